"""What is said of traced graphs and files that are not all that was asked; see message_cases.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune as gp
from tests.message_cases import case
from tests.test_capture import Padded


def padded() -> tuple[nn.Module, torch.Tensor]:
    model, x = Padded().eval(), torch.randint(1, 15, (2, 9))
    x[1, 4:] = 0
    return model, x


@case(
    r"the graph gives what body gives in training, with gradients, or with torch\.backends\.mha\."
    r"set_fastpath_enabled\(False\); in evaluation without gradients torch takes a fast path there whose "
    r"outputs differ, by .+ of the largest value: it sets padded positions to zero\. What comes after "
    "should not read padded positions"
)
def graph_beside_a_fast_path(_: Path) -> None:
    model, x = padded()
    gp.slim(model, 1e-9, x, form="graph")


@case(
    r"the model computes with bfloat16 numbers, for which ONNX Runtime lacks operators here, so the file "
    r"cannot be checked: .+; let it compute in float32 or float16"
)
def export_of_bfloat16(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16).eval()
    gp.export(model, torch.randn(2, 8).to(torch.bfloat16), folder / "net.onnx")


class WithAutocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


@case(r"the model computes with bfloat16 numbers, for which ONNX Runtime lacks operators here, .+")
def export_of_autocast(folder: Path) -> None:
    gp.export(WithAutocast(8, 4).eval(), torch.randn(2, 8), folder / "net.onnx")
