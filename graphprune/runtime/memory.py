"""The memory that ONNX Runtime takes for a file, seen from outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from graphprune.onnx_export.export import Feed

# Without graphprune or torch, whose own memory would be in the way.
_CHILD = """
import sys
import numpy, onnxruntime
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
feed = dict(numpy.load(sys.argv[2]))
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(int(sys.argv[4])):
    session.run(None, feed)
print(peak() - before)
"""


def peak_memory(path: Path, feed: Feed, threads: int = 1, runs: int = 3) -> int | None:
    """Return the bytes by which a process grows at most while it loads and runs a file on the CPU.

    None where the process fails, as on other systems than Linux, which do not tell. With no runs, what
    loading takes: the weights, without what is computed from them.
    """
    with tempfile.TemporaryDirectory() as folder:
        feed_file = Path(folder) / "feed.npz"
        np.savez(feed_file, **feed)  # type: ignore[arg-type]
        completed = subprocess.run(
            [sys.executable, "-c", _CHILD, str(path), str(feed_file), str(threads), str(runs)],
            capture_output=True,
            text=True,
            check=False,
        )
    # Linux counts in kilobytes.
    return int(completed.stdout) * 1024 if completed.returncode == 0 else None
