"""Where a slim graph can be repaired: each layer with what follows it, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.graph_utils.linear_layers import Layer, held_by, layers_of
from graphprune.rules import arguments_of, writes

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A layer and what is made of its output before anything else is done with it.

    Attributes:
        layer: the layer whose weights are fitted.
        norm: the batch norm that alone reads its output, or None.
        total: the sum that alone reads the output of these, or None.
        rest: the other operand of that sum, or None.

    """

    layer: Layer
    norm: fx.Node | None = None
    total: fx.Node | None = None
    rest: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        """The node whose value the fit aims at."""
        return self.total or self.norm or self.layer.node

    @property
    def bounds(self) -> tuple[float, float]:
        """Below the first and above the second, all that reads the end takes one value for another."""
        of_readers = [_bounds(reader) for reader in self.end.users]
        low = min((low for low, _ in of_readers), default=-math.inf)
        return low, max((high for _, high in of_readers), default=math.inf)


def _bounds(reader: fx.Node) -> tuple[float, float]:
    packet = getattr(reader.target, "overloadpacket", None)
    if packet in (aten.relu, aten.relu_):
        return 0.0, math.inf
    if packet in (aten.relu6, aten.relu6_):
        return 0.0, 6.0
    if packet in (aten.hardtanh, aten.hardtanh_):
        given = arguments_of(reader)
        return given["min_val"], given["max_val"]
    return -math.inf, math.inf


def sites_of(graph_module: fx.GraphModule) -> tuple[list[Site], list[fx.Node]]:
    """Return the sites of a graph in the order of their repair, and the nodes in an order for it.

    A layer whose output goes into a sum aims at the sum, so that it makes up for what the rest of the
    sum lacks; the rest has to be known by then, so the layer moves to just before the sum. Where both
    operands are such layers, the one with more inputs makes up for the other.
    """

    def fan_in(layer: Layer) -> int:
        return layer.fan_in(held_by(graph_module, layer.weight))

    order = list(graph_module.graph.nodes)
    sites: dict[fx.Node, Site] = {}
    by_total: dict[fx.Node, Site] = {}
    for layer in layers_of(graph_module).values():
        site = followed(layer)
        sites[layer.node] = Site(site.layer, site.norm)
        if site.total is not None and _may_move(site, order):
            rival = by_total.get(site.total)
            if rival is None or fan_in(layer) > fan_in(rival.layer):
                by_total[site.total] = site
    for total, site in by_total.items():
        moved = [node for node in (site.layer.node, site.norm) if node is not None]
        order = [node for node in order if node not in moved]
        place = order.index(total)
        order[place:place] = moved
        sites[site.layer.node] = site
    return [sites[node] for node in order if node in sites], order


def followed(layer: Layer) -> Site:
    """Return the layer with the batch norm and the sum that follow it."""
    last, norm = layer.node, None
    reader = _only_reader(last)
    if (
        reader is not None
        and layer.channels_are_second
        and _is_own_norm(reader)
        and reader.args[0] is last
    ):
        last = norm = reader
        reader = _only_reader(last)
    if reader is None or getattr(reader.target, "overloadpacket", None) not in (
        aten.add,
        aten.add_,
    ):
        return Site(layer, norm)
    operands = arguments_of(reader)
    pair = [operands["self"], operands["other"]]
    rest = next((one for one in pair if one is not last), None)
    if operands["alpha"] != 1 or not isinstance(rest, fx.Node) or not _have_one_shape(rest, last):
        return Site(layer, norm)
    return Site(layer, norm, reader, rest)


def _have_one_shape(a: fx.Node, b: fx.Node) -> bool:
    """Say whether two values are known to have the same shape, so that neither is broadcast."""
    values = [node.meta.get("val") for node in (a, b)]
    shapes = [list(map(str, v.shape)) for v in values if isinstance(v, torch.Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _is_own_norm(node: fx.Node) -> bool:
    """Say whether a node is a batch norm whose weight, bias and statistics nothing else reads."""
    return node.target is aten.batch_norm.default and all(
        isinstance(held, fx.Node) and held.op == "get_attr" and len(held.users) == 1
        for held in node.args[1:5]
    )


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _may_move(site: Site, order: Sequence[fx.Node]) -> bool:
    """Say whether the layer can run as late as the sum: nothing between writes over what it reads."""
    assert site.total is not None
    between = order[order.index(site.layer.node) + 1 : order.index(site.total)]
    return not any(node is not site.norm and writes(node) for node in between)
