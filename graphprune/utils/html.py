"""The package's pages of HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2

# What neither HTML nor XML can hold, or what they read as something else: control characters, halves of
# pairs, and two that are no characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")


def render_template(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """Return a page of the package's templates, in which all values are escaped.

    Args:
        template: its name.
        scripts: those that may run on it, or in a frame on it; a browser runs no others, and fetches
            nothing.
        values: what the template asks for.

    """
    loader = jinja2.PackageLoader("graphprune")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    # in a script, the same by another spelling
    printable_scripts = [printable(script) for script in scripts]
    page = pages.get_template(template)
    return printable(
        page.render(policy=_policy(printable_scripts), scripts=printable_scripts, **values)
    )


def _policy(scripts: Sequence[str]) -> str:
    """Return what a page lets a browser do, as a content security policy."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests] or ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def printable(text: str) -> str:
    """Return a text for HTML or XML: what they cannot hold, as Python spells it."""
    return _UNPRINTABLE.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)
