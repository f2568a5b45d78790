"""What one process of a group does in tests of several processes; run as `python -m tests.ranks`."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import graphprune as gp

TASKS: dict[str, Callable[[], Any]] = {}
CRITERIA = (
    "taylor", "taylor2", "taylor2_recursion", "fisher", "obs", "oracle", "reconstruction", "interpolative",
)  # fmt: skip


def task(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register what a process can be asked to do; it returns what the test looks at."""
    TASKS[function.__name__] = function
    return function


class Net(nn.Module):
    """Convolutions with batch norms and a residual, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)
        hidden: Tensor = self.head(torch.sigmoid(self.hidden(x.mean((2, 3)))))
        return hidden


def net() -> Net:
    """Return the same network in every process, in evaluation mode, its norms not as they begin."""
    torch.manual_seed(0)
    model = Net()
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8))
    return model.eval()


class Tagger(nn.Module):
    """A recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        tags: Tensor = self.head(self.gru(x)[0])
        return tags


def batches(count: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 6 to 8 images."""
    chance = torch.Generator().manual_seed(1)
    sizes = [8 - i % 3 for i in range(count)]
    return [
        (torch.randn(n, 3, 8, 8, generator=chance), torch.randint(4, (n,), generator=chance))
        for n in sizes
    ]


def scored_and_repaired() -> Any:
    """Score by every criterion, scan, repair, and connect sparsely."""
    model, data = net(), batches()
    found: dict[str, Any] = {"scores": {}, "plans": {}}
    for criterion in CRITERIA:
        result = gp.slimmed(
            model, 0.4, of="macs", importance=criterion, align=1, data=data, loss=F.cross_entropy
        )
        found["scores"][criterion] = result.scores
        found["plans"][criterion] = result.plan.to_json()
    scan = gp.sensitivity(model, data, F.cross_entropy, ratios=(0.25, 0.5))
    found["scores"]["sensitivity"] = {name: torch.tensor(x) for name, x in scan.losses.items()}
    repaired = gp.slim(model, 0.5, align=1, data=data, compensate=True)
    found["repaired"] = repaired.state_dict()
    torch.manual_seed(0)
    tagger, chance = Tagger(), torch.Generator().manual_seed(2)
    words = [torch.randn(5, 7, 6, generator=chance) for _ in range(5)]
    found["tagger"] = gp.slim(
        tagger, 0.4, words[0], align=1, data=words, compensate=True
    ).state_dict()
    wide = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    images = [(torch.randn(2, 32, 6, 6, generator=chance), None) for _ in range(3)]
    sparse = gp.connect_sparsely(
        wide, 0.25, images[0][0], pattern="taylor", data=images, loss=lambda y, _: y.square().mean()
    )
    found["sparse"] = {name: x != 0 for name, x in sparse.state_dict().items()}
    return found


def _scored(data: Any) -> Any:
    result = gp.slimmed(net(), 0.5, importance="taylor", align=1, data=data, loss=F.cross_entropy)
    return {"scores": result.scores, "plan": result.plan.to_json()}


def fewer_batches_than_processes() -> Any:
    """Score and repair on two batches."""
    data = batches(2)
    repaired = gp.slim(net(), 0.5, align=1, data=data, compensate=True)
    aside = gp.slimmed(net(), 0.5, importance="reconstruction", align=1, data=data)
    return {**_scored(data), "repaired": repaired.state_dict(), "aside": aside.scores}


def own_shares() -> Any:
    """Score on data of which each process has other batches, the last none; or by a sampler."""
    rank, size = _where()
    mine = [batch for i, batch in enumerate(batches()) if i % max(size - 1, 1) == rank]
    images, labels = (torch.cat(each) for each in zip(*batches(), strict=True))
    dataset = TensorDataset(images[:48], labels[:48])
    sampler: Any = DistributedSampler(dataset, size, rank, shuffle=False) if size > 1 else None
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    return {"own": _scored(gp.OwnShare(mine)), "sampled": _scored(loader)}


def _where() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrapped() -> Any:
    """Slim models in DistributedDataParallel and under fully_shard, and wrap the results alike."""
    plain = gp.slim(net(), 0.5, align=1, data=batches(), compensate=True)
    x = batches(1)[0][0]
    found: dict[str, Any] = {"plain": plain.state_dict(), "output": plain(x).detach()}
    if _where()[1] == 1:
        return found
    inside = DistributedDataParallel(net())
    slim = gp.slim(inside, 0.5, align=1, data=batches(), compensate=True)
    again = gp.wrapped_like(slim, inside)
    assert isinstance(again, DistributedDataParallel)
    found["ddp"], found["ddp_output"] = slim.state_dict(), again.eval()(x).detach()
    found["same_macs"] = gp.count_macs(inside, x) == gp.count_macs(net(), x)
    sharded = net()
    for part in (sharded.first, sharded.second):
        fully_shard(part)
    fully_shard(sharded)
    before = {name: tensor.full_tensor() for name, tensor in sharded.named_parameters()}
    names = list(gp.analyze(sharded).by_name)
    with tempfile.TemporaryDirectory() as folder:
        exported = gp.export(sharded, x, Path(folder) / "net.onnx")
        found["exported"] = exported.path.exists()  # and agreed with PyTorch
    slim = gp.slim(sharded, 0.5, align=1, data=batches(), compensate=True)
    found["fsdp"] = {name: x.clone() for name, x in slim.state_dict().items()}
    found["same_groups"] = names == list(gp.analyze(net()).by_name)
    found["class"] = type(slim).__name__, type(slim.first).__name__, len(slim._forward_pre_hooks)
    again = gp.wrapped_like(slim, sharded)
    found["fsdp_output"] = again(x).detach()
    found["sharded"] = all(hasattr(p, "full_tensor") for p in again.first.parameters())
    found["untouched"] = type(sharded).__name__ == "FSDPNet" and all(
        torch.equal(before[name], tensor.full_tensor())
        for name, tensor in sharded.named_parameters()
    )
    again.train()
    again(x).square().mean().backward()  # it trains
    return found


@task
def everything() -> Any:
    """Do all that several processes should do as one does."""
    parts = (scored_and_repaired, fewer_batches_than_processes, own_shares, wrapped)
    return {part.__name__: part() for part in parts}


def _failing(what: Callable[[], Any]) -> Any:
    """Score while one process comes to something else; return what this one is told, and when."""
    began = time.monotonic()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if _where()[0] == 1 and not torch.is_grad_enabled():
            what()
        return F.cross_entropy(output, target)

    try:
        gp.slimmed(net(), 0.5, importance="oracle", data=batches(), loss=loss)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", 0.0


@task
def one_is_killed() -> Any:
    """Rank 1 is killed in the middle of scoring."""
    return _failing(lambda: os.kill(os.getpid(), signal.SIGKILL))


@task
def one_raises() -> Any:
    """Rank 1 raises in the middle of scoring."""

    def fail() -> None:
        raise ValueError("the label of sample 17 is missing")

    return _failing(fail)


@task
def one_does_not_call() -> Any:
    """Rank 1 does not make the call."""
    if _where()[0] == 1:
        time.sleep(11)
    return _failing(lambda: None)


@task
def others_differ() -> Any:
    """Each process is given other data without saying so, then another model; return what they are told."""
    model = net()
    with torch.no_grad():
        model.hidden.weight[:8] *= 1 + 9 * _where()[0]
        model.hidden.weight[8:] *= 10 - 9 * _where()[0]
    told = []
    for its, data in ((net(), batches(7 + _where()[0])), (model, batches())):
        try:
            gp.slim(its, 0.5, data=data, align=1)
        except gp.DistributedError as error:
            told.append(str(error))
    return told


def main() -> None:
    """Do a task in a group of processes and save what came of it."""
    parser = argparse.ArgumentParser()
    for name in ("task", "folder"):
        parser.add_argument(name)
    for name in ("rank", "size", "timeout"):
        parser.add_argument(name, type=int)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", gp.GraphPruneWarning)
    torch.set_num_threads(1)
    if asked.size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{asked.folder}/store",
            rank=asked.rank,
            world_size=asked.size,
            timeout=datetime.timedelta(seconds=asked.timeout),
        )
    found = TASKS[asked.task]()
    torch.save(found, Path(asked.folder) / f"{asked.rank}.pt")
    os._exit(0)  # a group that lost a process cannot be taken down in order


if __name__ == "__main__":
    main()
