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


def read(text: str, known: Mapping[str, type[Made]]) -> Iterator[Made]:
    """Yield what a text names, with its options.

    Args:
        text: names in order, with commas between them, each with options in braces or without.
        known: dataclasses by name.

    Raises:
        InvalidRequestError: the text is not of this form, or names what is not known.

    """
    reader = _Reader(text)
    while not reader.at_end():
        name = reader.take(_NAME, "the name of a pass")
        options = dict(reader.options()) if reader.skip("{") else {}
        if name not in known:
            raise InvalidRequestError(
                f"there is no pass {name!r}; there are {', '.join(sorted(known))}"
            )
        yield _made(name, known[name], options)
        if reader.skip(","):
            if reader.at_end():
                raise reader.expected("the name of a pass")
        elif not reader.at_end():
            raise reader.expected("a comma, options in braces or the end")


class _Reader:
    """A place in a text."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self._skip_space()

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.place)
        if found is None:
            raise self.expected(what)
        self._move(found.end())
        return found[found.lastindex or 0]

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
        found = self.take(_VALUE, "a value")
        try:
            return ast.literal_eval(found)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last, of many signs
            if _WORD.fullmatch(found):
                return found
        self.place = start
        raise self.expected("a number, a word, a text in quotes or a tuple of these")

    def expected(self, what: str) -> InvalidRequestError:
        rest = self.text[self.place :]
        here = f"at {rest!r}" if rest else "at the end"
        return InvalidRequestError(f"the pipeline {self.text!r} should have {what} {here}")

    def _move(self, place: int) -> None:
        self.place = place
        self._skip_space()

    def _skip_space(self) -> None:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1


def _made(name: str, kind: type[Made], options: Mapping[str, Any]) -> Made:
    its = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    strange = sorted(options.keys() - its.keys())
    if strange:
        raise InvalidRequestError(
            f"the pass {name!r} has no option {strange[0]!r}; it has {', '.join(its) or 'none'}"
        )
    missing = [n for n, field in its.items() if n not in options and not _has_default(field)]
    if missing:
        raise InvalidRequestError(f"the pass {name!r} needs {', '.join(missing)}")
    return kind(**options)


def written(name: str, made: Any) -> str:
    """Return a dataclass as `read` reads it; options that have their default are left out.

    Raises:
        InvalidRequestError: an option is not a number, a text or a tuple of these.

    """
    options = []
    for field in fields(made):
        value = getattr(made, field.name)
        if _has_default(field) and value is field.default:
            continue
        if not _is_plain(value):
            raise InvalidRequestError(
                f"the option {field.name} of the pass {name!r} is a {type(value).__name__}, which no text "
                "can hold; numbers, texts and tuples of these can be written"
            )
        if (type(value), value) != (type(field.default), field.default):
            options.append(f"{field.name}={_as_text(value)}")
    return f"{name}{{{' '.join(options)}}}" if options else name


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(not isinstance(one, tuple) and _is_plain(one) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else repr(value)
