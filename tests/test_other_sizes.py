"""What a run does not read, or reads by the size of its input, stays; slim models fit other sizes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.inference import infer, other_sizes
from graphprune.layout import Axis, Concat, Product, Reason
from graphprune.utils.inputs import Inputs
from graphprune.verify import copy_with_slots_zeroed
from tests.models import randomise
from tests.random_networks import Network
from tests.random_tables import READS_BY_LENGTH, ROWS

IDS = torch.arange(8).view(2, 4)


class Positions(nn.Module):
    """Token embeddings to which something read from a table is added, and a feed-forward layer."""

    def __init__(self, read: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.tokens, self.table = nn.Embedding(11, 6), nn.Parameter(torch.randn(ROWS, 6))
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.read(self.table, ids.shape[1])
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("name", READS_BY_LENGTH)
def test_a_table_that_is_read_by_the_length_of_the_input_keeps_its_rows(name: str) -> None:
    model = randomise(Positions(READS_BY_LENGTH[name]), (IDS,))
    result = gp.slimmed(model, 0.5, IDS, align=1)
    fewer = 4 if name == "by_number" else 0  # rows 0 to 6, 9 and 10 are read whatever the length
    assert result.model.table.shape[0] == ROWS - fewer
    assert result.plan.removed == (8 if name == "strided" else 3 + 8) + fewer
    silenced = copy_with_slots_zeroed(
        model, result.graph.inference, result.plan.masks(result.graph)
    )
    for length in (2, 3, 9):
        ids = torch.arange(3 * length).view(3, length) % 11
        assert torch.allclose(result.model(ids), silenced(ids), atol=1e-5)


def test_what_no_operator_reads_says_where_it_is_left_out() -> None:
    graph = gp.analyze(Positions(READS_BY_LENGTH["from_the_end"]), IDS)
    [reason] = [fixed.reason for fixed in graph.fixed if fixed.parameter == "table"]
    assert reason.why == "not used in this run of the model"
    assert reason.operator == "aten.slice"
    assert reason.source.startswith("random_tables.py:")


def test_what_is_read_by_the_size_of_an_input_says_which_operator_does() -> None:
    graph = gp.analyze(Positions(READS_BY_LENGTH["bag"]), IDS)
    [reason] = [fixed.reason for fixed in graph.fixed if fixed.parameter == "table"]
    assert reason.why == "what is read of it depends on the size of an input"
    assert reason.operator == "aten.slice"
    assert reason.source.startswith("random_tables.py:")


def test_a_table_of_a_model_that_takes_one_size_alone_keeps_what_is_read_in_part() -> None:
    model = randomise(Positions(lambda table, t: table[:t].sum(0).view(1, 1 + t - 4, 6)), (IDS,))
    graph = gp.analyze(model, IDS)
    assert {group.name for group in graph.groups} == {"table:1", "up.weight:0"}


def test_the_example_may_be_as_long_as_the_table() -> None:
    ids = torch.randint(11, (2, ROWS))
    model = randomise(Positions(READS_BY_LENGTH["bag"]), (ids,))
    slimmer = gp.slim(model, 0.5, ids, align=1)
    assert slimmer.table.shape[0] == ROWS
    assert slimmer(IDS).shape == (2, 4, 3)


class CausalAttention(nn.Module):
    """Attention with a mask buffer of which a corner is read, and position numbers in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(32, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 5)
        self.register_buffer("mask", torch.ones(32, 32).tril()[None, None])
        self.register_buffer("position_ids", torch.arange(32)[None])

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.tokens(ids) + self.positions(self.position_ids[:, :t])
        q, k, v = (y.view(b, t, -1, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask[:, :, :t, :t] == 0, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_masks_and_position_numbers_stay_as_long_as_they_are() -> None:
    model = randomise(CausalAttention(), (IDS,))
    slimmer = gp.slim(model, 0.5, IDS, align=1)
    assert slimmer.mask.shape == (1, 1, 32, 32)
    assert slimmer.position_ids.shape == (1, 32)
    assert slimmer.qkv.out_features == 12
    assert slimmer(torch.randint(11, (1, 32))).shape == (1, 32, 5)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_verification_compares_longer_and_shorter_inputs(form: str) -> None:
    model = randomise(Positions(READS_BY_LENGTH["first"]), (IDS,))
    seen = gp.slimmed(model, 0.5, IDS, form=form).verification
    assert [tuple(inputs.tensors()[0].shape) for inputs in seen.inputs] == [(2, 4), (3, 8), (3, 2)]


def test_verification_finds_a_slim_model_that_is_right_at_the_example_s_size_alone() -> None:
    class Longest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return self.down(h if x.shape[1] <= 5 else h.view(*x.shape[:2], 16) * 2)

    model, x = Longest().eval(), torch.randn(2, 5, 6)
    with pytest.raises(gp.VerificationError, match=r"shape '\[3, 6, 16\]' is invalid"):
        gp.slim(model, 0.5, x, form="module", align=1)


def test_images_are_compared_at_another_size_and_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(16, 4)).eval()  # fmt: skip
    seen = gp.slimmed(net, 0.5, torch.randn(1, 3, 64, 64)).verification
    assert [tuple(inputs.tensors()[0].shape) for inputs in seen.inputs] == [
        (1, 3, 64, 64), (2, 3, 32, 32)]  # fmt: skip


def test_dimensions_of_one_size_change_together_and_values_repeat() -> None:
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 1, 3, 3)
    longer, shorter = other_sizes.propose_inputs(Inputs(ids, mask), set())
    assert [tuple(t.shape) for t in longer[0].tensors()] == [(3, 4), (3, 1, 4, 4)]
    assert longer[0].tensors()[0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0]]
    assert [tuple(t.shape) for t in shorter[0].tensors()] == [(3, 1), (3, 1, 1, 1)]
    assert tuple(longer[-1].tensors()[0].shape) == (3, 3)


def test_sizes_keep_the_halvings_that_networks_need() -> None:
    assert [other_sizes._lengthen(n) for n in (5, 8, 24, 224)] == [6, 16, 32, 256]
    assert [other_sizes._shorten(n) for n in (5, 8, 24, 32, 224)] == [2, 4, 8, 16, 96]


def test_reconciling_fixes_what_two_analyses_see_in_different_ways() -> None:
    def layouts(first: int) -> dict[str, list[Axis | Concat | Product]]:
        channels, heads = Axis(4), Axis(2)
        return {
            "table": [Concat((Axis(first), Axis(9 - first))), channels],
            "weight": [Product((heads, Axis(3, Reason("features")))), channels],
        }

    one, two = layouts(3), layouts(5)
    [partners] = other_sizes.reconcile(one, [two], lambda *_: Reason("unlike"))
    assert [axis.fixed is not None for axis in one["table"][0].parts] == [True, True]
    assert partners == {one["table"][1]: two["table"][1],
                        one["weight"][0].factors[0]: two["weight"][0].factors[0]}  # fmt: skip


# ------------------------------------------------------------------ the same without the fix


def pair_only(first, others, reason_for):  # type: ignore[no-untyped-def]
    """Pair axes of one size as `reconcile` does, and fix nothing."""
    partners = []
    for second in others:
        pairing = other_sizes._Pairing()
        for name, layouts in second.items():
            for a, b in zip(first[name], layouts, strict=True):
                pairing.fits(other_sizes._outline(a), other_sizes._outline(b))
        partners.append({a: b for a, b in pairing.partners.items() if a.size == b.size})
    return partners


def take_the_fix_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(infer, "fix_unread", lambda *_: None)
    patch.setattr(infer, "fix_parts_of_tables", lambda *_: None)
    patch.setattr(infer, "reconcile", pair_only)


@pytest.mark.parametrize("name", ["first", "last", "one", "bag", "bag_of_most", "every_other"])
def test_verification_at_other_sizes_catches_what_the_analysis_would_miss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_the_fix_out(monkeypatch)
    model = randomise(Positions(READS_BY_LENGTH[name]), (IDS,))
    with pytest.raises(gp.VerificationError):
        gp.slim(model, 0.5, IDS, align=1)


def networks_with_tables(count: int) -> Iterator[Network]:
    """Yield random networks of sequences, each with a block that reads a part of a table."""
    draw = random.Random("tables")
    for _ in range(count):
        names = [
            draw.choice(["table", "masked_scores"]),
            draw.choice(["linear", "gated", "joined"]),
        ]
        draw.shuffle(names)
        blocks = tuple((name, draw.randrange(100)) for name in names)
        yield Network(draw.choice(["sequence", "features"]), draw.randint(4, 12), blocks)


def sizes_of_groups(network: Network) -> set[tuple[str, int]]:
    groups = gp.analyze(*network.build()).groups
    return {(group.name, group.size) for group in groups if group.exact and group.size > 1}


def count_of_caught(count: int) -> tuple[int, int]:
    """Return how many networks are cut elsewhere without the fix, and how many of them are refused."""
    changed = caught = 0
    for network in networks_with_tables(count):
        sizes = sizes_of_groups(network)
        with pytest.MonkeyPatch.context() as patch:
            take_the_fix_out(patch)
            if sizes_of_groups(network) == sizes:
                continue
            changed += 1
            try:
                model, x = network.build()
                gp.slim(model, 0.5, x, align=1, form="module")
            except gp.VerificationError:
                caught += 1
    return changed, caught


@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
def test_random_networks_are_caught_without_the_fix() -> None:
    changed, caught = count_of_caught(12)
    assert changed >= 6
    assert caught == changed


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
def test_many_random_networks_are_caught_without_the_fix() -> None:
    changed, caught = count_of_caught(1000)
    assert changed >= 500
    assert caught == changed


class BatchTimesHeads(nn.Module):
    """Has the batch and the heads in one dimension, of which it takes everything (`[:, 1:]`)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.out = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.rows(x).view(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8)
        y = y[:, 1:].view(b, 4, t - 1, 8).transpose(1, 2)
        return self.out(y.reshape(b, t - 1, 32))


def test_all_of_a_dimension_is_all_of_it_at_another_batch_too() -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    result = gp.slimmed(BatchTimesHeads().eval(), 0.5, x, align=1)
    assert result.form == "graph"
    assert result.plan.removed == 2
    assert result.model(torch.cat([x, x])).shape == (4, 4, 4)


class WithAuxiliaryHead(nn.Module):
    """In training a head reads an early map too, which fits no map smaller than eight by eight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.early, self.late, self.out = (
            nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 8), nn.Conv2d(16, 4, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        y = self.out(self.second(x).relu()).mean((2, 3))
        return (y, self.late(self.early(x).relu())) if self.training else y


@pytest.mark.parametrize("size", [8, 12])
def test_a_head_for_training_that_takes_fewer_sizes_holds_nothing_back(size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    result = gp.slimmed(WithAuxiliaryHead().eval(), 0.5, x, align=1)
    assert result.form == "module"
    assert result.verification is not None
    assert any(inputs.tensors()[0].shape[2] < 8 for inputs in result.verification.inputs)
    assert [len(layer.weight) for layer in result.model.children()] == [8, 8, 4, 4, 4]
    result.model.train()(x)


@pytest.mark.filterwarnings("ignore:the example inputs reach no operator that reads late")
def test_a_head_for_training_that_fails_on_the_example_keeps_what_was_not_seen() -> None:
    result = gp.slimmed(WithAuxiliaryHead().eval(), 0.5, torch.randn(2, 3, 6, 6), align=1)
    assert [len(layer.weight) for layer in result.model.children()] == [8, 8, 8, 4, 4]
    result.model.train()(torch.randn(2, 3, 8, 8))
