"""Times that were measured before, on disk: by what was run, on which runtime, version and machine."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import onnxruntime
import platformdirs

from graphprune.runtimes import Runtime, machine

FORMAT = "graphprune-latency"
VERSION = 1


class Cache:
    """Seconds by signature. What cannot be read or written is measured again: a cache is no result.

    Args:
        runtime: where the times were measured.
        folder: where the file is; by default in the user's cache, or where `GRAPHPRUNE_CACHE` says.

    """

    def __init__(self, runtime: Runtime, folder: Path | None = None) -> None:
        where = folder or Path(
            os.environ.get("GRAPHPRUNE_CACHE") or platformdirs.user_cache_dir("graphprune")
        )
        key = {
            "runtime": str(runtime),
            "threads": runtime.threads,
            "onnxruntime": onnxruntime.__version__,
            **machine(runtime),
        }
        self.about = {name: str(value) for name, value in key.items()}
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = where / f"latency-{name}.json"
        self.seconds = self._read()

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self.path.read_text())
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                return {}
            return {str(name): float(seconds) for name, seconds in content["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, seconds: dict[str, float]) -> None:
        """Keep more times, beside those that others have written meanwhile."""
        self.seconds = {**self._read(), **self.seconds, **seconds}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "about": self.about,
            "seconds": self.seconds,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            os.replace(beside, self.path)
        except OSError:
            return
