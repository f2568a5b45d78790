"""Cutting in steps, with training in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from graphprune.distributed.wrappers import unwrap
from graphprune.selection.choose import Baseline
from graphprune.slimming.slim import MILLI, Options, Order, run_slim


def slim_gradually(
    model: Any,
    ratio: float | None = None,
    example_inputs: Any = None,
    **options: Unpack[Options],
) -> Iterator[nn.Module]:
    """Yield smaller and smaller models, each cut from the one before as training has left it.

        for slimmer in graphprune.slim_gradually(model, 0.5, images, steps=5):
            graphprune.finetune(slimmer, model, data)

    What was yielded is a copy that may be trained, in place, before the next is asked for; channels
    are scored anew for each step, on the weights of that time. The ratio is a fraction of the model
    that was given, and the last step ends where `slim` would. With `compensate`, each model is fitted
    to the one before.

    Args:
        model: as for `slim`.
        ratio: fraction to remove in the end; half if not given.
        example_inputs: as for `slim`.
        **options: those of `slim` but `plan`; `steps` (5 if not given) is the number of models, the
            k-th of which has lost k / steps of the ratio.

    Raises:
        TypeError: there is no such option.
        GraphPruneError: as `slim`, when the model of a step is asked for.

    """
    order = Order.of(ratio, options)
    if order.plan is not None:
        raise TypeError("slim_gradually makes a plan for each step and takes none")
    steps = options.get("steps", 5)
    baseline: Baseline | None = None
    if isinstance(model, nn.Module):  # its modules, not those of the copies that follow
        order = replace(order, request=order.request.with_names(unwrap(model)))
    for step in range(1, steps + 1):
        progress = step / steps
        request = replace(order.request, ratio=order.request.ratio * progress, steps=1)
        order_of_step = replace(order, request=request, way=progress)
        result = run_slim(order_of_step, model, example_inputs, baseline)
        # of the graph before the first cut, since every step's ratio counts from there
        if baseline is None:
            nanoseconds = None if result.latency is None else result.latency.original / MILLI
            baseline = Baseline.of(result.graph, request, nanoseconds)
        model = result.model
        yield model
