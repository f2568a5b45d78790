"""The second-order criterion of The Incredible Shrinking Neural Network, as its authors computed it.

Derivatives go back through the network one operator after the other, the first and the second by each
value, g = dE/do and h = d2E/do2. Of the second derivatives only those by one value twice are kept at
each operator, never those by two different ones:

    element-wise f:  g f',                h f'^2 + g f''
    linear layer W:  W' g,                (W * W)' h

That is exact for the units that the last linear layer reads where the loss's second derivatives are
of one output each, as those of the squared error are, and where each unit is one value; further back
it is an approximation. "taylor2" has the same expansion with the exact second derivative, so that the
two tell what the recursion costs from what the expansion costs.

Source: Wolfe et al., The Incredible Shrinking Neural Network, section 3 (arXiv 1701.04465), for networks
of any form instead of chains of sigmoid layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphprune.calibration.batches import Batch, refuse_unless_finite
from graphprune.capture.capture import graph_of
from graphprune.errors import InvalidRequestError
from graphprune.graph_utils.linear_layers import Layer, layers_of, tensor_read_by
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import Loss, ScoringContext
from graphprune.importance.gated_loss import GatedLoss
from graphprune.inference.infer import infer
from graphprune.layout import Axis, Layout, size_of
from graphprune.masks import slots_of
from graphprune.rules import bind_arguments, functional_twin, is_in_place, writes
from graphprune.utils.tensors import evaluation_mode

aten = torch.ops.aten

# Element-wise functions of one tensor that torch does not tag as such; batch norm and dropout are, in
# evaluation mode.
_ELEMENTWISE = (
    aten.hardswish, aten.hardsigmoid, aten.log_sigmoid, aten.prelu, aten.batch_norm, aten.dropout,
    aten.feature_dropout, aten.alpha_dropout,
)  # fmt: skip

# Operators whose every output is one entry of an input, or a constant; so is what a view gives.
_MOVES = (
    aten.cat, aten.constant_pad_nd, aten.pad, aten.max_pool1d, aten.max_pool2d, aten.max_pool3d,
)  # fmt: skip

# Operators whose outputs are means of windows, those of the second only if its sizes can be divided.
_MEANS = (aten.mean, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)

Derivatives: TypeAlias = tuple[Tensor, Tensor]
"""The first and the second by each entry of a value."""


def taylor2_recursion(subject: ScoringContext) -> Scores:
    """Score by -o dE/do + o2/2 d2E/do2, the second derivative by diagonal back-propagation.

    The terms are summed over a channel's positions and over the layers that read it. A group that no
    convolution or linear layer reads scores infinity: it is never cut before the others.

    The loss's own second derivatives are exact. They cost one backward pass where each is of one
    output (squared error), as many as a sample has outputs where samples do not mix (cross-entropy),
    and as many as the batch has outputs otherwise.

    Source: arXiv 1701.04465, section 3.

    Raises:
        InvalidRequestError: there is no loss, or an operator between a channel and the loss is none of
            those that the recursion knows.

    """
    gated, inputs = GatedLoss(subject), subject.data[0].inputs
    graph_module = graph_of(subject.model, inputs)
    traced = Dependencies(infer(graph_module, inputs))
    axes = {
        g.name: traced.by_name[g.name].axis
        for g in subject.graph.groups
        if g.name in traced.by_name
    }
    scores = {group.name: np.full(group.size, np.inf) for group in subject.graph.groups}
    with evaluation_mode(graph_module):
        recursion = Recursion.of(graph_module, traced, axes, gated.loss)
        terms = recursion.mean_terms(gated)
    for name, axis in axes.items():
        readings = [
            (slots, terms[node])
            for node, channels in recursion.units.items()
            for slots in slots_of(channels, axis)
        ]
        if readings:
            scores[name] = np.zeros(len(scores[name]))
        for slots, position_terms in readings:
            # several positions of `[positions]` may be one slot, which += on an index would count once
            np.add.at(scores[name], slots[slots >= 0], position_terms[slots >= 0])
    return scores


@dataclass
class Recursion:
    """A graph whose values' derivatives are wanted.

    Attributes:
        graph_module: calls ATen operators.
        layers: the calls that are layers with weights of their own.
        units: the layers that read channels, and what the dimension over which they sum is made of.
        needed: the nodes whose values depend on such channels, or are them.
        places: by a node's name, where it stands in the model's source.
        loss: from the model's output and a batch's target to one number.

    """

    graph_module: fx.GraphModule
    layers: dict[fx.Node, Layer]
    units: dict[fx.Node, Layout]
    needed: set[fx.Node]
    places: dict[str, str]
    loss: Loss

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        traced: Dependencies,
        axes: Mapping[str, Axis],
        loss: Loss,
    ) -> Recursion:
        """Return the recursion that scores the channels of some axes."""
        layers = {layer.node: layer for layer in layers_of(graph_module).values()}
        units = {}
        for node, layer in layers.items():
            layouts = traced.inference.nodes.get(layer.data.name)
            if layouts and any(slots_of(layouts[layer.summed], axis) for axis in axes.values()):
                units[node] = layouts[layer.summed]
        # nodes stand in the order of their calls, so one pass finds all that lies behind a needed one
        needed = {layers[node].data for node in units}
        for node in graph_module.graph.nodes:
            if needed.intersection(node.all_input_nodes):
                needed.add(node)
        places = {step.place.module: step.place.source for step in traced.inference.steps}
        return cls(graph_module, layers, units, needed, places, loss)

    @torch.no_grad()
    def mean_terms(self, gated: GatedLoss) -> dict[fx.Node, npt.NDArray[np.float64]]:
        """Return the means of `terms` over the data of all processes."""
        total: dict[fx.Node, Tensor] = {}
        for batch, weight in gated.weighted_batches():
            with gated.naming(batch, "importance='taylor2_recursion' cannot go back from its loss"):
                batch_terms = self.terms(batch)
            for node, terms in batch_terms.items():
                refuse_unless_finite(batch, terms, "in the derivatives of its loss")
                total[node] = total.get(node, 0.0) + weight * terms
        return {node: mean.numpy() for node, mean in gated.subject.data.total(total).items()}

    def terms(self, batch: Batch) -> dict[fx.Node, Tensor]:
        """Return, for each layer that reads channels, the terms of each channel of its input.

        Shapes: float64 `[channels]`, summed over all other dimensions.
        """
        values = self._values(batch)
        derivatives = dict(self._differentiate_loss(values, batch))
        terms = {
            node: torch.zeros(size_of(channels)).double() for node, channels in self.units.items()
        }
        for node in reversed(self.graph_module.graph.nodes):
            if node in self.needed and _overwrites_what_others_read(node):
                self._refuse(node)
            if node not in derivatives:
                continue
            for operand in node.all_input_nodes:
                if operand in self.needed and not _is_discrete(values[operand]):
                    g, h = self._propagate_back(node, operand, values, derivatives[node])
                    if node in self.units:
                        o = values[operand].double()
                        loss_change = h.double() * o.square() / 2 - g.double() * o
                        channel_dim = self.layers[node].summed % o.dim()
                        # `[batch, channels, height, width]` before a convolution -> `[channels]`
                        terms[node] = loss_change.movedim(channel_dim, 0).flatten(1).sum(1).cpu()
                    # a value that several calls read: what each says of it adds up
                    if operand in derivatives:
                        g, h = g + derivatives[operand][0], h + derivatives[operand][1]
                    derivatives[operand] = g, h
        return terms

    def _values(self, batch: Batch) -> dict[fx.Node, Any]:
        """Return what every node gives, before anything is written over it."""
        order = list(self.graph_module.graph.nodes)
        run = Run(self.graph_module, batch.inputs, order, what=str(batch))
        values: dict[fx.Node, Any] = {}
        for node in order:
            if writes(node):
                # the run writes into this very tensor; the copy keeps what stood there before
                values[node.args[0]] = values[node.args[0]].clone()
            values[node] = run.until(node, inclusive=True)
        return values

    def _differentiate_loss(
        self, values: Mapping[fx.Node, Any], batch: Batch
    ) -> Iterator[tuple[fx.Node, Derivatives]]:
        """Yield the nodes that the model returns and the loss's derivatives by their values."""
        graph = self.graph_module.graph
        output_node = graph.output_node()
        leaves = {
            node: values[node].detach().clone().requires_grad_()
            for node in output_node.all_input_nodes
            if node in self.needed and values[node].is_floating_point()
        }
        if not leaves:
            return
        with torch.enable_grad():
            flat_outputs = fx.map_arg(
                output_node.args[0], lambda node: leaves.get(node, values[node])
            )
            loss = self.loss(graph.process_outputs(flat_outputs), batch.target).reshape(())
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=True, materialize_grads=True
            )
        for (node, value), gradient in zip(leaves.items(), gradients, strict=True):
            yield node, (gradient.detach(), _hessian_diagonal(gradient, value))

    def _propagate_back(
        self, node: fx.Node, operand: fx.Node, values: Mapping[fx.Node, Any], by_result: Derivatives
    ) -> Derivatives:
        """Return what derivatives by a node's value say of those by one of its operands.

        Raises:
            InvalidRequestError: the operator is not known.

        """
        value, result = values[operand], values[node]
        if node in self.layers:
            return _propagate_through_layer(self.graph_module, self.layers[node], values, by_result)
        if not (_is_real(value) and _is_real(result)):
            self._refuse(node if _is_real(value) else operand)
        function = _function(node, operand, values)
        if _is_elementwise(node, values):
            return _propagate_through_function(function, value, by_result)
        packet = getattr(node.target, "overloadpacket", None)
        moves = packet in _MOVES or getattr(node.target, "is_view", False)
        if not moves and not (packet in _MEANS and _has_disjoint_windows(packet, value, result)):
            self._refuse(node)
        g, h = (_vjp(function, value, cotangent) for cotangent in by_result)
        # of a mean over k values, 1 / k comes back from a one: the second factor of 1 / k2
        return g, h if moves else h * _vjp(function, value, torch.ones_like(result))

    def _refuse(self, node: fx.Node) -> NoReturn:
        operator = getattr(node.target, "overloadpacket", node.target)
        source = self.places.get(node.name)
        raise InvalidRequestError(
            f"importance='taylor2_recursion' does not go back through {operator}"
            f"{f' ({source})' if source else ''}: it knows layers with weights of their own, element-wise "
            "functions, means and what moves values; use importance='taylor2', whose second derivatives "
            "are exact"
        )


def _is_discrete(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _overwrites_what_others_read(node: fx.Node) -> bool:
    """Say whether an operator works in place on a value that is read later under another name."""
    if not writes(node):
        return False
    written: Any = node.args[0]
    aliases = [written]
    # a view shares its memory with what it was taken from: writing to one changes all
    while getattr(written.target, "is_view", False):
        written = written.args[0]
        aliases.append(written)
    # nodes compare by their place in the graph
    return any(user > node for alias in aliases for user in alias.users)


def _is_elementwise(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    func = node.target
    if not isinstance(func, OpOverload):
        return False
    twin = _find_out_of_place(func)
    arguments = bind_arguments(func, node.args, dict(node.kwargs))
    training = arguments.get("training", arguments.get("train", False))
    if values[training] if isinstance(training, fx.Node) else training:
        return False
    return torch.Tag.pointwise in twin.tags or twin.overloadpacket in _ELEMENTWISE


def _find_out_of_place(func: OpOverload) -> OpOverload:
    return (functional_twin(func) or func) if is_in_place(func) else func


def _has_disjoint_windows(packet: Any, value: Tensor, result: Tensor) -> bool:
    """Say whether no two windows of an operator that takes means overlap."""
    # from 8 entries to 4 the windows are 2 wide; from 8 to 3 they overlap
    return packet is aten.mean or all(
        size % count == 0 for size, count in zip(value.shape, result.shape, strict=True)
    )


def _function(
    node: fx.Node, operand: fx.Node, values: Mapping[fx.Node, Any]
) -> Callable[[Tensor], Tensor]:
    """Return a call as a function of one of its operands, wherever that stands among them."""

    def function(operand_value: Tensor) -> Tensor:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs),
            lambda other: operand_value if other is operand else values[other],
        )
        result: Tensor = _find_out_of_place(node.target)(*args, **kwargs)  # type: ignore[arg-type]
        return result

    return function


def _vjp(function: Callable[[Tensor], Tensor], value: Tensor, cotangent: Tensor) -> Tensor:
    """Return the transposed Jacobian of a function at a value, times a cotangent."""
    with torch.enable_grad():
        leaf = value.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, cotangent)
    return gradient


def _propagate_through_layer(
    graph_module: fx.GraphModule,
    layer: Layer,
    values: Mapping[fx.Node, Any],
    by_result: Derivatives,
) -> Derivatives:
    """Return W' g and (W * W)' h."""
    weight, arguments = tensor_read_by(graph_module, layer.weight), layer.arguments(values)
    g, h = (
        _vjp(lambda data, w=w: layer.value(data, w, None, arguments), values[layer.data], cotangent)  # type: ignore[misc]
        for w, cotangent in zip((weight, weight.square()), by_result, strict=True)
    )
    return g, h


def _propagate_through_function(
    function: Callable[[Tensor], Tensor], value: Tensor, by_result: Derivatives
) -> Derivatives:
    """Return g f' and h f'^2 + g f'', summed over the places to which a value was broadcast."""
    g, h = by_result
    with torch.enable_grad():
        # a value `[channels]` that meets `[rows, channels]` becomes as large as that: each entry of the
        # result depends on one entry of the leaf then, and the gradient of the sum is f', entry by entry
        leaf = value.detach().expand(g.shape).clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        curve = torch.zeros_like(slope)
        if slope.requires_grad:
            (curve,) = torch.autograd.grad(slope.sum(), leaf, materialize_grads=True)
    slope = slope.detach()
    by_entry = g * slope, h * slope.square() + g * curve
    return by_entry[0].sum_to_size(value.shape), by_entry[1].sum_to_size(value.shape)


def _hessian_diagonal(gradient: Tensor, output: Tensor) -> Tensor:
    """Return the second derivatives by each entry of an output, given the gradient as a function of it.

    The Hessian is multiplied by vectors that are not zero at several entries at once. If the others of
    these have a part in a product, it depends on how the entries are weighted; then fewer are taken.
    """
    if not gradient.requires_grad:
        return torch.zeros_like(output)
    generator = torch.Generator().manual_seed(0)
    # from 0.5 to 1.5, since they are divided by
    random_weights = torch.rand(output.shape, generator=generator).to(output) + 0.5
    tolerance = torch.finfo(output.dtype).eps ** 0.5

    # with the Hessian H, a mask m and weights w: H (m w) / w is H's diagonal at m where H has nothing off
    # the diagonal between entries of m, whatever w is; else it changes with w
    def probe_diagonal(masks: Iterator[Tensor], entry_weights: Tensor) -> Tensor:
        diagonal = torch.zeros_like(output)
        for mask in masks:
            (product,) = torch.autograd.grad(
                gradient, output, mask * entry_weights, retain_graph=True, materialize_grads=True
            )
            diagonal += mask * product / entry_weights
        return diagonal

    for masks_of in (_mask_everything, _mask_one_per_sample):
        plain, weighted = (
            probe_diagonal(masks_of(output), torch.ones_like(output)),
            probe_diagonal(masks_of(output), random_weights),
        )
        if (plain - weighted).abs().max() <= tolerance * plain.abs().max():
            return plain
    return probe_diagonal(_mask_one_entry(output), torch.ones_like(output))


def _mask_everything(output: Tensor) -> Iterator[Tensor]:
    yield torch.ones_like(output)


def _mask_one_per_sample(output: Tensor) -> Iterator[Tensor]:
    """Yield masks of one entry of every sample, the same in each."""
    for mask in _mask_one_entry(output[:1]):
        yield mask.expand_as(output)


def _mask_one_entry(output: Tensor) -> Iterator[Tensor]:
    """Yield masks of one entry."""
    for entry in range(output.numel()):
        mask = torch.zeros_like(output)
        mask.view(-1)[entry] = 1
        yield mask
