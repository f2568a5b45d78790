"""What is said of inputs of other sizes than the example's; see message_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.inference import infer
from tests.message_cases import Does, case, said
from tests.test_other_sizes import IDS, Positions, pair_only


def step_by_step(module: nn.Module, hidden: Tensor) -> Tensor:
    """Add up the steps of a sequence one by one, in a loop that a tracer writes out."""
    steps = [hidden[:, step].reshape(-1, 8) for step in range(hidden.shape[1])]
    return module.last(torch.stack(steps).sum(0))


said(
    r"the graph form fits inputs like the example's, Inputs\(float32\[2, 5, 6\]\): on "
    r"Inputs\(float32\[3, 6, 6\]\), which the model takes, AssertionError: output of the graph differs "
    "from the model's; pass example_inputs of the sizes that you need",
    lambda: gp.slim(Does(step_by_step).eval(), 0.5, torch.randn(2, 5, 6)),
)


@case(
    r"table:0 are cut, but their channels go together only at the sizes of the example inputs, not on "
    r"Inputs\(int64\[3, 8\]\)"
)
def channels_of_one_size_of_inputs(_: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "fix_unread", lambda *_: None)
        patch.setattr(infer, "reconcile", pair_only)
        model = Positions(lambda table, t: table[:t]).eval()
        gp.slim(model, 0.5, IDS, form="module")
