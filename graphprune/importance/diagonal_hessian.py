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
from graphprune.graph_utils.linear_layers import Layer, held_by, layers_of
from graphprune.graph_utils.stepwise import Run
from graphprune.groups.groups import Dependencies, Scores
from graphprune.importance.context import Loss, Subject
from graphprune.importance.gated_loss import GatedLoss
from graphprune.inference.infer import infer
from graphprune.layout import Axis, Layout, size_of
from graphprune.masks import slots_of
from graphprune.rules import bind_arguments, functional_twin, is_in_place, writes
from graphprune.utils.tensors import evaluating

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


def taylor2_recursion(subject: Subject) -> Scores:
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
    with evaluating(graph_module):
        recursion = Recursion.of(graph_module, traced, axes, gated.loss)
        terms = recursion.mean_terms(gated)
    for name, axis in axes.items():
        read = [
            (slots, terms[node])
            for node, channels in recursion.units.items()
            for slots in slots_of(channels, axis)
        ]
        if read:
            scores[name] = np.zeros(len(scores[name]))
        for slots, of_position in read:
            np.add.at(scores[name], slots[slots >= 0], of_position[slots >= 0])
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
        for batch, weight in gated.weighted():
            with gated.naming(batch, "importance='taylor2_recursion' cannot go back from its loss"):
                found = self.terms(batch)
            for node, terms in found.items():
                refuse_unless_finite(batch, terms, "in the derivatives of its loss")
                total[node] = total.get(node, 0.0) + weight * terms
        return {node: mean.numpy() for node, mean in gated.subject.data.total(total).items()}

    def terms(self, batch: Batch) -> dict[fx.Node, Tensor]:
        """Return, for each layer that reads channels, the terms of each channel of its input.

        Shapes: float64 `[channels]`, summed over all other dimensions.
        """
        values = self._values(batch)
        found = dict(self._at_the_output(values, batch))
        terms = {
            node: torch.zeros(size_of(channels)).double() for node, channels in self.units.items()
        }
        for node in reversed(self.graph_module.graph.nodes):
            if node in self.needed and _overwrites_what_others_read(node):
                self._refuse(node)
            if node not in found:
                continue
            for operand in node.all_input_nodes:
                if operand in self.needed and not _is_discrete(values[operand]):
                    first, second = self._back(node, operand, values, found[node])
                    if node in self.units:
                        o = values[operand].double()
                        change = second.double() * o.square() / 2 - first.double() * o
                        own = self.layers[node].summed % o.dim()
                        terms[node] = change.movedim(own, 0).flatten(1).sum(1).cpu()
                    if operand in found:
                        first, second = first + found[operand][0], second + found[operand][1]
                    found[operand] = first, second
        return terms

    def _values(self, batch: Batch) -> dict[fx.Node, Any]:
        """Return what every node gives, before anything is written over it."""
        order = list(self.graph_module.graph.nodes)
        run = Run(self.graph_module, batch.inputs, order, what=str(batch))
        values: dict[fx.Node, Any] = {}
        for node in order:
            if writes(node):
                values[node.args[0]] = values[node.args[0]].clone()
            values[node] = run.until(node, inclusive=True)
        return values

    def _at_the_output(
        self, values: Mapping[fx.Node, Any], batch: Batch
    ) -> Iterator[tuple[fx.Node, Derivatives]]:
        """Yield the nodes that the model returns and the loss's derivatives by their values."""
        graph = self.graph_module.graph
        returned = graph.output_node()
        free = {
            node: values[node].detach().clone().requires_grad_()
            for node in returned.all_input_nodes
            if node in self.needed and values[node].is_floating_point()
        }
        if not free:
            return
        with torch.enable_grad():
            given = fx.map_arg(returned.args[0], lambda node: free.get(node, values[node]))
            loss = self.loss(graph.process_outputs(given), batch.target).reshape(())
            firsts = torch.autograd.grad(
                loss, list(free.values()), create_graph=True, materialize_grads=True
            )
        for (node, value), first in zip(free.items(), firsts, strict=True):
            yield node, (first.detach(), _diagonal(first, value))

    def _back(
        self, node: fx.Node, operand: fx.Node, values: Mapping[fx.Node, Any], after: Derivatives
    ) -> Derivatives:
        """Return what derivatives by a node's value say of those by one of its operands.

        Raises:
            InvalidRequestError: the operator is not known.

        """
        value, result = values[operand], values[node]
        if node in self.layers:
            return _back_through_layer(self.graph_module, self.layers[node], values, after)
        if not (_is_real(value) and _is_real(result)):
            self._refuse(node if _is_real(value) else operand)
        function = _function(node, operand, values)
        if _is_elementwise(node, values):
            return _back_through_function(function, value, after)
        packet = getattr(node.target, "overloadpacket", None)
        moves = packet in _MOVES or getattr(node.target, "is_view", False)
        if not moves and not (packet in _MEANS and _divides(packet, value, result)):
            self._refuse(node)
        first, second = (_pulled(function, value, one) for one in after)
        # of a mean over k values, 1 / k comes back from a one: the second factor of 1 / k2
        return first, second if moves else second * _pulled(
            function, value, torch.ones_like(result)
        )

    def _refuse(self, node: fx.Node) -> NoReturn:
        operator = getattr(node.target, "overloadpacket", node.target)
        place = self.places.get(node.name)
        raise InvalidRequestError(
            f"importance='taylor2_recursion' does not go back through {operator}"
            f"{f' ({place})' if place else ''}: it knows layers with weights of their own, element-wise "
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
    names = [written]
    while getattr(written.target, "is_view", False):
        written = written.args[0]
        names.append(written)
    return any(user > node for name in names for user in name.users)


def _is_elementwise(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    func = node.target
    if not isinstance(func, OpOverload):
        return False
    twin = _out_of_place(func)
    given = bind_arguments(func, node.args, dict(node.kwargs))
    training = given.get("training", given.get("train", False))
    if values[training] if isinstance(training, fx.Node) else training:
        return False
    return torch.Tag.pointwise in twin.tags or twin.overloadpacket in _ELEMENTWISE


def _out_of_place(func: OpOverload) -> OpOverload:
    return (functional_twin(func) or func) if is_in_place(func) else func


def _divides(packet: Any, value: Tensor, result: Tensor) -> bool:
    """Say whether no two windows of an operator that takes means overlap."""
    return packet is aten.mean or all(
        size % count == 0 for size, count in zip(value.shape, result.shape, strict=True)
    )


def _function(
    node: fx.Node, operand: fx.Node, values: Mapping[fx.Node, Any]
) -> Callable[[Tensor], Tensor]:
    """Return a call as a function of one of its operands, wherever that stands among them."""

    def function(free: Tensor) -> Tensor:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda other: free if other is operand else values[other]
        )
        result: Tensor = _out_of_place(node.target)(*args, **kwargs)  # type: ignore[arg-type]
        return result

    return function


def _pulled(function: Callable[[Tensor], Tensor], value: Tensor, cotangent: Tensor) -> Tensor:
    """Return the transposed Jacobian of a function at a value, times a cotangent."""
    with torch.enable_grad():
        free = value.detach().clone().requires_grad_()
        (pulled,) = torch.autograd.grad(function(free), free, cotangent)
    return pulled


def _back_through_layer(
    graph_module: fx.GraphModule,
    layer: Layer,
    values: Mapping[fx.Node, Any],
    after: Derivatives,
) -> Derivatives:
    """Return W' g and (W * W)' h."""
    weight, arguments = held_by(graph_module, layer.weight), layer.arguments(values)
    first, second = (
        _pulled(lambda data, w=w: layer.value(data, w, None, arguments), values[layer.data], one)  # type: ignore[misc]
        for w, one in zip((weight, weight.square()), after, strict=True)
    )
    return first, second


def _back_through_function(
    function: Callable[[Tensor], Tensor], value: Tensor, after: Derivatives
) -> Derivatives:
    """Return g f' and h f'^2 + g f'', summed over the places to which a value was broadcast."""
    first, second = after
    with torch.enable_grad():
        free = value.detach().expand(first.shape).clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(free).sum(), free, create_graph=True)
        curve = torch.zeros_like(slope)
        if slope.requires_grad:
            (curve,) = torch.autograd.grad(slope.sum(), free, materialize_grads=True)
    slope = slope.detach()
    before = first * slope, second * slope.square() + first * curve
    return before[0].sum_to_size(value.shape), before[1].sum_to_size(value.shape)


def _diagonal(first: Tensor, output: Tensor) -> Tensor:
    """Return the second derivatives by each entry of an output, given the first as a function of it.

    The Hessian is multiplied by vectors that are not zero at several entries at once. If the others of
    these have a part in a product, it depends on how the entries are weighted; then fewer are taken.
    """
    if not first.requires_grad:
        return torch.zeros_like(output)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(output.shape, generator=generator).to(output) + 0.5
    tolerance = torch.finfo(output.dtype).eps ** 0.5

    def found(sets: Iterator[Tensor], weights: Tensor) -> Tensor:
        diagonal = torch.zeros_like(output)
        for mask in sets:
            (product,) = torch.autograd.grad(
                first, output, mask * weights, retain_graph=True, materialize_grads=True
            )
            diagonal += mask * product / weights
        return diagonal

    for sets in (_everything, _one_a_sample):
        plain, weighted = found(sets(output), torch.ones_like(output)), found(sets(output), weights)
        if (plain - weighted).abs().max() <= tolerance * plain.abs().max():
            return plain
    return found(_each(output), torch.ones_like(output))


def _everything(output: Tensor) -> Iterator[Tensor]:
    yield torch.ones_like(output)


def _one_a_sample(output: Tensor) -> Iterator[Tensor]:
    """Yield masks of one entry of every sample, the same in each."""
    for mask in _each(output[:1]):
        yield mask.expand_as(output)


def _each(output: Tensor) -> Iterator[Tensor]:
    """Yield masks of one entry."""
    for entry in range(output.numel()):
        mask = torch.zeros_like(output)
        mask.view(-1)[entry] = 1
        yield mask
