"""Which form of a sparse convolution runs fastest in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphprune.onnx_export.providers import Runtime
from graphprune.runtime.autotune import IR_VERSION, OPSET, benchmark_variants

Form: TypeAlias = Literal["dense", "grouped", "product"]


@dataclass(frozen=True)
class ConvolutionShape:
    """What the time of a sparse convolution depends on.

    Attributes:
        data: of its input, `[batch, channels, *space]`.
        weight: of its dense weight, `[filters, channels, *window]`.
        blocks: of filters that share their channels.
        filters: of a block.
        channels: that a block reads.
        stride: by dimension of space.
        padding: likewise, on each side.
        dilation: likewise.
        gathers: whether the channels have to be put in the blocks' order.
        sorts: whether the filters have to be put in their own order afterwards.

    """

    data: tuple[int, ...]
    weight: tuple[int, ...]
    blocks: int
    filters: int
    channels: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    gathers: bool
    sorts: bool

    @property
    def forms(self) -> list[Form]:
        """The forms that there are: a window of one position, moved by one, is a product of matrices."""
        ones = (1,) * len(self.stride)
        is_product = self.weight[2:] == self.stride == ones and not any(self.padding)
        return ["dense", "grouped", "product"] if is_product else ["dense", "grouped"]


def find_fastest_form(shape: ConvolutionShape, runtime: Runtime) -> Form:
    """Return the form that takes the least time, measured in turns."""
    feed = {"x": np.random.default_rng(0).standard_normal(shape.data).astype(np.float32)}
    times = benchmark_variants({form: _model(shape, form) for form in shape.forms}, feed, runtime)
    return min(shape.forms, key=times.__getitem__)


class _Nodes:
    """The nodes of a small ONNX graph, each reading the one before."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.last = "x"

    def add(self, kind: str, *arrays: object, weight_first: bool = False, **options: Any) -> None:
        """Add a node that reads the last value and some constants."""
        names = [f"c{len(self.tensors) + index}" for index in range(len(arrays))]
        self.tensors += [
            numpy_helper.from_array(np.asarray(array), name)
            for array, name in zip(arrays, names, strict=True)
        ]
        inputs = [*names, self.last] if weight_first else [self.last, *names]
        self.last = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [self.last], **options))


def _model(shape: ConvolutionShape, form: Form) -> onnx.ModelProto:
    """Return the convolution between two cheap ones, which have data in the layout of such kernels."""
    nodes = _Nodes()
    _add_depthwise(nodes, shape.data[1], len(shape.stride))
    _add_convolution(nodes, shape, form)
    nodes.add("Relu")
    _add_depthwise(nodes, shape.weight[0], len(shape.stride))
    value_infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("x", shape.data), (nodes.last, [None] * len(shape.data)))
    ]
    graph = helper.make_graph(nodes.nodes, form, value_infos[:1], value_infos[1:], nodes.tensors)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def _add_depthwise(nodes: _Nodes, channels: int, dims: int) -> None:
    nodes.add("Conv", np.ones((channels, 1, *[1] * dims), np.float32), group=channels)


def _add_convolution(nodes: _Nodes, shape: ConvolutionShape, form: Form) -> None:
    outputs, inputs, *window = shape.weight
    if form == "dense":
        _add_conv(nodes, shape, (outputs, inputs, *window), 1)
        return
    # Blocks that are short of filters are filled up, so there may be more slots than outputs.
    slots = shape.blocks * shape.filters
    if shape.gathers:
        # Channels 7 apart: in order, they would be gathered faster than those of a trained layer.
        order = np.arange(shape.blocks * shape.channels, dtype=np.int64)
        nodes.add("Gather", order * 7 % inputs, axis=1)
    if form == "grouped":
        _add_conv(nodes, shape, (slots, shape.channels, *window), shape.blocks)
    else:
        # [blocks, filters, channels] times [batch, blocks, channels, positions], one product a block.
        batch, space = shape.data[0], shape.data[2:]
        nodes.add("Reshape", np.array([batch, shape.blocks, shape.channels, math.prod(space)]))
        weight = _weights((1, shape.blocks, shape.filters, shape.channels))
        nodes.add("MatMul", weight, weight_first=True)
        nodes.add("Reshape", np.array([batch, slots, *space]))
    if shape.sorts:
        nodes.add("Gather", np.arange(outputs, dtype=np.int64) * 7 % slots, axis=1)


def _add_conv(nodes: _Nodes, shape: ConvolutionShape, weight: Sequence[int], groups: int) -> None:
    nodes.add(
        "Conv", _weights(weight), group=groups, kernel_shape=list(weight[2:]),
        strides=list(shape.stride), pads=[*shape.padding, *shape.padding],
        dilations=list(shape.dilation),
    )  # fmt: skip


def _weights(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
