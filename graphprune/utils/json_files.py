"""JSON that others wrote: read, or refused with a `ValueError`, whatever is in it."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn

# Digits of a number that is a size, a position or a count.
_MOST_DIGITS = 20


def parsed(text: str | bytes, *, finite: bool = True) -> Any:
    """Return what a JSON text says.

    Args:
        text: the JSON.
        finite: refuse numbers that are none, or too large to be one: NaN, Infinity, 1e999.

    Raises:
        ValueError: it is no JSON, has such numbers, integers of more than 20 digits, or lists in lists
            deeper than can be read.

    """
    constant, number = (_no_number, _finite) if finite else (None, None)
    try:
        return json.loads(text, parse_constant=constant, parse_float=number, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path, *, finite: bool = True) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: as for `parsed`.

    """
    return parsed(path.read_bytes(), finite=finite)


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a value that has to be a JSON object.

    Raises:
        ValueError: it is something else.

    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {reprlib.repr(value)}, not an object")
    return value


def of_format(value: Any, name: str, version: int | str) -> dict[str, Any]:
    """Return a value that has to be a JSON object of this format.

    Raises:
        ValueError: it is something else.

    """
    content = mapping(value, "it")
    said = content.get("format"), content.get("version")
    if said != (name, version) or isinstance(said[1], bool):
        raise ValueError(f"format {reprlib.repr(said[0])} version {reprlib.repr(said[1])}")
    return content


def integer(value: Any, what: str) -> int:
    """Return a value that has to be an integer: not a text of one, nor a number with a point, nor true.

    Raises:
        ValueError: it is something else.

    """
    if type(value) is not int:
        raise ValueError(f"{what} is {reprlib.repr(value)}, not an integer")
    return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is too large")
    return int(digits)
