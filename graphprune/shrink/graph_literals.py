"""The numbers in a graph that are sizes in disguise, and what they become when channels go.

Integers that a graph computes live in the world of the original sizes; each operator that takes one
as a size is given the slim size instead. So arithmetic on sizes stays right whatever it does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphprune.inference.recorded import Inference, Step
from graphprune.layout import Axis, Layout, Reason, can_split, cut, size_of, split
from graphprune.masks import kept_size, touches
from graphprune.rules import Layouts, arguments_of, bind_arguments
from graphprune.shrink.module_attributes import kept_groups

aten = torch.ops.aten

# Splits and cuts here repeat what inference did, so that nothing is left to unify or to fix.
_NO_REASON = Reason("the same as in inference")


def restrict_arguments(
    step: Step, args: Sequence[Any], kwargs: dict[str, Any], kept: Mapping[Axis, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a statistic once its tensors hold only the kept slots."""
    arguments_by_name = bind_arguments(step.func, args, kwargs)
    slim_values: dict[str, Any] = {}
    if "normalized_shape" in arguments_by_name:
        layouts = step.inputs[0].layouts[-len(arguments_by_name["normalized_shape"]) :]
        slim_values["normalized_shape"] = [kept_size(layout, kept) for layout in layouts]
    if step.func.overloadpacket is aten.native_group_norm:
        sizes = [kept_size(layout, kept) for layout in step.inputs[0].layouts]
        space = math.prod(sizes[2:])
        slim_values.update(N=sizes[0], C=sizes[1], HxW=space, group=kept_groups(step, kept))
    # What was positional stays so: `args` are the first of the schema's arguments.
    names = [argument.name for argument in step.func._schema.arguments]
    new_args = [slim_values.get(name, value) for name, value in zip(names, args, strict=False)]
    return tuple(new_args), {name: slim_values.get(name, value) for name, value in kwargs.items()}


class _Site:
    """One graph node whose literals are rewritten: its arguments by name, and the layouts around it."""

    def __init__(self, node: fx.Node, inference: Inference, kept: Mapping[Axis, int]) -> None:
        self.node = node
        self.nodes = inference.nodes
        self.kept = kept
        self.func = node.target
        self.arguments = arguments_of(node)

    def layouts(self, name: str) -> Layouts:
        """Return the layouts of the tensor argument of that name."""
        node_layouts = self.nodes.get(self.arguments[name].name)
        return node_layouts if node_layouts is not None else []

    @property
    def output(self) -> Any:
        """The layouts of the node's result, in the structure of the result."""
        return self.nodes[self.node.name]

    def is_cut(self, layout: Layout) -> bool:
        """Say whether a dimension of this layout gets smaller."""
        return touches(layout, self.kept)

    def slim_size(self, layout: Layout) -> int:
        """Return the size of a dimension in the slim model."""
        return kept_size(layout, self.kept)

    def set(self, name: str, value: Any) -> None:
        """Replace an argument."""
        position = [argument.name for argument in self.func._schema.arguments].index(name)  # type: ignore[union-attr]
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def replace_by(self, target: Any, args: tuple[Any, ...]) -> None:
        """Make the node call another operator."""
        self.node.target, self.node.args, self.node.kwargs = target, args, {}

    def resize(self, value: Any, layout: Layout) -> Any:
        """Return the slim size for an original one, which may be -1 or computed by the graph."""
        if not self.is_cut(layout) or (isinstance(value, int) and value < 0):
            return value
        if isinstance(value, int):
            return self.slim_size(layout)
        return scale_size(value, self.slim_size(layout), size_of(layout), before=self.node)


def scale_size(value: fx.Node, numerator: int, denominator: int, before: fx.Node) -> Any:
    """Return `value * numerator // denominator`, computed by the graph unless the value is known."""
    traced_size = value.meta.get("val")
    if isinstance(traced_size, int):
        return traced_size * numerator // denominator
    with before.graph.inserting_before(before):
        # Times first, which keeps the division whole: 6 * 2 // 4 is 3, where 6 // 4 * 2 is 2.
        product = before.graph.call_function(operator.mul, (value, numerator))
        return before.graph.call_function(operator.floordiv, (product, denominator))


def rewrite_literals(
    graph_module: fx.GraphModule, inference: Inference, kept: Mapping[Axis, int]
) -> list[fx.Node]:
    """Make every size in the graph the slim one; return the nodes that changed.

    Args:
        graph_module: the graph, in the ATen dialect, whose tensors are slim already.
        inference: layouts by node of this graph.
        kept: how many slots of each cut axis are left.

    """
    changed = []
    # A list, since rewriting adds nodes.
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.name not in inference.nodes:
            continue
        call_before = (node.target, node.args, dict(node.kwargs))
        if node.target is aten.sym_size.int:
            _restore_size(node, inference, kept)
        rewrite = _find_rewrite(node.target)
        if rewrite is not None:
            rewrite(_Site(node, inference, kept))
        if call_before != (node.target, node.args, dict(node.kwargs)):
            changed.append(node)
    graph_module.recompile()
    return changed


def _find_rewrite(target: Any) -> Callable[[_Site], None] | None:
    packet = getattr(target, "overloadpacket", None)
    name = target._schema.name if isinstance(target, OpOverload) else None
    return _REWRITES.get(packet) or _REWRITES.get(name)


def _restore_size(node: fx.Node, inference: Inference, kept: Mapping[Axis, int]) -> None:
    """Give the users of a size the original one."""
    tensor, dim = node.args
    layout = inference.nodes[tensor.name][dim]  # type: ignore[union-attr,index]
    if not touches(layout, kept):
        return
    # `x.shape[1] // 64` was written for the original. Listed now: the new nodes use `node` too.
    users = list(node.users)
    original = scale_size(node, size_of(layout), kept_size(layout, kept), before=node.next)
    for user in users:
        user.replace_input_with(node, original)


def _sizes(name: str) -> Callable[[_Site], None]:
    """Return the rewrite of operators that take the sizes of their result."""

    def rewrite(site: _Site) -> None:
        if name not in site.arguments:  # an overload that takes no sizes, as view.dtype
            return
        sizes = site.arguments[name]
        # From the end, where sizes belong; not `[-len(sizes):]`, which is all of them for none.
        layouts = site.output[len(site.output) - len(sizes) :]
        site.set(name, [site.resize(s, layout) for s, layout in zip(sizes, layouts, strict=True)])

    return rewrite


def _unflatten(site: _Site) -> None:
    dim = site.arguments["dim"] % len(site.layouts("self"))
    sizes = site.arguments["sizes"]
    layouts = site.output[dim : dim + len(sizes)]
    site.set("sizes", [site.resize(s, layout) for s, layout in zip(sizes, layouts, strict=True)])


def _pieces(site: _Site) -> None:
    dim = site.arguments["dim"]
    pieces = [layouts[dim] for layouts in site.output]
    if any(map(site.is_cut, pieces)):
        # `chunk(x, 2)` makes pieces alike, of which the slim ones need not be.
        sizes = [site.slim_size(piece) for piece in pieces]
        source = site.arguments["self"]
        site.replace_by(aten.split_with_sizes.default, (source, sizes, dim))


def _slice(site: _Site) -> None:
    layout = site.layouts("self")[site.arguments["dim"]]
    if not site.is_cut(layout):
        return
    if site.arguments["step"] != 1:
        # Whole strides go, so the start stays where it is from the front: -5 of six is 1.
        site.set("start", slice(site.arguments["start"], None).indices(size_of(layout))[0])
        return
    bounds = site.arguments["start"], site.arguments["end"]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return
    start, end, _ = slice(*bounds).indices(size_of(layout))
    site.set("start", _count_kept_before(site, layout, start))
    if not _is_open(bounds[1]):  # else it ends where the dimension does, at any size of the inputs
        site.set("end", _count_kept_before(site, layout, max(start, end)))


def _is_open(end: int | None) -> bool:
    return end is None or end == torch.iinfo(torch.int64).max


def _count_kept_before(site: _Site, layout: Layout, position: int) -> int:
    return site.slim_size(cut(layout, [position], _NO_REASON)[0])


def _select(site: _Site) -> None:
    layout = site.layouts("self")[site.arguments["dim"]]
    index = site.arguments["index"]
    if site.is_cut(layout) and isinstance(index, int):
        site.set("index", _count_kept_before(site, layout, index % size_of(layout)))


def _squeeze(site: _Site) -> None:
    layouts = site.layouts("self")
    if not any(map(site.is_cut, layouts)):
        return
    dims = site.arguments.get("dim", list(range(len(layouts))))
    dims = [dims] if isinstance(dims, int) else dims
    # A dimension of which one slot is left has size 1 now and must not go.
    unit_dims = [dim for dim in dims if size_of(layouts[dim]) == 1]
    site.replace_by(aten.squeeze.dims, (site.arguments["self"], unit_dims))


def _narrow(site: _Site) -> None:
    dim = site.arguments["dim"]
    layout, start = site.layouts("self")[dim], site.arguments["start"]
    if site.is_cut(layout):
        site.set("start", _count_kept_before(site, layout, start % size_of(layout)))
        site.set("length", site.slim_size(site.output[dim]))


def _repeat_by(name: str) -> Callable[[_Site], None]:
    """Return the rewrite of operators that repeat their last dimensions so many times."""

    def rewrite(site: _Site) -> None:
        repeats = list(site.arguments[name])
        if not repeats:  # of a last dimension none: [-0:] would be all
            return
        # More repeats than dimensions: those in front are of new dimensions, whose layout is None.
        layouts: list[Layout | None] = [None] * len(repeats) + list(site.layouts("self"))
        dims = zip(repeats, layouts[-len(repeats) :], site.output[-len(repeats) :], strict=True)
        new_repeats = []
        for times, source, result in dims:
            source_size = 1 if source is None else site.slim_size(source)
            new_repeats.append(
                site.slim_size(result) // source_size if site.is_cut(result) else times
            )
        site.set(name, new_repeats)

    return rewrite


def _repeat_interleave(site: _Site) -> None:
    dim = site.arguments["dim"]
    if dim is not None and site.is_cut(site.output[dim]):
        source_size, result_size = (
            site.slim_size(site.layouts("self")[dim]),
            site.slim_size(site.output[dim]),
        )
        site.set("repeats", result_size // source_size)
        if site.arguments["output_size"] is not None:
            site.set("output_size", result_size)


def _pad(site: _Site) -> None:
    amounts = list(site.arguments["pad"])
    for i in range(len(amounts) // 2):
        # `[left, right, top, bottom]`: the first two are those of the last dimension.
        result, before, after = site.output[-1 - i], amounts[2 * i], amounts[2 * i + 1]
        source = site.layouts("self")[-1 - i]
        if not site.is_cut(result) and not site.is_cut(source):
            continue
        # At each end slots are added or, by a negative amount, dropped: the result is (added +
        # inside + added), the source (dropped + inside + dropped), and one of each two is empty.
        result_ends = [max(before, 0), size_of(result) - max(after, 0)]
        result_pieces = cut(result, result_ends, _NO_REASON)
        source_ends = [max(-before, 0), size_of(source) - max(-after, 0)]
        source_pieces = cut(source, source_ends, _NO_REASON)
        for offset, side in ((0, 0), (1, 2)):
            amounts[2 * i + offset] = site.slim_size(result_pieces[side]) - site.slim_size(
                source_pieces[side]
            )
    site.set("pad", amounts)


def _drop_as_strided(site: _Site) -> None:
    # The slim tensor has other strides. Only where it changed nothing is there something to cut.
    if any(map(site.is_cut, site.output)):
        site.replace_by(aten.alias.default, (site.arguments["self"],))


def _normalized_shape(site: _Site) -> None:
    shape = site.arguments["normalized_shape"]
    layouts = site.layouts("input")[-len(shape) :]
    site.set(
        "normalized_shape",
        [site.resize(s, layout) for s, layout in zip(shape, layouts, strict=True)],
    )


def _group_norm(site: _Site) -> None:
    channels, groups = site.layouts("input")[1], site.arguments["num_groups"]
    group_size = size_of(channels) // groups
    if site.is_cut(channels) and can_split(channels, group_size):
        site.set("num_groups", site.slim_size(split(channels, group_size, _NO_REASON)[0]))


def _convolution_groups(site: _Site) -> None:
    weight = site.layouts("weight")
    transposed = site.arguments.get("transposed", "transpose" in str(site.func))
    # Weights are `[out, in / groups]`, transposed ones `[in, out / groups]`: the channels of that
    # side, divided by weight[1], are the groups.
    outer = site.output if transposed else site.layouts("input")
    if site.arguments["groups"] != 1:
        site.set("groups", site.slim_size(outer[1]) // site.slim_size(weight[1]))


def _deformed_groups(site: _Site) -> None:
    _convolution_groups(site)
    window = math.prod(size_of(layout) for layout in site.layouts("weight")[2:])
    # The channels of the offsets are `[offset groups, positions in the window, 2]`.
    site.set("offset_groups", site.slim_size(site.layouts("offset")[1]) // (2 * window))


def _attention_scale(site: _Site) -> None:
    size = site.layouts("query")[-1]
    # By default 1 / sqrt(head size), which would change with the size.
    if site.is_cut(size) and site.arguments["scale"] is None:
        site.set("scale", 1 / math.sqrt(size_of(size)))


def _shuffle_groups(site: _Site) -> None:
    channels, groups = site.layouts("self")[1], site.arguments["groups"]
    group_size = size_of(channels) // groups
    if site.is_cut(channels) and can_split(channels, group_size):
        site.set("groups", site.slim_size(split(channels, group_size, _NO_REASON)[0]))


_REWRITES: dict[Any, Callable[[_Site], None]] = {
    **dict.fromkeys(
        [aten.view, aten.expand, aten.zeros, aten.ones, aten.empty, aten.full],
        _sizes("size"),
    ),
    **dict.fromkeys([aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full], _sizes("size")),
    **dict.fromkeys([aten._unsafe_view], _sizes("size")),
    aten.reshape: _sizes("shape"),
    aten.unflatten: _unflatten,
    **dict.fromkeys([aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_chunk], _pieces),
    **dict.fromkeys([aten.unsafe_split, aten.unsafe_split_with_sizes, aten.tensor_split], _pieces),
    aten.as_strided: _drop_as_strided,
    aten.slice: _slice,
    aten.select: _select,
    aten.squeeze: _squeeze,
    aten.narrow: _narrow,
    aten.repeat: _repeat_by("repeats"),
    aten.tile: _repeat_by("dims"),
    aten.repeat_interleave: _repeat_interleave,
    **dict.fromkeys([aten.pad, aten.constant_pad_nd], _pad),
    **dict.fromkeys([aten.layer_norm, aten.rms_norm, aten.native_layer_norm], _normalized_shape),
    aten.group_norm: _group_norm,
    **dict.fromkeys([aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution], _convolution_groups),
    **dict.fromkeys(
        [aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d], _convolution_groups
    ),
    "torchvision::deform_conv2d": _deformed_groups,  # by name, as it may not be loaded
    aten.scaled_dot_product_attention: _attention_scale,
    **dict.fromkeys([aten.channel_shuffle, aten.native_channel_shuffle], _shuffle_groups),
}
