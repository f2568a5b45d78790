"""Which sizes of a model's inputs an exported file leaves free: those asked for, and the batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from graphprune.errors import InvalidRequestError

BATCH = "batch"

_GUESSES = 16  # at which dimension of each input the batch may be; each is one run of the model
_FEWER = 8  # choices of fewer names than asked for that are tried; each is an export at most

Free: TypeAlias = Mapping[str, Mapping[int, str]]
"""By the name of an input, names for some of its dimensions."""

Dims: TypeAlias = list[dict[int, str]]
"""By input, the names of its free dimensions."""


def dims_asked(names: Sequence[str], tensors: Sequence[Tensor], free: Free) -> Dims:
    """Return by input the names of the dimensions that were asked to be free.

    Raises:
        InvalidRequestError: there is no such input or dimension, or a name has several sizes.

    """
    for name, dims in free.items():
        if name not in names:
            raise InvalidRequestError(f"free= names {name!r}; the inputs are {', '.join(names)}")
        shape = tuple(tensors[names.index(name)].shape)
        strange = [d for d in dims if not 0 <= d < len(shape)]
        if strange:
            raise InvalidRequestError(
                f"free= names dimension {strange[0]} of {name!r}, which has shape {shape}"
            )
    sizes: dict[str, int] = {}
    asked = [dict(free.get(name, {})) for name in names]
    for name, tensor, dims in zip(names, tensors, asked, strict=True):
        for d, what in dims.items():
            if sizes.setdefault(what, tensor.shape[d]) != tensor.shape[d]:
                raise InvalidRequestError(
                    f"free= calls dimension {d} of {name!r} {what!r}, which is {tensor.shape[d]} there and "
                    f"{sizes[what]} elsewhere"
                )
    return asked


def batch_name(asked: Dims) -> str:
    """Return what the batch is called: the name asked for dimension 0 of the first that has one."""
    if any(BATCH in dims.values() for dims in asked):
        return BATCH
    return next((dims[0] for dims in asked if 0 in dims), BATCH)


def with_batch(asked: Dims, tensors: Sequence[Tensor]) -> Iterator[Dims]:
    """Yield what was asked for with the batch where it may be besides, the likeliest first.

    That is dimension 0 of every tensor that has the batch's size there. A state has it elsewhere, which
    an equal size does not tell: the number of layers may be the same, above all at batch 1.
    """
    batch = batch_name(asked)
    size = _size_of(batch, asked, tensors)
    places: list[list[int | None]] = []
    for number, (tensor, dims) in enumerate(zip(tensors, asked, strict=True)):
        equal = [d for d, n in enumerate(tensor.shape) if n == size and d not in dims]
        others: list[int | None] = [d for d in equal if d and number]
        if batch in dims.values() or 0 in dims:
            places.append([None])
        else:
            places.append([0, *others, None] if 0 in equal else [None, *others])
    for picks in itertools.islice(itertools.product(*places), _GUESSES):
        yield [
            dims if d is None else {**dims, d: batch} for dims, d in zip(asked, picks, strict=True)
        ]


def _size_of(name: str, asked: Dims, tensors: Sequence[Tensor]) -> int | None:
    """Return the size that has a name, or the first tensor's dimension 0."""
    for tensor, dims in zip(tensors, asked, strict=True):
        for d, what in dims.items():
            if what == name:
                return tensor.shape[d]
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)


def names_of(dims: Dims) -> tuple[str, ...]:
    """Return the names, each once."""
    return tuple(dict.fromkeys(name for each in dims for name in each.values()))


def with_fewer_names(dims: Dims, batch: str) -> Iterator[Dims]:
    """Yield choices of fewer and fewer of the names, those with the batch first."""
    names = sorted(names_of(dims), key=lambda name: name != batch)
    fewer = itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(len(names) - 1, 0, -1)
    )
    for kept in itertools.islice(fewer, _FEWER):
        yield [{d: name for d, name in each.items() if name in kept} for each in dims]
