"""A model run on a batch of data, with words for what goes wrong that name the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphprune.calibration.batches import Batch, refuse_unless_finite
from graphprune.errors import InvalidRequestError, in_a_line
from graphprune.graph_utils.stepwise import several_inputs
from graphprune.groups.groups import Dependencies
from graphprune.importance.context import ScoringContext
from graphprune.layout import size_of
from graphprune.utils.inputs import call, output_tensors
from graphprune.utils.tensors import working_copy


def output_of(run: Callable[[], Any], batch: Batch, graph: Dependencies) -> Any:
    """Return what a run of a model on a batch gives.

    Args:
        run: does it.
        batch: what it is run on.
        graph: of the model, on its example inputs.

    Raises:
        InvalidRequestError: the model does not run on it.

    """
    try:
        return run()
    except Exception as failure:
        raise InvalidRequestError(
            f"the model does not run on {batch}, {batch.inputs}: {in_a_line(failure)}; "
            f"{_form_of_batches(graph, batch)}"
        ) from failure


def check_runs(subject: ScoringContext) -> None:
    """See that a model runs on its first batch and gives numbers.

    Raises:
        InvalidRequestError: it does not.

    """
    batch, model = subject.data[0], working_copy(subject.model).eval()
    output = output_of(lambda: call(model, batch.inputs), batch, subject.graph)
    for _, tensor in output_tensors(output):
        if tensor.is_floating_point():  # masked ones may be infinite
            refuse_unless_finite(batch, tensor[~tensor.isinf()], "as the model's output")


def _form_of_batches(graph: Dependencies, batch: Batch) -> str:
    """Return the end of a message: what a batch should be like."""
    examples = [list(map(size_of, layouts)) for layouts in graph.inference.inputs.values()]
    tensors = batch.inputs.tensors()
    text = f"batches need the form of example_inputs, {', '.join(map(str, examples))}"
    if tensors and examples and tensors[0].dim() == len(examples[0]) - 1:
        text += "; samples come in batches, as a DataLoader gives them; one alone is sample[None]"
    return text + several_inputs(len(tensors), len(examples))
