"""Safetensors files that are written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from graphprune.utils.atomic_files import open_atomically
from graphprune.utils.safetensors_blocks import DTYPES

# The data begin at a multiple of this.
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file to write: its type as the format names it, its shape, and its blocks of rows."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def header_of(tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the data of a safetensors file: the length of a header, and the header."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        entries[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    # The length in 8 bytes, the header in JSON with blanks behind it, then the data.
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, holding no more than a block of a tensor."""
    with open_atomically(path) as file:
        file.write(header_of(tensors, metadata))
        for tensor in tensors.values():
            for block in tensor.blocks:
                file.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
