"""A trained network pruned while it is tuned: the g2p GRU, from spelling to sounds.

    python benchmarks/sparse_g2p.py --net g2p [--quick | --report]

The network and the words need two packages: see real_models.py. Recurrent weights of the encoder and the
decoder are cut at once, with and without tuning after it, or bit by bit over the first half of the tuning,
by weights or in blocks. Tuned once on 100,000 words; judged on 2,000 others.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from graphprune.passes import SparseRecurrent
from latency import header
from real_models import PAD, batches, encoded, evaluate_g2p, g2p, sample_of_words
from sparse_recurrent import block_of, not_zero
from torch import nn
from trainings import Job, Kept, Row, add_options, all_jobs, mean_and_spread, with_spread

import graphprune as gp
from graphprune.onnx_export.providers import Runtime

RESULTS = Path(__file__).parent / "results" / "sparse_recurrent_g2p.md"
WORDS, JUDGED, EPOCHS, BATCH, PEAK = 100_000, 2_000, 1, 64, 5e-4

JOBS = {
    "as it is": (1.0,),
    "tuned": (1.0,),
    "at once": (0.2, 0.1),
    "at once, tuned": (0.2, 0.1),
    "gradual": (0.2, 0.1),
    "gradual, 32x8": (0.2, 0.1),
    "gradual, 32x32": (0.2,),
}


def tuned(model: nn.Module, method: str, sparsity: float, seed: int, words: int) -> nn.Module:
    """Train on, pruning as the method says."""
    pairs = list(
        batches([encoded(*word) for word in sample_of_words(JUDGED + words)[JUDGED:]], BATCH)
    )
    steps = EPOCHS * len(pairs)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = None
    if method != "tuned":
        block = block_of(method)
        at_once = method.startswith("at once")
        schedule = gp.GradualSparsity(
            model, start=0, end=2 if at_once else steps // 2, every=1 if at_once else 10,
            schedule="hard" if at_once else "cubic", sparsity=sparsity, block=block,
            balanced=block != (1, 1), include=["encoder.*", "decoder.*"],
        )  # fmt: skip
    chance, step = random.Random(seed), 0
    model.train()
    for _ in range(EPOCHS):
        for letters, given, wanted in chance.sample(pairs, len(pairs)):
            optimiser.param_groups[0]["lr"] = PEAK * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = model(letters, given)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            if schedule is not None:
                schedule.step()
    return model.eval()


def work(quick: bool, job: Job) -> Row:
    """Prune the network; return its errors in percent of sounds, its size and the seconds that it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    (model, inputs), sparsity = g2p(), 1 - job.fraction
    if job.method == "at once":
        model = SparseRecurrent(sparsity, (1, 1), balanced=False)(model, inputs).graph_module
    elif job.method != "as it is":
        model = tuned(model, job.method, sparsity, job.seed, 1_000 if quick else WORDS)
    errors = evaluate_g2p(model, sample_of_words(JUDGED)[: 100 if quick else JUDGED])
    seconds = round(time.perf_counter() - start)
    return {
        "error": 100 * errors["phoneme_error"],
        "words": 100 * errors["word_accuracy"],
        "parameters": not_zero(model),
        "seconds": seconds,
    }


def report(kept: Kept) -> None:
    lines = [
        *header("Sparse g2p, pruned while it is tuned", [Runtime()]),
        f"Tuned on {WORDS:,} words, judged on {JUDGED:,} others: means over the seeds and standard "
        "deviations.",
        "",
        "| method | fraction | parameters | phoneme error, % | words right, % | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (method, fraction), rows in kept.by_method("g2p").items():
        error, words = (with_spread(*mean_and_spread(rows, name)) for name in ("error", "words"))
        parameters, _ = mean_and_spread(rows, "parameters")
        lines.append(
            f"| {method} | {fraction:g} | {parameters:,.0f} | {error} | {words} | {len(rows)} |"
        )
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, ["g2p"], seeds=1)
    options = parser.parse_args()
    kept = Kept(options.cache / f"sparse_recurrent_g2p{'_quick' if options.quick else ''}.jsonl")
    if not options.report:
        jobs = all_jobs("g2p", JOBS, 1 if options.quick else options.seeds)
        kept.run(functools.partial(work, options.quick), jobs, options.workers)
    if not (options.quick or options.train):
        report(kept)


if __name__ == "__main__":
    main()
