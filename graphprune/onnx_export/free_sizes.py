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


def resolve_requested_dims(names: Sequence[str], tensors: Sequence[Tensor], free: Free) -> Dims:
    """Return by input the names of the dimensions that were asked to be free.

    Raises:
        InvalidRequestError: there is no such input or dimension, or a name has several sizes.

    """
    for name, dims in free.items():
        if name not in names:
            raise InvalidRequestError(f"free= names {name!r}; the inputs are {', '.join(names)}")
        shape = tuple(tensors[names.index(name)].shape)
        absent = [d for d in dims if not 0 <= d < len(shape)]
        if absent:
            raise InvalidRequestError(
                f"free= names dimension {absent[0]} of {name!r}, which has shape {shape}"
            )
    # Dimensions of one name are one dimension: all must have the same size.
    sizes: dict[str, int] = {}
    requested = [dict(free.get(name, {})) for name in names]
    for name, tensor, dims in zip(names, tensors, requested, strict=True):
        for d, dim_name in dims.items():
            if sizes.setdefault(dim_name, tensor.shape[d]) != tensor.shape[d]:
                raise InvalidRequestError(
                    f"free= calls dimension {d} of {name!r} {dim_name!r}, which is {tensor.shape[d]} "
                    f"there and {sizes[dim_name]} elsewhere"
                )
    return requested


def batch_name(requested: Dims) -> str:
    """Return what the batch is called: the name asked for dimension 0 of the first that has one."""
    if any(BATCH in dims.values() for dims in requested):
        return BATCH
    return next((dims[0] for dims in requested if 0 in dims), BATCH)


def guess_batch_dims(requested: Dims, tensors: Sequence[Tensor]) -> Iterator[Dims]:
    """Yield what was asked for with the batch where it may be besides, the likeliest first.

    That is dimension 0 of every tensor that has the batch's size there. A state has it elsewhere, which
    an equal size does not tell: the number of layers may be the same, above all at batch 1.
    """
    batch = batch_name(requested)
    size = _size_of(batch, requested, tensors)
    candidates: list[list[int | None]] = []
    for position, (tensor, dims) in enumerate(zip(tensors, requested, strict=True)):
        equal_dims = [
            d for d, length in enumerate(tensor.shape) if length == size and d not in dims
        ]
        later_dims: list[int | None] = [d for d in equal_dims if d and position]
        # By input, where its batch may be, the likeliest first; None leaves the input without one.
        # With batch 2, a state behind the first input, [layers, batch, units], is [2, 2, 8] and gives
        # [0, 1, None].
        if batch in dims.values() or 0 in dims:
            candidates.append([None])
        else:
            candidates.append([0, *later_dims, None] if 0 in equal_dims else [None, *later_dims])
    for chosen in itertools.islice(itertools.product(*candidates), _GUESSES):
        yield [
            dims if d is None else {**dims, d: batch}
            for dims, d in zip(requested, chosen, strict=True)
        ]


def _size_of(name: str, requested: Dims, tensors: Sequence[Tensor]) -> int | None:
    """Return the size that has a name, or the first tensor's dimension 0."""
    for tensor, dims in zip(tensors, requested, strict=True):
        for d, dim_name in dims.items():
            if dim_name == name:
                return tensor.shape[d]
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)


def names_of(dims: Dims) -> tuple[str, ...]:
    """Return the names, each once."""
    return tuple(dict.fromkeys(name for names_by_dim in dims for name in names_by_dim.values()))


def drop_names(dims: Dims, batch: str) -> Iterator[Dims]:
    """Yield choices of fewer and fewer of the names, those with the batch first."""
    # The batch comes first, and so do the combinations that have it: (batch, a), (batch, b), (a, b), ...
    names = sorted(names_of(dims), key=lambda name: name != batch)
    choices = itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(len(names) - 1, 0, -1)
    )
    for kept_names in itertools.islice(choices, _FEWER):
        yield [
            {d: name for d, name in names_by_dim.items() if name in kept_names}
            for names_by_dim in dims
        ]
