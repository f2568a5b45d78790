"""Small structures that are hard to prune: what breaks or silently falsifies other tools.

`STRUCTURES[name].build()` is one idea in a few lines, its widths chosen so that no two agree by
accident; `.inputs()` are its inputs, a tuple or keyword arguments, at batch 2.
"""

from tests import (
    structures_attention,
    structures_channels,
    structures_layers,
    structures_numbers,
    structures_recurrent,
)
from tests.structures_registry import Structure

STRUCTURES: dict[str, Structure] = (
    structures_channels.STRUCTURES
    | structures_layers.STRUCTURES
    | structures_attention.STRUCTURES
    | structures_numbers.STRUCTURES
    | structures_recurrent.STRUCTURES
)
