"""The dependency graph as users read it, rules of their own, and the layers of the code."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

import graphprune as gp
from tests.models import ALL
from tests.structures import STRUCTURES


class Attention(nn.Module):
    """Four heads of three from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 36)
        self.out = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.view(*x.shape[:2], 4, 3).transpose(1, 2) for p in self.qkv(x).split(12, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_heads_are_found_and_their_features_are_inner() -> None:
    graph = gp.analyze(Attention(), torch.randn(2, 5, 10))
    heads, features, values = graph.groups
    assert (heads.size, features.size, values.size) == (4, 3, 3)
    assert (heads.inner, features.inner, values.inner) == (False, True, True)
    made_of = graph.explain("qkv.weight", 0).layout
    assert made_of.startswith("((qkv.weight:0.0 qkv.weight:0.1) + (qkv.weight:0.0 ")


def test_what_is_fixed_says_why_and_where() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sort(-1).values)

    graph = gp.analyze(Sorted(), torch.randn(2, 6))
    assert graph.groups == []
    reason = next(f.reason for f in graph.fixed if (f.parameter, f.dim) == ("a.weight", 0))
    assert reason.why == "slots are sorted"
    assert reason.operator == "aten.sort"
    assert reason.source.startswith("test_groups.py:")
    assert "slots are sorted (aten.sort, test_groups.py:" in str(graph.explain("a.weight", 0))


BESIDE = """
from torch import nn

class Sorted(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).sort(-1).values)
"""


@pytest.mark.parametrize(
    ("folder", "source"),
    [(f"{Path(torch.__file__).parent}like", "layers.py:6"), (f"{Path(gp.__file__).parent}", "")],
)
def test_code_in_a_folder_beside_torch_is_nobody_elses(folder: str, source: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(BESIDE, f"{folder}/layers.py", "exec"), names)
    model = names["Sorted"](nn.Linear(6, 8), nn.Linear(8, 3))
    for form in (
        model,
        torch.export.export(model, (torch.randn(2, 6),)).module(check_guards=False),
    ):
        graph = gp.analyze(form, torch.randn(2, 6))
        found = {f.reason.source for f in graph.fixed if f.reason.why == "slots are sorted"}
        expected = source if source or form is not model else next(iter(found))
        assert found == {expected}
        assert "layers.py" not in str(found) or source


def test_an_operator_without_a_rule_is_named_and_one_line_frees_it() -> None:
    @library.custom_op("graphprune_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(lambda x: torch.empty_like(x))

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.graphprune_test.double(self.a(x)))

    x = torch.randn(2, 6)
    graph = gp.analyze(Doubled(), x)
    assert [place.operator for place in graph.unknown] == ["graphprune_test.double"]
    assert "operators without a rule, whose channels stay: 1" in str(graph)
    operator = torch.ops.graphprune_test.double
    gp.pattern("*b c -> *b c", operator)
    try:
        assert gp.slim(Doubled(), 0.5, x).a.out_features == 4
    finally:
        gp.rules.unregister(operator)


def test_the_graph_goes_to_networkx_with_its_layouts() -> None:
    graph = gp.analyze(Attention(), torch.randn(2, 5, 10)).to_networkx()
    assert graph.nodes["qkv.weight"]["kind"] == "parameter"
    operators = [data for _, data in graph.nodes(data=True) if data["kind"] == "operator"]
    assert {"aten.addmm", "aten.bmm"} <= {data["label"] for data in operators}
    assert all("layout" in data for *_, data in graph.edges(data=True))


def test_a_model_without_weights_is_analysed() -> None:
    with torch.device("meta"):
        model = Attention()
    assert len(gp.analyze(model, torch.randn(2, 5, 10)).groups) == 3


def weighted(x: Tensor, scale: float | None, weight: Tensor) -> Tensor:
    return x @ weight.t() * (1.0 if scale is None else scale)


def product_of_all(xs: list[Tensor]) -> Tensor:
    return xs[0] @ xs[1]


UNDESCRIBED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a number that is None": (weighted, "b i, o i -> b o", lambda op, x, w: op(x, None, w)),
    "an operand too many": (weighted, "b i -> b o", lambda op, x, w: op(x, None, w)),
    "another rank": (weighted, "b t i, o i -> b t o", lambda op, x, w: op(x, None, w)),
    "tensors in a list": (product_of_all, "b i -> b i", lambda op, x, w: op([x, w])),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_what_a_pattern_does_not_describe_stays_whole(name: str) -> None:
    function, text, run = UNDESCRIBED[name]
    defined = library.custom_op(f"graphprune_test::{function.__name__}", mutates_args=())(function)
    defined.register_fake(function)
    operator = getattr(torch.ops.graphprune_test, function.__name__)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(run(operator, self.a(x), self.weight))  # type: ignore[no-any-return]

    gp.pattern(text, operator)
    try:
        graph = gp.analyze(Net(), torch.randn(2, 6))
        if name == "a number that is None":
            gp.slim(Net(), 0.5, torch.randn(2, 6), align=1)
            assert [group.name for group in graph.groups] == ["weight:0", "weight:1"]
        else:
            assert not graph.groups
            assert f"the pattern {text!r} does not describe" in str(graph)
    finally:
        gp.rules.unregister(operator)


def test_two_analyses_of_a_model_read_the_same() -> None:
    example = ALL["llama"](small=True)
    first, second = (gp.analyze(example.model, example.inputs) for _ in range(2))
    assert str(first) == str(second)
    assert "groups that can be cut" in str(first)


def test_public_names_exist_and_are_documented() -> None:
    for name in gp.__all__:
        assert getattr(gp, name).__doc__, name
    for module in pkgutil.walk_packages(gp.__path__, "graphprune."):
        assert importlib.import_module(module.name).__doc__, module.name


def test_windows_that_cut_across_pieces_fix_them() -> None:
    structure = STRUCTURES["fold_across_pieces"]
    graph = gp.analyze(structure.build(), structure.inputs())
    why = {(fixed.parameter, fixed.dim): (fixed.size, fixed.reason.why) for fixed in graph.fixed}
    assert why["five.weight", 0] == (5, "windows that cut across channels")
    assert why["thirteen.weight", 0] == (13, "windows that cut across channels")
