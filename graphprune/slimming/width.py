"""The same network with a fixed fraction of its channels, to be trained from scratch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.errors import InvalidRequestError
from graphprune.inference.infer import infer
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.selection.plan import Plan
from graphprune.slimming.slim import slimmed


def width_multiplier(
    model: nn.Module, multiplier: float, example_inputs: Any = None, *, seed: int = 0
) -> nn.Module:
    """Return a network like the given one in which every layer is narrower, with fresh weights.

    Every group of channels keeps `ceil(multiplier * channels)`; parameters and multiply-adds fall to about
    the square of it. Weights are what each module's `reset_parameters` gives.

    Source: the depth multiplier that The Power of Sparsity in Convolutional Neural Networks compares with
    (arXiv 1702.06257).

    Args:
        model: an nn.Module; it is not changed.
        multiplier: fraction of the channels to have, 0 < multiplier <= 1.
        example_inputs: as everywhere; None where they can be guessed.
        seed: for the fresh weights.

    Raises:
        InvalidRequestError: no such multiplier, or a module that holds parameters cannot reset them.

    """
    if not 0 < multiplier <= 1:
        raise InvalidRequestError(
            f"multiplier={multiplier} must be above 0 and at most 1; it is what stays of the channels"
        )
    without_reset = [
        path or type(module).__name__
        for path, module in model.named_modules()
        if list(module.parameters(recurse=False)) and not hasattr(module, "reset_parameters")
    ]
    if without_reset:
        raise InvalidRequestError(
            f"{', '.join(without_reset)} hold parameters and have no reset_parameters() that gives fresh "
            "ones; write one, as torch.nn's layers have"
        )
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    graph = DependencyGraph(infer(module, inputs))
    groups = [group for group in graph.groups if not group.inner]
    # any would do, as all weights become fresh; less a little, since 0.07 * 100 is 7.000000000000001
    keep = {g.name: list(range(math.ceil(multiplier * g.size - 1e-9))) for g in groups}
    plan = Plan(keep, {group.name: group.size for group in groups})
    narrow = slimmed(module, example_inputs=inputs, plan=plan, form="module").model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for submodule in narrow.modules():
            reset: Any = getattr(submodule, "reset_parameters", None)
            if reset is not None:
                reset()
    return narrow
