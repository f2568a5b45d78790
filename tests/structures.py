"""Small structures that are hard to prune: what breaks or silently falsifies other tools.

`STRUCTURES[name].build()` is one idea in a few lines, its widths chosen so that no two agree by
accident; `.inputs()` are its inputs, a tuple or keyword arguments, at batch 2.
"""

import importlib

from tests.structures_registry import STRUCTURES

__all__ = ["STRUCTURES"]

for kind in ("channels", "layers", "attention", "numbers", "recurrent"):
    importlib.import_module(f"tests.structures_{kind}")
