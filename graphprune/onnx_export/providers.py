"""Where ONNX Runtime runs a file: the provider, the precision of its arithmetic and the threads."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime as ort
import torch

from graphprune.errors import InvalidRequestError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

Precision = Literal["float32", "tf32", "float16"]

_SUFFIX = "ExecutionProvider"

# Providers that are timed where ONNX Runtime has them, in this order, each with its precisions.
_TIMED: Mapping[str, tuple[Precision, ...]] = {
    CPU: ("float32",),
    CUDA: ("float32", "tf32", "float16"),
    TENSORRT: ("float32", "float16"),
    "OpenVINOExecutionProvider": ("float32",),
    "DmlExecutionProvider": ("float32", "float16"),
}


@dataclass(frozen=True)
class Runtime:
    """A provider of ONNX Runtime and how it computes; prints as `Runtime.of` reads it: "cuda-tf32".

    Attributes:
        provider: ONNX Runtime's own name of it.
        precision: "float32"; "tf32", with CUDA's rounded products; "float16", on a converted file.
        threads: threads inside an operator, on the CPU.

    """

    provider: str = CPU
    precision: Precision = "float32"
    threads: int = 1

    @classmethod
    def of(cls, name: str, threads: int = 1) -> Runtime:
        """Return the runtime of a name such as "cpu", "cuda", "cuda-tf32" or "cuda-float16".

        Raises:
            InvalidRequestError: ONNX Runtime has no such provider here, or the provider no such precision.

        """
        short, _, precision = name.partition("-")
        providers = {_shorten(provider): provider for provider in ort.get_available_providers()}
        provider = providers.get(_shorten(short))
        if provider is None:
            raise InvalidRequestError(
                f"ONNX Runtime has no provider {short!r} here; it has {', '.join(sorted(providers))}"
            )
        precisions = _TIMED.get(provider, ("float32",))
        if precision and precision not in precisions:
            raise InvalidRequestError(
                f"{name!r} asks for {precision}; {short} is timed in {', '.join(precisions)}"
            )
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise InvalidRequestError(f"threads={threads!r} must be a whole number from 1")
        return cls(provider, precision or "float32", threads)

    def __str__(self) -> str:
        short = _shorten(self.provider)
        return short if self.precision == "float32" else f"{short}-{self.precision}"

    @property
    def is_one_thread(self) -> bool:
        """Whether the calling thread does all the work."""
        return self.provider == CPU and self.threads == 1

    @property
    def device(self) -> str:
        """Where inputs and outputs are kept while a model is timed, as ONNX Runtime calls it."""
        return "cuda" if self.provider == CUDA else "cpu"


DEFAULT = Runtime()


def _shorten(provider: str) -> str:
    return provider.removesuffix(_SUFFIX).lower()


def default_runtimes(threads: int = 1) -> list[Runtime]:
    """Return what is timed unless something else is asked for: the CPU, and accelerators that are here."""
    available = set(ort.get_available_providers())
    if importlib.util.find_spec("tensorrt") is None:  # whose provider is listed all the same
        available.discard(TENSORRT)
    return [
        Runtime(provider, precision, threads)
        for provider, precisions in _TIMED.items()
        if provider in available
        for precision in precisions
    ]


def open_session(path: Path, runtime: Runtime = DEFAULT, **settings: Any) -> ort.InferenceSession:
    """Return a session of a file at full optimisation.

    Args:
        path: an ONNX file; for "float16" one that was converted.
        runtime: where it runs.
        settings: attributes of onnxruntime.SessionOptions to set.

    Raises:
        InvalidRequestError: ONNX Runtime cannot start the provider here.

    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = runtime.threads
    # Waiting threads would spin, and take cores from the models that are timed in turn with this.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, so it need not be printed
    for name, value in settings.items():
        setattr(options, name, value)
    provider_options = (
        {"use_tf32": str(int(runtime.precision == "tf32"))} if runtime.provider == CUDA else {}
    )
    session = ort.InferenceSession(
        str(path), options, providers=[(runtime.provider, provider_options)]
    )
    # Where a provider does not start, ONNX Runtime runs on the CPU and raises nothing.
    if session.get_providers()[0] != runtime.provider:
        raise InvalidRequestError(f"ONNX Runtime cannot start {runtime.provider!r} here")
    return session


def convert_precision(path: Path, precision: Precision) -> Path:
    """Return the file, or for "float16" one beside it whose weights and arithmetic are float16.

    Inputs and outputs keep their types. The file beside it is made once.
    """
    if precision != "float16":
        return path
    search_path = list(sys.path)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    sys.path[:] = search_path  # to which that import adds a folder of modules with common names
    converted = path.with_name(f"{path.stem}-float16.onnx")
    if not converted.exists() or converted.stat().st_mtime < path.stat().st_mtime:
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), converted)
    return converted


def describe_machine(*runtimes: Runtime) -> dict[str, str]:
    """Return what was measured on; the GPU too where one was, if PyTorch knows its name."""
    description = {
        "cpu": _cpu_name(),
        "cores": f"{os.cpu_count()} cores",
        "system": platform.system(),
    }
    if torch.cuda.is_available() and any(runtime.device != "cpu" for runtime in runtimes):
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _cpu_name() -> str:
    """Return the processor's name, from Linux's own list where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
