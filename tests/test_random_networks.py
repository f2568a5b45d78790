"""Hundreds of random networks, each slimmed and compared with its silenced original."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphprune as gp
from tests.random_networks import KINDS, Network

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())


def networks(kind: str) -> st.SearchStrategy[Network]:
    block = st.tuples(st.sampled_from(sorted(KINDS[kind][1])), st.integers(0, 99))
    blocks = st.lists(block, min_size=1, max_size=6).map(tuple)
    return st.builds(Network, st.just(kind), st.integers(4, 16), blocks)


def check(network: Network, ratio: float, renormalised: bool, align: int | str) -> None:
    """Slim a network (it verifies itself), and see that it runs on and nothing else changed."""
    model, x = network.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = gp.slimmed(
        model, ratio, x, importance="random", renormalised=renormalised, align=align
    )  # type: ignore[arg-type]
    assert result.verification is not None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.model(torch.cat([x, x[:1]])).shape[0] == 3


OPTIONS = {
    "ratio": st.sampled_from([0.25, 0.5, 0.75]),
    "renormalised": st.booleans(),
    "align": st.sampled_from([1, "auto"]),
}
MANY = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=100, **MANY)
@given(network=networks("image"), **OPTIONS)
def test_random_image_networks(
    network: Network, ratio: float, renormalised: bool, align: str
) -> None:
    check(network, ratio, renormalised, align)


@settings(max_examples=100, **MANY)
@given(network=networks("image"), **OPTIONS)
def test_more_random_image_networks(
    network: Network, ratio: float, renormalised: bool, align: str
) -> None:
    check(network, ratio, renormalised, align)


@settings(max_examples=180, **MANY)
@given(network=networks("sequence"), **OPTIONS)
def test_random_sequence_networks(
    network: Network, ratio: float, renormalised: bool, align: str
) -> None:
    check(network, ratio, renormalised, align)


@settings(max_examples=150, **MANY)
@given(network=networks("vector"), **OPTIONS)
def test_random_vector_networks(
    network: Network, ratio: float, renormalised: bool, align: str
) -> None:
    check(network, ratio, renormalised, align)


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_what_once_failed_stays_mended(case: dict) -> None:
    blocks = tuple((name, detail) for name, detail in case["blocks"])
    check(Network(case["kind"], case["width"], blocks), case["ratio"], True, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(2))
def test_a_long_sweep(part: int) -> None:
    count = int(os.environ.get("GRAPHPRUNE_SWEEP", "10000")) // 2
    for number in range(count):
        draw = random.Random(f"{part} {number}")
        kind = draw.choice(sorted(KINDS))
        names = sorted(KINDS[kind][1])
        blocks = tuple((draw.choice(names), draw.randrange(100)) for _ in range(draw.randint(1, 6)))
        network = Network(kind, draw.randint(4, 16), blocks)
        ratio, renormalised = draw.choice([0.25, 0.5, 0.75]), draw.random() < 0.5
        try:
            check(network, ratio, renormalised, draw.choice([1, "auto"]))
        except Exception as error:
            raise AssertionError(f"{network}, {ratio}, {renormalised}") from error
