"""What a model takes in ONNX Runtime as a function of the channels it keeps, measured node by node."""

from graphprune.runtime.latency.bench import Bench, LatencyOutcome
from graphprune.runtime.latency.model import NANO, LatencyModel

__all__ = ["NANO", "Bench", "LatencyModel", "LatencyOutcome"]
