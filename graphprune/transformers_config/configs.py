"""Configs of transformers: the numbers that a model's code reads in them, and models of other numbers."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphprune.errors import InvalidRequestError, in_a_line
from graphprune.utils.torch_context import silence_torch

_ATTENTION = "_attn_implementation"

# What initialises weights, most often; on the meta device it would take most of the time, for nothing.
_FILLING = frozenset(
    (
        "normal_", "uniform_", "trunc_normal_", "constant_", "zeros_", "ones_", "zero_", "fill_", "copy_",
        "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_",
    )
)  # fmt: skip

NumberPath: TypeAlias = tuple[str | int, ...]
"""Where a number stands in a config: names of attributes and positions in lists, from outside in."""

Number: TypeAlias = int | float
Changes: TypeAlias = Mapping[NumberPath, Number]
Shapes: TypeAlias = dict[str, tuple[int, ...]]


class Architecture:
    """A class of transformers models and the config of one of them.

    Attributes:
        name: of the class of the config.
        content: the config as nested dicts and lists.
        numbers: those that the model's code reads while it is built; None for one left open.

    Raises:
        InvalidRequestError: the class cannot be built from its config alone.

    """

    def __init__(self, model: Any) -> None:
        self._kind: Any = type(model)
        self._config: Any = model.config
        self.name = type(self._config).__name__
        self.content: dict[str, Any] = self._config.to_dict()
        self._shapes: dict[frozenset[tuple[NumberPath, Number]], Shapes] = {}
        self.numbers = self._find_numbers()

    def config_of(self, content: Mapping[str, Any]) -> Any:
        """Return the config as it is read from such a file."""
        with silence_transformers():
            config = type(self._config).from_dict(copy.deepcopy(dict(content)))
            if hasattr(self._config, _ATTENTION):  # is not written to the file
                setattr(config, _ATTENTION, _kernels_of(self._config))
        return config

    def build(self, config: Any) -> nn.Module:
        """Return the model of a config, its weights on the meta device, its computed buffers real."""
        # Building a model draws random numbers, filled or not; the user's generator must not move.
        with silence_transformers(), _UnfilledOnMeta(), torch.random.fork_rng(devices=[]):
            model: nn.Module = self._kind(config)
        return model

    def build_with(self, changes: Changes) -> nn.Module:
        """Return the model of the config with other numbers.

        Raises:
            Exception: whatever the config or the model raise where they refuse them.

        """
        return self.build(self.config_of(copy_with_changes(self.content, changes)))

    def file_of(self, changes: Changes) -> dict[str, Any]:
        """Return what the config with other numbers writes as config.json."""
        with silence_transformers():
            config = type(self._config).from_dict(copy_with_changes(self.content, changes))
            return dict(json.loads(config.to_json_string()))

    def without_aliases(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config's content under the names that the class itself has for it."""
        aliases: dict[str, str] = getattr(self._config, "attribute_map", {})
        return {aliases.get(name, name): value for name, value in content.items()}

    def shapes(self, changes: Changes) -> Shapes:
        """Return the shapes of the model with other numbers, or nothing where there is none."""
        key = frozenset(changes.items())
        if key not in self._shapes:
            try:
                self._shapes[key] = shapes(self.build_with(changes))
            except Exception:  # a config refuses some numbers in whatever way it likes
                self._shapes[key] = {}
        return self._shapes[key]

    def _find_numbers(self) -> dict[NumberPath, Number | None]:
        with _record_reads(type(self._config)) as reads:
            try:
                self.build_with({})
            except Exception as refusal:  # of whatever kind it likes
                raise InvalidRequestError(
                    f"{self._kind.__name__} cannot be built from what its {self.name} writes, as "
                    f"from_pretrained would ({in_a_line(refusal)}); use graphprune.save"
                ) from refusal
        return dict(_collect_numbers_read(self._config, reads, ()))


def has_config(model: nn.Module) -> bool:
    """Say whether a model is of transformers, with a config that can be written and read."""
    config = getattr(model, "config", None)
    return all(hasattr(config, name) for name in ("to_dict", "to_json_string", "from_dict"))


def shapes(model: nn.Module) -> Shapes:
    """Return the shapes of a model's parameters and buffers, under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(chain(parameters, model.named_buffers(remove_duplicate=False)))


def copy_with_changes(content: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return a copy of nested dicts and lists with other numbers."""
    changed_content = copy.deepcopy(dict(content))
    for path, value in changes.items():
        container: Any = changed_content
        for key in path[:-1]:
            # A tuple takes no other number; config.json would have a list for it anyway.
            if isinstance(container[key], tuple):
                container[key] = list(container[key])
            container = container[key]
        container[path[-1]] = value
    return changed_content


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep from the user what torch and transformers say of configs that are only tried."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with silence_torch():
            yield
    finally:
        logger.setLevel(level)


def _kernels_of(config: Any) -> Any:
    """Return which attention a config and the configs in it were given, as transformers takes them."""
    kernels_by_name = {
        name: getattr(value, _ATTENTION)
        for name, value in vars(config).items()
        if hasattr(value, _ATTENTION)
    }
    kernel = getattr(config, _ATTENTION)
    return {"": kernel, **kernels_by_name} if kernels_by_name else kernel


@contextmanager
def _record_reads(kind: type) -> Iterator[set[tuple[type, str]]]:
    """Give the set to which every read of an attribute of such configs is added, present or not."""
    # The root of all config classes, so that reads of the configs inside this one are seen too.
    base: Any = next(cls for cls in reversed(kind.__mro__) if "to_dict" in vars(cls))
    reads: set[tuple[type, str]] = set()
    getattribute = base.__getattribute__

    def record_read(config: Any, name: str) -> Any:
        if not name.startswith("_"):
            aliases = (
                getattribute(config, "attribute_map") if hasattr(base, "attribute_map") else {}
            )
            # Code reads GPT-2's `hidden_size`, config.json writes `n_embd`: this name counts.
            reads.add((type(config), aliases.get(name, name)))
        return getattribute(config, name)

    # Put back as it was: an inherited method is uncovered again, not copied into the class.
    base_defines_it = "__getattribute__" in vars(base)
    base.__getattribute__ = record_read
    try:
        yield reads
    finally:
        if base_defines_it:
            base.__getattribute__ = getattribute
        else:
            del base.__getattribute__


def _collect_numbers_read(
    config: Any, reads: set[tuple[type, str]], path: NumberPath
) -> Iterator[tuple[NumberPath, Number | None]]:
    content = config.to_dict()
    for kind, name in sorted(reads, key=lambda pair: pair[1]):
        # The reads are of every config that was seen, the one outside and those in it.
        if kind is not type(config):
            continue
        inner_config = getattr(config, name, None)
        if hasattr(inner_config, "to_dict"):
            yield from _collect_numbers_read(inner_config, reads, (*path, name))
        # Lacking here, but read by `getattr(config, name, default)`: a number left open, None.
        elif name in content or not hasattr(config, name):
            yield from _collect_numbers(content.get(name), (*path, name))


def _collect_numbers(value: Any, path: NumberPath) -> Iterator[tuple[NumberPath, Number | None]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _collect_numbers(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for position, inner in enumerate(value):
            yield from _collect_numbers(inner, (*path, position))
    # By type: a bool is an instance of int. Numbers up to 1 (epsilon, dropout) are no sizes.
    elif value is None or (type(value) in (int, float) and value > 1):
        yield path, value


class _UnfilledOnMeta(TorchFunctionMode):
    """Makes tensors that are to be filled later, as parameters are, without memory, and fills none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        tensor = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if name in _FILLING and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
