"""Explanations: chains of operators from a dimension to what it is tied to, or to what fixes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups.explain import ExplainedPart, Explanation
from tests.models import ALL
from tests.structures import STRUCTURES


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> gp.DependencyGraph:
    return gp.analyze(Residual().eval(), torch.randn(2, 3, 8, 8))


def line(text: str) -> int:
    """Return the number of the line of this file that holds the text."""
    with open(__file__) as file:
        return next(number for number, found in enumerate(file, 1) if text in found)


def test_a_tie_is_told_by_its_operators_with_modules_and_lines(
    residual: gp.DependencyGraph,
) -> None:
    (part,) = residual.explain("norm.weight", 0).parts
    by_end = {link.end: link for link in part.links}
    assert part.group == "first.weight:0"
    assert set(by_end) == {
        *(f"norm.{name}:0" for name in ("bias", "running_mean", "running_var")),
        *("first.weight:0", "first.bias:0", "second.weight:0", "second.bias:0"),
        *("second.weight:1", "head.weight:1"),
    }
    at = line("self.second(x)")
    assert str(by_end["second.weight:0"]) == (
        "second.weight:0 is tied to norm.weight:0 by "
        f"aten.native_batch_norm (norm, test_explain.py:{at - 1}), "
        f"then aten.add (test_explain.py:{at}), "
        f"then aten.convolution (second, test_explain.py:{at})"
    )


def test_what_is_fixed_is_led_to_the_operator_that_fixes_it(residual: gp.DependencyGraph) -> None:
    at = line("self.head(x")
    assert str(residual.explain("head.bias", -1)).splitlines() == [
        "head.bias:0 has 10 slots: 10",
        "  fixed",
        f"    head.weight:0 is tied to head.bias:0 by aten.addmm (head, test_explain.py:{at})",
        f"    a dimension of the model's output (output, head, test_explain.py:{at})",
    ]
    (part,) = residual.explain("first.weight", 1).parts
    assert [link.end for link in part.links] == ["input[0]"]


def test_a_long_list_is_cut_in_print_and_whole_as_data() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(12)]

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            for layer in self.layers[1:]:
                x = x + layer(x)
            return self.head(x)

    explanation = gp.analyze(Stream().eval(), torch.randn(2, 8)).explain("head.weight", 1)
    assert "more" in str(explanation).splitlines()[-1]
    (part,) = explanation.as_dict()["parts"]
    assert len(part["links"]) == 12 * 6 + 11
    assert json.loads(json.dumps(part)) == part


def complete(explanation: Explanation, part: ExplainedPart, graph: gp.DependencyGraph) -> None:
    """Every member of a group is reached, and every chain hangs together."""
    if part.group:
        members = graph.by_name[part.group].members
        wanted = {f"{member.parameter}:{member.dim}" for member in members}
        assert {explanation.name, *(link.end for link in part.links)} == wanted
    reached = {explanation.name}
    for link in part.links:
        assert link.start in reached
        assert link.by
        assert all(place.operator for place in link.by)
        reached.add(link.end)


def check(model: nn.Module, inputs: Any) -> None:
    graph = gp.analyze(model, inputs)
    for parameter, layouts in graph.inference.parameters.items():
        for dim in range(len(layouts)):
            explanation = graph.explain(parameter, dim)
            for part in explanation.parts:
                complete(explanation, part, graph)


@pytest.mark.parametrize("name", STRUCTURES)
def test_in_every_structure_chains_arrive(name: str) -> None:
    check(STRUCTURES[name].build(), STRUCTURES[name].inputs())


@pytest.mark.parametrize("name", ALL)
def test_in_every_model_chains_arrive(name: str) -> None:
    example = ALL[name](small=True)
    check(example.model, example.inputs)


def test_an_unknown_parameter_gets_a_clear_error(residual: gp.DependencyGraph) -> None:
    with pytest.raises(
        gp.InvalidRequestError, match=r"no parameter .* 'heed\.weight'.*head\.weight"
    ):
        residual.explain("heed.weight", 0)
    with pytest.raises(
        gp.InvalidRequestError, match=r"no dimension 7 of 'head\.bias', which has 1"
    ):
        residual.explain("head.bias", 7)
