"""Example inputs in one form: positional and keyword arguments of a model's forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.errors import InvalidRequestError


class Inputs:
    """Positional and keyword arguments for a model: `Inputs(ids, attention_mask=mask)`.

    Everywhere that example inputs are taken, a tensor stands for one positional argument, a tuple or
    list for several, and a dict for keyword arguments; `Inputs` says both at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Return `example_inputs` in this form.

        Raises:
            InvalidRequestError: it is neither a tensor, a tuple, a list, a dict nor `Inputs`.

        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls(example_inputs)
        if isinstance(example_inputs, Mapping):
            return cls(**{str(name): value for name, value in example_inputs.items()})
        if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
            return cls(*example_inputs)
        raise InvalidRequestError(
            "example_inputs must be a tensor, a tuple of positional arguments, a dict of keyword "
            f"arguments or graphprune.Inputs(...), not {type(example_inputs).__name__}"
        )

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """Return the same arguments with `function` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def repeat(self, times: int) -> Inputs:
        """Return the arguments with every tensor's first dimension repeated `times` times."""
        return self.map(lambda t: t.repeat(times, *[1] * (t.dim() - 1)) if t.dim() else t)

    def __repr__(self) -> str:
        described = self.map(lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}")
        words = [str(value) for value in described.args]
        words += [f"{name}={value}" for name, value in described.kwargs.items()]
        return f"Inputs({', '.join(words)})"


def output_tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output with a name for each, in order.

    Walks tuples, lists, mappings and dataclasses. Objects of other kinds (a key-value cache, say)
    are state, not results: their tensors are not promised to keep their shapes.
    """
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from output_tensors(value, f"{name}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for position, value in enumerate(output):
            yield from output_tensors(value, f"{name}[{position}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from output_tensors(getattr(output, field.name), f"{name}.{field.name}")


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return what the model gives for the inputs, without recording gradients."""
    with torch.no_grad():
        return model(*inputs.args, **inputs.kwargs)
