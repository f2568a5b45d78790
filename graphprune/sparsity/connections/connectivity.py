"""Which connections of each convolution are on, at any fraction of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from graphprune.calibration.batches import batches_of
from graphprune.distributed.process_group import join_call
from graphprune.errors import InvalidRequestError, warn
from graphprune.groups.groups import Dependencies
from graphprune.importance import Loss
from graphprune.importance.context import ScoringContext, values_of
from graphprune.sparsity.connections.clustering import Saliency, cluster_filters
from graphprune.sparsity.connections.patterns import (
    PATTERNS,
    blocks_of,
    connections_up_to,
    fan_in,
    ranks_of,
)
from graphprune.sparsity.connections.sites import (
    MANY_CHANNELS,
    Connections,
    ConnectionSite,
    Flags,
    choose_connections,
    sites_of,
)
from graphprune.utils.inputs import Inputs
from graphprune.utils.progress import track
from graphprune.utils.tensors import copy_with, evaluation_mode, parameter_names

PatternName: TypeAlias = Literal["random", "expander", "magnitude", "taylor"]


@dataclass(frozen=True)
class Connectivity:
    """The turns in which the connections of a model's convolutions come.

    Attributes:
        graph: of the model.
        sites: the convolutions.
        turns: by the name of the weight, the turn of each connection, `[outputs, inputs]`.

    """

    graph: Dependencies
    sites: Sequence[ConnectionSite]
    turns: dict[str, npt.NDArray[np.int64]]

    def connections(self, fraction: float) -> dict[str, Connections]:
        """Return what is on at that fraction, by the name of the weight.

        Each filter reads as many channels, the first by turn, so that what is on stays on at a larger
        fraction. Filters that no output depends on read none.
        """

        def choose(site: ConnectionSite, live: Flags) -> Connections:
            return connections_up_to(self.turns[site.weight], fraction, live)

        return choose_connections(self.graph, self.sites, choose)


def choose_connectivity(
    model: nn.Module,
    graph: Dependencies,
    fraction: float,
    *,
    pattern: PatternName = "random",
    share: int = 1,
    seed: int = 0,
    first: bool = False,
    data: Any = None,
    loss: Loss | None = None,
) -> Connectivity:
    """Return a wiring of the model's convolutions that suits that fraction, and holds at larger ones.

    Warns where there are none with connections to spare.

    The arguments are those of `connect_sparsely`.

    Raises:
        InvalidRequestError: no such fraction, pattern or share; or data and loss are missing.

    """
    check_fraction(fraction)
    if pattern not in get_args(PatternName):
        pattern_names = ", ".join(get_args(PatternName))
        raise InvalidRequestError(f"pattern={pattern!r} is none of {pattern_names}")
    if share < 1:
        raise InvalidRequestError(f"share={share} must be a number of filters, 1 or more")
    sites = sites_of(graph, first)
    if not sites:
        _warn_of_no_sites(graph)
    turns: dict[str, npt.NDArray[np.int64]] = {}
    saliencies = (
        {} if pattern in PATTERNS else _saliencies(model, graph, sites, pattern, data, loss)
    )

    def choose(site: ConnectionSite, live: Flags) -> Connections:
        # by name, so that other convolutions change nothing here; hash() differs from run to run
        rng = np.random.default_rng([seed, crc32(site.weight.encode())])
        count = fan_in(fraction, site.inputs)
        block_of = blocks_of(site.outputs, site.inputs, count, share)
        if pattern in PATTERNS:
            # `[blocks]`: whether a block has a live filter, by a sum of those flags
            live_blocks = np.bincount(block_of, live) > 0
            order = PATTERNS[pattern](len(live_blocks), site.inputs, count, live_blocks, rng)
        else:
            # filters that nothing reads have no say in what their block reads
            saliency = saliencies[site.weight] * live[:, None]
            block_of, order = cluster_filters(saliency, block_of, count, rng)
        turns[site.weight] = ranks_of(order, block_of)
        return connections_up_to(turns[site.weight], fraction, live)

    # for what `choose` notes in `turns`: only this walk knows which filters are live
    choose_connections(graph, sites, choose)
    return Connectivity(graph, sites, turns)


def _warn_of_no_sites(graph: Dependencies) -> None:
    """Warn that a model has no convolution with connections to spare."""
    count = sum(
        step.func.overloadpacket is torch.ops.aten.convolution for step in graph.inference.steps
    )
    warn(
        f"none of the model's {count} convolutions has connections to spare, so it stays as it was: they "
        f"must be ungrouped, not transposed, read and make {MANY_CHANNELS} channels or more, and have a "
        "weight that nothing else reads"
    )


def check_fraction(fraction: float) -> None:
    """Refuse what is no fraction of connections.

    Raises:
        InvalidRequestError: it is not above 0 and at most 1.

    """
    if not 0 < fraction <= 1:
        raise InvalidRequestError(
            f"fraction={fraction} of the connections must be above 0 and at most 1; it is what stays"
        )


def _saliencies(
    model: nn.Module,
    graph: Dependencies,
    sites: Sequence[ConnectionSite],
    pattern: PatternName,
    data: Any,
    loss: Loss | None,
) -> dict[str, Saliency]:
    """Return how much each connection matters, by the name of the weight."""
    if pattern == "magnitude":
        weights = {site.weight: values_of(site.weight, _weight(model, site)) for site in sites}
        return {name: _sum_over_window(weight.double() ** 2) for name, weight in weights.items()}
    with join_call(data is not None):
        batches = None if data is None else batches_of(data)
        return _taylor(ScoringContext(model, graph, batches, loss), sites)


def _weight(model: nn.Module, site: ConnectionSite) -> nn.Parameter:
    return parameter_names(model)[site.weight]


def _sum_over_window(entries: torch.Tensor) -> Saliency:
    """Return the sums over windows, `[outputs, inputs]`."""
    saliency: Saliency = entries.flatten(2).sum(2).cpu().numpy().astype(np.float64)
    return saliency


def _taylor(subject: ScoringContext, sites: Sequence[ConnectionSite]) -> dict[str, Saliency]:
    """Return the squared first-order change in loss when a connection goes, averaged over batches.

    That is the square of the sum over the window of weight times derivative.
    Source: Molchanov et al., Importance Estimation for Neural Network Pruning (arXiv 1906.10771),
    here for connections.

    Raises:
        InvalidRequestError: there is no data or no loss.

    """
    batches = subject.data
    if subject.loss is None:
        raise InvalidRequestError(
            "pattern='taylor' asks what the loss does; pass loss=, a function of output and target"
        )
    # a copy, since weights that are frozen in the user's model get gradients here
    model = copy_with(subject.model, lambda name, tensor: None)
    weights = [_weight(model, site).requires_grad_() for site in sites]
    sums = [np.zeros((site.outputs, site.inputs)) for site in sites]
    with evaluation_mode(model), torch.enable_grad():
        for batch in track(batches, "connections by taylor"):
            inputs = Inputs.of(batch.inputs)
            output = model(*inputs.args, **inputs.kwargs)
            gradients = torch.autograd.grad(subject.loss(output, batch.target), weights)
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                sums[index] += _sum_over_window(weight.detach().double() * gradient.double()) ** 2
    means = batches.mean(sums)
    return {site.weight: mean.numpy() for site, mean in zip(sites, means, strict=True)}
