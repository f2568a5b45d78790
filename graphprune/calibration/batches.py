"""Batches of data to choose and to repair by: a few hundred samples, with labels or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphprune.errors import InvalidRequestError
from graphprune.inputs import Inputs


@dataclass(frozen=True)
class Batch:
    """What a model is run on at once.

    Attributes:
        inputs: the model's arguments.
        target: what goes into the loss with the model's output; None where no labels were given.

    """

    inputs: Inputs
    target: Any = None


def batches_of(data: Any) -> list[Batch]:
    """Return batches from what users pass as `data=`.

    Args:
        data: batches in a list, a DataLoader or any other iterable. A batch is the model's input (a
            tensor, a dict of keyword arguments or `graphprune.Inputs`) or a pair of it and a target.

    Raises:
        InvalidRequestError: there are no batches, or one is none of these.

    """
    return list(each_batch(data))


def each_batch(data: Any) -> Iterator[Batch]:
    """Yield the batches of `batches_of`, each when it is asked for."""
    if isinstance(data, (Tensor, Mapping, Inputs, str)) or not isinstance(data, Iterable):
        raise InvalidRequestError(
            f"data must be several batches, as in [batch] or a DataLoader, not {type(data).__name__}"
        )
    number = -1
    for number, given in enumerate(data):
        yield _batch(number, given)
    if number < 0:
        raise InvalidRequestError("data holds no batch; pass at least one, as in data=[images]")


def _batch(number: int, given: Any) -> Batch:
    if isinstance(given, (Tensor, Mapping, Inputs)):
        return Batch(Inputs.of(given))
    if isinstance(given, (tuple, list)) and 1 <= len(given) <= 2:
        return Batch(Inputs.of(given[0]), *given[1:])
    raise InvalidRequestError(
        f"batch {number} of data must be the model's input (a tensor, a dict or graphprune.Inputs) or a "
        f"pair of it and a target, not {_described(given)}"
    )


def _described(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
