"""Latency as a target: the model of it, its cache, and the loop, on a machine whose times are known."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from graphprune.passes import SlimChannels
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.network import ResNet8
from graphprune.errors import GraphPruneWarning, InvalidRequestError
from graphprune.groups import cost
from graphprune.groups.cost import mac_terms
from graphprune.onnx_export.export import Feed, export
from graphprune.onnx_export.providers import CUDA, Runtime
from graphprune.runtime.latency import Bench
from graphprune.runtime.latency.cache import LatencyCache
from graphprune.runtime.profiling import Event, profile_nodes
from graphprune.runtime.timing import Latency, Spread
from tests import models

X = torch.randn(1, 1, 28, 28)
BLOCK = 8


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.randomise(ResNet8(), X)


def blocks(size: int) -> int:
    return math.ceil(size / BLOCK) * BLOCK


def pretended(path: Path) -> list[Event]:
    """Return what each node takes on a machine that has a fixed cost a node and computes in blocks."""
    graph = onnx.load(path).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    events = []
    for node in graph.node:
        weight = [shapes[name] for name in node.input if len(shapes.get(name, [])) > 1]
        work = blocks(weight[0][0]) * math.prod(weight[0][1:]) if weight else 0
        events.append(Event(node.op_type, node.name, 1e-6 + 1e-8 * work))
    return events


@pytest.fixture(scope="module", autouse=True)
def blocks_of_eight() -> Iterator[None]:
    """Let no test depend on the vector instructions of this machine's processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "CONVOLUTION_BLOCK", BLOCK)
        yield


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Put the pretended machine in the place of this one; gives the files that it profiled."""
    seen: list[Path] = []

    def profile(path: Path, feed: Feed, runtime: Runtime, seconds: float) -> list[Event]:
        seen.append(path)
        return pretended(path)

    def times(
        files: Mapping[str, Path], feeds: Any, runtimes: Sequence[Runtime], seconds: float
    ) -> dict[str, dict[str, Latency]]:
        whole = {
            name: 5e-6 + sum(e.seconds for e in pretended(path)) for name, path in files.items()
        }
        found = {name: Latency(Spread(s, s, s, s), None, 1, 1) for name, s in whole.items()}
        return {str(runtimes[0]): found}

    monkeypatch.setattr("graphprune.runtime.latency.bench.profile_nodes", profile)
    monkeypatch.setattr("graphprune.runtime.latency.bench.time_onnx", times)
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    return seen


def whole(model: nn.Module, folder: Path) -> float:
    path = folder / "whole.onnx"
    export(model, X, path)
    return 5e-6 + sum(event.seconds for event in pretended(path))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_the_measured_latency_is_met(
    ratio: float, ranking: Any, machine: list[Path], tmp_path: Path
) -> None:
    model = resnet()
    result = gp.slimmed(model, ratio, X, of="latency", ranking=ranking, align=4)
    assert result.latency is not None
    assert result.verification is not None
    share = whole(result.model, tmp_path) / whole(model, tmp_path)
    assert share == pytest.approx(1 - ratio, rel=0.05)
    assert result.latency.slim / result.latency.original == pytest.approx(share)


def test_milliseconds_are_met(machine: list[Path], tmp_path: Path) -> None:
    model = resnet()
    asked = whole(model, tmp_path) * 1e3 / 2
    slim = gp.slim(model, example_inputs=X, latency_ms=asked, align=BLOCK)
    assert whole(slim, tmp_path) * 1e3 == pytest.approx(asked, rel=0.05)


def test_more_milliseconds_than_it_takes_leave_the_model_whole(
    machine: list[Path], tmp_path: Path
) -> None:
    model = resnet()
    slim = gp.slim(model, example_inputs=X, latency_ms=2e3 * whole(model, tmp_path))
    assert gp.count_parameters(slim) == gp.count_parameters(model)


def test_a_latency_between_two_widths_is_said(machine: list[Path]) -> None:
    with pytest.warns(GraphPruneWarning, match="numbers of channels allowed are no finer"):
        gp.slim(resnet(), 0.08, X, of="latency", align=32)


def test_a_latency_that_cannot_be_reached_is_said(machine: list[Path]) -> None:
    with pytest.warns(GraphPruneWarning, match="no more can be cut as asked"):
        gp.slim(resnet(), 0.99, X, of="latency", include=["stem*"])


def test_channels_that_would_save_nothing_stay_where_a_latency_cannot_be_reached(
    machine: list[Path],
) -> None:
    with pytest.warns(GraphPruneWarning, match="no more can be cut as asked"):
        result = gp.slimmed(resnet(), 0.99, X, of="latency", align=BLOCK // 2)
    assert BLOCK in {len(kept) for kept in result.plan.keep.values()}  # half would do as well


def test_a_pass_and_the_gradual_way_take_a_latency_too(machine: list[Path], tmp_path: Path) -> None:
    model = resnet()
    limit = whole(model, tmp_path) * 1e3 / 2
    graph, _ = SlimChannels(latency_ms=limit, align=BLOCK)(model, X)
    assert whole(graph, tmp_path) * 1e3 == pytest.approx(limit, rel=0.05)
    steps = list(gp.slim_gradually(model, 0.6, X, of="latency", steps=2, align=4))
    shares = [whole(slim, tmp_path) / whole(model, tmp_path) for slim in steps]
    assert shares == pytest.approx([0.7, 0.4], rel=0.06)


def test_parts_are_measured_once_and_then_known_from_the_disk(
    machine: list[Path], tmp_path: Path
) -> None:
    gp.slim(resnet(), 0.3, X, of="latency", align=BLOCK)
    first = len(machine)
    gp.slim(resnet(), 0.5, X, of="latency", align=BLOCK)
    assert len(machine) - first <= first - 2
    (file,) = tmp_path.glob("latency-*.json")
    content = json.loads(file.read_text())
    assert content["about"]["runtime"] == "cpu"
    assert all(seconds >= 0 for seconds in content["seconds"].values())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "else"}', '{"seconds": {"a": "x"}}']
)
def test_a_cache_that_cannot_be_read_is_no_cache(content: str, tmp_path: Path) -> None:
    path = LatencyCache(Runtime(), tmp_path).path
    path.write_text(content)
    cache = LatencyCache(Runtime(), tmp_path)
    assert cache.seconds == {}
    cache.add({"a": 1.0})
    LatencyCache(Runtime(), tmp_path).add({"b": 2.0})
    assert LatencyCache(Runtime(), tmp_path).seconds == {"a": 1.0, "b": 2.0}
    assert LatencyCache(Runtime(threads=2), tmp_path).seconds == {}
    assert set(tmp_path.iterdir()) == {path, path.with_suffix(".lock")}


def test_entries_that_no_measurement_gives_are_dropped(tmp_path: Path) -> None:
    path = LatencyCache(Runtime(), tmp_path).path
    wrong = ["0.0", "-1.0", "Infinity", "NaN", "1e999", "true", "null", '"1.0"', "[1.0]", "{}"]
    entries = ", ".join(f'"{number}": {value}' for number, value in enumerate(wrong))
    head = '{"format": "graphprune-latency", "version": 1, "seconds": '
    path.write_text(f'{head}{{{entries}, "good": 1e-6, "whole": 1}}}}')
    assert LatencyCache(Runtime(), tmp_path).seconds == {"good": 1e-6, "whole": 1.0}
    for hostile in ("[" * 100_000, f"{head}{'9' * 4_000}}}", f'{head}{{"a": {"9" * 4_000}}}}}'):
        path.write_text(hostile)
        assert LatencyCache(Runtime(), tmp_path).seconds == {}


@pytest.mark.parametrize("factor", [math.inf, 1e3, 1e-3])
def test_entries_that_cannot_be_true_are_measured_again_and_replaced(
    factor: float, machine: list[Path], tmp_path: Path
) -> None:
    wanted = gp.slimmed(resnet(), 0.5, X, of="latency", align=BLOCK).plan
    (file,) = tmp_path.glob("latency-*.json")
    content = json.loads(file.read_text())
    good = content["seconds"]
    poisoned = {signature: factor * seconds for signature, seconds in good.items()}
    file.write_text(json.dumps(content | {"seconds": poisoned}))
    assert gp.slimmed(resnet(), 0.5, X, of="latency", align=BLOCK).plan.keep == wanted.keep
    assert json.loads(file.read_text())["seconds"] == pytest.approx(good)


def test_a_full_disk_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    cache = LatencyCache(Runtime(), tmp_path)
    cache.add({"a": 1.0})
    assert cache.seconds == {"a": 1.0}
    assert list(tmp_path.iterdir()) == [cache.path.with_suffix(".lock")]


def test_a_home_in_the_name_of_the_folder_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRAPHPRUNE_CACHE", "~/times")
    assert LatencyCache(Runtime()).path.parent == tmp_path / "times"


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    LatencyCache(Runtime(), tmp_path / "file").add({"a": 1.0})


@pytest.fixture(scope="module")
def bench() -> Any:
    with Bench(resnet(), gp.Inputs(X), Runtime(), seconds=0.1) as bench:
        yield bench


def test_every_multiply_add_belongs_to_a_part_that_is_measured(bench: Bench) -> None:
    steps = [step for step in bench.program.inference.steps if any(mac_terms(step))]
    assert len(steps) == 10
    assert {step.node for step in steps} <= bench.part_of.keys()
    assert all(bench.by_part[bench.part_of[step.node].name] > 0 for step in steps)


def test_every_group_is_an_axis_of_the_parts(bench: Bench) -> None:
    graph = gp.analyze(bench.model, X)
    axes = bench.program.axes_of(graph)
    assert set(graph.by_axis) <= set(axes.values())


def test_latency_is_a_staircase_in_channels_of_convolutions(bench: Bench) -> None:
    graph = gp.analyze(bench.model, X)
    group = max(graph.groups, key=lambda group: group.size)
    latency = bench.of_groups(bench.build_latency_model(), graph)
    steps = [latency.total({group.axis: n}) for n in range(1, group.size + 1)]
    assert steps == sorted(steps)
    assert len(set(steps)) == group.size // BLOCK
    assert steps[-1] == pytest.approx(bench.seconds * 1e9)


def test_what_was_learned_is_what_is_predicted(bench: Bench) -> None:
    graph = gp.analyze(bench.model, X)
    plan = gp.slimmed(bench.model, 0.5, X).plan
    left = bench.count_kept(plan, graph)
    half = {name: seconds / 3 for name, seconds in bench.by_part.items()}
    latency = bench.build_latency_model().add_measurement(left, half, bench.seconds / 3)
    assert latency.total(left) == pytest.approx(bench.seconds / 3 * 1e9)
    assert latency.total({}) == pytest.approx(bench.seconds * 1e9, rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "lstm_net", "mobilenet_v2", "shufflenet_v2"])
def test_what_onnx_runtime_runs_is_traced_back(name: str, tmp_path: Path) -> None:
    example = models.ALL[name](small=True)
    with Bench(example.model, gp.Inputs.of(example.inputs), Runtime(), seconds=0.05) as bench:
        events = profile_nodes(bench.original.exported.path, bench.feed, Runtime(), 0.05)
        traced = sum(e.seconds for e in events if bench.original.origins.get(e.source))
        assert traced > 0.9 * sum(event.seconds for event in events)
        heavy = [s for s in bench.program.inference.steps if any(mac_terms(s))]
        assert {step.node for step in heavy} <= bench.part_of.keys()


class Twice(nn.Module):
    """Runs an operator with a graph inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(torch.cond(hidden.sum() > 0, torch.relu, torch.abs, (hidden,)))


def test_nodes_inside_others_are_counted_once(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export(Twice(), x, tmp_path / "twice.onnx")
    events = profile_nodes(exported.path, exported.feed(x), Runtime(), 0.05)
    assert [event.operator for event in events].count("If") == 1
    assert not {"Relu", "Abs"} & {event.operator for event in events}


def test_one_real_run(tmp_path: Path) -> None:
    """Only that it ends and tells what it measured; how near it comes is shown in benchmarks/."""
    model = resnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphPruneWarning)
        result = gp.slimmed(model, 0.5, X, of="latency")
    assert result.latency is not None
    assert result.latency.slim > 0
    assert result.latency.target == pytest.approx(result.latency.original / 2)
    assert gp.count_macs(result.model, X) < gp.count_macs(model, X)
    assert str(result.latency).count("ms") == 3


@pytest.mark.parametrize("wrong", [0, -1.0, True, "5"])
def test_milliseconds_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match="latency_ms="):
        gp.slim(resnet(), example_inputs=X, latency_ms=wrong)


@pytest.mark.cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no CUDA provider")
def test_on_a_gpu_the_work_itself_is_profiled() -> None:
    example = models.ALL["resnet50"](small=False)
    with Bench(example.model, gp.Inputs.of(example.inputs), Runtime(CUDA), seconds=1.0) as bench:
        assert sum(bench.by_part.values()) > 0.5 * bench.seconds
        heavy = [s for s in bench.program.inference.steps if any(mac_terms(s))]
        assert all(bench.by_part[bench.part_of[step.node].name] > 0 for step in heavy)
