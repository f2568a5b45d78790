"""Which hidden units matter: The Incredible Shrinking Neural Network (arXiv 1701.04465), run again.

Its MNIST is Fashion-MNIST here, which `fashion_mnist.py` says how to get; plots need `pip install
matplotlib`.

    python benchmarks/neuron_ranking.py --data fashion/usr/share/datasets/fashion-mnist

With `--quick` everything is small, ends within a minute and is printed instead of written.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from neuron_experiments import (
    BATCH,
    CRITERIA,
    FULL,
    HOW,
    QUICK,
    Cosine,
    Curve,
    Curves,
    Gains,
    Net,
    Size,
    Timing,
    UnderTrained,
    all_curves,
    cosines,
    gains,
    images,
    log,
    pairs,
    recursion_against_exact,
    same_as_the_library,
    sigmoid_net,
    timing,
    train,
    under_trained,
)
from torch import nn

from graphprune.importance.vmap_or_loop import CHUNK

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "graphprune"
from matplotlib import pyplot as plt  # noqa: E402

NAMES = {
    "oracle": "brute force",
    "taylor2": "2nd, exact",
    "taylor2_recursion": "2nd, recursion",
    "taylor": "1st",
    "l2": "l2 norm",
    "random": "random",
}


AT = range(10, 90, 10)


# Accuracy that the paper reports where its x axis reads 10, 20 ... 80, by network, criterion and ranking.
PAPER = {
    ("1x100", "oracle", "iterative"): (0.994, 0.991, 0.986, 0.984, 0.983, 0.956, 0.892, 0.786),
    ("1x100", "taylor2_recursion", "iterative"): (
        0.984, 0.930, 0.910, 0.827, 0.804, 0.741, 0.672, 0.361,
    ),
    ("1x100", "taylor", "iterative"): (0.944, 0.848, 0.661, 0.580, 0.323, 0.269, 0.109, 0.182),
    ("1x100", "oracle", "single"): (0.990, 0.963, 0.856, 0.676, 0.487, 0.311, 0.464, 0.344),
    ("1x100", "taylor2_recursion", "single"): (
        0.963, 0.928, 0.834, 0.788, 0.654, 0.543, 0.479, 0.358,
    ),
    ("1x100", "taylor", "single"): (0.960, 0.783, 0.698, 0.672, 0.605, 0.421, 0.370, 0.414),
    ("2x50", "oracle", "iterative"): (0.996, 0.994, 0.983, 0.962, 0.932, 0.886, 0.691, 0.586),
    ("2x50", "taylor2_recursion", "iterative"): (
        0.917, 0.718, 0.622, 0.613, 0.420, 0.218, 0.104, 0.100,
    ),
    ("2x50", "taylor", "iterative"): (0.952, 0.802, 0.517, 0.422, 0.202, 0.217, 0.259, 0.173),
    ("2x50", "oracle", "single"): (0.973, 0.891, 0.594, 0.419, 0.330, 0.135, 0.091, 0.100),
}  # fmt: skip


# Units that the paper's networks lose before accuracy has dropped by 1, 2 and 5 points.
PAPER_REMOVABLE = {
    ("1x100", "oracle", "iterative"): (35, 53, 63),
    ("1x100", "taylor2_recursion", "iterative"): (4, 16, 20),
    ("1x100", "taylor", "iterative"): (4, 6, 10),
    ("2x50", "oracle", "iterative"): (26, 35, 43),
    ("2x50", "taylor2_recursion", "iterative"): (4, 6, 6),
    ("2x50", "taylor", "iterative"): (3, 8, 11),
}


def mean(curves: Sequence[Curve], of: str) -> Any:
    return np.mean([getattr(curve, of) for curve in curves], axis=0)


def spread(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracies(curves: Curves) -> str:
    rows = []
    for (net, criterion, how), of_seeds in curves.items():
        ours = mean(of_seeds, "accuracy")
        count = len(ours) - 1
        rows.append(
            [net, NAMES[criterion], how, "here"] + [f"{ours[count * at // 100]:.3f}" for at in AT]
        )
        if (net, criterion, how) in PAPER:
            paper = [f"{value:.3f}" for value in PAPER[net, criterion, how]]
            rows.append(["", "", "", "paper", *paper])
    return table(["net", "criterion", "ranking", "", *(f"{at} %" for at in AT)], rows)


def removables(curves: Curves) -> str:
    rows = []
    for key, of_seeds in curves.items():
        net, criterion, how = key
        ours = [spread([curve.within(points) for curve in of_seeds]) for points in (1, 2, 5)]
        paper = [str(count) for count in PAPER_REMOVABLE.get(key, ("", "", ""))]
        rows.append([net, NAMES[criterion], how, *ours, *paper])
    lost = [f"{points} point{'s' * (points > 1)}" for points in (1, 2, 5)]
    return table(["net", "criterion", "ranking", *lost, *(f"paper, {one}" for one in lost)], rows)


def share_of_last_layer(curve: Curve, net: Net) -> float:
    """Return how many of the first quarter of the units that go are of the last hidden layer."""
    last, count = net.graph.groups[-1].name, len(net.units) // 4
    return sum(name == last for name, _ in curve.order[:count]) / count


def area(curves: Curves, key: tuple[str, str, str], until: int) -> float:
    """Return the mean accuracy over removals, up to a share of the units in percent."""
    accuracy = mean(curves[key], "accuracy")
    count = (len(accuracy) - 1) * until // 100
    return float(np.mean(accuracy[1 : count + 1]))


@dataclass
class Found:
    """All that was measured."""

    size: Size
    nets: dict[str, list[Net]]
    curves: Curves
    same: bool
    cosines: list[Cosine]
    gains: Gains
    pairs: dict[str, list[list[str]]]
    under_trained: list[UnderTrained]
    timings: dict[str, Timing]


def claims(found: Found) -> list[list[str]]:
    """Return, for each claim, what was measured and whether it held by the rule given."""
    curves = found.curves

    def within(net: str, criterion: str, points: float = 5) -> float:
        of_seeds = curves[net, criterion, "iterative"]
        share: float = np.mean([100 * c.within(points) / len(c.order) for c in of_seeds])
        return share

    def first_of(net: str, until: int) -> tuple[float, float]:
        a, b = (area(curves, (net, c, "iterative"), until) for c in ("taylor", "taylor2_recursion"))
        return a, b

    def last_layer(criterion: str) -> float:
        of_seeds = zip(curves["2x50", criterion, "iterative"], found.nets["2x50"], strict=True)
        return float(np.mean([share_of_last_layer(curve, net) for curve, net in of_seeds]))

    brute = [within(net, "oracle") for net in ("1x100", "2x50")]
    orders = [within(net, c) for net in ("1x100", "2x50") for c in ("taylor", "taylor2_recursion")]
    first, second = first_of("1x100", 80)
    early, late = first_of("2x50", 25)
    layers = {c: last_layer(c) for c in ("oracle", "taylor", "taylor2_recursion")}
    better = {
        (net, c): area(curves, (net, c, "iterative"), 80) - area(curves, (net, c, "single"), 80)
        for net in ("1x100", "2x50")
        for c in ("oracle", "taylor2_recursion", "taylor")
    }
    harder = {c: (within("1x100", c), within("2x50", c)) for c in CRITERIA[:4] if c != "taylor2"}
    essential = {
        f"{cosine.trained_by} 2x{cosine.width}": float(
            np.median([cosine.essential(c, 0.01) for c in cosine.curves])
        )
        for cosine in found.cosines
    }
    by_adam = [left for name, left in essential.items() if name.startswith("Adam")]
    falls = {
        key: max(curve.rise_and_fall() for curve in of_seeds)
        for key, of_seeds in curves.items()
        if key[1] != "random"
    }
    most = max(falls, key=lambda key: falls[key])
    improved = [min(one.curve.error) < 0.99 * one.curve.error[0] for one in found.under_trained]
    flat = [np.mean(np.abs(g) < 0.01) for g in (found.gains.doubled, found.gains.fourfold)]
    rows = [
        (
            "40 to 70 % of the units can go without major loss (brute force, iterative)",
            f"within 5 points: {brute[0]:.0f} % of 1x100, {brute[1]:.0f} % of 2x50",
            "at least 40 % on both",
            min(brute) >= 40,
        ),
        (
            "first and second order can be relied on for the first 10 to 30 % only",
            "within 5 points, 1st and 2nd: 1x100 {:.0f} and {:.0f} %, 2x50 {:.0f} and {:.0f} %".format(
                *orders
            ),
            "at most 30 % in all four",
            max(orders) <= 30,
        ),
        (
            "second order beats first on 1x100",
            f"mean accuracy up to 80 % removed: 1st {first:.3f}, 2nd {second:.3f}",
            "2nd higher",
            second > first,
        ),
        (
            "first order is the better one on 2x50 for the first quarter",
            f"mean accuracy up to 25 % removed: 1st {early:.3f}, 2nd {late:.3f}",
            "1st higher",
            early > late,
        ),
        (
            "a deeper network is harder to prune",
            "within 5 points, 1x100 and 2x50: "
            + ", ".join(f"{NAMES[c]} {a:.0f} and {b:.0f} %" for c, (a, b) in harder.items()),
            "2x50 lower for all three",
            all(b < a for a, b in harder.values()),
        ),
        (
            "brute force takes from the layer nearest the output first",
            f"2x50: {layers['oracle']:.0%} of the first quarter removed are of the last hidden layer",
            "over two thirds",
            layers["oracle"] > 2 / 3,
        ),
        (
            "first and second order have no preference for a layer",
            f"the same for 1st {layers['taylor']:.0%}, 2nd {layers['taylor2_recursion']:.0%}",
            "both between one and two thirds",
            all(1 / 3 <= layers[c] <= 2 / 3 for c in ("taylor", "taylor2_recursion")),
        ),
        (
            "iterative re-ranking beats a single ranking",
            "mean accuracy up to 80 % removed, gain: "
            + ", ".join(f"{net} {NAMES[c]} {gain:+.3f}" for (net, c), gain in better.items()),
            "higher for all six",
            all(gain > 0 for gain in better.values()),
        ),
        (
            "the cosine needs about as many units wherever pruning starts",
            "units left at 1 % error, median, by start: "
            + ", ".join(f"{name} {left:.0f}" for name, left in essential.items()),
            "Adam: largest at most 1.5 times the smallest",
            max(by_adam) <= 1.5 * min(by_adam),
        ),
        (
            "error rises and falls again as more units go",
            f"the deepest fall is {falls[most]:.0%} of the error before it "
            f"({most[0]}, {NAMES[most[1]]}, {most[2]})",
            "over 10 %",
            falls[most] > 0.1,
        ),
        (
            "networks that were not trained to the end improve when pruned (brute force)",
            f"{sum(improved)} of {len(improved)} get an error lower by over 1 %",
            "all",
            all(improved),
        ),
        (
            "some units can be doubled to quadrupled without a change of error",
            f"1x100: error within 1 % for {flat[0]:.0%} of the units doubled, {flat[1]:.0%} fourfold",
            "any fourfold",
            flat[1] > 0,
        ),
    ]
    return [[what, seen, rule, "held" if held else "not held"] for what, seen, rule, held in rows]


def facts(found: Found) -> str:
    size = found.size
    start = {
        name: ", ".join(f"{net.measured(net.module)[0]:.2%}" for net in nets)
        for name, nets in found.nets.items()
    }
    forms = ["-".join(map(str, (400, *hidden, 10))) for hidden in size.hidden.values()]
    rows = [
        ("date", str(datetime.date.today())),
        (
            "versions",
            f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"matplotlib {matplotlib.__version__}",
        ),
        (
            "machine",
            f"{platform.machine()}, {os.cpu_count()} cores, one thread used, shared with other work",
        ),
        ("data", f"the first {size.images:,} training images, 20 x 20 (area means), pixels 0 to 1"),
        (
            "networks",
            f"{' and '.join(forms)}, sigmoid outputs, {size.seeds} of each, seeds from 0; half the "
            f"squared error; Adam, until 99.8 % or {size.epochs} epochs",
        ),
        (
            "accuracy at the start",
            f"1x100 {start['1x100']} (paper 99.8 %); 2x50 {start['2x50']} (paper 100 %)",
        ),
        ("precision", "trained in float32, all else in float64"),
    ]
    return table(["", ""], rows)


def of_recursion(found: Found) -> str:
    head = ["net", "seed", "hidden layer", "off, median", "off, most"]
    head += ["rank correlation: 1st", "2nd, recursion", "2nd, exact"]
    rows = [
        [name, str(seed), *row]
        for name, nets in found.nets.items()
        for seed, net in enumerate(nets)
        for row in recursion_against_exact(net)
    ]
    return table(head, rows)


def of_cosines(found: Found) -> str:
    shares = (0.001, 0.01, 0.1)
    rows = []
    for cosine in found.cosines:
        start = ", ".join(f"{c.error[0]:.0e}" for c in cosine.curves)
        left = [", ".join(str(cosine.essential(c, s)) for c in cosine.curves) for s in shares]
        rows.append([f"2x{cosine.width}", cosine.trained_by, start, *left])
    return table(
        ["net", "trained by", "error at the start", *(f"{share:.1%}" for share in shares)], rows
    )


def of_pairs(found: Found) -> str:
    head = ["net", "seed", "pairs", "negative", "positive", "size over dE_i + dE_j, median"]
    head += ["90th percentile", "cancelling", "dE_ij < 0", "dE_i < 0"]
    rows = [[name, str(n), *row] for name, own in found.pairs.items() for n, row in enumerate(own)]
    return table(head, rows)


def of_falls(found: Found) -> str:
    rows = []
    for (name, criterion, how), of_seeds in found.curves.items():
        if criterion != "random":
            falls = ", ".join(f"{curve.rise_and_fall():.0%}" for curve in of_seeds)
            rows.append([name, NAMES[criterion], how, falls])
    return table(["net", "criterion", "ranking", "one a network"], rows)


def of_under_trained(found: Found) -> str:
    head = ["net", "accuracy", "at the least error", "error", "least (removed)", "not above until"]
    head += ["all removed", "paper: error", "least (removed)", "not above until"]
    return table(head, [one.row() for one in found.under_trained])


def of_timing(found: Found) -> str:
    head = ["net", "one by one", "one by one in batches", "oracle", "ratio", "ratio in batches"]
    rows = [[name, *one.row()] for name, one in found.timings.items()]
    return table([*head, "apart, at most"], rows)


def written(found: Found) -> str:
    """Return the result file."""
    size = found.size
    adam = size.steps // 2 * 5  # five batches an epoch
    return f"""# The Incredible Shrinking Neural Network, run again

    python benchmarks/neuron_ranking.py --data fashion/usr/share/datasets/fashion-mnist

Wolfe et al., arXiv 1701.04465, on Fashion-MNIST instead of MNIST.

{facts(found)}

Accuracy is that on the images of training and ranking, as in the paper. Nothing is trained after a
removal. Units are taken one by one by the library's scores; that these are the units which
`slimmed(..., ranking="global", steps=...)` takes was checked for half of one 1x100, first order,
iterative: {"the same units" if found.same else "OTHER UNITS"}.

## The paper's claims

The rules were written for this table. Where there are several networks, their mean counts.

{table(["claim", "measured here", "counts as held if", ""], claims(found))}

## Accuracy by share of units removed

Means over the networks; for random, over five orders of each. The paper's figures are read off its
plots, whose x axis counts from the first removal, so that its 10 % is 11 units.

{accuracies(found.curves)}

![accuracy and error](neuron_ranking_curves.svg)

## Units removed before accuracy is lower by more than 1, 2, 5 points

From the lowest to the highest of the networks, of {len(found.nets["1x100"][0].units)} units.

{removables(found.curves)}

## What the recursion costs

Second-order terms of the paper's recursion against the exact diagonal of the Hessian, before any
removal: the share by which a unit's term is off. Beside it, how scores correlate with those of brute
force by rank.

{of_recursion(found)}

## The cosine

500 points from 0 to 2 pi, two hidden layers of sigmoids, a linear output, float64; {adam:,} steps of
Adam or up to {size.steps:,} of L-BFGS; one figure a network, seeds from 0. Brute force, iterative:
units left of both layers together before the error exceeds a share of that of an output of zero, all
where it does from the start.

{of_cosines(found)}

![cosine](neuron_ranking_cos.svg)

## Gain

Error of the first 1x100 against a factor on the output of one unit, for every tenth unit that brute
force, iterative, removes.

![gains](neuron_ranking_gains.svg)

## Pairs of units

Change of error without two units, dE_ij, less dE_i + dE_j without each. Positive: together they cost
more than one by one. Cancelling: dE_ij is below the greater of dE_i and dE_j, so that once the dearer
unit is gone, error falls when the other goes too.

{of_pairs(found)}

Share of the error by which it falls again, at most, after a rise, as units are removed:

{of_falls(found)}

## Networks that were not trained to the end

Brute force, iterative; one network each. The first three are like the paper's: softmax outputs,
pixels 0 to 255, one class against the rest; five epochs of Adam here.

{of_under_trained(found)}

## Brute force, batched

Seconds for the change of error without each unit, over all images, in float64: a forward pass of the
whole network a unit, over all images at once or in batches of {BATCH}, and the criterion "oracle" on
the same batches, {CHUNK} units side by side. Medians of {size.repeats}, in turn, in one
run. The last column is the difference of the results over the change.

{of_timing(found)}
"""


def plot(found: Found, folder: Path) -> None:
    plot_curves(found, folder / "neuron_ranking_curves.svg")
    plot_cosines(found.cosines, folder / "neuron_ranking_cos.svg")
    figure, axes = plt.subplots(figsize=(7, 4))
    colours = plt.get_cmap("viridis")
    for place, error in found.gains.of_unit.items():
        colour = colours(place / max(found.gains.of_unit))
        axes.plot(found.gains.factors, error, color=colour, label=f"{place} removed before it")
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(yscale="log", xlabel="factor on the unit's output", ylabel="squared error")
    axes.legend(fontsize=7)
    _save(figure, folder / "neuron_ranking_gains.svg")


def plot_curves(found: Found, path: Path) -> None:
    figure, grid = plt.subplots(2, 4, figsize=(16, 7), sharex=True, sharey="row")
    columns = [(net, how) for net in found.nets for how in HOW]
    for (net, how), (top, bottom) in zip(columns, grid.T, strict=True):
        for number, criterion in enumerate((*CRITERIA, "random")):
            of_seeds = found.curves.get((net, criterion, how))
            if of_seeds:
                for axes, of in ((top, "accuracy"), (bottom, "error")):
                    axes.plot(mean(of_seeds, of), color=f"C{number}", label=NAMES[criterion])
        top.set(title=f"{net}, {how} ranking", ylabel="accuracy")
        bottom.set(xlabel="units removed", ylabel="squared error", yscale="log")
    grid[0, 1].legend(fontsize=8)
    _save(figure, path)


def plot_cosines(of_all: Sequence[Cosine], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for cosine in of_all:
        ends = [cosine.essential(curve, 0.01) for curve in cosine.curves]
        by_adam = cosine.trained_by == "Adam"
        marker, first = "o" if by_adam else "x", cosine.width == of_all[0].width
        label = cosine.trained_by if first else None
        right.plot([cosine.width] * len(ends), ends, marker, color=f"C{by_adam:d}", label=label)
        for number, curve in enumerate(cosine.curves if by_adam else ()):
            label = None if number else f"2x{cosine.width}"
            units = range(len(curve.order), -1, -1)
            left.plot(units, curve.error, color=f"C{of_all.index(cosine)}", label=label)
    left.set(yscale="log", xlabel="units left", ylabel="squared error", title="Adam, brute force")
    left.invert_xaxis()
    left.legend()
    right.set(xlabel="units a layer at the start", ylabel="units left at 1 % error", ylim=(0, None))
    right.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def measured(folder: Path, size: Size) -> Found:
    x, labels = images(folder, size.images, 20)
    t = F.one_hot(labels, 10).float()
    models: dict[str, list[nn.Module]] = {}
    nets: dict[str, list[Net]] = {}
    for name, hidden in size.hidden.items():
        for seed in range(size.seeds):
            model = sigmoid_net((400, *hidden, 10), nn.Sigmoid(), seed)
            train(model, x, t, size.epochs, 1e-2, seed, goal=0.998)
            net = Net.of(model, x, t)
            accuracy, error = net.measured(net.module)
            log(f"{name}, seed {seed}: accuracy {accuracy:.2%}, squared error {error:.1f}")
            models.setdefault(name, []).append(model)
            nets.setdefault(name, []).append(net)
    timings = {
        name: timing(models[name][0], of_seeds[0], size.repeats) for name, of_seeds in nets.items()
    }
    log("brute force:", timings)
    same = same_as_the_library(nets["1x100"][0])
    log("slimmed removes the same units:", same)
    of_cosine: list[Cosine] = list(cosines(size))
    early = []
    for one in under_trained(folder, size):
        log("under-trained:", *one.row())
        early.append(one)
    curves = all_curves(nets)
    by_brute_force = curves["1x100", "oracle", "iterative"][0]
    of_units = gains(nets["1x100"][0], by_brute_force)
    both = {name: [pairs(net) for net in of_seeds] for name, of_seeds in nets.items()}
    log("pairs:", both)
    return Found(size, nets, curves, same, of_cosine, of_units, both, early, timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *-ubyte.gz files")
    parser.add_argument("--quick", action="store_true", help="small, printed, under a minute")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = measured(options.data, QUICK if options.quick else FULL)
    text = written(found)
    if options.quick:
        print(text)
    else:
        (options.output / "neuron_ranking.md").write_text(text)
        plot(found, options.output)
    log(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
