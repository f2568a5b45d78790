"""Training goes on after channels went: what an optimizer remembers goes along with the parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError
from graphprune.report.result import Slimmed
from graphprune.shrink.tensors import slice_tensor

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def carry_optimizer(optimizer: Optimizer, model: nn.Module, result: Slimmed) -> Optimizer:
    """Return an optimizer of the slim model's parameters that goes on where the original's stood.

    What it keeps for each parameter (momentum, first and second moments) loses the slots that the
    parameter lost; groups of parameters and their options stay. The given optimizer is not changed.
    Schedulers hold the optimizer that they were made for: make them anew, with `last_epoch`.

    Averaged weights (EMA) are a model of their own: `graphprune.slim(averaged, plan=result.plan)`.

    Args:
        optimizer: of the original's parameters; one that keeps tensors of a parameter's shape, or
            numbers (SGD, Adam, AdamW, RMSprop, NAdam and others, not Adafactor).
        model: the original, whose parameters the optimizer holds.
        result: what `graphprune.slimmed` returned for it.

    Raises:
        InvalidRequestError: the optimizer holds parameters that the model or the slim model lacks, or
            keeps tensors of another shape.

    """
    name_by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    slim_parameters = dict(result.model.named_parameters())
    masks = result.plan.masks(result.graph)
    layouts = result.graph.inference.parameters

    def name_of(parameter: Tensor) -> str:
        name = name_by_id.get(id(parameter))
        if name is None or name not in slim_parameters:
            raise InvalidRequestError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} "
                + (
                    "that the model does not; pass the model that it was made for"
                    if name is None
                    else f"{name!r} that the slim model lacks"
                )
            )
        return name

    def carry_state(name: str, state_name: str, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return copy.deepcopy(value)
        if value.shape != parameter.shape:
            raise InvalidRequestError(
                f"{type(optimizer).__name__} keeps {state_name!r} of shape {tuple(value.shape)} for "
                f"{name!r}, which has {tuple(parameter.shape)}, and what to leave out of it is not known; "
                "make a new optimizer"
            )
        slim_value = slice_tensor(value, layouts.get(name, []), masks)
        return value.detach().clone() if slim_value is None else slim_value

    groups: list[dict[str, Any]] = []
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        parameter_names = [name_of(parameter) for parameter in group["params"]]
        groups.append(
            {**copy.copy(group), "params": [slim_parameters[name] for name in parameter_names]}
        )
        for name, parameter in zip(parameter_names, group["params"], strict=True):
            for state_name, value in optimizer.state.get(parameter, {}).items():
                state[slim_parameters[name]][state_name] = carry_state(
                    name, state_name, value, parameter
                )
    # a shallow copy, of the same class and defaults; the groups and the state that it shares are replaced
    slim_optimizer = copy.copy(optimizer)
    slim_optimizer.param_groups, slim_optimizer.state = groups, state
    return slim_optimizer
