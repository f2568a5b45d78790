"""Every rule against its operator: removing slots before or after the call must be the same.

For exact axes: the operator on operands whose removed slots are zero, restricted to the kept slots,
equals the operator on operands without those slots. Axes that a rule declares renormalised need only
give the shapes that the layouts say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphprune import rules
from graphprune.inference import Inference, LayoutInference, Step
from graphprune.layout import Axis, Concat, Mask, Product, leaves, mask_of
from graphprune.literals import restricted_arguments, rewrite_literals
from graphprune.rules import Call, Rule, rule_for, tensors_in
from graphprune.rules.registry import POINTWISE
from graphprune.shrink import sliced
from tests.rule_cases import CANNOT_RUN, cases

aten = torch.ops.aten
CASES = list(cases())
DRAWS = 6


def check(func: Any, args: Any, kwargs: Any, rule: Rule | None = None) -> None:
    """Raise AssertionError where a rule does not describe its operator."""
    mode = LayoutInference()
    operands = list(tensors_in([*args, *kwargs.values()]))
    for tensor in operands:
        mode.declare(tensor, [Axis(size) for size in tensor.shape], "operand")
    result = mode.step(func, rule or rule_for(func), args, kwargs)
    outputs = list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))
    step = mode.found.steps[0]
    assert len(outputs) == len(step.outputs)
    axes = [axis for t in (*operands, *outputs) for x in mode.layouts_of(t) for axis in leaves(x)]
    free = list(dict.fromkeys(axis for axis in axes if axis.fixed is None))
    exact = [axis for axis in free if not axis.renormalised]
    for seed in range(DRAWS):
        _check_draw(mode, step, args, kwargs, masks_for(exact, seed), values=True)
        _check_draw(mode, step, args, kwargs, masks_for(free, seed), values=False)


def masks_for(axes: list[Axis], seed: int) -> dict[Axis, Mask]:
    """Return what stays of each axis: at least one slot, seldom all."""
    random = np.random.default_rng(seed)
    masks = {axis: random.random(axis.size) < 0.5 for axis in axes}
    for mask in masks.values():
        mask[random.integers(len(mask))] = True
    return masks


def _check_draw(
    mode: LayoutInference, step: Step, args: Any, kwargs: Any, masks: dict[Axis, Mask], values: bool
) -> None:
    def silent(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        for dim, layout in enumerate(mode.layouts_of(tensor)):
            copy.index_fill_(dim, torch.from_numpy((~mask_of(layout, masks)).nonzero()[0]), 0)
        return copy

    def small(tensor: Tensor) -> Tensor:
        found = sliced(tensor, mode.layouts_of(tensor), masks)
        return tensor if found is None else found

    full = _flat(step.func(*pytree.tree_map_only(Tensor, silent, args),
                           **pytree.tree_map_only(Tensor, silent, kwargs)))  # fmt: skip
    slim = _flat(_call_slim(mode, step, args, kwargs, masks, small))
    for value, wanted, given in zip(step.outputs, full, slim, strict=True):
        cut = sliced(wanted, value.layouts, masks)
        cut = wanted if cut is None else cut
        assert cut.shape == given.shape, f"shape {list(given.shape)}, not {list(cut.shape)}"
        if values and torch.Tag.nondeterministic_seeded not in step.func.tags:
            torch.testing.assert_close(given, cut, rtol=1e-9, atol=1e-9, equal_nan=True)


def _flat(result: Any) -> list[Tensor]:
    return list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))


def _call_slim(mode: Any, step: Step, args: Any, kwargs: Any, masks: Any, small: Any) -> Any:
    """Call the operator on small operands, its literals rewritten as they are in a graph."""
    kept = {axis: int(mask.sum()) for axis, mask in masks.items()}
    if "normalized_shape" in step.arguments or step.func is aten.native_group_norm.default:
        small_args, small_kwargs = pytree.tree_map_only(Tensor, small, (args, kwargs))
        new_args, new_kwargs = restricted_arguments(step, small_args, small_kwargs, kept)
        return step.func(*new_args, **new_kwargs)
    graph, found, data = fx.Graph(), Inference(), {}

    def placed(tensor: Tensor) -> fx.Node:
        node = graph.placeholder(f"operand{len(data)}")
        data[node.name] = small(tensor)
        found.nodes[node.name] = mode.layouts_of(tensor)
        return node

    node_args, node_kwargs = pytree.tree_map_only(Tensor, placed, (args, kwargs))
    node = graph.call_function(step.func, tuple(node_args), node_kwargs)
    layouts = [value.layouts for value in step.outputs]
    found.nodes[node.name] = layouts if len(layouts) > 1 or _gives_list(step) else layouts[0]
    graph.output(node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    rewrite_literals(module, found, kept)
    return module(*data.values())


def _gives_list(step: Step) -> bool:
    return "[]" in str(step.func._schema.returns[0].type) or "List" in str(
        step.func._schema.returns[0].type
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_rule_describes_its_operator(case: Any) -> None:
    check(*case)


def test_every_rule_is_checked_against_its_operator() -> None:
    checked = {func.overloadpacket for func, _, _ in CASES} | set(CANNOT_RUN)
    missing = [str(operator) for operator in rules.registered() if operator not in checked]
    assert not missing, f"rules without a case in rule_cases.py: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("func", "twin"),
    [
        (aten.add_.Tensor, POINTWISE),
        (aten.copy_.default, aten.copy),
        (aten.transpose_.default, aten.transpose),
        (aten.index_put_.default, aten.index_put),
        (aten.view_copy.default, aten.view),
        (aten.sigmoid.default, POINTWISE),
    ],
)
def test_in_place_and_copying_twins_share_a_rule(func: Any, twin: Any) -> None:
    assert rule_for(func) is rules.registered()[twin]


def test_an_operator_takes_one_rule() -> None:
    with pytest.raises(rules.registry.InvalidRequestError, match=r"aten\.mm has a rule already"):
        rules.register(lambda call: [], aten.mm)


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _pass(call: Call) -> Any:
    return [call.layouts_of(call.tensors[0])]


def _reversed_cat(call: Call) -> Any:
    operands = [call.layouts_of(t) for t in call["tensors"]]
    return [[operands[0][0], Concat(tuple(x[1] for x in reversed(operands)))]]


def _column_major(call: Call) -> Any:
    a, b, c = call.layouts("self")
    return [[a, Product((c, b))]]


def _off_by_one(call: Call) -> Any:
    from graphprune.layout import cut

    a, b = call.layouts("self")
    return [[a, cut(b, [2, 8])[1]]]


def _drop(position: int) -> Rule:
    def dropping(call: Call) -> Any:
        layouts = call.layouts_of(call.tensors[0])
        return [[x for i, x in enumerate(layouts) if i != position]]

    return dropping


def _tied_to_the_wrong(call: Call) -> Any:
    a, b = (call.layouts_of(t) for t in call.tensors)
    call.unify(a[0], b[0])
    return [[a[0], b[1]]]


P = rules.Pattern.parse
PLANTED = {
    "a convolution without groups": (
        P("b i *s, o k *w, o? -> b o *t"),
        (
            aten.convolution.default,
            (r(2, 6, 9), r(6, 2, 3), r(6), [1], [0], [1], False, [0], 3),
            {},
        ),
    ),
    "a product that contracts nothing": (
        P("m k, j n -> m n"),
        (aten.mm.default, (r(4, 6), r(6, 5)), {}),
    ),
    "a product that ties the wrong sides": (
        _tied_to_the_wrong,
        (aten.mm.default, (r(6, 6), r(6, 6)), {}),
    ),
    "a layer norm that is not marked": (
        P("*b c, c?, c? -> *b c"),
        (aten.native_layer_norm.default, (r(2, 6), [6], r(6), r(6), 1e-5), {}),
    ),
    "a concatenation in reverse": (
        _reversed_cat,
        (aten.cat.default, ([r(2, 5), r(2, 5)], 1), {}),
    ),
    "a reshape by columns": (
        _column_major,
        (aten.view.default, (r(2, 3, 4), [2, 12]), {}),
    ),
    "a slice that is off by one": (
        _off_by_one,
        (aten.slice.Tensor, (r(2, 12), 1, 3, 9), {}),
    ),
    "a flip that is not fixed": (_pass, (aten.flip.default, (r(2, 6), [1]), {})),
    "a roll that is not fixed": (_pass, (aten.roll.default, (r(2, 6), [1], [1]), {})),
    "a softmax that is not marked": (_pass, (aten._softmax.default, (r(2, 6), 1, False), {})),
    "a mean that is not marked": (_drop(1), (aten.mean.dim, (r(2, 6), [1]), {})),
    "a maximum that is not marked": (_drop(1), (aten.amax.default, (-r(2, 6).abs(), [1]), {})),
    "a sort that is not fixed": (
        lambda call: _pass(call) * 2,
        (aten.sort.default, (r(2, 6), 1), {}),
    ),
    "a sum over the wrong dimension": (_drop(0), (aten.sum.dim_IntList, (r(6, 6), [1]), {})),
    "a look-up in a vocabulary that is cut": (
        P("v d, *b -> *b d"),
        (aten.embedding.default, (r(9, 6), torch.arange(9)), {}),
    ),
    "an addition that ties nothing": (_pass, (aten.add.Tensor, (r(2, 6), r(2, 6)), {})),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_rule_is_caught(name: str) -> None:
    rule, (func, args, kwargs) = PLANTED[name]
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(func, args, kwargs, rule)
