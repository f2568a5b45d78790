"""One function for many arguments: side by side where the model allows it, one by one where not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

# How many channels, or samples, are looked at at once.
CHUNK = 32


def for_each(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function gives for each row of its arguments, in rows.

    Python code that asks for a tensor's values, and operators without a batching rule, cannot run for
    many at once; they run for one after the other.
    """
    try:
        return vmap(function, chunk_size=CHUNK)(*arguments)
    except RuntimeError as error:
        # the words of vmap's own refusals; any other error is the function's
        if not any(word in str(error) for word in ("vmap", "Batching rule")):
            raise
    leaves, _ = pytree.tree_flatten(arguments)
    rows = len(next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
    row_results = []
    for row in range(rows):
        row_arguments = pytree.tree_map_only(torch.Tensor, partial(_row, row=row), arguments)
        row_results.append(function(*row_arguments))
    return pytree.tree_map(lambda *parts: torch.stack(parts), *row_results)


def _row(tensor: torch.Tensor, row: int) -> torch.Tensor:
    return tensor[row]
