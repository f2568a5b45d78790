"""Torch-Pruning on the same networks: its criteria, and batch norms re-estimated by hand.

    pip install --no-deps torch-pruning==1.6.1

It takes a fraction of channels, not of MACs: the fraction is searched for that meets the target.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tasks import Task
from torch import nn

import graphprune as gp

# Its Hessian takes a backward pass a sample at each step of the search; on the digits and on ResNet-8 it
# came last (88.2 and 44.7 % with new statistics), so it is left out.
CRITERIA = ("l1", "l2", "bn_scale", "lamp", "fpgm", "taylor")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
HALVINGS = 8


def slimmed(
    task: Task, ratio: float, criteria: Sequence[str] = CRITERIA
) -> Iterator[tuple[str, nn.Module | Exception]]:
    """Yield a name and what each criterion, local and global, leaves of the MACs, or its error."""
    for criterion in criteria:
        for is_global in (False, True):
            name = f"{criterion}, {'global' if is_global else 'local'}"
            try:
                yield name, to_macs(task, ratio, criterion, is_global)
            except Exception as error:
                yield name, error


def to_macs(task: Task, ratio: float, criterion: str, is_global: bool) -> nn.Module:
    """Return the network without that fraction of its MACs, by one criterion, local or global."""
    wanted = (1 - ratio) * gp.count_macs(task.model, task.inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        model = _cut(task, middle, criterion, is_global)
        try:
            macs = gp.count_macs(model, task.inputs)
        except gp.GraphPruneError:  # no channels left in some layer
            macs = 0
        if 0 < macs <= wanted:
            high, best = middle, model
        elif macs == 0:
            high = middle
        else:
            low = middle
    if best is None:
        raise RuntimeError("no fraction of channels meets the target")
    return best


def _cut(task: Task, fraction: float, criterion: str, is_global: bool) -> nn.Module:
    import torch_pruning as tp

    importances: dict[str, Callable[[], Any]] = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }
    model = copy.deepcopy(task.model)
    importance = importances[criterion]()
    modules = dict(model.named_modules())
    heads = {
        module: module.num_attention_heads
        for module in modules.values()
        if hasattr(module, "num_attention_heads")
    }
    pruner = tp.pruner.BasePruner(
        model,
        task.inputs,
        importance,
        pruning_ratio=fraction,
        global_pruning=is_global,
        ignored_layers=[modules[name] for name in task.heads],
        num_heads={projection: count for m, count in heads.items() for projection in _of_heads(m)},
        prune_num_heads=bool(heads),
    )
    if criterion == "taylor":
        torch.autograd.backward(sum(task.loss(_called(model, x), y) for x, y in task.calibration))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.step()
    for module, before in heads.items():
        if hasattr(module, "query"):  # what its documentation tells to do by hand
            module.num_attention_heads = pruner.num_heads.get(module.query, before)
            module.all_head_size = module.query.out_features
            module.attention_head_size = module.all_head_size // module.num_attention_heads
    model.zero_grad()
    return model


def _of_heads(module: nn.Module) -> list[nn.Module]:
    return [getattr(module, name) for name in ("query", "key", "value") if hasattr(module, name)]


def _called(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs.args) if isinstance(inputs, gp.Inputs) else model(inputs)


@torch.no_grad()
def with_statistics(model: nn.Module, task: Task) -> nn.Module:
    """Return a copy whose batch norms have the mean statistics of the calibration batches."""
    found = copy.deepcopy(model)
    norms = [module for module in found.modules() if isinstance(module, NORMS)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for inputs, _ in task.calibration if norms else ():
        _called(found, inputs)
    return found.eval()
