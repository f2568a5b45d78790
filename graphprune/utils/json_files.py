"""JSON that others wrote: read, or refused with a `ValueError`, whatever is in it."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn

# Digits of a number that is a size, a position or a count.
_MOST_DIGITS = 20


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Return what a JSON text says.

    Args:
        text: the JSON.
        finite: refuse numbers that are none, or too large to be one: NaN, Infinity, 1e999.

    Raises:
        ValueError: it is no JSON, has such numbers, integers of more than 20 digits, or lists in lists
            deeper than can be read.

    """
    parse_constant, parse_float = (_refuse_constant, _parse_finite) if finite else (None, None)
    try:
        return json.loads(
            text, parse_constant=parse_constant, parse_float=parse_float, parse_int=_parse_integer
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path, *, finite: bool = True) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: as for `parse_json`.

    """
    return parse_json(path.read_bytes(), finite=finite)


def require_object(value: Any, label: str) -> dict[str, Any]:
    """Return a value that has to be a JSON object.

    Raises:
        ValueError: it is something else.

    """
    if not isinstance(value, dict):
        raise ValueError(f"{label} is {reprlib.repr(value)}, not an object")
    return value


def require_format(value: Any, name: str, version: int | str) -> dict[str, Any]:
    """Return a value that has to be a JSON object of this format.

    Raises:
        ValueError: it is something else.

    """
    content = require_object(value, "it")
    format_and_version = content.get("format"), content.get("version")
    # in Python True == 1, so that version true would pass for 1
    if format_and_version != (name, version) or isinstance(format_and_version[1], bool):
        raise ValueError(
            f"format {reprlib.repr(format_and_version[0])} version {reprlib.repr(format_and_version[1])}"
        )
    return content


def require_integer(value: Any, label: str) -> int:
    """Return a value that has to be an integer: not a text of one, nor a number with a point, nor true.

    Raises:
        ValueError: it is something else.

    """
    if type(value) is not int:
        raise ValueError(f"{label} is {reprlib.repr(value)}, not an integer")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _parse_finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is too large")
    return int(digits)
