"""What the command line says beside its results: mistakes and warnings in a line, and what is going on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from rich.console import Console

from graphprune.errors import GraphPruneError, GraphPruneWarning
from graphprune.utils.progress import no_bars


@contextmanager
def errors_to_exit_code() -> Iterator[None]:
    """Turn errors that are meant for users into a line and an exit status, and warnings into a line.

    Meanwhile modules of the current folder can be imported, where none of that name is installed.
    """
    old_path = list(sys.path)
    sys.path.append("")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show, warnings.showwarning)
            yield
    except BrokenPipeError:  # who reads the output has read enough
        raise
    except (GraphPruneError, OSError) as error:
        print(f"graphprune: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        sys.path[:] = old_path


def _show(show_other: Callable[..., None], text: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning of this library as a line; show those of others as they are shown."""
    if isinstance(text, GraphPruneWarning):
        print(f"graphprune: warning: {text}", file=sys.stderr)
    else:
        show_other(text, *where, **more)


@contextmanager
def show_spinner(activity: str) -> Iterator[None]:
    """Show that something is going on, where a person watches."""
    with Console(stderr=True).status(activity), no_bars():
        yield
