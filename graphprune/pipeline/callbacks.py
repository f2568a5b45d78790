"""What to do between the passes of a pipeline: note the time, write the graph down, compare, print."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.errors import VerificationError
from graphprune.inference.precision import relative_difference
from graphprune.pipeline.pipeline import Pass
from graphprune.utils.atomic_files import write_text
from graphprune.utils.inputs import Inputs, call, output_tensors
from graphprune.utils.tensors import evaluation_mode, working_copy


@dataclass
class Timed:
    """Notes the seconds that each pass takes, in `.seconds`, in order; the first since this was made."""

    seconds: list[tuple[str, float]] = field(default_factory=list)
    last: float = field(default_factory=time.perf_counter, repr=False)

    def __call__(self, graph_pass: Pass, result: PassResult) -> None:
        """Note one pass."""
        now = time.perf_counter()
        self.seconds.append((graph_pass.name(), now - self.last))
        self.last = now

    def __str__(self) -> str:
        return "\n".join(f"{seconds:8.3f} s  {name}" for name, seconds in self.seconds)


@dataclass
class Dumped:
    """Writes the graph after each pass as Python code: `01-slim-channels.py`, and so on.

    Attributes:
        folder: made if there is none.

    """

    folder: str | Path
    count: int = field(default=0, init=False)

    def __call__(self, graph_pass: Pass, result: PassResult) -> None:
        """Write one graph."""
        self.count += 1
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.count:02}-{graph_pass.name()}.py", result.graph_module.code)


@dataclass(frozen=True)
class Printed:
    """Prints a line for each pass: its name, and whether it changed anything."""

    def __call__(self, graph_pass: Pass, result: PassResult) -> None:
        """Print one line."""
        count = len(result.graph_module.graph.nodes)
        print(
            f"{graph_pass.name()}: {'changed' if result.modified else 'left as it was'}, {count} nodes"
        )


class Compared:
    """Compares what each pass gives with the original, for passes that must not change results.

    Args:
        model: the original.
        example_inputs: of it, as for `graphprune.slim`.
        tolerance: the largest difference accepted, relative to the largest value of an output.

    """

    def __init__(self, model: Any, example_inputs: Any = None, tolerance: float = 1e-4) -> None:
        module, self.inputs = normalize_model_and_inputs(model, example_inputs)
        self.tolerance = tolerance
        self.expected = _outputs(module, self.inputs)
        self.differences: list[float] = []

    def __call__(self, graph_pass: Pass, result: PassResult) -> None:
        """Compare one graph.

        Raises:
            VerificationError: it gives something else.

        """
        outputs = _outputs(result.graph_module, self.inputs)
        worst = 0.0
        for (name, expected), (_, actual) in zip(self.expected, outputs, strict=True):
            difference = (
                relative_difference(expected.double().cpu().numpy(), actual.double().cpu().numpy())
                if expected.shape == actual.shape
                else math.inf
            )
            # Not `>`, which would let a difference of NaN pass.
            if not difference <= self.tolerance:
                raise VerificationError(
                    f"after {graph_pass.name()}, {name} differs from the original's by {difference:.3g} of "
                    f"its largest value; the tolerance is {self.tolerance:g}"
                )
            worst = max(worst, difference)
        self.differences.append(worst)


def _outputs(module: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    copy = working_copy(module)  # a model may write to its buffers
    with evaluation_mode(copy):
        return list(output_tensors(call(copy, inputs)))
