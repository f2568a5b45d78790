"""The dependency graph as people look at it: a page, a picture, and data for other tools."""

from graphprune.inspection.document import build_document
from graphprune.inspection.files import SUFFIXES, read_scripts, render_frame, render_page, save

__all__ = ["SUFFIXES", "build_document", "read_scripts", "render_frame", "render_page", "save"]
