"""A short training of a slim model that learns from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.calibration.batches import Batch, each_batch
from graphprune.distributed.wrappers import unwrap
from graphprune.errors import InvalidRequestError
from graphprune.importance import Loss, check_loss, value_of
from graphprune.utils.inputs import output_tensors
from graphprune.utils.progress import track
from graphprune.utils.tensors import evaluation_mode, parameter_names, restore_training_flags

Optimiser: TypeAlias = Literal["adamw", "sgd"]

# Of one cosine, from nothing up to the learning rate: this share of all steps.
_WARM_UP = 0.1


@dataclass(frozen=True)
class Distillation:
    """How far a slim model's output is from the original's.

    Attributes:
        temperature: for logits; the divergence between the softmaxes of both outputs, over the last
            dimension, divided by this, times its square. None for outputs that are no logits: half
            the mean squared difference.

    Source: Hinton et al., Distilling the knowledge in a neural network, section 2 (arXiv 1503.02531).

    """

    temperature: float | None = 2.0

    def __call__(self, slim_output: Any, original_output: Any) -> Tensor:
        """Return the distance, summed over the output's floating-point tensors.

        Raises:
            InvalidRequestError: the outputs differ in form, or have no such tensors.

        """
        pairs = [
            (dict(output_tensors(slim_output)).get(name), tensor)
            for name, tensor in output_tensors(original_output)
            if tensor.is_floating_point()
        ]
        if not pairs or any(
            slim is None or slim.shape != original.shape for slim, original in pairs
        ):
            raise InvalidRequestError(
                "the outputs of the slim model and of the original do not match, tensor by tensor; "
                "finetune needs the model that was cut and what it was cut to"
            )
        return torch.stack(
            [self._measure_distance(slim, original) for slim, original in pairs if slim is not None]
        ).sum()

    def _measure_distance(self, slim: Tensor, original: Tensor) -> Tensor:
        if self.temperature is None:
            return F.mse_loss(slim, original) / 2
        log_slim, log_original = (
            F.log_softmax(logits / self.temperature, -1) for logits in (slim, original)
        )
        divergence = (log_original.exp() * (log_original - log_slim)).sum(-1).mean()
        # gradients shrink by the square of the temperature, which this makes up for
        return divergence * self.temperature**2


def finetune(
    slimmer: nn.Module,
    original: nn.Module,
    data: Any,
    *,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    optimiser: Optimiser = "adamw",
    distillation: Distillation | None = Distillation(),
    loss: Loss | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a slim model, in place, to give what the original gives.

    The learning rate rises for a tenth of the steps and falls along a cosine to zero. The modes
    (training or evaluation) of both models are as before at the end.

    Args:
        slimmer: the model to train, in training mode meanwhile.
        original: its teacher, in evaluation mode meanwhile.
        data: batches of inputs, or of pairs of inputs and target, in a list, a DataLoader or anything
            else with a length; gone through once an epoch, so that a DataLoader that shuffles and
            augments does so anew.
        epochs: passes over the data.
        learning_rate: the highest.
        optimiser: "adamw" or "sgd" (with Nesterov momentum 0.9); no weight decay.
        distillation: what is minimised over the outputs of both; None to learn from the loss alone.
        loss: of the slim model's output and a batch's target, added where given.
        seed: for what is random in the model (dropout).

    Returns:
        What was minimised, averaged over each epoch.

    Raises:
        InvalidRequestError: an argument makes no sense, the models are exchanged, or what is minimised
            or its gradient is NaN or infinite for a batch. Then training ends before that batch: the
            slim model has the weights and statistics that the batches before gave it.

    """
    _refuse_exchanged(slimmer, original)
    if loss is not None:
        check_loss(loss)
    if distillation is None and loss is None:
        raise InvalidRequestError("distillation=None leaves nothing to learn from; pass loss=")
    if optimiser not in get_args(Optimiser):
        raise InvalidRequestError(f"optimiser={optimiser!r} must be 'adamw' or 'sgd'")
    if not isinstance(epochs, int) or epochs < 1:
        raise InvalidRequestError(f"epochs={epochs!r} must be a whole number from 1")
    if not hasattr(data, "__len__"):
        raise InvalidRequestError(
            f"data must be batches with a length, as a list or a DataLoader is, not {type(data).__name__}: "
            "the learning rate follows from how many there are"
        )
    parameters = [p for p in slimmer.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidRequestError(
            "no parameter of the slim model requires a gradient, so none learns"
        )
    stepper = _optimiser(optimiser, parameters, learning_rate)
    steps = epochs * len(data)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: _rate(step, steps))
    means, steps_done = [], 0
    # the seed holds within: the caller's random numbers go on as if none had been drawn
    with torch.random.fork_rng(), evaluation_mode(original), restore_training_flags(slimmer):
        torch.manual_seed(seed)
        slimmer.train()
        for epoch in range(epochs):
            total = 0.0
            for batch in track(each_batch(data), f"epoch {epoch + 1} of {epochs}", len(data)):
                # batch norms take in a batch before it is seen whether its numbers are finite
                buffers_before = {name: buffer.clone() for name, buffer in slimmer.named_buffers()}
                objective = _objective(slimmer, original, batch, distillation, loss)
                stepper.zero_grad()
                torch.autograd.backward(objective)
                if not _is_finite(objective, parameters):
                    stepper.zero_grad()
                    _put_back(slimmer, buffers_before)
                    raise InvalidRequestError(
                        f"{batch} in epoch {epoch + 1} gives {float(objective.detach()):.3g} to minimise, "
                        "with NaN or infinite numbers in it or in its gradient, so a step would destroy "
                        f"the slim model: it keeps what the {steps_done} steps before gave it; look at the "
                        "batch, or take a lower learning_rate"
                    )
                stepper.step()
                steps_done += 1
                schedule.step()
                total += float(objective.detach())
            means.append(total / len(data))
    stepper.zero_grad()
    return means


def _objective(
    slimmer: nn.Module,
    original: nn.Module,
    batch: Batch,
    distillation: Distillation | None,
    loss: Loss | None,
) -> Tensor:
    args, kwargs = batch.inputs.args, batch.inputs.kwargs
    slim_output = slimmer(*args, **kwargs)
    objective = torch.zeros(())
    if distillation is not None:
        with torch.no_grad():
            original_output = original(*args, **kwargs)
        objective = distillation(slim_output, original_output)
    if loss is None:
        return objective
    return objective + value_of(loss, slim_output, batch, differentiated=True)


def _is_finite(objective: Tensor, parameters: list[nn.Parameter]) -> bool:
    gradients = [p.grad for p in parameters if p.grad is not None]
    finite = [t.isfinite().all().to(objective.device) for t in (objective.detach(), *gradients)]
    return bool(torch.stack(finite).all())  # one wait for the device, not one a parameter


@torch.no_grad()
def _put_back(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the buffers of a model such values."""
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])


def _refuse_exchanged(slimmer: nn.Module, original: nn.Module) -> None:
    """See that it is not the original that would be trained, to give what the slim model gives.

    Raises:
        InvalidRequestError: all tensors that both have are as large in the first or larger.

    """
    trained, teacher = (parameter_names(unwrap(model)) for model in (slimmer, original))
    shapes = {
        name: (tuple(parameter.shape), tuple(teacher[name].shape))
        for name, parameter in trained.items()
        if name in teacher and parameter.dim() == teacher[name].dim()
    }
    differing = [
        name
        for name, (trained_shape, teacher_shape) in shapes.items()
        if trained_shape != teacher_shape
    ]
    contained = all(a >= b for pair in shapes.values() for a, b in zip(*pair, strict=True))
    if differing and contained:
        trained_shape, teacher_shape = shapes[differing[0]]
        raise InvalidRequestError(
            f"finetune trains its first model to give what the second gives, and the first is the larger "
            f"({differing[0]} is {trained_shape} in it and {teacher_shape} in the second): they are "
            "exchanged; call finetune(slimmer, original, data)"
        )


def _optimiser(
    name: Optimiser, parameters: list[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, nesterov=True)


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step."""
    warm_up_steps = max(1, round(_WARM_UP * steps))
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps))) / 2
