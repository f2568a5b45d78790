"""Hundreds of random networks, each slimmed and compared with its silenced original."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphprune as gp
from graphprune.utils.inputs import Inputs
from graphprune.verify import Run, verify
from tests.random_networks import KINDS, Network

pytestmark = pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())


def networks(*kinds: str) -> st.SearchStrategy[Network]:
    block = st.tuples(st.sampled_from(sorted(KINDS[kinds[0]][1])), st.integers(0, 99))
    blocks = st.lists(block, min_size=1, max_size=4).map(tuple)
    return st.builds(
        Network, st.sampled_from(kinds), st.integers(4, 16), blocks, st.integers(0, 11)
    )


def check(network: Network, ratio: float, renormalised: bool, align: int | str) -> gp.Slimmed:
    """Slim a network (it verifies itself), and see that it runs on and nothing else changed."""
    model, x = network.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].train()  # a flag that has no effect on these layers, to see that it stays
    flags = {name: module.training for name, module in model.named_modules()}
    result = gp.slimmed(
        model, ratio, x, importance="random", renormalised=renormalised, align=align, seed=1
    )  # type: ignore[arg-type]
    assert result.verification is not None
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert count(result.model) <= count(model)
    result.model.eval()
    more = torch.cat([x, x[:1]])
    wanted, alone, found = (tree_leaves(f(y)) for f, y in
                            ((model, more), (result.model, x), (result.model, more)))  # fmt: skip
    for full, two, three in zip(wanted, alone, found, strict=True):
        assert full.shape[0] == three.shape[0] == 3
        assert torch.allclose(
            two, three[:2], rtol=1e-3, atol=1e-3 * float(two.detach().abs().max())
        )
    if result.form == "module":
        for size in OTHER_SIZES[network.kind]:
            check_at(resized(x, size), model, result)
    return result


OTHER_SIZES = {
    "image": [(3, 3, 8, 8), (2, 3, 7, 2)],
    "sequence": [(3, 9), (2, 2)],
    "features": [(3, 9, 6), (2, 2, 6)],
    "vector": [(5, 6)],
}


def resized(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    for dim, size in enumerate(sizes):
        x = x.index_select(dim, torch.arange(size) % x.shape[dim])
    return x


def check_at(x: Tensor, model: nn.Module, result: gp.Slimmed) -> None:
    """Verify at a size that the model takes, by an analysis on inputs of that size alone."""
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, IndexError):
        return
    graph = gp.analyze(model, x)
    verify(model, result.model, Run(Inputs(x), graph.inference, result.plan.masks(graph)))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
@given(network=networks("sequence", "features"), **OPTIONS)
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
def test_what_once_failed_stays_mended(case: dict[str, Any]) -> None:
    blocks = tuple((name, detail) for name, detail in case["blocks"])
    network = Network(case["kind"], case["width"], blocks, case["ends"])
    check(network, case["ratio"], case["renormalised"], case["align"])


def test_both_forms_of_the_result_occur() -> None:
    forms = [
        check(*drawn(random.Random(f"form {number}"))).form  # the same networks every time
        for number in range(30)
    ]
    assert forms.count("module") >= 8
    assert forms.count("graph") >= 8


def drawn(draw: random.Random) -> tuple[Network, float, bool, int | str]:
    kind = draw.choice(sorted(KINDS))
    names = sorted(KINDS[kind][1])
    blocks = tuple((draw.choice(names), draw.randrange(100)) for _ in range(draw.randint(1, 6)))
    network = Network(kind, draw.randint(4, 16), blocks, draw.randrange(12))
    return network, draw.choice([0.25, 0.5, 0.75]), draw.random() < 0.5, draw.choice([1, "auto"])


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(2))
def test_a_long_sweep(part: int) -> None:
    """Every failure, each with the case for corpus.json, after all networks were tried."""
    failures = []
    for number in range(int(os.environ.get("GRAPHPRUNE_SWEEP", "10000")) // 2):
        network, ratio, renormalised, align = drawn(random.Random(f"{part} {number}"))
        try:
            check(network, ratio, renormalised, align)
        except Exception as error:
            case = {**asdict(network), "ratio": ratio, "renormalised": renormalised, "align": align}
            failures.append(f"{json.dumps(case)}\n  {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
