"""The loss that users pass: what it must be, and what is wrong where it is something else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.calibration.batches import Batch, refuse_unless_finite
from graphprune.errors import GraphPruneError, InvalidRequestError, in_a_line
from graphprune.importance.context import Loss


def check_loss(loss: Any) -> Loss:
    """Return what is passed as `loss=`, once it is something to call.

    Raises:
        InvalidRequestError: it is a class of losses, or no function.

    """
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise InvalidRequestError(
            f"loss={loss.__name__} is a class; pass one of it, as in loss={loss.__name__}()"
        )
    if not callable(loss):
        raise InvalidRequestError(
            "loss must be a function of the model's output and the target of a batch that returns one "
            f"number, not {type(loss).__name__}"
        )
    return loss  # type: ignore[no-any-return]


def value_of(loss: Loss, output: Any, batch: Batch, *, differentiated: bool) -> Tensor:
    """Return the loss of a batch, a tensor of no dimension.

    Args:
        loss: of output and target.
        output: what the model gave for the batch.
        batch: has the target.
        differentiated: whether derivatives by the output are wanted; gradients are recorded then.

    Raises:
        InvalidRequestError: it fails, gives no single number, or one without a derivative.

    """
    try:
        value = loss(output, batch.target)
    except GraphPruneError:
        raise
    except Exception as failure:
        hint = (
            "; the batch has no target: pass pairs (inputs, target)" if batch.target is None else ""
        )
        raise InvalidRequestError(
            f"the loss fails on {batch}: {in_a_line(failure)}{hint}"
        ) from failure
    if not isinstance(value, Tensor) or value.numel() != 1:
        description = (
            f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise InvalidRequestError(
            f"the loss gives {description} for {batch}, where one number is needed, in a tensor; "
            "take its mean over the samples (reduction='mean' of torch's losses)"
        )
    if differentiated and not value.requires_grad:
        raise InvalidRequestError(
            f"the loss of {batch} does not depend on the output by a derivative: it counts (argmax, a "
            "comparison), or it was cut off (detach, no_grad, item); pass one that does, as "
            "F.cross_entropy is"
        )
    return value.reshape(())


def is_a_sum(loss: Loss, output: Any, batch: Batch) -> bool:
    """Say whether the loss of two batches is the sum of theirs: whether it doubles once all come twice."""

    def twice(tensor: Tensor) -> Tensor:
        # a tensor of other length, as one of weights by class, is the same for all samples
        has_samples = tensor.dim() > 0 and len(tensor) == batch.size
        return tensor.repeat(2, *[1] * (tensor.dim() - 1)) if has_samples else tensor

    doubled = pytree.tree_map_only(Tensor, twice, (output, batch.target))
    try:
        once, double = (float(loss(*arguments)) for arguments in ((output, batch.target), doubled))
    except Exception:  # not every loss takes other numbers of samples than the batch has
        return False
    return abs(double - 2 * once) < 0.1 * abs(once)


def refuse_infinite_loss(value: Tensor, batch: Batch) -> None:
    """See that a loss is a number.

    Raises:
        InvalidRequestError: it is infinite or NaN.

    """
    refuse_unless_finite(batch, value, "as its loss")
