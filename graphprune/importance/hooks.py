"""Hooks of the user's that look at gradients: not for the derivatives that criteria take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules


def without_backward_hooks(model: nn.Module) -> nn.Module:
    """Take the hooks that see gradients off a model's modules, in place, and return it.

    `torch.func` cannot differentiate through them. What they do is not part of what the model computes.
    """
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model


@contextmanager
def no_hooks_of_gradients() -> Iterator[None]:
    """Within it, hooks on saved tensors and those that see gradients in all modules are not called."""
    global_hooks: list[Any] = [
        of_all_modules._global_backward_hooks,
        of_all_modules._global_backward_pre_hooks,
    ]
    entries_before = [dict(hooks) for hooks in global_hooks]
    saved_tensor_hooks = list(_pop_saved_tensor_hooks())
    for hooks in global_hooks:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in zip(global_hooks, entries_before, strict=True):
            hooks.update(entries)
        # they are a stack: what was popped last is pushed first
        for pack, unpack in reversed(saved_tensor_hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _pop_saved_tensor_hooks() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Take the hooks on saved tensors off, the last first, and yield them."""
    # True: also while torch traces, when it would otherwise say that there are none
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        yield hooks
