"""The zoo: every family of torchvision, timm and transformers, slimmed, verified, exported, compared.

    pip install --no-deps torchvision==0.28.0 timm==1.0.31 pillow pyyaml
    python benchmarks/zoo.py --out benchmarks/results/zoo.md [--only transformers/bert ...]

A process a model, with limits on time and memory. What was found is kept beside the table, a line of
JSON a model, and a second run goes on where the first one stopped; `--again` forgets what failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
import zoo_members
from torch import nn

import graphprune as gp
from graphprune.layout import Concat, Layout, free_axes, resolve, size_of, why_fixed
from graphprune.utils.inputs import call

Row: TypeAlias = dict[str, Any]

RATIO = 0.5
SECONDS, GIGABYTES = 300, 16

# Why a channel of a convolution or a linear layer may stay without anything being amiss.
GOOD_REASONS = (
    "a dimension of the model's input",
    "a dimension of the model's output",
    "a window",
    "a spatial extent",
    "positions",
    "made of values that depend on the position",
    "a dimension of fixed meaning",
)


def measured(member: str) -> Iterator[Row]:
    """Yield what the table says about one member: without its export, then with it."""
    try:
        model, inputs = zoo_members.build(member)
        call(model, gp.Inputs.of(inputs))
    except Exception as failure:
        yield {"untried": _in_short(failure)}
        return
    row: Row = {"before": gp.count_parameters(model)}
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gp.GraphPruneWarning)
        result = gp.slimmed(model, RATIO, inputs, renormalised=True)
    assert result.verification is not None
    row |= {
        "seconds": time.perf_counter() - start,
        "form": result.form,
        "why_graph": result.why_graph.splitlines()[0] if result.why_graph else "",
        "groups": len(result.graph.groups),
        "after": gp.count_parameters(result.model),
        "verified": result.verification.difference,
        "unknown": sorted({place.operator for place in result.graph.unknown}),
        "warnings": sorted(
            {str(w.message)[:120] for w in caught if w.category is gp.GraphPruneWarning}
        ),
        **coverage(model, result.graph),
    }
    yield {**row, "equal": None, "export": f"not done in {SECONDS} s"}
    yield row | exported(model, result.model, inputs)


def exported(model: nn.Module, slimmer: nn.Module, inputs: Any) -> Row:
    """Say whether the slim model is equal in ONNX Runtime, or why not and whether the original is."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        try:
            found = gp.export(slimmer, inputs, path)
            return {"equal": found.difference, "batch_free": found.batch_free}
        except gp.GraphPruneError as failure:
            why = _in_short(failure)
        try:
            gp.export(model, inputs, path)
        except gp.GraphPruneError:
            return {"equal": None, "export": f"nor does the original: {why}"}
        return {"equal": None, "export": f"only the original does: {why}"}


def coverage(model: nn.Module, graph: gp.DependencyGraph) -> Row:
    """Count the channels of convolutions and linear layers that the inputs reach, and the fixed ones.

    A picture's part of a model that was given text alone is neither right nor wrong: it is counted as
    not reached, and says more about the inputs here than about the analysis.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    weights = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds)]
    total, not_reached, fixed = 0, 0, Counter[str]()
    unused = set(graph.inference.unused)
    for name in weights:
        if name in unused:
            not_reached += sum(map(size_of, graph.inference.parameters[name][:2]))
            continue
        for layout in graph.inference.parameters.get(name, [])[:2]:
            total += size_of(layout)
            for part in _parts(layout):
                reason = why_fixed(part)
                if reason is not None and not free_axes(part):
                    fixed[f"{reason.why} ({reason.operator})"] += size_of(part)
    for_no_good_reason = {
        why: count for why, count in fixed.items() if not why.startswith(GOOD_REASONS)
    }
    return {
        "channels": total,
        "not_reached": not_reached,
        "fixed": sum(fixed.values()),
        "bad": for_no_good_reason,
    }


def _parts(layout: Layout) -> Sequence[Layout]:
    layout = resolve(layout)
    return layout.parts if isinstance(layout, Concat) else (layout,)


def _in_short(error: BaseException) -> str:
    """Return the error's kind and what it says first, without the folders of this machine."""
    text = " ".join(str(error).split())
    for folder in sorted((*filter(None, sys.path), tempfile.gettempdir()), key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return f"{type(error).__name__}: {text[:300]}"


def one(member: str, answer: Connection) -> None:
    """Send the row of one member each time that more is known; what goes wrong is its refusal."""
    limit = GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            for row in measured(member):
                answer.send(row | {"peak": _peak()})
        except Exception as failure:
            answer.send({"refused": _in_short(failure), "peak": _peak()})


def _peak() -> float:
    """Return the most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


# Processes are forked from one that has imported the libraries, which takes longer than most models.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["zoo_members", "onnxruntime", "onnxscript"])


def run(member: str) -> Row:
    """Return the row of one member, measured in a process of its own."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=one, args=(member, sender))
    process.start()
    sender.close()
    row: Row = {}
    end = time.monotonic() + SECONDS
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            row = receiver.recv()
        return row or {"refused": f"not done in {SECONDS} s"}
    except EOFError:
        process.join()
        why = f"its process ended with {process.exitcode}"
        if process.exitcode == 0:
            return row
        return {**row, "export": why} if row else {"refused": why}
    finally:
        process.kill()
        process.join()


def table(rows: dict[str, Row]) -> str:
    """Return the summary and the rows as Markdown."""
    untried = {name: row["untried"] for name, row in rows.items() if "untried" in row}
    rows = {name: row for name, row in rows.items() if name not in untried}
    lines = [
        f"# The zoo at ratio {RATIO}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
        "| library | members | slimmed and verified | of those exported and equal | module form "
        "| channels fixed for no good reason | channels not reached by the inputs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for library in (*zoo_members.LIBRARIES, ""):
        chosen = [row for name, row in rows.items() if name.startswith(library)]
        if chosen:
            lines.append(_summary(library or "all", chosen))
    bad: Counter[str] = Counter()
    for row in rows.values():
        bad.update(row.get("bad", {}))
    lines += ["", "Channels fixed for no good reason, over all members:", ""]
    lines += [f"- {count:,}: {why}" for why, count in bad.most_common(25)]
    lines += ["", "## Refused", ""]
    lines += [f"- {name}: {row['refused']}" for name, row in rows.items() if "refused" in row]
    lines += ["", "## Slimmed", ""]
    lines += [
        "| member | form | groups | parameters | left | verified | ORT equal | batch free "
        "| fixed for no good reason | s | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(name, row) for name, row in rows.items() if "refused" not in row),
    ]
    lines += ["", "## Not tried: the general recipe does not build or run these", ""]
    lines += [f"- {name}: {why}" for name, why in untried.items()]
    return "\n".join(lines) + "\n"


def _summary(library: str, rows: list[Row]) -> str:
    good = [row for row in rows if "refused" not in row]
    equal = [row for row in good if row["equal"] is not None]
    modules = sum(row["form"] == "module" for row in good)
    channels = sum(row["channels"] for row in good)
    not_reached = sum(row["not_reached"] for row in good)
    bad = sum(sum(row["bad"].values()) for row in good)
    return (
        f"| {library} | {len(rows)} | {len(good)} ({len(good) / len(rows):.1%}) | {len(equal)} "
        f"| {modules} | {bad / max(channels, 1):.1%} of {channels:,} | {not_reached:,} |"
    )


def _line(name: str, row: Row) -> str:
    equal = row["export"] if row["equal"] is None else f"{row['equal']:.0e}"
    share = sum(row["bad"].values()) / max(row["channels"], 1)
    return (
        f"| {name} | {row['form']} | {row['groups']} | {row['before']:,} "
        f"| {row['after'] / row['before']:.1%} | {row['verified']:.0e} | {equal} "
        f"| {row.get('batch_free', '')} | {share:.1%} | {row['seconds']:.1f} | {row['peak']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="members, or the beginnings of their names")
    parser.add_argument("--again", action="store_true", help="try again what was refused")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("zoo.md"))
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which the server of processes lacks
    kept = options.out.with_suffix(".jsonl")
    rows = _kept(kept, options.again)
    waiting = [name for name in _members(options.only) if name not in rows]
    random.Random(0).shuffle(waiting)  # so that a run cut short is a fair sample
    options.out.write_text(table(dict(sorted(rows.items()))))
    for name, row in _in_parallel(waiting, options.jobs):
        rows[name] = row
        with kept.open("a") as file:
            file.write(json.dumps({"member": name, **row}) + "\n")
        options.out.write_text(table(dict(sorted(rows.items()))))


def _members(only: Sequence[str] | None) -> list[str]:
    wanted = tuple(only or zoo_members.LIBRARIES)
    libraries = [name for name in zoo_members.LIBRARIES if any(w.startswith(name) for w in wanted)]
    names = [member for library in libraries for member in zoo_members.members(library)]
    return [name for name in names if name.startswith(wanted)]


def _kept(path: Path, again: bool) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows[row.pop("member")] = row
    again_for = {"refused", "untried"} if again else set()
    return {name: row for name, row in rows.items() if not again_for & row.keys()}


def _in_parallel(names: Sequence[str], jobs: int) -> Iterable[tuple[str, Row]]:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}")) as progress:
        task = progress.add_task("zoo", total=len(names), last="")
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(run, name): name for name in names}
            for done in as_completed(running):
                name = running[done]
                progress.update(task, advance=1, last=name)
                yield name, done.result()


if __name__ == "__main__":
    main()
