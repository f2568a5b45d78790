"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphprune.errors import InvalidRequestError
from graphprune.utils.atomic_files import open_atomically


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of that many inches, which no window shows.

    Raises:
        InvalidRequestError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequestError(
            "plots are drawn by matplotlib, which is not installed: pip install graphprune[plot]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file, whose ending says how."""
    with open_atomically(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150)
