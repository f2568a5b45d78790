"""Accuracy after half of the MACs are gone: as cut, repaired, tuned, beside Torch-Pruning.

tasks.py and peers.py say what has to be installed, and where the data is.

    python benchmarks/accuracy.py --data FASHION --stamps STAMPS --snippets ARCHIVE

Each figure is kept in results/accuracy.jsonl as soon as it is there, so that a run that was cut off
goes on; `--report` writes results/accuracy.md from what is kept, `--tasks` picks some.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from tasks import TASKS, Task, arguments
from torch import nn

import graphprune as gp

RATIO = 0.5
SEEDS = (0, 1, 2)
EPOCHS = 2
RESULTS = Path(__file__).parent / "results"

# Criteria and alignments by task: what gradients of every sample cost too much is left out, and so is
# a second alignment where no convolution is aligned.
TRIED: dict[str, list[tuple[str, int | str]]] = {
    "minilm": [("l2", 1), ("reconstruction", 1), ("fisher", 1)],
    "g2p": [("l2", 1), ("taylor", 1)],
    "efficientnet_lite0": [("l2", "auto"), ("reconstruction", "auto"), ("reconstruction", 1)],
}
USUAL = [
    ("l2", "auto"),
    ("reconstruction", "auto"),
    ("l2", 1),
    ("reconstruction", 1),
    ("fisher", 1),
]

# Networks that are also cut uniformly, and by how much of the channels.
UNIFORM = ("resnet8", "lenet", "digits")
# Of the peer: what is left out takes more than 24 GiB (its Taylor criterion on images of 224 x 224), or
# nothing to look at (statistics of batch norms that there are not).
PEERS = {
    "minilm": ("l1", "l2", "taylor"),
    "efficientnet_lite0": ("l1", "l2", "bn_scale", "lamp", "fpgm"),
}
RATIOS = (0.25, 0.5, 0.75)


class Kept:
    """Figures by key, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.figures[entry["key"]] = entry
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of a key, computed now if they are not there."""
        if key not in self.figures:
            started = time.perf_counter()
            entry = {"key": key, **compute()}
            entry["seconds"] = round(time.perf_counter() - started, 1)
            self.figures[key] = entry
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
        return self.figures[key]


def ours(
    task: Task, criterion: str, align: Any, ratio: float = RATIO
) -> tuple[nn.Module, nn.Module]:
    """Return the network as cut and repaired."""
    options = {"data": task.calibration, "loss": task.loss, "align": align}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gp.GraphPruneWarning)
        cut = gp.slimmed(task.model, ratio, task.inputs, of="macs", importance=criterion, **options)
        repaired = gp.slim(
            task.model,
            example_inputs=task.inputs,
            plan=cut.plan,
            data=task.calibration,
            compensate=True,
        )
    return cut.model, repaired


def tuned(task: Task, slim: nn.Module, seed: int) -> float:
    """Return the score after a short fine-tuning, the same for everyone."""
    assert task.tuning is not None
    batches = task.tuning(seed)
    image = task.inputs[0].dim() == 4
    distillation = gp.Distillation() if task.name != "minilm" else gp.Distillation(None)
    gp.finetune(
        slim, task.model, batches, epochs=EPOCHS, learning_rate=task.learning_rate, seed=seed,
        distillation=distillation, loss=task.loss if image else None,
    )  # fmt: skip
    return task.score(slim)


def share(task: Task, slim: nn.Module) -> float:
    return gp.count_macs(slim, task.inputs) / gp.count_macs(task.model, task.inputs)


def latency(task: Task, slim: nn.Module) -> float:
    """Return the time of one sample in ONNX Runtime on a CPU thread, over the original's."""
    one = tuple(tensor[:1] for tensor in task.inputs)
    compared = gp.compare(task.model, slim, one, providers=["cpu"], seconds=1.0)
    return 1 / compared.speedups()["cpu"]


def run(task: Task, kept: Kept) -> None:
    """Compute what is missing of a task."""
    kept.get(
        f"{task.name}/dense", lambda: {"score": task.score(task.model), "measure": task.measure}
    )
    for criterion, align in TRIED.get(task.name, USUAL):

        def figures(criterion: str = criterion, align: Any = align) -> dict[str, Any]:
            cut, repaired = ours(task, criterion, align)
            return {
                "macs": share(task, repaired),
                "cut": task.score(cut),
                "repaired": task.score(repaired),
                "latency": latency(task, repaired),
            }

        kept.get(f"{task.name}/ours/{criterion}/{align}", figures)
    if task.name in UNIFORM:
        _uniform(task, kept)
    compared = kept.get(f"{task.name}/peer", lambda: _peer(task))
    if task.tuning is None:
        return
    _tune(task, kept, compared)


def _uniform(task: Task, kept: Kept) -> None:
    """Cut the same share of the channels of every group, of any width."""
    for criterion in ("l2", "reconstruction"):
        for ratio in RATIOS:

            def scores(criterion: str = criterion, ratio: float = ratio) -> dict[str, Any]:
                slim = gp.slim(
                    task.model, ratio, task.inputs, importance=criterion, align=1,
                    data=task.calibration, compensate=True,
                )  # fmt: skip
                return {"macs": share(task, slim), "repaired": task.score(slim)}

            kept.get(f"{task.name}/uniform/{criterion}/{ratio}", scores)


def _peer(task: Task) -> dict[str, Any]:
    """Return the scores of each criterion of the peer, or its error."""
    found: dict[str, Any] = {}
    for name, slim in peers.slimmed(task, RATIO, PEERS.get(task.name, peers.CRITERIA)):
        if isinstance(slim, Exception):
            found[name] = {"error": f"{type(slim).__name__}: {slim}"[:200]}
        else:
            try:
                again = peers.with_statistics(slim, task)
                found[name] = {
                    "macs": share(task, slim),
                    "cut": task.score(slim),
                    "statistics": task.score(again),
                }
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(name, found[name], flush=True)
    return {"criteria": found}


def curves(task: Task, kept: Kept) -> None:
    """Compute score and latency against MACs: ours with default widths where tried, and the peer's best."""
    criterion, align = _best(kept, task.name)
    its = kept.figures[f"{task.name}/peer"]["criteria"]
    worked = {name: one["statistics"] for name, one in its.items() if "statistics" in one}
    for ratio in RATIOS:

        def of_mine(ratio: float = ratio) -> dict[str, Any]:
            return _point(task, ours(task, criterion, align, ratio)[1])

        kept.get(f"{task.name}/curve/ours/{ratio}", of_mine)
        if worked:
            name, where = max(worked, key=worked.__getitem__).split(", ")

            def of_peer(ratio: float = ratio, name: str = name, where: str = where) -> Any:
                slim = peers.to_macs(task, ratio, name, where == "global")
                return _point(task, peers.with_statistics(slim, task))

            kept.get(f"{task.name}/curve/peer/{ratio}", of_peer)


def _point(task: Task, slim: nn.Module) -> dict[str, Any]:
    return {"macs": share(task, slim), "score": task.score(slim), "latency": latency(task, slim)}


def _best(kept: Kept, name: str) -> tuple[str, Any]:
    """Return the criterion of ours with the best score after repair, with default widths where tried."""
    rows = {
        tuple(key.split("/")[2:]): entry["repaired"]
        for key, entry in kept.figures.items()
        if key.startswith(f"{name}/ours/")
    }
    auto = {row: score for row, score in rows.items() if row[1] == "auto"} or rows
    criterion, align = max(auto, key=auto.__getitem__)
    return criterion, align if align == "auto" else int(align)


def plot(kept: Kept) -> None:
    """Draw the curves of each task: score against MACs, and against latency."""
    from matplotlib.figure import Figure

    names = [name for name in TASKS if f"{name}/curve/ours/{RATIOS[0]}" in kept.figures]
    if not names:
        return
    figure = Figure(figsize=(9, 2.6 * len(names)), layout="constrained")
    for row, (name, panels) in enumerate(
        zip(names, figure.subplots(len(names), 2, sharey="row", squeeze=False), strict=True)
    ):
        dense = kept.figures[f"{name}/dense"]["score"]
        for axes, of in zip(panels, ("macs", "latency"), strict=True):
            for whose, label in (
                ("ours", "graphprune, repaired"),
                ("peer", "Torch-Pruning, statistics"),
            ):
                points = [kept.figures.get(f"{name}/curve/{whose}/{ratio}") for ratio in RATIOS]
                known = [point for point in points if point]
                axes.plot(
                    [1, *(p[of] for p in known)],
                    [dense, *(p["score"] for p in known)],
                    "o-",
                    label=label,
                )
            axes.set_xlabel(f"{of}, slim to original" if row == len(names) - 1 else "")
        panels[0].set_ylabel(name)
    figure.axes[0].legend()
    figure.savefig(RESULTS / "accuracy.svg")


def _tune(task: Task, kept: Kept, peer: dict[str, Any]) -> None:
    """Tune the best of ours and the best of the peer's alike."""
    mine = {
        key: entry["repaired"]
        for key, entry in kept.figures.items()
        if key.startswith(f"{task.name}/ours/")
    }
    _, _, criterion, align = max(mine, key=mine.__getitem__).split("/")
    of_mine = functools.cache(
        lambda: ours(task, criterion, align if align == "auto" else int(align))[1]
    )
    its = {name: one["statistics"] for name, one in peer["criteria"].items() if "statistics" in one}
    best = max(its, key=its.__getitem__, default="")

    @functools.cache
    def of_peer() -> nn.Module:
        name, where = best.split(", ")
        return peers.with_statistics(peers.to_macs(task, RATIO, name, where == "global"), task)

    for seed in SEEDS:
        for whose, of, model in (
            ("ours", f"{criterion}, align {align}", of_mine),
            ("peer", best, of_peer),
        ):

            def figures(of: str = of, model: Any = model, seed: int = seed) -> dict[str, Any]:
                timed = {"latency": latency(task, model())} if model is of_peer and not seed else {}
                return {"of": of, "tuned": tuned(task, copy.deepcopy(model()), seed), **timed}

            if of:
                kept.get(f"{task.name}/tuned/{whose}/{seed}", figures)


def report(kept: Kept) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Half of the MACs gone: accuracy as cut, repaired and tuned",
        "",
        "    python benchmarks/accuracy.py --data FASHION --stamps STAMPS --snippets ARCHIVE",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, torch-pruning 1.6.1, "
        f"{platform.processor() or platform.machine()}, one thread. Scores in percent; the same "
        "calibration samples (512 where there are as many) for both, the same tuning (2 epochs of at most "
        "6,400 samples), three seeds: mean and spread. `align=1` keeps any width, as the peer does; "
        "`auto`, the default, keeps widths that ONNX Runtime is fast on. Of the peer: the best criterion, "
        "local and global, as shipped and after its batch norms were re-estimated by hand on the "
        "calibration samples. Latency: of one sample in ONNX Runtime, slim to original.",
        "",
    ]
    for name in TASKS:
        dense = kept.figures.get(f"{name}/dense")
        if dense is None:
            continue
        lines += [f"## {name}: {dense['score']:.2f} ({dense['measure']})", ""]
        lines += [
            "| | MACs left | as cut | repaired | tuned | latency |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for key, entry in kept.figures.items():
            if key.startswith(f"{name}/ours/"):
                _, _, criterion, align = key.split("/")
                title = f"{criterion}, align {align}"
                lines.append(
                    f"| {title} | {entry['macs']:.3f} | {entry['cut']:.2f} | {entry['repaired']:.2f} | "
                    f"{_tuned(kept, name, 'ours', title)} | x {entry['latency']:.2f} |"
                )
        peer = kept.figures.get(f"{name}/peer", {"criteria": {}})["criteria"]
        worked = {n: one for n, one in peer.items() if "cut" in one}
        if worked:
            cut = max(worked, key=lambda n: worked[n]["cut"])
            again = max(worked, key=lambda n: worked[n]["statistics"])
            for title, best, key in (
                ("as shipped", cut, "cut"),
                ("statistics", again, "statistics"),
            ):
                one = worked[best]
                tuned_ = _tuned(kept, name, "peer", best) if key == "statistics" else ""
                timed = kept.figures.get(f"{name}/tuned/peer/0", {}).get("latency")
                slower = f"x {timed:.2f}" if timed and key == "statistics" else ""
                lines.append(
                    f"| Torch-Pruning, best {title} ({best}) | {one['macs']:.3f} | {one['cut']:.2f} | "
                    f"{one['statistics']:.2f} | {tuned_} | {slower} |"
                )
        elif peer:
            first = next(iter(peer.values()))
            lines.append(f"| Torch-Pruning | | fails: {first['error']} | | | |")
        lines.append("")
    drawn = (
        ["![score against MACs and latency](accuracy.svg)", ""]
        if (RESULTS / "accuracy.svg").exists()
        else []
    )
    return "\n".join([*lines, *_verdicts(kept), *_uniform_table(kept), *drawn])


def _verdicts(kept: Kept) -> list[str]:
    """Return the lines of a table of drops: ours without training against shares of the peer's."""
    lines = [
        "## Points lost without training, and the aims",
        "",
        "Aims: at most half of what the peer's best criterion loses with new statistics, and a tenth of "
        "what its best loses as shipped. Tuned: mean over the seeds.",
        "",
        "| | ours | peer, statistics | at most half | peer, as shipped | at most a tenth | tuned better |",
        "| --- " * 7 + "|",
    ]
    for name in TASKS:
        peer = kept.figures.get(f"{name}/peer", {"criteria": {}})["criteria"]
        worked = [one for one in peer.values() if "cut" in one]
        mine = [e["repaired"] for k, e in kept.figures.items() if k.startswith(f"{name}/ours/")]
        if not (worked and mine):
            continue
        dense = kept.figures[f"{name}/dense"]["score"]
        lost = dense - max(mine)
        again, shipped = (dense - max(one[key] for one in worked) for key in ("statistics", "cut"))
        means = [
            [kept.figures[f"{name}/tuned/{whose}/{seed}"]["tuned"] for seed in SEEDS]
            for whose in ("ours", "peer")
            if all(f"{name}/tuned/{whose}/{seed}" in kept.figures for seed in SEEDS)
        ]
        tuned_ = ""
        if len(means) == 2:
            tuned_ = "yes" if statistics.mean(means[0]) > statistics.mean(means[1]) else "no"
        lines.append(
            f"| {name} | {lost:.2f} | {again:.2f} | {'yes' if lost <= again / 2 else 'no'} | "
            f"{shipped:.2f} | {'yes' if lost <= shipped / 10 else 'no'} | {tuned_} |"
        )
    return [*lines, ""]


def _uniform_table(kept: Kept) -> list[str]:
    """Return the lines of the table of uniform cuts."""
    lines = [
        "## The same share of the channels of every group, repaired, not tuned (align=1)",
        "",
        "| | dense | " + " | ".join(f"-{ratio:.0%}" for ratio in RATIOS) + " |",
        "| --- " * (2 + len(RATIOS)) + "|",
    ]
    for name in UNIFORM:
        for criterion in ("l2", "reconstruction"):
            entries = [kept.figures.get(f"{name}/uniform/{criterion}/{ratio}") for ratio in RATIOS]
            scores = [f"{entry['repaired']:.2f}" if entry else "" for entry in entries]
            dense = kept.figures.get(f"{name}/dense", {}).get("score", float("nan"))
            lines.append(f"| {name}, {criterion} | {dense:.2f} | " + " | ".join(scores) + " |")
    return [*lines, ""]


def _tuned(kept: Kept, name: str, whose: str, of: str) -> str:
    entries = [kept.figures.get(f"{name}/tuned/{whose}/{seed}") for seed in SEEDS]
    scores = [entry["tuned"] for entry in entries if entry and entry["of"] == of]
    if not scores:
        return ""
    return f"{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"


def main() -> None:
    parser = arguments()
    parser.description = __doc__.splitlines()[0] if __doc__ else None
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--curves", action="store_true", help="compute the curves of the tasks too")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(RESULTS / "accuracy.jsonl")
    for name in [] if options.report else options.tasks:
        task = TASKS[name](options)
        run(task, kept)
        if options.curves:
            curves(task, kept)
    plot(kept)
    (RESULTS / "accuracy.md").write_text(report(kept))


if __name__ == "__main__":
    main()
