"""The dependency graph as people look at it: a page, a picture, and data for other tools."""

from graphprune.view.document import document
from graphprune.view.files import framed, page, save

__all__ = ["document", "framed", "page", "save"]
