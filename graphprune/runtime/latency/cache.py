"""Times that were measured before, on disk: by what was run, on which runtime, version and machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import platformdirs

from graphprune.onnx_export.providers import Runtime, describe_machine
from graphprune.utils import json_files
from graphprune.utils.atomic_files import try_lock, write_text

FORMAT = "graphprune-latency"
VERSION = 1

_WAIT = 10.0  # seconds, for another process that writes


class LatencyCache:
    """Seconds by signature. What cannot be read or written is measured again: a cache is no result.

    Args:
        runtime: where the times were measured.
        folder: where the file is; by default in the user's cache, or where `GRAPHPRUNE_CACHE` says.

    """

    def __init__(self, runtime: Runtime, folder: Path | None = None) -> None:
        folder_name = os.environ.get("GRAPHPRUNE_CACHE")
        cache_folder = (
            folder or Path(folder_name or platformdirs.user_cache_dir("graphprune")).expanduser()
        )
        key = {
            "runtime": str(runtime),
            "threads": runtime.threads,
            "onnxruntime": onnxruntime.__version__,
            **describe_machine(runtime),
        }
        self.about = {name: str(value) for name, value in key.items()}
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder / f"latency-{name}.json"
        self.seconds = self._read()

    def _read(self) -> dict[str, float]:
        try:
            content = json_files.require_format(
                json_files.read(self.path, finite=False), FORMAT, VERSION
            )
            seconds = json_files.require_object(content.get("seconds"), "what it says of seconds")
        except (OSError, ValueError):
            return {}
        return {name: float(value) for name, value in seconds.items() if _is_time(value)}

    def add(self, seconds: dict[str, float]) -> None:
        """Keep more times, beside those that others have written meanwhile."""
        self._write(seconds, ())

    def forget(self, signatures: Iterable[str]) -> None:
        """Keep these times no longer, so that they are measured again."""
        self._write({}, signatures)

    def _write(self, more: Mapping[str, float], fewer: Iterable[str]) -> None:
        forgotten = set(fewer)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with try_lock(self.path.with_suffix(".lock"), wait=_WAIT):
                # Read again under the lock: another process may have written since.
                merged = {**self._read(), **more}
                self.seconds = {name: merged[name] for name in merged if name not in forgotten}
                content = {
                    "format": FORMAT, "version": VERSION, "about": self.about, "seconds": self.seconds,
                }  # fmt: skip
                write_text(self.path, json.dumps(content))
        except OSError:
            self.seconds = {
                name: value
                for name, value in {**self.seconds, **more}.items()
                if name not in forgotten
            }


def _is_time(value: Any) -> bool:
    """Say whether this can have been measured: a finite number of seconds, above 0."""
    return type(value) in (int, float) and 0 < value < math.inf
