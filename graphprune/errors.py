"""What graphprune raises and warns with: one root, and a kind for each thing a caller may handle."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Sequence
from types import FrameType


class GraphPruneError(Exception):
    """Root of every error that graphprune raises on purpose."""


class InvalidRequestError(GraphPruneError, ValueError):
    """An argument is outside what the call accepts: a ratio, a name, a pattern, an input."""


class CaptureError(GraphPruneError):
    """A model could not be run or traced on its example inputs."""


class PlanError(GraphPruneError, LookupError):
    """A plan names groups or slots that the model does not have."""


class VerificationError(GraphPruneError):
    """The slim model does not compute what the original computes with the removed slots silenced."""


class OtherOperatorsError(VerificationError):
    """On data, the model ran other operators than without."""


class ExportError(GraphPruneError):
    """A model could not be exported to ONNX, or the ONNX model disagrees with PyTorch."""


class DistributedError(GraphPruneError):
    """A process of a group failed, is gone, or did something else than the others."""


class GraphPruneWarning(UserWarning):
    """Something was done differently from what a reader of the call would expect."""


def warn(text: str) -> None:
    """Warn at the line that called the library: the innermost that is not its own, nor torch's."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _root(frame) in ("graphprune", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, GraphPruneWarning, stacklevel=level)


def _root(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def in_a_line(error: BaseException) -> str:
    """Return the kind of the error that began it, and the first line of what it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 300)}"
