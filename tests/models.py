"""Real architectures for the tests and the benchmarks: at their published size, and small.

`ALL[name](small=True)` gives an `Example`: a model in eval mode and real inputs at batch 2. Every
parameter is random, and so are batch norm's statistics: a pruned bias of zero or a scale of one is
a bug that no output shows. `build(name, small=False)` gives the bare module, also on the meta
device.

The transformers are built from configurations; that library is imported when one is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphprune.utils.inputs import Inputs, call
from tests.models_images import (
    conv_norm,
    densenet121,
    efficientnet_b0,
    mobilenet_v2,
    pixel_shuffle_upsampler,
    resnet50,
    resnext50,
    shufflenet_v2,
    unet,
    yolo_neck,
)

# ------------------------------------------------------------------------------ random parameters


def randomise(model: nn.Module, inputs: Any = None, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, every parameter drawn anew, with signals of about unit size.

    Weights are normal with 1 / fan-in as variance, biases are not zero, norms neither scale by one
    nor shift by zero. With inputs, batch norm's statistics are those of these inputs, disturbed:
    random ones would make the signal of a deep network die out or blow up.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, std: float, mean: float = 0.0) -> None:
        p.copy_(torch.randn(p.shape, generator=generator) * std + mean)

    def uniform(p: Tensor, low: float, high: float) -> None:
        p.copy_(torch.rand(p.shape, generator=generator) * (high - low) + low)

    def disturb_statistics(module: nn.Module, args: tuple[Tensor]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        variance, mean = torch.var_mean(args[0], dim=dims, correction=0)
        uniform(module.running_var, 0.6, 1.6)
        normal(module.running_mean, 0.3)
        module.running_mean.mul_(variance.sqrt()).add_(mean)
        module.running_var.mul_(variance + 1e-3)

    drawn: set[Tensor] = set()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                continue  # already random, and its parts belong together
            kind = type(module).__name__
            for name, p in module.named_parameters(recurse=False):
                if p in drawn or not p.is_floating_point():
                    continue
                drawn.add(p)
                if "Norm" in kind and "weight" in name:
                    uniform(p, 0.6, 1.4)
                elif "bias" in name or "Norm" in kind:
                    normal(p, 0.2)
                elif isinstance(module, nn.PReLU):
                    uniform(p, 0.05, 0.5)
                elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                    normal(p, 0.3)
                elif kind == "Conv1D":  # of transformers: weight [in, out]
                    normal(p, p.shape[0] ** -0.5)
                elif isinstance(module, _ConvTransposeNd):
                    reached = p[0, 0].numel() / math.prod(module.stride)
                    normal(p, (reached * p.shape[0] / module.groups) ** -0.5)
                elif isinstance(
                    module, (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
                ):
                    normal(p, 1.2 * p[0].numel() ** -0.5)
                elif isinstance(module, nn.MultiheadAttention):
                    normal(p, p.shape[-1] ** -0.5)
                elif p.dim() == 2 and p.shape[0] == p.shape[1]:
                    normal(p, p.shape[0] ** -0.5)
                else:
                    normal(p, 0.4, mean=0.3)
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        for norm in norms:
            normal(norm.running_mean, 0.3)
            uniform(norm.running_var, 0.6, 1.6)
        if inputs is not None and norms:
            hooks = [norm.register_forward_pre_hook(disturb_statistics) for norm in norms]
            call(model, Inputs.of(inputs))
            for hook in hooks:
                hook.remove()
    return model


def uniform_images(batch: int, *shape: int, seed: int = 1) -> Tensor:
    """Return normal noise with an offset, so that no channel's mean is zero."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)) + 0.25


def random_tokens(batch: int, length: int, vocabulary: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


# ------------------------------------------------------------------------------------- recurrent


class CRNN(nn.Module):
    """Shi et al. 2017, reading a line of text: columns of the feature map are the time steps."""

    def __init__(self, widths: Sequence[int], height: int, hidden: int, classes: int) -> None:
        super().__init__()
        a, b, c, d = widths
        self.features = nn.Sequential(
            nn.Conv2d(1, a, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(a, b, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            *conv_norm(b, c, 3, activation=nn.ReLU),
            nn.Conv2d(c, c, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1), (2, 1)),
            *conv_norm(c, d, 3, activation=nn.ReLU),
            nn.Conv2d(d, d, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1), (2, 1)),
            nn.Conv2d(d, d, 2, bias=False),
            nn.BatchNorm2d(d),
            nn.ReLU(),
        )
        rows = height // 16 - 1
        self.lstm = nn.LSTM(d * rows, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2)
        x = x.reshape(x.size(0), x.size(1), -1)
        x, _ = self.lstm(x)
        return self.fc(x)


def crnn(
    widths: Sequence[int] = (64, 128, 256, 512),
    height: int = 32,
    hidden: int = 256,
    classes: int = 37,
) -> nn.Module:
    return CRNN(widths, height, hidden, classes)


class Classifier(nn.Module):
    """A class for a sequence of tokens: embedding, 2-layer bidirectional LSTM, its last step."""

    def __init__(self, vocabulary: int, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.lstm = nn.LSTM(features, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (h, _) = self.lstm(self.embedding(tokens))
        return self.fc(torch.cat([h[-2], h[-1]], dim=1))


def lstm_net(
    vocabulary: int = 10000, features: int = 200, hidden: int = 256, classes: int = 20
) -> nn.Module:
    return Classifier(vocabulary, features, hidden, classes)


class Tagger(nn.Module):
    """A class for each step of a signal: projection, 2-layer bidirectional GRU, linear head."""

    def __init__(self, features: int, projected: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, projected)
        self.gru = nn.GRU(projected, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(torch.relu(self.projection(x)))
        return self.fc(x)


def gru_net(
    features: int = 80, projected: int = 128, hidden: int = 256, classes: int = 41
) -> nn.Module:
    return Tagger(features, projected, hidden, classes)


# ---------------------------------------------------------------------------------- transformers


def import_torchvision() -> ModuleType:
    """Return the library.

    Where it and torch are of different builds, the import fails until two operators that nothing here
    needs are declared.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(f"torchvision::{name}", signature)
        return importlib.import_module("torchvision")


def import_transformers() -> ModuleType:
    """Return the library, which imports torchvision where there is one."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return importlib.import_module("transformers")


def bert(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 88,
        "max_position_embeddings": 40,
    }
    return transformers.BertModel(transformers.BertConfig(**({} if full else small)))


def gpt2(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "n_embd": 60,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 92,
        "n_positions": 40,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(use_cache=False, **({} if full else small))
    )


def llama(full: bool = False) -> nn.Module:
    """Grouped-query attention: 3 queries a key-value head. Full: 100M parameters, head tied."""
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 76,
        "max_position_embeddings": 40,
    }
    base: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(use_cache=False, **(base if full else small))
    )


def vit(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "hidden_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 88,
        "image_size": 30,
        "patch_size": 6,
        "num_labels": 10,
    }
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**({"num_labels": 1000} if full else small))
    )


def swin(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "image_size": 24,
        "patch_size": 2,
        "embed_dim": 20,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 3,
        "mlp_ratio": 3.0,
        "num_labels": 11,
    }
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(**({"num_labels": 1000} if full else small))
    )


def t5(full: bool = False) -> nn.Module:
    transformers = import_transformers()

    small: dict[str, Any] = {
        "vocab_size": 101,
        "d_model": 36,
        "d_kv": 10,
        "num_heads": 4,
        "d_ff": 84,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
    }
    config = transformers.T5Config(
        use_cache=False, pad_token_id=0, decoder_start_token_id=0, **({} if full else small)
    )
    return transformers.T5ForConditionalGeneration(config)


# -------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Example:
    """A model in eval mode with example inputs: positional as a tuple, by keyword as a dict."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """How to build one model at both sizes, and the parameters of the full one, as published."""

    build: Callable[..., nn.Module]
    parameters: int
    inputs: Callable[[bool], tuple[Tensor, ...] | dict[str, Tensor]]
    small: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)


def images(full: int, small: int, channels: int = 3) -> Callable[[bool], tuple[Tensor, ...]]:
    def inputs(is_small: bool) -> tuple[Tensor, ...]:
        size = small if is_small else full
        return (uniform_images(2, channels, size, size),)

    return inputs


def pixels(full: int, small: int) -> Callable[[bool], dict[str, Tensor]]:
    return lambda is_small: {"pixel_values": images(full, small)(is_small)[0]}


def text_lines(is_small: bool) -> tuple[Tensor, ...]:
    return (uniform_images(2, 1, 48, 36) if is_small else uniform_images(2, 1, 32, 100),)


def tokens(full: int) -> Callable[[bool], tuple[Tensor, ...]]:
    return lambda is_small: (random_tokens(2, *((9, 101) if is_small else (32, full))),)


def signals(is_small: bool) -> tuple[Tensor, ...]:
    return (uniform_images(2, *((9, 15) if is_small else (50, 80))),)


def token_ids(vocabulary: int, mask: bool = False) -> Callable[[bool], dict[str, Tensor]]:
    """Return token ids; with a mask, the second sequence ends in three padding tokens."""

    def inputs(is_small: bool) -> dict[str, Tensor]:
        length, size = (11, 101) if is_small else (64, vocabulary)
        named = {"input_ids": random_tokens(2, length, size)}
        if mask:
            named["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            named["attention_mask"][1, -3:] = 0
        return named

    return inputs


def two_texts(is_small: bool) -> dict[str, Tensor]:
    lengths, size = ((11, 7), 101) if is_small else ((64, 32), 32128)
    return {
        "input_ids": random_tokens(2, lengths[0], size, seed=1),
        "decoder_input_ids": random_tokens(2, lengths[1], size, seed=2),
    }


FULL = {"full": True}
ENTRIES: dict[str, Entry] = {
    "resnet50": Entry(
        resnet50, 25_557_032, images(224, 64), {"width": 16, "classes": 10, "layers": (2, 2, 1, 1)}
    ),
    "resnext50": Entry(
        resnext50,
        25_028_904,
        images(224, 64),
        {"width": 16, "classes": 10, "layers": (2, 1, 1, 1), "groups": 6, "group_width": 24},
    ),
    "mobilenet_v2": Entry(
        mobilenet_v2,
        3_504_872,
        images(224, 64),
        {"width": 0.5, "classes": 10, "head": 200, "repeats": False},
    ),
    "efficientnet_b0": Entry(
        efficientnet_b0,
        5_288_548,
        images(224, 64),
        {"width": 0.5, "classes": 10, "head": 200, "repeats": False},
    ),
    "densenet121": Entry(
        densenet121,
        7_978_856,
        images(224, 64),
        {"growth": 6, "layers": (2, 3, 2, 2), "stem": 20, "classes": 10},
    ),
    "shufflenet_v2": Entry(
        shufflenet_v2,
        2_278_604,
        images(224, 64),
        {"repeats": (2, 3, 2), "channels": (12, 20, 36, 56, 90), "classes": 10},
    ),
    "unet": Entry(unet, 31_037_698, images(256, 32), {"width": 10, "depth": 3}),
    "yolo_neck": Entry(
        yolo_neck,
        3_157_184,
        images(320, 64),
        {"widths": (8, 12, 20, 28, 44), "box": 16, "classes": 7},
    ),
    "pixel_shuffle_upsampler": Entry(
        pixel_shuffle_upsampler, 1_369_859, images(96, 14), {"width": 12, "blocks": 3}
    ),
    "crnn": Entry(
        crnn,
        8_722_981,
        text_lines,
        {"widths": (8, 12, 20, 28), "height": 48, "hidden": 18, "classes": 13},
    ),
    "lstm_net": Entry(
        lstm_net,
        4_525_204,
        tokens(10000),
        {"vocabulary": 101, "features": 20, "hidden": 24, "classes": 7},
    ),
    "gru_net": Entry(
        gru_net,
        1_807_017,
        signals,
        {"features": 15, "projected": 20, "hidden": 24, "classes": 7},
    ),
    "bert": Entry(bert, 109_482_240, token_ids(30522, mask=True), full=FULL),
    "gpt2": Entry(gpt2, 124_439_808, token_ids(50257), full=FULL),
    "llama": Entry(llama, 100_092_672, token_ids(32000), full=FULL),
    "vit": Entry(vit, 86_567_656, pixels(224, 30), full=FULL),
    "swin": Entry(swin, 28_288_354, pixels(224, 24), full=FULL),
    "t5": Entry(t5, 60_506_624, two_texts, full=FULL),
}
TRANSFORMERS = frozenset({"bert", "gpt2", "llama", "vit", "swin", "t5"})


def build(name: str, small: bool = True) -> nn.Module:
    """Return the bare module, as its constructor initialises it."""
    entry = ENTRIES[name]
    return entry.build(**(entry.small if small else entry.full))


def example(name: str, small: bool = True, seed: int = 0) -> Example:
    """Return the model with random parameters, in eval mode, and inputs at batch 2."""
    inputs = ENTRIES[name].inputs(small)
    model = randomise(build(name, small), inputs, seed)
    if name == "t5":  # its attention does not divide by the root of the head size
        with torch.no_grad():
            for module_name, module in model.named_modules():
                if module_name.endswith("Attention.q"):
                    module.weight.mul_(model.config.d_kv**-0.5)
    return Example(name, model, inputs)


ALL: dict[str, Callable[..., Example]] = {
    name: functools.partial(example, name) for name in ENTRIES
}
