"""What a model takes in ONNX Runtime as a function of the channels it keeps, measured node by node."""

from graphprune.latency.measure import Bench, Reached
from graphprune.latency.model import NANO, LatencyModel

__all__ = ["NANO", "Bench", "LatencyModel", "Reached"]
