"""The dependency graph as people look at it: a page, a picture, and data for other tools."""

from graphprune.inspection.document import document
from graphprune.inspection.files import SUFFIXES, framed, page, save, scripts

__all__ = ["SUFFIXES", "document", "framed", "page", "save", "scripts"]
