"""The loss as a function of gates, one a channel: 1 for a channel as it is, 0 for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from graphprune.calibration.batches import Batch
from graphprune.errors import GraphPruneError, InvalidRequestError, in_a_line
from graphprune.groups.readers import readers_of
from graphprune.importance.context import ScoringContext, values_of
from graphprune.importance.hooks import without_backward_hooks
from graphprune.importance.losses import check_loss, is_a_sum, refuse_infinite_loss, value_of
from graphprune.importance.running import output_of
from graphprune.inference.recurrent_steps import StepByStep
from graphprune.rules.recurrent import GATES
from graphprune.utils.inputs import Inputs
from graphprune.utils.tensors import parameter_names, working_copy


class GatedLoss:
    """The loss of a model, in evaluation mode, whose channels are multiplied by gates.

    The gates stand on the parameters that read a channel, so that no operator of the model is touched.

    Args:
        subject: the model, the data and the loss.
        differentiated: whether derivatives of the loss are wanted.

    Raises:
        InvalidRequestError: there is no loss, or the first batch does not fit the model or the loss.

    """

    def __init__(self, subject: ScoringContext, *, differentiated: bool = True) -> None:
        if subject.loss is None:
            raise InvalidRequestError(
                "this importance looks at a loss; pass loss=, a function of the model's output and the "
                "target of a batch that returns one number"
            )
        self.loss = check_loss(subject.loss)
        self.differentiated = differentiated
        self.model = without_backward_hooks(working_copy(subject.model)).eval()
        self.graph = graph = subject.graph
        parameters = parameter_names(self.model)
        self.parameters = {
            name: values_of(name, parameter) for name, parameter in parameters.items()
        }
        operators = (step.func.overloadpacket for step in graph.inference.steps)
        self.is_recurrent = any(packet in GATES for packet in operators)
        self.sizes = {group.name: group.size for group in graph.groups}
        floats = (p for p in self.parameters.values() if p.is_floating_point() or p.is_complex())
        # gates take its type and device; a complex parameter is multiplied by real ones
        self.like = next((p.real for p in floats), torch.zeros(()))
        self.slots: list[tuple[str, str, Tensor]] = []
        for name, readers in readers_of(graph).items():
            for reader in readers:
                weight = self.parameters[reader.parameter]
                for slots in reader.slots(graph.by_name[name], weight):
                    self.slots.append((name, reader.parameter, slots.reshape(weight.shape)))
        self.subject = subject
        if subject.batches is not None:
            self.check(subject.batches[0])

    def ones(self) -> dict[str, Tensor]:
        """Return open gates, a vector a group."""
        return {name: self.like.new_ones(size) for name, size in self.sizes.items()}

    def __call__(self, gates: Mapping[str, Tensor], inputs: Inputs, target: Any) -> Tensor:
        """Return the loss of a batch with the channels multiplied by the gates."""
        gated = dict(self.parameters)
        for group, parameter, slots in self.slots:
            factors = gates[group].to(gated[parameter].dtype)
            # `[channels + 1]`: entries of no channel have slot -1, which reads this last 1
            factors = torch.cat([factors, factors.new_ones(1)])
            gated[parameter] = gated[parameter] * factors[slots]
        with StepByStep() if self.is_recurrent else nullcontext():
            output = functional_call(self.model, gated, inputs.args, inputs.kwargs)
        return self.loss(output, target).reshape(())

    def check(self, batch: Batch) -> None:
        """See that the model runs on a batch as it is, and that its loss is what it should be.

        Raises:
            InvalidRequestError: not so.

        """
        with torch.set_grad_enabled(self.differentiated):
            value = value_of(
                self.loss, self._output(batch), batch, differentiated=self.differentiated
            )
        refuse_infinite_loss(value.detach(), batch)

    def _output(self, batch: Batch) -> Any:
        """Return what the model gives for a batch, with all channels."""
        leaves = {
            name: value.detach().requires_grad_(value.is_floating_point() or value.is_complex())
            for name, value in self.parameters.items()
        }

        def run() -> Any:
            return functional_call(self.model, leaves, batch.inputs.args, batch.inputs.kwargs)

        return output_of(run, batch, self.graph)

    @contextmanager
    def naming(self, batch: Batch, requirement: str = "") -> Iterator[None]:
        """Within it, what goes wrong with a batch is said in words of the batch.

        Args:
            batch: what is looked at.
            requirement: what is asked of a batch besides that model and loss run on it; "" for nothing.

        """
        try:
            yield
        except (GraphPruneError, torch.OutOfMemoryError):
            raise
        except Exception as failure:
            self.check(batch)
            if requirement:
                raise InvalidRequestError(
                    f"{batch}, {batch.inputs}: {requirement}: {in_a_line(failure)}"
                ) from failure
            raise

    def weighted_batches(self) -> Iterator[tuple[Batch, float]]:
        """Yield the batches of this process, each with its part of the mean over all.

        A loss that is a mean over samples, as any is taken to be that does not double once all samples
        come twice, counts by how many a batch holds; a sum counts as it is.
        """
        data, by_samples = self.subject.data, False
        if not data.are_alike:
            with torch.no_grad():
                is_mean = not is_a_sum(self.loss, self._output(data[0]), data[0])
            # each process judged by its own batch: the verdict of rank 0 holds for all
            by_samples = data.ranks.gather(is_mean)[0]
        yield from data.weighted_batches(by_samples=by_samples)
