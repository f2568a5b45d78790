"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from typing import Any

from graphprune.errors import InvalidRequestError


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
