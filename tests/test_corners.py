"""Small inputs at the edge of what an operator, a file or a request may be: right, or said to be wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.checkpoint.config import _fill_in
from graphprune.importance.layer_statistics import LayerStatistics
from graphprune.layout import Axis, Product
from graphprune.report.comparison import File, ModelMeasurement, rows
from graphprune.selection.allocation import _slots_for
from tests.models import ALL

X = torch.randn(2, 6)


class Through(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 16), nn.Linear(16, 4), between

    def forward(self, x: Tensor) -> Any:
        return self.second(self.between(self.first(x)))


AT_THE_EDGE: dict[str, Callable[[Tensor], Tensor]] = {
    "cat of nothing": lambda x: x + torch.cat([x.new_empty(0), x.new_empty(0)]).sum(),
    "index_select of a scalar": lambda x: x + x.sum().index_select(0, torch.tensor([0])).sum(),
    "index_fill of a scalar": lambda x: x + x.sum().index_fill(0, torch.tensor([0]), 0.5),
    "tile by nothing": lambda x: torch.tile(x, ()),
}


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_operators_on_tensors_without_dimensions_or_elements(name: str, form: Any) -> None:
    result = gp.slimmed(Through(AT_THE_EDGE[name]), 0.5, X, form=form, align=1)
    assert result.verification is not None


def test_a_factor_that_stands_for_infinity_is_no_size() -> None:
    lowest = torch.finfo(torch.float64).min
    result = gp.slimmed(Through(lambda x: x + (x * 0) * lowest), 0.5, X, verify=False, align=1)
    assert result.plan.removed == 8


def test_outputs_in_mappings_with_keys_that_are_no_texts() -> None:
    class Numbered(nn.Sequential):
        def forward(self, x: Tensor) -> OrderedDict[int, Tensor]:
            return OrderedDict({0: super().forward(x), 1: x})

    model = Numbered(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    assert gp.slimmed(model, 0.5, X, form="graph").form == "graph"


def test_a_plan_leaves_whole_all_groups_that_an_iterator_names() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    plan = gp.slimmed(model, 0.5, X).plan
    assert plan.removed
    assert not plan.without(name for name in list(plan.keep)).removed


def test_slots_of_several_widths_make_multiples_in_each() -> None:
    assert _slots_for(12, [4, 6]) == 6
    assert _slots_for(16, [4, 6]) == 8
    assert _slots_for(16, []) == 1


def test_groups_of_a_layer_that_hold_a_slot_each_are_no_channels_to_score() -> None:
    groups, inner = Axis(4), Axis(4)
    nothing = torch.zeros(4, 37, 37)
    matrix: Any = torch.zeros(4, 4, 36)
    reading = LayerStatistics(None, Product((groups, inner)), matrix, nothing, 1)  # type: ignore[arg-type]
    assert not list(reading.places(groups))
    assert [place.features.shape for place in reading.places(inner)] == [(4, 9)] * 4


@pytest.mark.parametrize("name", ["gpt2", "shufflenet_v2", "densenet121", "gru_net"])
def test_what_is_fixed_has_the_size_of_its_dimension(name: str) -> None:
    example = ALL[name](small=True)
    tensors = dict(example.model.named_parameters()) | dict(example.model.named_buffers())
    fixed = gp.analyze(example.model, example.inputs).fixed
    assert fixed
    assert all(f.size == tensors[f.parameter].shape[f.dim] for f in fixed if f.parameter in tensors)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0])
def test_thresholds_grow_to_the_quantile_whatever_the_slopes(ratio: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    quantile = float(model.weight.detach().abs().quantile(0.9))
    sparsity = gp.GradualSparsity(
        model, start=0, ramp=4_000, end=10_000, every=1, slope_ratio=ratio
    )
    sparsity.steps = 10_000
    assert sparsity.threshold("weight") == pytest.approx(quantile, rel=1e-2)


def test_a_config_that_says_nothing_of_a_nested_one_gets_it() -> None:
    assert _fill_in({"text": None}, {"text": {"width": 8}}, [("text", "width")], {}) == {
        "text": {"width": 8}
    }


def test_memory_that_was_not_measured_is_not_called_unexported() -> None:
    measured, unknown = (
        ModelMeasurement(1, 1, File(1, 20, True, (2,), 0.0, memory), {}) for memory in (5, None)
    )
    table = {label: cells for label, *cells in rows(measured, unknown)}
    assert table["bytes of memory, cpu"] == ["5", "not measured", ""]
