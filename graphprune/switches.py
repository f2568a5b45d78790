"""Torch's own switches, held for a while: which kernels run, and what torch logs and warns."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# The switches are the process's, not the thread's.
_ONE_THREAD = threading.RLock()


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it, torch picks kernels by what they compute, not by device or shape.

    Nothing is compiled on the way. The fused encoder path would hide a whole transformer layer
    behind one operator, and the choice of an attention kernel could differ between two runs whose
    operators are compared one by one.
    """
    with _ONE_THREAD:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                torch.compiler.set_stance("force_eager"),
                sdpa_kernel(SDPBackend.MATH),
                torch.no_grad(),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep torch's own logging and warnings from the user."""
    with _ONE_THREAD:
        logger = logging.getLogger("torch")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)


@contextmanager
def same_chance() -> Iterator[None]:
    """Within it random numbers are the same each time; the user's own go on after it as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _ONE_THREAD, torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
