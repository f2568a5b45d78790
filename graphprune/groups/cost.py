"""What a model costs, as a function of how many slots of each axis are kept.

Parameters and MACs (one multiply and add) are both sums of products of dimension sizes, so both are
lists of terms over layouts, and both are true when several axes of one layer shrink together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from graphprune.distributed.wrappers import unwrap
from graphprune.inference.infer import infer
from graphprune.inference.recorded import Inference, Step
from graphprune.layout import Axis, Layout, free_axes, size_of
from graphprune.masks import kept_size
from graphprune.ops.block_sparse_recurrent import OPERATOR
from graphprune.rules.recurrent import GATES
from graphprune.utils.inputs import Inputs

aten = torch.ops.aten


# ONNX Runtime's convolution kernels take channels in blocks of that many: a started one costs as a whole.
CONVOLUTION_BLOCK = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


class Amount(Protocol):
    """What a model costs, in any unit."""

    def total(self, kept: Mapping[Axis, int] | None = None) -> float:
        """Return the cost once only `kept[axis]` slots of each axis are left."""
        ...


@dataclass(frozen=True)
class Cost:
    """A sum of products of dimension sizes, each rounded up to a multiple of `block` where it is cut."""

    constant: int
    terms: tuple[tuple[int, tuple[Layout, ...]], ...]
    block: int = 1

    @classmethod
    def of(cls, products: Iterable[Sequence[Layout]], block: int = 1) -> Cost:
        """Return the cost whose terms are the given products of dimensions."""
        constant, terms = 0, []
        for dims in products:
            varying = tuple(dim for dim in dims if free_axes(dim))
            factor = prod(size_of(dim) for dim in dims if not free_axes(dim))
            if varying:
                terms.append((factor, varying))
            else:
                constant += factor
        return cls(constant, tuple(terms), block)

    def total(self, kept: Mapping[Axis, int] | None = None) -> int:
        """Return the cost once only `kept[axis]` slots of each axis are left."""
        kept_counts = kept or {}
        varying = (f * prod(self._size(dim, kept_counts) for dim in dims) for f, dims in self.terms)
        return self.constant + sum(varying)

    def _size(self, dim: Layout, kept_counts: Mapping[Axis, int]) -> int:
        # rounded up, -(-7 // 4) * 4 being 8, but to no more than the dimension has, which may end in a
        # started block too
        return min(-(-kept_size(dim, kept_counts) // self.block) * self.block, size_of(dim))


def parameter_cost(inference: Inference) -> Cost:
    """Return the number of parameters, tied ones counted once."""
    return Cost.of(list(inference.parameters[name]) for name in sorted(inference.trainable))


def mac_cost(inference: Inference) -> Cost:
    """Return the multiply-adds of convolutions and matrix products for the example inputs."""
    return Cost.of(dims for step in inference.steps for dims in mac_terms(step))


def work_of(steps: Sequence[Step]) -> list[Cost]:
    """Return what the time of some operators is a function of.

    That is their multiply-adds, channels of convolutions rounded up to the blocks that kernels take; where
    there are none, the numbers that they read and write.
    """
    blocks = {aten.convolution: CONVOLUTION_BLOCK}
    products = [Cost.of(mac_terms(s), blocks.get(s.func.overloadpacket, 1)) for s in steps]
    heavy = [cost for cost in products if cost.constant or cost.terms]
    return heavy or [Cost.of(v.layouts for s in steps for v in (*s.inputs, *s.outputs))]


def mac_terms(step: Step) -> Iterator[list[Layout]]:
    """Yield the products of dimensions that count an operator's multiply-adds."""
    packet = step.func.overloadpacket
    if packet is aten.convolution:
        data, weight = step.inputs[0].layouts, step.inputs[1].layouts
        # each of its entries meets `weight[1:]` once: weights are `[out, in / groups, *window]`, transposed
        # ones `[in, out / groups, *window]`
        window_centres = data if step.arguments["transposed"] else step.outputs[0].layouts
        yield [*window_centres, *weight[1:]]
    elif packet in (aten.mm, aten.bmm, aten.mv, aten.dot):
        yield [*step.outputs[0].layouts, step.inputs[0].layouts[-1]]
    elif packet in (aten.addmm, aten.baddbmm):
        yield [*step.outputs[0].layouts, step.inputs[1].layouts[-1]]
    elif packet in GATES:  # each matrix of each layer meets each step of each sequence
        positions = step.inputs[0].layouts[:-1]
        matrices = (value.layouts for value in step.inputs[1:] if len(value.layouts) == 2)
        yield from ([*positions, *matrix] for matrix in matrices)
    elif packet is OPERATOR:
        # data `[time, features, batch]`; behind the states matrices or their blocks, and of one dimension
        # the places of blocks and the biases
        time, _, batch = step.inputs[0].layouts
        weights = step.inputs[1 + len(step.arguments["states"]) :]
        yield from ([time, batch, *v.layouts] for v in weights if len(v.layouts) > 1)


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-adds of a model's convolutions and matrix products on the inputs.

    Units: MACs, one multiply and one add, for the whole batch of the example inputs.
    """
    return mac_cost(infer(unwrap(model), Inputs.of(example_inputs))).total()


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
