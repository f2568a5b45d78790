"""The loss as a function of gates, one a channel: 1 for a channel as it is, 0 for one that is gone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from graphprune.errors import InvalidRequestError
from graphprune.importance.readers import readers_of
from graphprune.importance.subject import Subject, values_of
from graphprune.inputs import Inputs
from graphprune.rules.recurrent import GATES
from graphprune.state import parameter_names, working_copy
from graphprune.steps import StepByStep


class GatedLoss:
    """The loss of a model, in evaluation mode, whose channels are multiplied by gates.

    The gates stand on the parameters that read a channel, so that no operator of the model is touched.

    Raises:
        InvalidRequestError: there is no loss.

    """

    def __init__(self, subject: Subject) -> None:
        if subject.loss is None:
            raise InvalidRequestError(
                "this importance looks at a loss; pass loss=, a function of the model's output and the "
                "target of a batch that returns one number"
            )
        self.loss = subject.loss
        self.model = working_copy(subject.model).eval()
        graph = subject.graph
        named = parameter_names(self.model)
        self.parameters = {name: values_of(name, parameter) for name, parameter in named.items()}
        operators = (step.func.overloadpacket for step in graph.inference.steps)
        self.is_recurrent = any(packet in GATES for packet in operators)
        self.sizes = {group.name: group.size for group in graph.groups}
        self.like = next(p for p in self.parameters.values() if p.is_floating_point())
        self.slots: list[tuple[str, str, Tensor]] = []
        for name, readers in readers_of(graph).items():
            for reader in readers:
                held = self.parameters[reader.parameter]
                for slots in reader.slots(graph.by_name[name], held):
                    self.slots.append((name, reader.parameter, slots.reshape(held.shape)))

    def ones(self) -> dict[str, Tensor]:
        """Return open gates, a vector a group."""
        return {name: self.like.new_ones(size) for name, size in self.sizes.items()}

    def __call__(self, gates: Mapping[str, Tensor], inputs: Inputs, target: Any) -> Tensor:
        """Return the loss of a batch with the channels multiplied by the gates."""
        gated = dict(self.parameters)
        for group, parameter, slots in self.slots:
            factors = gates[group].to(gated[parameter].dtype)
            factors = torch.cat(
                [factors, factors.new_ones(1)]
            )  # the last for slot -1, which is none
            gated[parameter] = gated[parameter] * factors[slots]
        with StepByStep() if self.is_recurrent else nullcontext():
            output = functional_call(self.model, gated, inputs.args, inputs.kwargs)
        return self.loss(output, target)
