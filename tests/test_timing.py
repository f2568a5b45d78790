from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.onnx_export.export import Exported, export
from graphprune.onnx_export.providers import CPU, CUDA, Runtime, default_runtimes
from graphprune.runtime.timing import Latency, Spread, time_onnx

X = torch.randn(2, 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    return export(net, X, tmp_path_factory.mktemp("timing") / "net.onnx")


def timed(exported: Exported, name: str = "cpu", threads: int = 1) -> Latency:
    latencies = time_onnx(
        {"one": exported.path, "two": exported.path},
        {"one": exported.feed(X), "two": exported.feed(X)},
        runtimes=[Runtime.of(name, threads)],
        seconds=0.1,
    )
    assert set(latencies[name]) == {"one", "two"}
    return latencies[name]["one"]


def test_medians_lie_between_their_quartiles(exported: Exported) -> None:
    latency = timed(exported)
    for spread in (latency.wall, latency.cpu):
        assert spread is not None
        assert 0 < spread.minimum <= spread.low <= spread.median <= spread.high


def test_short_runs_are_repeated_within_a_sample(exported: Exported) -> None:
    latency = timed(exported)
    assert latency.runs > 1
    assert latency.rounds >= 3


def test_the_thread_s_own_clock_counts_only_where_one_thread_does_all_the_work(
    exported: Exported,
) -> None:
    alone, together = timed(exported, threads=1), timed(exported, threads=2)
    assert alone.steadiest == alone.cpu
    assert together.cpu is None
    assert together.steadiest == together.wall


def test_the_spread_of_samples_is_their_median_quartiles_and_minimum() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 1.0)


def test_every_model_needs_a_feed_and_every_provider_must_exist(
    exported: Exported, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=r"^no feeds for a, b;"):
        time_onnx({"b": tmp_path, "a": tmp_path}, {})
    with pytest.raises(InvalidRequestError, match="no provider 'abacus'"):
        timed(exported, "abacus")


def test_the_cpu_is_timed_by_default_and_first() -> None:
    assert default_runtimes()[0] == Runtime(CPU)


@pytest.mark.cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no CUDA provider")
def test_cuda_is_timed_by_the_wall(exported: Exported) -> None:
    for name in ("cuda", "cuda-tf32", "cuda-float16"):
        assert timed(exported, name).cpu is None
