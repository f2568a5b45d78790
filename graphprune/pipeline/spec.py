"""Pipelines as text: `"slim-channels{ratio=0.3 of=macs}, fold-batch-norm"`, read and written."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from graphprune.errors import InvalidRequestError

Made = TypeVar("Made")

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_OPTION = re.compile(r"([A-Za-z_]\w*)\s*=\s*")
_QUOTED = r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' """
_VALUE = re.compile(
    rf"""{_QUOTED}
    | \( (?: {_QUOTED} | [^()"'] )* \)  # a tuple
    | [^\s{{}}(),="']+                  # a number or a word
    """,
    re.VERBOSE,
)
_WORD = re.compile(r"(?!True$|False$|None$)[A-Za-z_][\w./*-]*")


def parse_spec(text: str, classes_by_name: Mapping[str, type[Made]]) -> Iterator[Made]:
    """Yield what a text names, with its options.

    Args:
        text: names in order, with commas between them, each with options in braces or without.
        classes_by_name: dataclasses that a text may name.

    Raises:
        InvalidRequestError: the text is not of this form, or names what is not known.

    """
    reader = _Reader(text)
    while not reader.at_end():
        name = reader.take(_NAME, "the name of a pass")
        options = dict(reader.options()) if reader.skip("{") else {}
        if name not in classes_by_name:
            raise InvalidRequestError(
                f"there is no pass {name!r}; there are {', '.join(sorted(classes_by_name))}"
            )
        yield _instantiate(name, classes_by_name[name], options)
        if reader.skip(","):
            if reader.at_end():
                raise reader.make_error("the name of a pass")
        elif not reader.at_end():
            raise reader.make_error("a comma, options in braces or the end")


class _Reader:
    """A place in a text."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self._skip_space()

    def take(self, pattern: re.Pattern[str], description: str) -> str:
        match = pattern.match(self.text, self.place)
        if match is None:
            raise self.make_error(description)
        self._move(match.end())
        # An option's pattern has its name as a group; the others have none, and are taken whole.
        return match[match.lastindex or 0]

    def skip(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.place):
            return False
        self._move(self.place + len(sign))
        return True

    def at_end(self) -> bool:
        return self.place == len(self.text)

    def options(self) -> Iterator[tuple[str, Any]]:
        while not self.skip("}"):
            name = self.take(_OPTION, "an option such as ratio=0.5, or a closing brace")
            yield name, self.value()

    def value(self) -> Any:
        start = self.place
        literal = self.take(_VALUE, "a value")
        try:
            return ast.literal_eval(literal)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last, of many signs
            if _WORD.fullmatch(literal):
                return literal
        self.place = start
        raise self.make_error("a number, a word, a text in quotes or a tuple of these")

    def make_error(self, description: str) -> InvalidRequestError:
        remaining_text = self.text[self.place :]
        location = f"at {remaining_text!r}" if remaining_text else "at the end"
        return InvalidRequestError(
            f"the pipeline {self.text!r} should have {description} {location}"
        )

    def _move(self, position: int) -> None:
        self.place = position
        self._skip_space()

    def _skip_space(self) -> None:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1


def _instantiate(name: str, kind: type[Made], options: Mapping[str, Any]) -> Made:
    fields_by_name = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown_options = sorted(options.keys() - fields_by_name.keys())
    if unknown_options:
        raise InvalidRequestError(
            f"the pass {name!r} has no option {unknown_options[0]!r}; it has "
            f"{', '.join(fields_by_name) or 'none'}"
        )
    missing = [
        n for n, field in fields_by_name.items() if n not in options and not _has_default(field)
    ]
    if missing:
        raise InvalidRequestError(f"the pass {name!r} needs {', '.join(missing)}")
    return kind(**options)


def format_spec(name: str, instance: Any) -> str:
    """Return a dataclass as `parse_spec` reads it; options that have their default are left out.

    Raises:
        InvalidRequestError: an option is not a number, a text or a tuple of these.

    """
    options = []
    for field in fields(instance):
        value = getattr(instance, field.name)
        # The default itself need not be plain, since it is not written.
        if _has_default(field) and value is field.default:
            continue
        if not _is_plain(value):
            raise InvalidRequestError(
                f"the option {field.name} of the pass {name!r} is a {type(value).__name__}, which no text "
                "can hold; numbers, texts and tuples of these can be written"
            )
        # With types, since True == 1 == 1.0.
        if (type(value), value) != (type(field.default), field.default):
            options.append(f"{field.name}={_as_text(value)}")
    return f"{name}{{{' '.join(options)}}}" if options else name


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(not isinstance(entry, tuple) and _is_plain(entry) for entry in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else repr(value)
