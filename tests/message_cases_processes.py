"""What is said of several processes, and of models wrapped for them; see message_cases.py."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

import graphprune as gp
from graphprune.calibration.batches import _own
from graphprune.distributed.process_group import Ranks
from tests.message_cases import X, case, net


@contextmanager
def group_of_one() -> Iterator[None]:
    """Have a process group without other processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Two(Ranks):
    """Rank 0 of two, where the other gives nothing."""

    def gather(self, contribution: object) -> list[object]:
        return [contribution, type(contribution)()]


def waiting(seconds: float) -> Ranks:
    """Return rank 0 of two, of which the other has not come yet."""
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=seconds))
    return Ranks(0, 2, store, call=1, step=3)


NEVER = SimpleNamespace(is_completed=lambda: False)


@case(
    "rank 1 arrived at another plan than rank 0: every process must call this with the same model, "
    "arguments and versions, and with data in the same order or, as graphprune.OwnShare, with a share of "
    "its own"
)
def processes_that_differ(folder: Path) -> None:
    Two(0, 2).agree("arrived at another plan", "a")


@case("data holds no batch in any process; pass at least one to one")
def no_data_anywhere(folder: Path) -> None:
    _own([], Two(0, 2))


@case(
    r"rank 1 did not come within 0\.45 s to where rank 0 waits: it died, or it does not make this call; "
    "every process of the group has to"
)
def a_process_that_does_not_come(folder: Path) -> None:
    waiting(0.5)._wait(NEVER)


@case("rank 1 failed: ValueError: no label")
def a_process_that_failed(folder: Path) -> None:
    ranks = waiting(10)
    Ranks(1, 2, ranks.store, call=1).fail(ValueError("no label"))
    ranks._wait(NEVER)


@case(
    "first is wrapped in FullyShardedDataParallel, whose parameters have no names of their own; use "
    r"torch\.distributed\.fsdp\.fully_shard, or pass the model without it"
)
def slimming_flat_parameters(folder: Path) -> None:
    model = nn.Sequential()
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    model.add_module("first", wrapped)
    gp.slim(model, 0.5, X)


@case(
    r"0\.weight is split over processes by something else than fully_shard; pass the model before it was "
    "parallelised"
)
def slimming_tensor_parallel_models(folder: Path) -> None:
    model = net()
    with group_of_one():
        split = distribute_tensor(model[0].weight, init_device_mesh("cpu", (1,)))
        model[0].weight = nn.Parameter(split)
        gp.slim(model, 0.5, X)


@case(
    "Sequential is neither in DistributedDataParallel nor sharded by fully_shard, so there is nothing to "
    "wrap alike"
)
def wrapping_like_a_plain_model(folder: Path) -> None:
    gp.wrapped_like(net(), net())


@case(
    "the slim model has no module '0' to shard as the original's is; slim it with form='module', or call "
    "fully_shard yourself"
)
def wrapping_another_model(folder: Path) -> None:
    model = net()
    with group_of_one():
        fully_shard(model[0])
        gp.wrapped_like(nn.Linear(6, 3), model)
