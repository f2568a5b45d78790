"""Slim models go through the int8 quantization of ONNX Runtime and of torchao."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import load_trained_network, sample
from graphprune.demo.main import accuracy
from graphprune.onnx_export.export import Exported
from graphprune.onnx_export.providers import open_session

IMAGES = sample("train").images[:256]
TEST = sample("test")
LOST = 0.03  # int8 may cost three points of accuracy


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    model: nn.Module = gp.slim(
        load_trained_network(), 0.5, IMAGES[:2], data=IMAGES.split(64), compensate=True
    )
    return model.eval()


class Batches(CalibrationDataReader):
    """The images, as a file takes them."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.left: Iterator[Tensor] = iter(IMAGES.split(64))

    def get_next(self) -> Any:
        batch = next(self.left, None)
        return None if batch is None else self.exported.feed(batch)


def test_an_exported_slim_model_can_be_quantized_by_onnx_runtime(
    slim: nn.Module, tmp_path: Path
) -> None:
    exported = gp.export(slim, IMAGES[:2], tmp_path / "slim.onnx")
    logging.disable(logging.WARNING)
    try:
        quantize_static(exported.path, tmp_path / "int8.onnx", Batches(exported))
    finally:
        logging.disable(logging.NOTSET)
    types = {w.data_type for w in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * exported.bytes
    session = open_session(tmp_path / "int8.onnx")

    def int8(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, exported.feed(images))[0])

    assert accuracy(int8, TEST) > accuracy(slim, TEST) - LOST  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["module", "graph"])
def test_an_exported_program_of_a_slim_model_can_be_quantized_by_torchao(form: Any) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    model = gp.slim(
        load_trained_network(), 0.5, IMAGES[:2], data=IMAGES.split(64), compensate=True, form=form
    )
    batch = {0: torch.export.Dim("batch", min=2, max=4096)}
    program = torch.export.export(model.eval(), (IMAGES[:2],), dynamic_shapes=(batch,))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    for part in IMAGES.split(64):
        prepared(part)
    int8 = convert_pt2e(prepared)
    held = {tensor.dtype for tensor in int8.state_dict().values()}
    assert torch.int8 in held
    assert accuracy(int8, TEST) > accuracy(model, TEST) - LOST
