"""The members of the zoo: what there is in torchvision, timm and transformers, and how to build it.

    pip install --no-deps torchvision==0.28.0 timm==1.0.31 pillow pyyaml

A member is named `library/name`. Weights are random: nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models import import_torchvision, import_transformers

torchvision, transformers = import_torchvision(), import_transformers()
timm = import_module("timm")
MODEL_MAPPING_NAMES = import_module("transformers.models.auto.modeling_auto").MODEL_MAPPING_NAMES

LIBRARIES = ("torchvision", "timm", "transformers")


def members(library: str) -> list[str]:
    """Return the names of a library's members."""
    return list(
        {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library]()
    )


def build(member: str) -> tuple[nn.Module, Any]:
    """Return a model and example inputs at batch 1 or 2."""
    library, name = member.split("/", 1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builders = {
            "torchvision": _build_torchvision,
            "timm": _build_timm,
            "transformers": _build_transformers,
        }
        model, inputs = builders[library](name)
    return livened(model).eval(), inputs


def livened(model: nn.Module) -> nn.Module:
    """Return the model with its batch statistics at random values: fresh ones are no-ops."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            size = module.running_mean.shape
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model


# ------------------------------------------------------------------------------------ torchvision


def _torchvision() -> Iterator[str]:
    """Yield one of each kind of classifier and video network; every segmenter and backbone."""
    families: dict[str, list[str]] = {}
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__
        if ".quantization" in module or ".optical_flow" in module:
            continue
        families.setdefault(module, []).append(name)
    for module, names in families.items():
        if ".detection" in module or ".segmentation" in module:
            yield from (f"torchvision/{name}" for name in names)
        else:
            for name in _one_of_each_kind(names):
                yield f"torchvision/{name}"


def _one_of_each_kind(names: list[str]) -> list[str]:
    """Return the shortest of the names that agree in their first word, numbers left out."""
    kinds: dict[str, str] = {}
    for name in sorted(names, key=lambda n: (len(n), n)):
        kinds.setdefault(name.rstrip("0123456789_").split("_")[0].rstrip("0123456789"), name)
    return list(kinds.values())


class _Backbone(nn.Module):
    """What a detector computes before it proposes boxes: the features of its backbone."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        return list(features.values()) if isinstance(features, dict) else [features]


def _build_torchvision(name: str) -> tuple[nn.Module, Any]:
    builder = torchvision.models.get_model_builder(name)
    module = builder.__module__
    if ".detection" in module:
        detector = builder(weights=None, weights_backbone=None)
        size = 300 if "300" in name else 160
        return _Backbone(detector), torch.randn(1, 3, size, size)
    if ".segmentation" in module:
        return builder(weights=None, weights_backbone=None), torch.randn(1, 3, 96, 96)
    if ".video" in module:
        size = 64 if "_18" in name else 224
        return builder(weights=None), torch.randn(1, 3, 16, size, size)
    size = 299 if "inception" in name else 224
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return builder(weights=None, **options), torch.randn(1, 3, size, size)


# ------------------------------------------------------------------------------------------- timm


def _timm() -> Iterator[str]:
    """Yield the smallest model of each module of timm, by parameters."""
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        counted = [(count, name) for name in names if (count := _size_of_timm(name)) is not None]
        if counted:
            yield f"timm/{min(counted)[1]}"


def _size_of_timm(name: str) -> int | None:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:  # some cannot be built without data; the family is then told by its others
        return None


def _build_timm(name: str) -> tuple[nn.Module, Any]:
    channels, *size = timm.get_pretrained_cfg(name).input_size
    if max(size) > 256:  # what a smaller image shows takes minutes less
        image = torch.randn(1, channels, 224, 224)
        for options in ({"img_size": 224}, {}):
            with contextlib.suppress(Exception), torch.no_grad():
                model = timm.create_model(name, **options)
                model.eval()(image)
                return model, image
    return timm.create_model(name), torch.randn(1, channels, *size)


# ----------------------------------------------------------------------------------- transformers

# What makes a configuration small, by the names that configurations use for it.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "projection_dim"], 64),
    **dict.fromkeys(
        ["encoder_hidden_size", "decoder_hidden_size", "embedding_size", "emb_dim"], 64
    ),
    "out_hidden_size": 64,
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"], 2),
    **dict.fromkeys(
        ["encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"], 2
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4
    ),
    **dict.fromkeys(["encoder_attention_heads", "num_encoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    **dict.fromkeys(
        ["intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner"],
        128,
    ),
    "moe_intermediate_size": 48,
    "vocab_size": 200,
    "d_kv": 16,
    "image_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    **dict.fromkeys(["num_experts_per_tok", "moe_top_k", "top_k", "num_experts_per_token"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "sliding_window": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    **dict.fromkeys(["image_token_id", "image_token_index"], 3),
    **dict.fromkeys(["audio_token_id", "audio_token_index"], 4),
    **dict.fromkeys(["video_token_id", "video_token_index"], 5),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _transformers() -> Iterator[str]:
    yield from (f"transformers/{name}" for name in MODEL_MAPPING_NAMES)


def shrink_config(config: Any) -> Any:
    """Make a configuration, and those inside it, small."""
    for name, value in _SMALL.items():
        given = getattr(config, name, None)
        if isinstance(given, int) and not isinstance(given, bool):
            try:
                setattr(config, name, value)
            except Exception:  # a property that follows from others
                continue
    if getattr(config, "layer_types", None):  # hybrids attend in every fourth layer or so
        config.num_hidden_layers = 4
        config.layer_types = config.layer_types[:4]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:  # by time, height and width
        half = int(config.head_dim * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            shrink_config(inner)
    return config


def _build_transformers(name: str) -> tuple[nn.Module, Any]:
    transformers.logging.set_verbosity_error()
    config = shrink_config(transformers.CONFIG_MAPPING[name]())
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    return model, _inputs_for(model, config)


def _inputs_for(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Return inputs for the argument that the model names as its main one, and what must go with it."""
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    vocabulary = min(getattr(text, "vocab_size", 200) or 200, 200)
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (2, 12))
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs[main] = ids
    elif main in ("pixel_values", "pixel_values_videos"):
        inner = getattr(config, "vision_config", config)
        size = getattr(inner, "image_size", 64) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs[main] = torch.randn(2, getattr(inner, "num_channels", 3) or 3, height, width)
    elif main in ("input_features", "input_values"):
        inputs[main] = _sound(main, config)
    else:
        raise NotImplementedError(f"no example for the input {main!r}")
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :7]
    if main == "input_ids" and "pixel_values" in accepted and not _token(config, "image"):
        inputs |= _picture(accepted, config)
    elif main == "input_ids":
        media = [_picture, _sized_picture] if hasattr(config, "vision_config") else [_recording]
        for medium in media:
            with contextlib.suppress(Exception):  # a recipe of its own; text alone is what is left
                return _with_medium(model, config, inputs, medium(accepted, config))
    return inputs


def _token(config: Any, kind: str) -> int | None:
    """Return the number of the token that holds a place in a text for a feature of a medium."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((number for name in names if (number := getattr(config, name, None))), None)


def _with_medium(
    model: nn.Module, config: Any, inputs: dict[str, Tensor], medium: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put a picture or a sound into each text, with a place in the text for each of its features.

    Any exception says that the model does not take it so.
    """
    kind = "image" if "pixel_values" in medium else "audio"
    with torch.no_grad():
        features = getattr(model.eval(), f"get_{kind}_features")(**medium, return_dict=True)
    rows = features.pooler_output
    count = sum(len(row) for row in rows) if rows[0].dim() > 1 else len(rows)
    places = torch.full((2, count // 2), _token(config, kind))
    mixed = {**inputs, **medium, "input_ids": torch.cat([places, inputs["input_ids"]], dim=1)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        mixed["mm_token_type_ids"] = (mixed["input_ids"] == _token(config, kind)).long()
    with torch.no_grad():
        model(**mixed)
    return mixed


def _picture(accepted: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    vision = config.vision_config
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    if "image_grid_thw" in accepted:
        entries = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        return {"pixel_values": torch.randn(32, entries), "image_grid_thw": grid}
    size = vision.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.randn(2, channels, height, width)}


def _sized_picture(accepted: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    medium = _picture(accepted, config)
    sizes = torch.tensor([list(medium["pixel_values"].shape[-2:])] * 2)
    return {**medium, "image_sizes": sizes}


def _recording(accepted: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    sound = _sound("input_features", config.audio_config)
    return {"input_features": sound, "input_features_mask": torch.ones(2, sound.shape[-1]).long()}


def _sound(main: str, config: Any) -> Tensor:
    if main == "input_values":
        return torch.randn(2, 4000)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
    frames = 2 * getattr(config, "max_source_positions", 50)
    return torch.randn(2, bins, min(frames, 3000))
