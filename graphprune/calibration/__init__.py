"""Running a model on data, layer by layer, to choose what to cut and to repair what is left."""

from graphprune.calibration.batches import (
    Batch,
    OwnShare,
    Share,
    batches_of,
    each_batch,
    refuse_unless_finite,
)
from graphprune.calibration.layers import Layer, held_by, layers_of
from graphprune.calibration.runs import Run, several_inputs

__all__ = [
    "Batch",
    "Layer",
    "OwnShare",
    "Run",
    "Share",
    "batches_of",
    "each_batch",
    "held_by",
    "layers_of",
    "refuse_unless_finite",
    "several_inputs",
]
