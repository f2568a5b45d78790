"""What graphprune raises and warns with: one root, and a kind for each thing a caller may handle."""


class GraphPruneError(Exception):
    """Root of every error that graphprune raises on purpose."""


class InvalidRequestError(GraphPruneError, ValueError):
    """An argument is outside what the call accepts: a ratio, a name, a pattern, an input."""


class CaptureError(GraphPruneError):
    """A model could not be run or traced on its example inputs."""


class PlanError(GraphPruneError, LookupError):
    """A plan names groups or slots that the model does not have."""


class VerificationError(GraphPruneError):
    """The slim model does not compute what the original computes with the removed slots silenced."""


class OtherOperatorsError(VerificationError):
    """On data, the model ran other operators than without."""


class ExportError(GraphPruneError):
    """A model could not be exported to ONNX, or the ONNX model disagrees with PyTorch."""


class GraphPruneWarning(UserWarning):
    """Something was done differently from what a reader of the call would expect."""
