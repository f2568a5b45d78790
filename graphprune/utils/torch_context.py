"""Torch's own switches, held for a while: which kernels run, and what torch logs and warns."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.export._trace
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import transformer

from graphprune.errors import warn

# The switches are the process's, not the thread's.
_ONE_THREAD = threading.RLock()


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """Within it no other thread traces or has switches set: torch's tracer works for one at a time."""
    with _ONE_THREAD:
        yield


def fused_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules for which torch has a fused path, used in evaluation alone."""
    kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def warn_of_fused(model: nn.Module, artefact: str, difference: float) -> None:
    """Warn that a graph or file gives something else than the fused path of a module does."""
    name = fused_modules(model)[0].removeprefix("model.") or "the model"
    warn(
        f"{artefact} gives what {name} gives in training, with gradients, or with "
        "torch.backends.mha.set_fastpath_enabled(False); in evaluation without gradients torch takes a "
        f"fast path there whose outputs differ, by {difference:.3g} of the largest value: it sets padded "
        "positions to zero. What comes after should not read padded positions"
    )


def _is_causal_as_said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Answer in the place of torch's look at the values of a mask, which only saves time."""
    return is_causal is True


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Within it the transformers of torch.nn run their operators one by one, whatever a mask holds.

    Their fused path would hide a whole layer behind one operator; and whether a mask is causal asks for
    its values, which a tracer does not have, and then changes no result.
    """
    with _ONE_THREAD:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with patch.object(transformer, "_detect_is_causal_mask", _is_causal_as_said):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Within it, torch picks kernels by what they compute, not by device or shape.

    Nothing is compiled on the way. The choice of an attention kernel could differ between two runs
    whose operators are compared one by one.
    """
    with (
        plain_transformers(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        yield


@contextmanager
def silence_torch() -> Iterator[None]:
    """Keep torch's own logging and warnings from the user, and the graph it prints where it fails."""
    # a global of that module's own, which hides the builtin `print` from its code alone
    with _ONE_THREAD, patch.object(torch.export._trace, "print", _do_nothing, create=True):
        logger = logging.getLogger("torch")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Within it random numbers are the same each time; the user's own go on after it as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _ONE_THREAD, torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
