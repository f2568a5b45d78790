"""The whole numbers that modules hold: as attributes, and in lists, tuples, dicts and records there."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

from torch import Size, nn

Key: TypeAlias = str | int

# Containers inside containers that are looked into, and entries of one.
_DEPTH, _ENTRIES = 3, 256
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_FOREIGN = frozenset(sys.stdlib_module_names | {"torch", "numpy"})


@dataclass(frozen=True)
class HeldNumber:
    """A whole number that a module holds.

    Attributes:
        module: the module's path.
        kind: the module's class.
        keys: the name of the attribute, and the keys, positions or fields inside it.
        value: the number.
        texts: the texts beside it in the same dict or record.

    """

    module: str
    kind: type[nn.Module]
    keys: tuple[Key, ...]
    value: int
    texts: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """What it is called, the innermost name first."""
        return [key for key in reversed(self.keys) if isinstance(key, str)]

    def __str__(self) -> str:
        inside = "".join(f"[{key!r}]" for key in self.keys[1:])
        return f"{self.module}.{self.keys[0]}{inside}".removeprefix(".")


def is_of_torch(kind: type) -> bool:
    """Say whether torch defines the class."""
    return kind.__module__.split(".")[0] == "torch"


def find_held_numbers(model: nn.Module, described: tuple[type, ...]) -> Iterator[HeldNumber]:
    """Yield the whole numbers above 1 that modules hold; each list or dict once, where first seen.

    Args:
        model: any module.
        described: classes of torch whose own attributes are left out.

    """
    visited_ids: set[int] = set()
    for path, module in model.named_modules():
        torch_names = (
            _names_of_torch(type(module)) if isinstance(module, described) else frozenset()
        )
        for name, value in _attributes(module):
            if name not in torch_names:
                for keys, number, texts in _find_inside(value, (name,), (), visited_ids):
                    yield HeldNumber(path, type(module), keys, number, texts)


def put_number(model: nn.Module, number: HeldNumber, value: int) -> None:
    """Let the model hold another number in this place."""
    module = model.get_submodule(number.module)
    name, *inner_keys = number.keys
    setattr(module, str(name), _replace_in(getattr(module, str(name)), inner_keys, value))


def _names_of_torch(kind: type) -> frozenset[str]:
    """Return the attributes that torch's classes under this one say that they have."""
    names: set[str] = set()
    for base in filter(is_of_torch, kind.__mro__):
        names.update(vars(base).get("__constants__", ()), vars(base).get("__annotations__", ()))
    return frozenset(names)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's attributes, and the numbers among those of its class."""
    instance_attributes = vars(module)
    for name, value in instance_attributes.items():
        if name not in _OF_EVERY_MODULE:
            yield name, value
    # The attribute of an instance or a subclass hides that of the class below.
    names_so_far: set[str] = set(instance_attributes)
    for base in type(module).__mro__:
        if is_of_torch(base):
            return
        for name, value in vars(base).items():
            if type(value) is int and name not in names_so_far and not name.startswith("__"):
                yield name, value
            names_so_far.add(name)


def _find_inside(
    value: Any, keys: tuple[Key, ...], texts: tuple[str, ...], visited_ids: set[int]
) -> Iterator[tuple[tuple[Key, ...], int, tuple[str, ...]]]:
    if type(value) is int:
        if value > 1:
            yield keys, value, texts
        return
    entries = _entries(value)
    if entries is None or len(keys) > _DEPTH or id(value) in visited_ids:
        return
    if not (isinstance(value, tuple) or _is_frozen(value)):  # else each module holds its own
        visited_ids.add(id(value))
    texts_beside = tuple(entry for _, entry in entries if isinstance(entry, str))
    for key, entry in entries[:_ENTRIES]:
        yield from _find_inside(entry, (*keys, key), texts_beside, visited_ids)


def _entries(value: Any) -> list[tuple[Key, Any]] | None:
    """Return what a list, tuple, dict or record holds by key, or None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    kind = type(value)
    # A list of a class that sets entries in its own way may refuse to be changed.
    if kind in (tuple, Size) or (isinstance(value, list) and kind.__setitem__ is list.__setitem__):
        return list(enumerate(value))
    if isinstance(value, dict):
        if kind.__setitem__ not in (dict.__setitem__, OrderedDict.__setitem__):
            return None  # it may refuse to be changed
        return [(key, entry) for key, entry in value.items() if isinstance(key, (str, int))]
    return list(vars(value).items()) if _is_record(value) else None


def _is_record(value: Any) -> bool:
    """Say whether a value is an object that only holds others, and no configuration of a library.

    Those that save themselves (`save_pretrained`) say more than sizes, and have to say it consistently.
    """
    kind = type(value)
    if isinstance(value, (SimpleNamespace, Namespace)):
        return True
    return (
        hasattr(value, "__dict__")
        and kind.__module__.split(".")[0] not in _FOREIGN
        and not isinstance(value, (nn.Module, type))
        and not callable(value)
        and not hasattr(kind, "save_pretrained")
        and not hasattr(kind, "__torch_function__")
    )


def _is_frozen(value: Any) -> bool:
    return bool(getattr(getattr(value, "__dataclass_params__", None), "frozen", False))


def _replace_in(container: Any, keys: Sequence[Key], value: int) -> Any:
    """Return the container with a number replaced, itself where it can be changed."""
    if not keys:
        return value
    key, *inner_keys = keys
    if isinstance(container, tuple) and isinstance(key, str):
        # A namedtuple: its keys are names of fields.
        return container._replace(**{key: _replace_in(getattr(container, key), inner_keys, value)})  # type: ignore[attr-defined]
    if isinstance(container, tuple):
        entries: list[Any] = list(container)
        entries[key] = _replace_in(entries[key], inner_keys, value)  # type: ignore[index]
        return type(container)(entries)
    if isinstance(container, (list, dict)):
        container[key] = _replace_in(container[key], inner_keys, value)  # type: ignore[index]
        return container
    new_entry = _replace_in(getattr(container, str(key)), inner_keys, value)
    record = copy.copy(container) if _is_frozen(container) else container
    # Past `__setattr__`, by which a frozen record refuses.
    vars(record)[str(key)] = new_entry
    return record


# What the last telling word of a name says: a size of tensors, or another number.
_SIZES = frozenset(
    """channel channels chan chans chs ch plane planes inplanes feature features feat feats filter
    filters width widths dim dims hidden embed embd emb embedding unit units neuron neurons head heads
    nhead group groups rank inner mid model state latent expert experts""".split()  # noqa: SIM905
)
_OTHERS = frozenset(
    """kernel stride padding pad dilation depth layer layers block blocks step steps epoch epochs seed
    length len max min position positions embeddings vocab vocabulary class classes label labels token
    tokens image img resolution patch patches window windows time frames index indices idx id ids ratio
    factor scale reduction top k iteration iterations repeat repeats batch dropout version bit bits level
    levels stage stages multiplier expansion order degree period limit alpha""".split()  # noqa: SIM905
)
# Words of names that are of what sizes are computed from: `base_width`.
_OPTIONS = frozenset(["base", "init", "initial", "default", "original", "orig", "pretrained"])


def says_size(number: HeldNumber) -> bool | None:
    """Say whether its name is one for a size of tensors, or for another number; None for neither."""
    for name in number.names:
        words = _words(name)
        if _OPTIONS.intersection(words):
            return None
        # The last telling word decides: in `kernel_size` "size" tells nothing, "kernel" does.
        for word in reversed(words):
            if word in _SIZES:
                return True
            if word in _OTHERS:
                return False
    return None


def says_side(number: HeldNumber) -> str:
    """Return "in" or "out" where the name is of what goes into or comes out of its module, else ""."""
    words = {word for name in number.names for word in _words(name)}
    if words & {"in", "input", "inp", "inplanes"}:
        return "in"
    return "out" if words & {"out", "output"} else ""


def _words(name: str) -> list[str]:
    # "hiddenDim2" is ["hidden", "dim"].
    spaced = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
    return [word.rstrip("0123456789") for word in spaced.split("_") if word]


def group_by_class_and_keys(
    numbers: Sequence[HeldNumber],
) -> Mapping[tuple[type, tuple[Key, ...]], list[HeldNumber]]:
    """Return the numbers by class and keys: what instances of one class hold in one place."""
    by_class_and_keys: dict[tuple[type, tuple[Key, ...]], list[HeldNumber]] = {}
    for number in numbers:
        by_class_and_keys.setdefault((number.kind, number.keys), []).append(number)
    return by_class_and_keys
