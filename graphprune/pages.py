"""The package's pages of HTML."""

from __future__ import annotations

from typing import Any

import jinja2


def rendered(template: str, **values: Any) -> str:
    """Return a page of the package's templates, in which all values are escaped."""
    loader = jinja2.PackageLoader("graphprune")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return pages.get_template(template).render(**values)
