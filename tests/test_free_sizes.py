from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneWarning
from graphprune.onnx_export.export import export
from graphprune.onnx_export.free_sizes import Free, guess_batch_dims
from graphprune.onnx_export.providers import open_session
from graphprune.utils.inputs import Inputs, call


class Stream(nn.Module):
    """A state of (layers, batch, hidden) goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cells(x, h)
        return self.last(y), h


@pytest.mark.parametrize(
    ("free", "batch", "names"),
    [
        ({"x": {0: "batch", 1: "t"}, "h": {1: "batch"}}, 3, {"batch", "t"}),
        ({"x": {0: "n", 1: "t"}, "h": {1: "n"}}, 3, {"n", "t"}),
        ({"x": {1: "t"}}, 3, {"batch", "t"}),
        ({"x": {1: "t"}}, 1, {"batch", "t"}),
    ],
)
def test_what_is_asked_is_free_and_a_state_has_its_batch_behind_its_layers(
    free: Free, batch: int, names: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Stream().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphPruneWarning)
        exported = export(
            model,
            (torch.randn(batch, 5, 6), torch.randn(1, batch, 8)),
            tmp_path / "net.onnx",
            free=free,
        )
    assert set(exported.free) == names
    assert exported.batch_free
    inputs = Inputs(torch.randn(4, 9, 6), torch.randn(1, 4, 8))
    found = open_session(exported.path).run(None, exported.feed(inputs))
    torch.testing.assert_close(
        torch.from_numpy(found[0]), call(model, inputs)[0], rtol=0, atol=1e-5
    )


def test_a_size_that_cannot_be_free_is_named_and_the_others_are_free(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, y.reshape(y.shape[0], 6) * 2

    free = {"x": {1: "width"}, "y": {1: "height"}}
    with pytest.warns(GraphPruneWarning, match=r"^dimension 1 of y is fixed to 6 in net\.onnx"):
        made = export(
            Fixed(), (torch.randn(2, 5), torch.randn(2, 6)), tmp_path / "net.onnx", free=free
        )
    assert set(made.free) == {"batch", "width"}


def test_a_name_for_dimension_0_is_the_batchs_of_all_inputs() -> None:
    tensors = [torch.zeros(3, 4), torch.zeros(3, 5)]
    assert next(guess_batch_dims([{0: "n"}, {}], tensors)) == [{0: "n"}, {0: "n"}]


def test_models_in_half_precision_are_compared_by_their_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).half().eval()
    exported = export(model, torch.randn(4, 64).half(), tmp_path / "net.onnx")
    assert exported.difference < 5e-3
