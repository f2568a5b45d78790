"""Sizes that modules hold and that forward does not need: they follow a cut, equal numbers do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp

IMAGE = torch.randn(2, 3, 8, 8)


def cut(model: nn.Module, inputs: Any = IMAGE, **options: Any) -> Any:
    return gp.slim(model, 0.5, inputs, align=1, form="module", **options)


def conv(inside: int, outside: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, padding=kernel // 2), nn.ReLU())


class Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.out_channels, self.epochs, self.image_size = width, 32, 32
        self.net = nn.Sequential(conv(3, 16), conv(16, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.set_classes(4)

    def set_classes(self, count: int) -> None:
        self.head = nn.Conv2d(self.encoder.out_channels, count, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@pytest.mark.parametrize("verify", [True, False])
def test_another_head_fits_the_encoder_after_a_cut(verify: bool) -> None:
    model = Segmenter()
    slimmer = cut(model, verify=verify)
    slimmer.set_classes(7)
    assert slimmer(IMAGE).shape == (2, 7, 8, 8)
    assert (slimmer.encoder.out_channels, model.encoder.out_channels) == (16, 32)


def test_numbers_of_other_things_stay_although_they_equal_the_width() -> None:
    encoder = cut(Segmenter()).encoder
    assert (encoder.epochs, encoder.image_size) == (32, 32)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 32
        self.cell, self.last = nn.GRUCell(8, 32), nn.Linear(32, 3)

    def fresh(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.hidden)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.last(self.cell(x, state))


def test_a_state_made_outside_of_forward_fits() -> None:
    slimmer = cut(Stateful(), torch.randn(2, 8))
    assert slimmer(torch.randn(2, 8), slimmer.fresh(2)).shape == (2, 3)


class Scaled(nn.Module):
    """A layer of its own that says its sizes in `extra_repr`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 48
        self.weight = nn.Parameter(torch.randn(48, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).relu()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


def test_what_a_module_prints_is_true() -> None:
    slimmer = cut(nn.Sequential(Scaled(), nn.Linear(48, 3)), torch.randn(2, 16))
    assert "16 -> 24" in repr(slimmer)


class Branches(nn.Module):
    """A convolution of two branches that can be merged into one, as in RepVGG."""

    def __init__(self, inside: int, outside: int, groups: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = inside, outside, groups
        self.large = nn.Conv2d(inside, outside, 3, padding=1, groups=groups)
        self.small = nn.Conv2d(inside, outside, 1, groups=groups)
        self.merged: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x).relu()
        return (self.large(x) + self.small(x)).relu()

    def merge(self) -> None:
        sizes = self.in_channels, self.out_channels
        merged = nn.Conv2d(*sizes, 3, padding=1, groups=self.groups)
        weight = self.large.weight + F.pad(self.small.weight, [1, 1, 1, 1])
        bias = self.large.bias + self.small.bias  # type: ignore[operator]
        merged.load_state_dict({"weight": weight, "bias": bias})
        self.merged = merged


def test_branches_merge_after_a_cut_as_before() -> None:
    blocks = (Branches(3, 16), Branches(16, 16, 16), Branches(16, 32), Branches(32, 32, 4))
    slimmer = cut(nn.Sequential(*blocks, nn.Conv2d(32, 4, 1)))
    expected = slimmer(IMAGE)
    for block in slimmer[:4]:
        block.merge()
    assert torch.allclose(slimmer(IMAGE), expected, atol=1e-5)
    assert [block.groups for block in slimmer[:4]] == [1, 8, 1, 2]


class Stages(nn.Module):
    """Stages of one width that a record describes, of which only one is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 24), conv(24, 24), nn.Conv2d(24, 4, 1)
        self.feature_info = [
            {"num_chs": 24, "reduction": 1, "module": name} for name in ("first", "second")
        ]
        self.num_features = 24

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def reset(self, count: int) -> None:
        self.head = nn.Conv2d(self.num_features, count, 1)


def test_a_record_is_about_the_module_that_it_names() -> None:
    slimmer = cut(Stages(), exclude=["first*"])
    assert [info["num_chs"] for info in slimmer.feature_info] == [24, 12]


@pytest.mark.filterwarnings("ignore:ratio and align will not be read")
def test_code_tells_which_of_two_equal_dimensions_a_number_is_of() -> None:
    slimmer = cut(Stages(), exclude=["first*"])
    assert slimmer.num_features == 12
    plan = gp.Plan({"first.0.weight:0": list(range(8))}, {"first.0.weight:0": 24})
    assert cut(Stages(), plan=plan).num_features == 24


class Unit(nn.Module):
    """Numbers whose names say nothing: the size, and a position that equals a size in one instance."""

    def __init__(self, n: int, number: int) -> None:
        super().__init__()
        layers = [nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)]
        self.inner = nn.Sequential(*layers)
        exec("self.n, self.m = n, number", {"self": self, "n": n, "number": number})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_what_agrees_in_all_instances_of_a_class_is_a_size() -> None:
    model = nn.Sequential(Unit(32, 32), Unit(16, 2), Unit(12, 3), nn.Linear(8, 3))
    slimmer = cut(model, torch.randn(2, 8))
    assert [(unit.n, unit.m) for unit in slimmer[:3]] == [(16, 32), (8, 2), (6, 3)]


class Sizes(NamedTuple):
    hidden: int
    classes: int


@dataclass(frozen=True)
class Frozen:
    width: int
    depth: int = 16


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dims = [6, 16, 20]
        self.table: dict[str, Any] = {"channels": (16, 20), "kernel_size": 16}
        self.named, self.frozen = Sizes(16, 4), Frozen(16)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU())
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x))


def test_sizes_in_lists_tuples_dicts_and_records_follow() -> None:
    model = Containers()
    slimmer = cut(model, torch.randn(2, 6))
    assert (slimmer.dims, model.dims) == ([6, 8, 10], [6, 16, 20])
    assert slimmer.table == {"channels": (8, 10), "kernel_size": 16}
    assert (slimmer.named, slimmer.frozen) == (Sizes(8, 4), Frozen(8, 16))


class Refusing(dict[str, int]):
    def __setitem__(self, key: str, value: int) -> None:
        if key in self:
            raise TypeError("frozen")
        super().__setitem__(key, value)


def test_a_dict_that_cannot_be_changed_is_left() -> None:
    model = Containers()
    model.table = Refusing(channels=16)
    slimmer = cut(model, torch.randn(2, 6))
    assert (slimmer.table, slimmer.dims) == ({"channels": 16}, [6, 8, 10])


SHARED = (16, 5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels, self.layer = SHARED, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_modules_that_hold_one_tuple_follow_each_for_itself() -> None:
    model = nn.Sequential(nn.Linear(6, 16), Shared(), Shared(), nn.Linear(16, 3))
    slimmer = cut(model, torch.randn(2, 6))
    assert (slimmer[1].channels, slimmer[2].channels, SHARED) == ((8, 5), (8, 5), (16, 5))


def pooled_head(width: int, classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.AdaptiveAvgPool2d(1), nn.Linear(width, classes)


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        pool, last = pooled_head(width, classes)
        self.pool = pool
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(x).flatten(1))


class Classifier(Stages):
    """The number reaches the layer that it is the size of through another class and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(width=self.num_features, classes=5)  # type: ignore[assignment]


def test_a_number_is_followed_through_classes_and_functions() -> None:
    assert cut(Classifier(), exclude=["first*"]).num_features == 12


class Means(nn.Module):
    """Forward computes with the width, so that it has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.first, self.last = 32, nn.Linear(6, 32), nn.Linear(32, 3)
        self.hidden_dim = 32

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.hidden_dim**-0.5 / self.width)


@pytest.mark.parametrize("verify", [True, False])
def test_a_number_that_forward_computes_with_stays(verify: bool) -> None:
    x = torch.randn(2, 6)
    result = gp.slimmed(Means(), 0.5, x, align=1, form="module", verify=verify)
    assert (result.model.width, result.model.hidden_dim) == (32, 32)
    listed = ["width = 32: 16 or 32 now", "hidden_dim = 32: 16 or 32 now"] if verify else []
    assert sorted(map(str, result.ambiguous_sizes)) == sorted(listed)


class Splits(nn.Module):
    """Sizes in a list, and in a module of torch, that forward goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [8, 24]
        self.first, self.small, self.last = nn.Linear(6, 32), nn.Linear(8, 24), nn.Linear(24, 32)
        self.heads, self.end = nn.Unflatten(-1, (4, 8)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split(self.splits, dim=-1)
        heads = self.heads(self.last(right * self.small(left)))
        return self.end(heads.softmax(-1).flatten(1))


def test_sizes_in_lists_and_modules_of_torch_that_forward_needs_follow() -> None:
    slimmer = cut(Splits(), torch.randn(2, 6))
    assert isinstance(slimmer, Splits)
    assert (slimmer.splits, slimmer.heads.unflattened_size) == ([4, 12], (2, 8))


class Twice(nn.Module):
    """A width of two layers; nothing says of which."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.first, self.second, self.last = conv(3, 24), conv(24, 24), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def unequal() -> gp.Plan:
    keep = {"first.0.weight:0": list(range(8)), "second.0.weight:0": list(range(16))}
    return gp.Plan(keep, dict.fromkeys(keep, 24))


def test_a_size_that_cannot_be_told_is_listed_and_said(tmp_path: Path) -> None:
    with pytest.warns(gp.GraphPruneWarning, match="width = 24: 8 or 16 now"):
        result = gp.slimmed(Twice(), example_inputs=IMAGE, plan=unequal())
    assert (result.model.width, str(result.ambiguous_sizes[0])) == (24, "width = 24: 8 or 16 now")
    result.report(tmp_path / "page.html")
    assert "width = 24: 8 or 16 now" in (tmp_path / "page.html").read_text()


def test_a_size_that_some_dimension_still_has_is_listed_only() -> None:
    result = gp.slimmed(Twice(), 0.5, IMAGE, exclude=["first*"], align=1)
    assert list(map(str, result.ambiguous_sizes)) == ["width = 24: 12 or 24 now"]


@pytest.mark.filterwarnings("default::graphprune.GraphPruneWarning")
def test_norms_without_weights_say_their_sizes() -> None:
    norms = (nn.InstanceNorm2d(16), nn.BatchNorm2d(16, affine=False, track_running_stats=False))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *norms, nn.Conv2d(16, 4, 1))
    slimmer = cut(model)
    assert (slimmer[1].num_features, slimmer[2].num_features) == (8, 8)
    layer_norm = nn.LayerNorm(16, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(6, 16), layer_norm, nn.Linear(16, 3))
    slimmer = cut(model, torch.randn(2, 6), renormalised=True)
    assert slimmer[1].normalized_shape == (8,)
