"""Criteria that ask what the loss does when a channel's output becomes zero.

With a gate `a` on every channel (1 as it is, 0 for a channel that is gone), the loss E over the data
changes by E(a = 0) - E(a = 1) (which oracle.py computes), expanded here around a = 1. A channel's
output is `a * o`, so dE/da = o dE/do and d2E/da2 = o2 d2E/do2, summed over everything that a channel
holds: these are the terms of The Incredible Shrinking Neural Network (arXiv 1701.04465, section 3),
for whole units of any network. Scores are the changes, signed: a negative one says that the loss gets
smaller without the channel; what is estimated from squares is never negative.

Units: those of the loss, averaged over batches: over their samples, where it is a mean over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from graphprune.calibration.batches import Batch, refuse_unless_finite
from graphprune.groups.groups import Scores
from graphprune.importance.context import ScoringContext
from graphprune.importance.gated_loss import GatedLoss
from graphprune.importance.vmap_or_loop import for_each
from graphprune.utils.inputs import Inputs
from graphprune.utils.progress import track

ByGroup = dict[str, Tensor]

_DERIVATIVES = "in the derivatives of its loss"

_ONE_BY_ONE = (
    "this importance looks at each sample by itself, so that inputs and target must have as many along "
    "their first dimension, and the loss must take one"
)


def taylor(subject: ScoringContext) -> Scores:
    """Score by the first-order term, -o dE/do."""
    return _as_scores(
        {name: -gradient for name, gradient in _average_over_data(_gradient, subject).items()}
    )


def taylor2(subject: ScoringContext) -> Scores:
    """Score by first- and second-order terms, -o dE/do + o2/2 d2E/do2, with the exact second derivative."""
    return _as_scores(_average_over_data(_second_order_change, subject))


def fisher(subject: ScoringContext) -> Scores:
    """Score by half the mean square, over samples, of the first-order term.

    It is the second-order term where the Fisher information stands for the Hessian, and the first is
    zero.

    Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, section 2.1
    (arXiv 1801.05787).
    """
    # `[samples, channels]` -> `[channels]`
    squares, count = _sum_over_samples(subject, lambda gradients: gradients.square().sum(0))
    return _as_scores({name: total / count / 2 for name, total in squares.items()})


def obs(subject: ScoringContext) -> Scores:
    """Score by the loss that is left once the other channels of a group have made up for one.

    Half of 1 / [inverse of the Fisher matrix over the gates]_kk, the matrix being estimated from the
    samples' gradients.

    Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
    section 3, with the Fisher matrix in place of the Hessian.
    """
    # `[samples, channels]` -> `[channels, channels]`
    products, count = _sum_over_samples(subject, lambda gradients: gradients.mT @ gradients)
    return _as_scores({name: _invert_fisher(total / count) for name, total in products.items()})


def _gradient(gated: GatedLoss, batch: Batch) -> ByGroup:
    gradient: ByGroup = grad(gated)(gated.ones(), batch.inputs, batch.target)
    return gradient


def _second_order_change(gated: GatedLoss, batch: Batch) -> ByGroup:
    gradient, curvature = _gradient(gated, batch), _hessian_diagonal(gated, batch)
    # E(0) - E(1) with the gates at 1 is -E' + E''/2 and terms of higher order
    return {name: curvature[name] / 2 - gradient[name] for name in gradient}


def _hessian_diagonal(gated: GatedLoss, batch: Batch) -> ByGroup:
    """Return d2E/da2, a gate after the other (many at once): the diagonal of the exact Hessian."""

    def second_derivative(group: str, open_gates: Tensor, direction: Tensor) -> Tensor:
        gradient_of = grad(partial(_loss_of_one, gated, batch, group))
        # the direction is a row of the identity, gates being 1: of row k of the Hessian it picks entry k
        hessian_row: Tensor = jvp(gradient_of, (open_gates,), (direction,))[1]
        return hessian_row.dot(direction)

    return {
        group: for_each(partial(second_derivative, group, gates), torch.diag(gates))
        for group, gates in gated.ones().items()
    }


def _loss_of_one(gated: GatedLoss, batch: Batch, group: str, factors: Tensor) -> Tensor:
    """Return the loss as a function of one group's gates."""
    return gated({**gated.ones(), group: factors}, batch.inputs, batch.target)


def _sum_over_samples(
    subject: ScoringContext, function: Callable[[Tensor], Tensor]
) -> tuple[ByGroup, int]:
    """Return the sum of what the function makes of o dE/do, and how many samples there are.

    It is given `[samples, channels]` of a batch, in float64, a group at a time.
    """
    gated, count = GatedLoss(subject), 0
    total: ByGroup = {}

    def sample_gradients(inputs: Inputs, target: object) -> ByGroup:
        # a sample without its first dimension, which vmap took; the model wants a batch of one
        single_inputs = inputs.map(lambda tensor: tensor.unsqueeze(0))
        single_target = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), target)
        gradients: ByGroup = grad(gated)(gated.ones(), single_inputs, single_target)
        return gradients

    for batch in track(subject.data, "scoring channels"):
        with gated.naming(batch, _ONE_BY_ONE):
            by_group = for_each(
                lambda args, kwargs, target: sample_gradients(Inputs(*args, **kwargs), target),
                batch.inputs.args,
                batch.inputs.kwargs,
                batch.target,
            )
        count += len(next(iter(by_group.values()), ()))
        for name, gradients in by_group.items():
            refuse_unless_finite(batch, gradients, _DERIVATIVES)
            batch_total = function(gradients.double())
            total[name] = total[name] + batch_total if name in total else batch_total
    sums, samples = subject.data.total((total, count))
    return sums, int(samples)


def _invert_fisher(matrix: Tensor) -> Tensor:
    """Return half of one over the inverse's diagonal, for the mean of g g'."""
    # channels that change the loss alike in all samples would leave no inverse
    ridge = 1e-3 * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.inv(matrix + ridge * identity)
    return 0.5 / inverse.diagonal()


def _average_over_data(
    function: Callable[[GatedLoss, Batch], ByGroup], subject: ScoringContext
) -> ByGroup:
    """Return the mean over the data of what the function gives for a batch."""
    gated = GatedLoss(subject)
    total = {name: torch.zeros_like(gates).double() for name, gates in gated.ones().items()}
    for batch, weight in track(
        gated.weighted_batches(), "scoring channels", len(subject.data.batches)
    ):
        with gated.naming(batch):
            values = function(gated, batch)
        for name, value in values.items():
            refuse_unless_finite(batch, value.detach(), _DERIVATIVES)
            total[name] += weight * value.detach()
    mean: ByGroup = subject.data.total(total)
    return mean


def _as_scores(values: Mapping[str, Tensor]) -> Scores:
    return {name: value.double().cpu().numpy() for name, value in values.items()}
