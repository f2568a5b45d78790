"""Bars for what takes a while: on the standard error of a terminal, nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")

_shown: ContextVar[bool] = ContextVar("_shown", default=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bars: whoever calls says by itself what goes on."""
    token = _shown.set(False)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[Item], description: str, count: int | None = None) -> Iterator[Item]:
    """Yield the items; on a terminal a bar says how many of `count` (or of their length) are done."""
    if not (_shown.get() and sys.stderr.isatty()):
        yield from items
        return
    with no_bars():  # what is done with an item shows none of its own
        console = Console(stderr=True)
        yield from rich_track(items, description, count, console=console, transient=True)
