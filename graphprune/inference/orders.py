"""Orders of slots that a model holds as numbers (`x[:, self.order]`): read, checked, numbered anew.

With three of four channels kept, `order = [3, 0, 2, 1]` without channel 2 is `[3, 0, 1]`, and these
are numbered 0, 1 and 2 in the slim model: `[2, 0, 1]`. The numbers may be read for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import fix
from graphprune.masks import Mask
from graphprune.rules import Numbers
from graphprune.utils.tensors import OF_AN_INDEX, may_be_an_order

aten = torch.ops.aten

_COPYING_OPERATORS = {
    aten.alias, aten.clone, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten._to_copy,
}  # fmt: skip


def passes_numbers_on(func: OpOverload, result: Tensor) -> bool:
    """Say whether a result of an operator holds the numbers of its operand."""
    return func.overloadpacket in _COPYING_OPERATORS and result.dtype in OF_AN_INDEX


def numbers_in(name: str, tensor: Tensor) -> Numbers | None:
    """Return what a tensor of that name holds, where it has values that may be an order of slots."""
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not may_be_an_order(tensor):
        return None
    # Within the mode of tensors without data, `tolist` would refuse to read a real one.
    with unset_fake_temporarily():
        return Numbers(name, tuple(tensor.tolist()))


def fix_misread_orders(inference: Inference, steps: Sequence[Step]) -> None:
    """Fix what comes in the order of numbers that an operator reads as anything but this order."""
    for step in steps:
        # An operator that indexes by an order reads it as one.
        for value in () if step.addresses else step.inputs:
            name = value.numbers.name if value.numbers else ""
            if name in inference.addressed and not _passes_on(value, step):
                why = replace(step.place, why="an order of channels that is read as numbers")
                fix(inference.parameters[name][0], why)


def _passes_on(value: Value, step: Step) -> bool:
    """Say whether the step's result is a copy of the numbers, not what it wrote in their place."""
    return any(output is not value and output.numbers == value.numbers for output in step.outputs)


def renumber(order: Tensor, kept: Mask) -> Tensor:
    """Return the order with its slots numbered as they are once only some are kept.

    Args:
        order: the kept slots, by the numbers they had, counted from the end where negative.
        kept: which slots are.

    """
    # `[kept, kept, gone, kept]` numbers its slots 0,
    # 1, 1, 2; the 1 of the third is never looked up.
    new_numbers = torch.from_numpy(kept).cumsum(0) - 1
    return new_numbers.to(order.device, order.dtype)[order.long()]
