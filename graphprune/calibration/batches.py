"""Batches of data to choose and to repair by: a few hundred samples, with labels or without.

In a process group each process runs its share of the batches, and sums over the data are sums over all
processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler

from graphprune.distributed.process_group import Ranks, join_call
from graphprune.errors import InvalidRequestError
from graphprune.utils.inputs import Inputs
from graphprune.utils.tensors import digest


@dataclass(frozen=True)
class Batch:
    """What a model is run on at once.

    Attributes:
        inputs: the model's arguments.
        target: what goes into the loss with the model's output; None where no labels were given.
        number: its place in the data that this process was given.

    """

    inputs: Inputs
    target: Any = None
    number: int = 0

    def __str__(self) -> str:
        return f"batch {self.number} of data"

    def tensors(self) -> list[Tensor]:
        """Return the tensors of inputs and target."""
        leaves = [*self.inputs.tensors(), *pytree.tree_leaves(self.target)]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with another tensor for each."""
        target = pytree.tree_map_only(Tensor, function, self.target)
        return Batch(self.inputs.map(function), target, self.number)

    @property
    def size(self) -> int:
        """How many samples it holds."""
        leaves = pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))
        return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


@dataclass(frozen=True)
class OwnShare:
    """Batches for this process of a group alone, where the others pass batches of their own.

    Pass it as `data=`. Without it every process passes the same data, of which each takes its share. A
    DataLoader with a `DistributedSampler` needs no such mark.

    Attributes:
        data: batches, as everywhere; there may be none.

    """

    data: Any


@dataclass(frozen=True)
class Share:
    """The batches that this process runs, of all that there are.

    A process whose share is empty runs a batch of another one, so that it learns what shapes there are;
    what it finds counts for nothing.

    Attributes:
        batches: of this process, one at least.
        places: of these among all.
        sizes: by place, how many samples each batch holds, of all processes.
        stands_in: the one batch is another process's.
        ranks: the processes.

    """

    batches: tuple[Batch, ...]
    places: tuple[int, ...]
    sizes: dict[int, int]
    stands_in: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this process."""
        return iter(self.batches)

    def __getitem__(self, number: int) -> Batch:
        """Return a batch of this process."""
        return self.batches[number]

    @property
    def count(self) -> int:
        """How many batches there are in all processes."""
        return len(self.sizes)

    def total(self, local_sums: Any) -> Any:
        """Return the sums over all processes of what was found on these batches.

        Args:
            local_sums: numbers, tensors and arrays, of the same shapes everywhere, in any containers.

        Returns:
            The same containers of float64 tensors.

        """
        leaves, structure = pytree.tree_flatten(local_sums)
        tensors = [torch.as_tensor(leaf) for leaf in leaves]
        if self.stands_in:
            tensors = [torch.zeros_like(tensor) for tensor in tensors]
        return pytree.tree_unflatten(self.ranks.total(tensors), structure)

    def mean(self, local_sums: Any) -> Any:
        """Return the means over the batches of all processes of what was summed on these ones."""
        return pytree.tree_map(lambda total: total / self.count, self.total(local_sums))

    @property
    def are_alike(self) -> bool:
        """Whether all batches, of all processes, hold as many samples."""
        return len(set(self.sizes.values())) == 1

    def weighted_batches(self, *, by_samples: bool) -> Iterator[tuple[Batch, float]]:
        """Yield the batches of this process, each with its part of a mean over all batches.

        Args:
            by_samples: a batch counts by how many samples it holds; otherwise all count alike.

        """
        total_weight = sum(self.sizes.values()) if by_samples else self.count
        for index, batch in zip(self.places, self.batches, strict=True):
            yield batch, (self.sizes[index] if by_samples else 1) / total_weight

    def part(self, places: Iterable[int]) -> Share:
        """Return the share of some of the batches, by their places among all."""
        chosen = set(places)
        sizes = {index: size for index, size in self.sizes.items() if index in chosen}
        positions = [i for i, index in enumerate(self.places) if index in chosen]
        # A process that has none of them stands in with whatever batch it holds, which counts for nothing.
        if self.stands_in or not positions:
            return replace(
                self, batches=self.batches[:1], places=(min(chosen),), sizes=sizes, stands_in=True
            )
        batches, part_places = (
            [self.batches[i] for i in positions],
            [self.places[i] for i in positions],
        )
        return replace(self, batches=tuple(batches), places=tuple(part_places), sizes=sizes)


def batches_of(data: Any) -> Share:
    """Return this process's share of what users pass as `data=`.

    Args:
        data: batches in a list, a DataLoader or any other iterable. A batch is the model's input (a
            tensor, a dict of keyword arguments or `graphprune.Inputs`) or a pair of it and a target.
            In a process group batch i is for process i modulo their number, unless the data are an
            `OwnShare` or a loader with a DistributedSampler.

    Raises:
        InvalidRequestError: there are no batches, or one is none of these.
        DistributedError: the processes were given different data.

    """
    with join_call() as ranks:
        is_own = isinstance(data, OwnShare) or _is_shared_out(data)
        source = data.data if isinstance(data, OwnShare) else data
        if ranks.size == 1:
            batches = dict(enumerate(each_batch(source)))
            return Share(tuple(batches.values()), tuple(batches), _sizes(batches))
        return _own(source, ranks) if is_own else _deal(source, ranks)


def _deal(data: Any, ranks: Ranks) -> Share:
    """Return the share of a process where all are given the same batches."""
    local_batches: dict[int, Batch] = {}
    sizes: dict[int, int] = {}
    first_batch: Batch | None = None
    for index, batch in enumerate(each_batch(data)):
        first_batch = first_batch or batch
        sizes[index] = batch.size  # of all batches, though only every size-th one is kept
        if index % ranks.size == ranks.rank:
            local_batches[index] = batch
    assert first_batch is not None
    ranks.agree(
        "came with another first batch of data, or another number of batches,",
        _digest(first_batch, len(sizes)),
    )
    return _share(local_batches, sizes, first_batch, ranks)


def _own(data: Any, ranks: Ranks) -> Share:
    """Return the share of a process where each is given its own."""
    batches = enumerate(_each_batch(data))
    # Of 2 processes, rank 0 has indices 0, 2, 4 and rank 1 has 1, 3, 5, as if they had been dealt.
    local_batches = {number * ranks.size + ranks.rank: batch for number, batch in batches}
    sizes_by_rank = ranks.gather(_sizes(local_batches))
    all_sizes = {index: size for rank_sizes in sizes_by_rank for index, size in rank_sizes.items()}
    if not all_sizes:
        raise InvalidRequestError("data holds no batch in any process; pass at least one to one")
    if all(sizes_by_rank):
        return _share(local_batches, all_sizes, None, ranks)
    giver = next(rank for rank, batch_sizes in enumerate(sizes_by_rank) if batch_sizes)
    # Some process is without a batch: one that has some sends its first, by way of the CPU, to all.
    sent_batch = None
    if giver == ranks.rank:
        first_batch = local_batches[min(local_batches)]
        sent_batch = first_batch.map(Tensor.cpu), first_batch.tensors()[0].device.type
    batch, device_type = ranks.gather(sent_batch)[giver]
    return _share(local_batches, all_sizes, batch.map(lambda tensor: tensor.to(device_type)), ranks)


def _share(
    local_batches: Mapping[int, Batch], sizes: dict[int, int], stand_in: Batch | None, ranks: Ranks
) -> Share:
    if not local_batches:
        assert stand_in is not None
        return Share((stand_in,), (min(sizes),), sizes, True, ranks)
    return Share(tuple(local_batches.values()), tuple(local_batches), sizes, False, ranks)


def _sizes(batches: Mapping[int, Batch]) -> dict[int, int]:
    return {index: batch.size for index, batch in batches.items()}


def _is_shared_out(data: Any) -> bool:
    """Say whether a loader gives each process other samples by itself."""
    if not isinstance(data, DataLoader):
        return False
    return any(
        isinstance(sampler, DistributedSampler)
        for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None))
    )


def _digest(batch: Batch, count: int) -> str:
    hasher = hashlib.sha256(str(count).encode())
    for tensor in batch.tensors():
        digest(hasher, "", tensor)
    return hasher.hexdigest()


def each_batch(data: Any) -> Iterator[Batch]:
    """Yield the batches of `batches_of`, each when it is asked for."""
    batch = None
    for batch in _each_batch(data):
        yield batch
    if batch is None:
        raise InvalidRequestError("data holds no batch; pass at least one, as in data=[images]")


def _each_batch(data: Any) -> Iterator[Batch]:
    if isinstance(data, (Tensor, Mapping, Inputs, str)) or not isinstance(data, Iterable):
        raise InvalidRequestError(
            f"data must be several batches, as in [batch] or a DataLoader, not {type(data).__name__}"
        )
    for number, entry in enumerate(data):
        yield _batch(number, entry)


def _batch(number: int, entry: Any) -> Batch:
    parts = list(entry) if isinstance(entry, (tuple, list)) else [entry]
    inputs, *target = parts or [None]
    if not isinstance(inputs, (Tensor, Mapping, Inputs, tuple, list)) or len(target) > 1:
        raise InvalidRequestError(
            f"batch {number} of data must be the model's input (a tensor, a dict or graphprune.Inputs) or "
            f"a pair of it and a target, not {_describe(entry)}; several inputs are "
            "graphprune.Inputs(a, b), with a target (graphprune.Inputs(a, b), target)"
        )
    batch = Batch(Inputs.of(inputs), target[0] if target else None, number)
    if batch.size == 0:
        raise InvalidRequestError(
            f"{batch} holds no samples, {batch.inputs}; leave it out (drop_last=True of a DataLoader)"
        )
    return batch


def _describe(value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    kinds = ", ".join(type(part).__name__ for part in value)
    return f"{type(value).__name__} of {len(value)} ({kinds})"


def refuse_unless_finite(batch: Batch, value: Tensor, where: str) -> None:
    """See that what a batch makes of a model is finite.

    Raises:
        InvalidRequestError: it is not.

    """
    if not bool(value.isfinite().all()):
        kind = "NaN" if bool(value.isnan().any()) else "numbers that are infinite"
        raise InvalidRequestError(
            f"{batch} gives {kind} {where}, so all that is summed over the data would be none; "
            f"look at it, or leave it out{_suspicion(batch)}"
        )


def _suspicion(batch: Batch) -> str:
    """Say what is odd about a batch's own numbers."""
    numbers = [t.detach() for t in batch.tensors() if t.is_floating_point() and t.numel()]
    if any(bool(tensor.isnan().any()) for tensor in numbers):
        return " (it holds NaN)"
    largest = max((float(tensor.abs().max()) for tensor in numbers), default=0.0)
    return f" (its largest number is {largest:.3g})"
