"""Where a slim graph can be repaired: each layer with what follows it, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
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
        # What one reader tells apart counts: for ReLU (0, inf) and ReLU6 (0, 6) it is (0, inf).
        reader_bounds = [_bounds(reader) for reader in self.end.users]
        low = min((low for low, _ in reader_bounds), default=-math.inf)
        return low, max((high for _, high in reader_bounds), default=math.inf)


def _bounds(reader: fx.Node) -> tuple[float, float]:
    packet = getattr(reader.target, "overloadpacket", None)
    if packet in (aten.relu, aten.relu_):
        return 0.0, math.inf
    if packet in (aten.relu6, aten.relu6_):
        return 0.0, 6.0
    if packet in (aten.hardtanh, aten.hardtanh_):
        arguments = arguments_of(reader)
        return arguments["min_val"], arguments["max_val"]
    return -math.inf, math.inf


def sites_of(graph_module: fx.GraphModule) -> tuple[list[Site], list[fx.Node]]:
    """Return the sites of a graph in the order of their repair, and the nodes in an order for it.

    A layer whose output goes into a sum aims at the sum, so that it makes up for what the rest of the
    sum lacks; the rest has to be known by then, so the layer moves to just before the sum. Where both
    operands are such layers, the one with more inputs makes up for the other.
    """

    def fan_in(layer: Layer) -> int:
        return layer.fan_in(tensor_read_by(graph_module, layer.weight))

    order = list(graph_module.graph.nodes)
    sites: dict[fx.Node, Site] = {}
    sites_by_total: dict[fx.Node, Site] = {}
    for layer in layers_of(graph_module).values():
        site = site_of_layer(layer)
        # Without its sum as yet: of two layers that could aim at one sum, one alone does.
        sites[layer.node] = Site(site.layer, site.norm)
        if site.total is not None and _may_move(site, order):
            rival_site = sites_by_total.get(site.total)
            if rival_site is None or fan_in(layer) > fan_in(rival_site.layer):
                sites_by_total[site.total] = site
    for total, site in sites_by_total.items():
        moved_nodes = [node for node in (site.layer.node, site.norm) if node is not None]
        order = [node for node in order if node not in moved_nodes]
        # `conv1 bn1 conv2 bn2 add` with conv1 moved is `conv2 bn2 conv1 bn1 add`.
        total_index = order.index(total)
        order[total_index:total_index] = moved_nodes
        sites[site.layer.node] = site
    return [sites[node] for node in order if node in sites], order


def site_of_layer(layer: Layer) -> Site:
    """Return the layer with the batch norm and the sum that follow it."""
    last_node, norm = layer.node, None
    reader = _only_reader(last_node)
    if (
        reader is not None
        and layer.channels_are_second
        and _is_own_norm(reader)
        and reader.args[0] is last_node
    ):
        last_node = norm = reader
        reader = _only_reader(last_node)
    if reader is None or getattr(reader.target, "overloadpacket", None) not in (
        aten.add,
        aten.add_,
    ):
        return Site(layer, norm)
    arguments = arguments_of(reader)
    operands = [arguments["self"], arguments["other"]]
    other_operand = next((operand for operand in operands if operand is not last_node), None)
    # Only in a plain sum of equal shapes is what the sum lacks, entry by entry, what the layer lacks.
    if (
        arguments["alpha"] != 1
        or not isinstance(other_operand, fx.Node)
        or not _have_one_shape(other_operand, last_node)
    ):
        return Site(layer, norm)
    return Site(layer, norm, reader, other_operand)


def _have_one_shape(a: fx.Node, b: fx.Node) -> bool:
    """Say whether two values are known to have the same shape, so that neither is broadcast."""
    values = [node.meta.get("val") for node in (a, b)]
    shapes = [list(map(str, value.shape)) for value in values if isinstance(value, torch.Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _is_own_norm(node: fx.Node) -> bool:
    """Say whether a node is a batch norm whose weight, bias and statistics nothing else reads."""
    return node.target is aten.batch_norm.default and all(
        isinstance(source, fx.Node) and source.op == "get_attr" and len(source.users) == 1
        for source in node.args[1:5]  # weight, bias, running mean and variance
    )


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _may_move(site: Site, order: Sequence[fx.Node]) -> bool:
    """Say whether the layer can run as late as the sum: nothing between writes over what it reads."""
    assert site.total is not None
    between = order[order.index(site.layer.node) + 1 : order.index(site.total)]
    return not any(node is not site.norm and writes(node) for node in between)
