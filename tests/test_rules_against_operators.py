"""Every rule against its operator, on random tensors: what the rule says may be cut, is cut.

The operator on operands whose removed slots are zero, without the removed slots of its result, must
equal the operator on operands that lack them. Wrong rules are planted to see that this catches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.errors import InvalidRequestError
from graphprune.inference import kernels
from graphprune.inference.orders import numbers_in, renumber
from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import Axis, Concat, Product, Reason, cut, free_axes, size_of
from graphprune.masks import Mask, count_kept_slots, kept_size, mask_of
from graphprune.rules import (
    Call,
    Layouts,
    Pattern,
    Rule,
    attention,
    bind_arguments,
    list_rules,
    register,
    rule_for,
    tensors_in,
)
from graphprune.shrink.graph_literals import restrict_arguments, rewrite_literals
from tests.rule_cases import CANNOT_RUN, CASES, Case, bits, whole, x

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


class _OurKernels(TorchDispatchMode):
    """Calls operators as an interpretation does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernels.run(func, args, kwargs or {})


class Examined:
    """A case, the layouts that a rule gives it, and the axes that these leave free."""

    def __init__(self, case: Case, rule: Rule) -> None:
        self.case = case
        self.arguments = bind_arguments(case.func, case.args, case.kwargs)
        self.operands = list(tensors_in(self.arguments.values()))
        self.layouts = {id(t): [Axis(size) for size in t.shape] for t in self.operands}
        self.result = kernels.run(case.func, case.args, case.kwargs)
        self.given = self._described(rule)
        dims = [dim for dims in (*self.layouts.values(), *self.given) for dim in dims]
        found = dict.fromkeys(axis for dim in dims for axis in free_axes(dim))
        self.free = [axis for axis in found if axis.size > 1]
        self.exact = [axis for axis in self.free if not axis.renormalised]

    def _described(self, rule: Rule) -> list[Layouts]:
        """Return the layouts of every output; as in inference, what is not described is fixed."""
        outputs = _tensors(self.result)
        layouts_of = lambda tensor: self.layouts[id(tensor)]  # noqa: E731
        numbers_of = lambda tensor: numbers_in(str(id(tensor)), tensor)  # noqa: E731
        strides = self.operands[0].stride() if self.operands else ()
        place = Reason("case")
        call = Call(self.case.func, self.arguments, layouts_of, outputs, place, strides, numbers_of)
        given: list[Layouts] = [list(dims) for dims in rule(call)][: len(outputs)]
        self.addressed = call.addressed
        for index, asks in call.asks.items():
            for ask in asks if index not in self.case.unread else ():
                ask()
        given += [[] for _ in outputs[len(given) :]]
        for index, output in enumerate(outputs):
            sizes, shape = list(map(size_of, given[index])), list(output.shape)
            assert index > 0 or sizes == shape, f"the rule says {sizes}, the operator {shape}"
            if sizes != shape:
                given[index] = [call.fixed(size, "not described") for size in shape]
        return given

    @property
    def in_structure(self) -> Any:
        """The layouts of the outputs, in the structure of the result."""
        layouts = iter(self.given)
        return pytree.tree_map_only(Tensor, lambda _: next(layouts), self.result)

    def silenced(self, masks: Mapping[Axis, Mask]) -> list[Tensor]:
        """Return what is left of the results when the removed slots of the operands are zero."""

        def silent(tensor: Tensor) -> Tensor:
            zeroed = tensor.clone()
            if str(id(tensor)) in self.addressed:
                return zeroed
            for dim, layout in enumerate(self.layouts[id(tensor)]):
                if tensor.stride(dim) == 0:  # expanded: a view, which verification leaves alone
                    continue
                gone = (~mask_of(layout, masks)).nonzero()[0]
                zeroed = zeroed.index_fill(dim, torch.from_numpy(gone), 0)
            return zeroed

        args, kwargs = pytree.tree_map_only(Tensor, silent, (self.case.args, self.case.kwargs))
        results = _tensors(kernels.run(self.case.func, args, kwargs))
        return [_restricted(t, dims, masks) for t, dims in zip(results, self.given, strict=True)]

    def slim(self, masks: Mapping[Axis, Mask]) -> list[Tensor]:
        """Return the results on operands that lack the removed slots, with literals rewritten."""
        kept = count_kept_slots(masks)
        program = self._program(kept)
        with _OurKernels():
            return _tensors(program(*[self._slim_operand(t, masks) for t in self.operands]))

    def _slim_operand(self, tensor: Tensor, masks: Mapping[Axis, Mask]) -> Tensor:
        smaller = _restricted(tensor, self.layouts[id(tensor)], masks)
        order_of = self.addressed.get(str(id(tensor)))
        return smaller if order_of is None else renumber(smaller, mask_of(order_of, masks))

    def _program(self, kept: Mapping[Axis, int]) -> fx.GraphModule:
        graph, nodes = fx.Graph(), {}
        placeholders: dict[int, fx.Node] = {}
        for number, tensor in enumerate(self.operands):
            node = graph.placeholder(f"operand_{number}")
            placeholders[id(tensor)] = node
            nodes[node.name] = self.layouts[id(tensor)]
        given = pytree.tree_map_only(
            Tensor, lambda t: placeholders[id(t)], (self.case.args, self.case.kwargs)
        )
        call = graph.call_function(self.case.func, *given)
        nodes[call.name] = self.in_structure
        graph.output(call)
        program = fx.GraphModule({}, graph)
        rewrite_literals(program, Inference(nodes=nodes), kept)
        self._rewrite_the_rest(call, kept)
        program.recompile()
        return program

    def _rewrite_the_rest(self, node: fx.Node, kept: Mapping[Axis, int]) -> None:
        """Rewrite literals of operators that no exported graph holds."""
        packet = self.case.func.overloadpacket
        if packet in _STATISTICS:
            inputs = [Value(self.layouts[id(tensor)], "operand") for tensor in self.operands]
            step = Step(self.case.func, Reason("case"), inputs, [], self.arguments)
            node.args, node.kwargs = restrict_arguments(step, node.args, dict(node.kwargs), kept)
        for name, value in _OTHER_LITERALS.get(packet, _nothing)(self, kept).items():
            names = [argument.name for argument in self.case.func._schema.arguments]
            if names.index(name) < len(node.args):
                node.update_arg(names.index(name), value)
            else:
                node.update_kwarg(name, value)


_STATISTICS = {aten.native_group_norm}


def _nothing(examined: Examined, kept: Mapping[Axis, int]) -> dict[str, Any]:
    return {}


def _size(examined: Examined, kept: Mapping[Axis, int]) -> dict[str, Any]:
    return {"size": [kept_size(layout, kept) for layout in examined.given[0]]}


def _size_and_stride(examined: Examined, kept: Mapping[Axis, int]) -> dict[str, Any]:
    sizes = _size(examined, kept)["size"]
    return {"size": sizes, "stride": [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]}


def _scale(examined: Examined, kept: Mapping[Axis, int]) -> dict[str, Any]:
    size, scale = examined.arguments["query"].shape[-1], examined.arguments["scale"]
    return {"scale": 1 / math.sqrt(size) if scale is None else scale}


_OTHER_LITERALS: dict[Any, Callable[[Examined, Mapping[Axis, int]], dict[str, Any]]] = {
    aten.empty_permuted: _size,
    aten.empty_strided: _size_and_stride,
    aten.new_empty_strided: _size_and_stride,
    aten._scaled_dot_product_flash_attention_for_cpu: _scale,
}


def _tensors(result: Any) -> list[Tensor]:
    return list(tensors_in(result if isinstance(result, (tuple, list)) else [result]))


def _restricted(tensor: Tensor, layouts: Layouts, masks: Mapping[Axis, Mask]) -> Tensor:
    """Return the tensor without the removed slots."""
    for dim, layout in enumerate(layouts):
        where = torch.from_numpy(mask_of(layout, masks).nonzero()[0])
        tensor = tensor.index_select(dim, where)
    return tensor.clone()


# A squeeze would drop a dimension of which one slot is left; torch takes an LSTM for one without
# projections where as many hidden slots are left as are passed on.
_LEAST = {aten.squeeze: 2, aten.lstm: 3}


def _draws(axes: list[Axis], seed: int, least: int) -> Iterator[dict[Axis, Mask]]:
    """Yield random keep-masks of each axis alone, of half of them and of all.

    Of each axis at least one slot goes, and at least `least` stay.
    """
    chance = np.random.default_rng(seed)
    halves = [[axis for axis in axes if chance.random() < 0.5] for _ in range(3)]
    if not axes:
        return
    for chosen in ([[axis] for axis in axes] * 2) + halves + [axes] * 3:
        masks = {}
        for axis in chosen:
            order = chance.permutation(axis.size)
            masks[axis] = order < chance.integers(min(least, axis.size - 1), axis.size)
        yield masks


def check(case: Case, rule: Rule) -> Examined:
    """Assert that the operator agrees with what the rule says of the call."""
    examined = Examined(case, rule)
    random = torch.Tag.nondeterministic_seeded in case.func.tags
    varies = random or case.func.overloadpacket in _WITHOUT_VALUES
    least = _LEAST.get(case.func.overloadpacket, 1)
    for masks in _draws(examined.exact, 1, least):
        _assert_same(examined, masks, values=not varies)
    for masks in _draws(examined.free, 2, least) if examined.free != examined.exact else ():
        _assert_same(examined, masks, values=False)
    return examined


def _assert_same(examined: Examined, masks: Mapping[Axis, Mask], *, values: bool) -> None:
    expected = examined.silenced(masks)
    try:
        found = examined.slim(masks)
    except (RuntimeError, IndexError) as failure:
        raise AssertionError(f"does not run on what is left: {failure}") from failure
    assert all(axis.bound is None for axis in examined.free), "a literal splits an axis"
    assert [t.shape for t in found] == [t.shape for t in expected]
    for index, (given, wanted) in enumerate(zip(found, expected, strict=True)):
        if values and index not in examined.case.unread:
            torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _name(case: Case) -> str:
    shapes = [str(list(t.shape)) for t in tensors_in([*case.args, *case.kwargs.values()])]
    return f"{case.func}-{','.join(shapes)}".replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_rule_of_an_operator_agrees_with_it(case: Case) -> None:
    rule = rule_for(case.func)
    assert rule is not None
    examined = check(case, rule)
    if case.finds == "renormalised":
        assert any(axis.renormalised for axis in examined.free)
    else:
        assert ("exact" if examined.exact else "fixed") == case.finds


def test_every_rule_has_a_case() -> None:
    called = {case.func for case in CASES} | {case.func._schema.name for case in CASES}
    missing = [str(op) for op in list_rules() if op not in called and op not in CANNOT_RUN]
    assert not missing, f"rules without a case in rule_cases.py: {', '.join(missing)}"
    assert set(CANNOT_RUN) <= set(list_rules()) - called


@pytest.mark.parametrize(
    ("twin", "operator"),
    [
        (aten.add_.Tensor, "aten::add"),
        (aten.relu_.default, "aten::add"),
        (aten.copy_.default, "aten::copy"),
        (aten.masked_fill_.Scalar, "aten::masked_fill"),
        (aten.transpose_.default, "aten::transpose"),
        (aten.squeeze_.dim, "aten::squeeze"),
        (aten.index_put_.default, "aten::index_put"),
        (aten.scatter_add_.default, "aten::scatter_add"),
        (aten.cumsum_.default, "aten::cumsum"),
        (aten.permute_copy.default, "aten::permute"),
        (aten.expand_copy.default, "aten::expand"),
    ],
    ids=str,
)
def test_in_place_and_copying_twins_share_a_rule(twin: Any, operator: str) -> None:
    assert rule_for(twin) is list_rules()[operator]


@pytest.mark.parametrize(
    ("a", "b", "ends"),
    [
        ((8, 16), (3, 16, 24), [2, 5, 8]),
        ((8, 16), (3, 16, 24), [2, 2, 8]),
        ((3, 8, 16), (16, 8), [0, 4, 8]),
        ((16, 24), (24, 32), [4, 12, 24]),
        ((3, 8, 16), (3, 16, 8), None),
    ],
)
def test_products_of_groups_are_those_of_torch(a: Any, b: Any, ends: list[int] | None) -> None:
    operands = x(*a).float(), x(*b).float()
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    wanted = torch._grouped_mm(*operands, offs=offsets)
    doubles = [operand.double() for operand in operands]
    given = kernels.run(aten._grouped_mm.default, (*doubles, offsets), {})
    torch.testing.assert_close(given.float(), wanted)


def test_an_operator_without_a_rule_has_none() -> None:
    assert rule_for(aten.linalg_qr.default) is None
    assert rule_for(aten.index_copy.default) is not list_rules()["aten::index"]


def test_an_operator_takes_one_rule() -> None:
    with pytest.raises(InvalidRequestError, match=r"aten\.mm has a rule already"):
        register(lambda call: [], aten.mm)


def _pass(call: Call) -> Any:
    return [call.layouts_of(call.tensors[0])] * len(call.outputs)


def _drop(position: int) -> Rule:
    def dropping(call: Call) -> Any:
        layouts = call.layouts_of(call.tensors[0])
        return [[layout for i, layout in enumerate(layouts) if i != position]]

    return dropping


def _mm_contracting_rows(call: Call) -> Any:
    a, b = (call.layouts_of(tensor) for tensor in call.tensors)
    call.unify(a[0], b[0])
    return [[a[0], b[1]]]


def _cat_reversed(call: Call) -> Any:
    rows, columns = zip(*(call.layouts_of(tensor) for tensor in call.tensors), strict=True)
    call.unify(*rows)
    return [[rows[0], Concat(columns[::-1])]]


def _cat_that_ties_only_its_parts(call: Call) -> Any:
    rows, columns = zip(*(call.layouts_of(tensor) for tensor in call.tensors), strict=True)
    return [[rows[0], Concat(columns)]]


def _view_by_columns(call: Call) -> Any:
    batch, rows, columns = call.layouts("self")
    return [[batch, Product((columns, rows))]]


def _slice_off_by_one(call: Call) -> Any:
    rows, columns = call.layouts("self")
    where = [call["start"] - 1, call["end"] - 1]
    return [[rows, cut(columns, where, Reason("a slice"))[1]]]


def _expand_of_the_wrong_dimension(call: Call) -> Any:
    rows = call.layouts("self")[0]
    return [[Axis(size_of(rows)), rows]]


def _stack_with_a_free_dimension(call: Call) -> Any:
    return [[Axis(len(call["tensors"])), *call.layouts_of(call.tensors[0])]]


def _attention_with_untied_heads(call: Call) -> Any:
    query, key, value = (call.layouts(name) for name in ("query", "key", "value"))
    for mine, its in zip(key[:-1], value[:-1], strict=True):
        call.unify(mine, its)
    call.renormalise(key[-2], "softmax")
    call.unify(query[0], key[0])
    call.unify(query[-1], key[-1])
    return [[*query[:-1], value[-1]], query[:-1]]


def _attention_whose_mask_is_free(call: Call) -> Any:
    mask, arguments = call["attn_mask"], {**call.arguments, "attn_mask": None}
    assert mask is not None
    return attention.attention(
        Call(call.func, arguments, call.layouts_of, call.outputs, call.reason)
    )


def _write_to_any_slot(call: Call) -> Any:
    call.unify(call.layouts("self")[1], call.layouts("values")[1])
    return [call.layouts("self")]


def _one(func: Any, *args: Any, **kwargs: Any) -> Case:
    return Case(func, args, kwargs, "exact")


_READ = Pattern.parse
_QKV = (x(2, 4, 5, 8), x(2, 4, 7, 8), x(2, 4, 7, 8))
# The kernel itself does not check shapes, which are wrong here; this one does.
_ATTEND = aten.scaled_dot_product_attention.default
_CONVOLVE = (aten.convolution.default, x(2, 6, 9), x(6, 2, 3), x(6), [1], [0], [1], False, [0], 3)
PLANTED: dict[str, tuple[Rule, Case]] = {
    "convolution without groups": (_READ("b i *s, o k *w, o? -> b o *t"), _one(*_CONVOLVE)),
    "convolution whose groups keep all channels": (
        _READ("b (g i) *s, o i *w, o? -> b o *t"),
        _one(*_CONVOLVE),
    ),
    "mm that contracts nothing": (
        _READ("m k, j n -> m n"),
        _one(aten.mm.default, x(4, 6), x(6, 5)),
    ),
    "mm that contracts rows": (_mm_contracting_rows, _one(aten.mm.default, x(6, 6), x(6, 6))),
    "layer_norm that is not marked": (
        _READ("*b c, c?, c? -> *b c"),
        _one(aten.native_layer_norm.default, x(2, 6), [6], x(6), x(6), 1e-5),
    ),
    "cat in reverse": (_cat_reversed, _one(aten.cat.default, [x(2, 5), x(2, 5)], 1)),
    "cat that forgets the rows": (
        _cat_that_ties_only_its_parts,
        _one(aten.cat.default, [x(4, 5), x(4, 3)], 1),
    ),
    "stack that lets go of a tensor": (
        _stack_with_a_free_dimension,
        _one(aten.stack.default, [x(2, 3), x(2, 3), x(2, 3)]),
    ),
    "view by columns": (_view_by_columns, _one(aten.view.default, x(2, 3, 4), [2, 12])),
    "slice off by one": (_slice_off_by_one, _one(aten.slice.Tensor, x(2, 12), 1, 3, 9)),
    "expand of the wrong dimension": (
        _expand_of_the_wrong_dimension,
        _one(aten.expand.default, x(4, 1), [4, 4]),
    ),
    "transpose that does nothing": (_pass, _one(aten.transpose.int, x(4, 4), 0, 1)),
    "flip that keeps the order": (_pass, _one(aten.flip.default, x(2, 6), [1])),
    "index that keeps the order": (
        _pass,
        _one(aten.index_select.default, x(2, 6), 1, torch.tensor([3, 1, 0, 5, 4, 2])),
    ),
    "roll that is not fixed": (_pass, _one(aten.roll.default, x(2, 6), [1], [1])),
    "softmax that is not marked": (_pass, _one(aten._softmax.default, x(2, 6), 1, False)),
    "mean that is not marked": (_drop(1), _one(aten.mean.dim, x(2, 6), [1])),
    "amax that is not marked": (_drop(1), _one(aten.amax.default, -x(2, 6).abs(), [1])),
    "sum that keeps the dimension": (_pass, _one(aten.sum.dim_IntList, x(6, 6), [1])),
    "sum over the wrong dimension": (_drop(0), _one(aten.sum.dim_IntList, x(6, 6), [1])),
    "sort that is not fixed": (_pass, _one(aten.sort.default, x(2, 6), 1)),
    "cumprod that is not fixed": (_pass, _one(aten.cumprod.default, x(2, 6), 1)),
    "embedding whose vocabulary is cut": (
        _READ("v d, *b -> *b d"),
        _one(aten.embedding.default, x(9, 6), torch.arange(9)),
    ),
    "index_put at slots that are cut": (
        _write_to_any_slot,
        _one(aten.index_put.default, x(5, 4), [whole(5, 3)], x(3, 4)),
    ),
    "add that ties nothing": (_pass, _one(aten.add.Tensor, x(2, 6), x(2, 6))),
    "where that ties nothing": (_pass, _one(aten.where.self, bits(2, 6), x(2, 6), x(2, 6))),
    "attention whose heads are not tied": (_attention_with_untied_heads, _one(_ATTEND, *_QKV)),
    "attention whose mask is not tied": (
        _attention_whose_mask_is_free,
        _one(_ATTEND, *_QKV, attn_mask=x(2, 4, 5, 7)),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_rule_is_caught(name: str) -> None:
    rule, case = PLANTED[name]
    with pytest.raises(AssertionError):
        check(case, rule)
