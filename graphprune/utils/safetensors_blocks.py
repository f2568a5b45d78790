"""Checkpoints in safetensors files, one or many, read a block of rows at a time.

Files are read, not mapped: pages of a mapped file count as the process's memory until the file is let
go, so that what was read of a shard would stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphprune.errors import InvalidRequestError, listed
from graphprune.utils import json_files
from graphprune.utils.tensors import copy_with, may_be_an_order, named_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"

# Entries of a tensor that are held at once: few enough for a processor's cache, in float64 too. Scoring
# by blocks of eight times as many took five times as long.
BLOCK = 1 << 17

# Bytes of each tensor that tell one checkpoint from another of the same shapes.
_SAMPLE = 64

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16,
    "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
        path: the file.
        start: position of its first byte there.
        dtype: as the format names it, a key of `DTYPES`.
        shape: its shape.

    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Yield the tensor, a block of rows after the other; a number as a row of one."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for start, stop in row_blocks(self.shape):
                shape = (stop - start, *self.shape[1:])
                count = prod(shape) * DTYPES[self.dtype].itemsize
                # raw bytes into the tensor's memory: numpy has no bfloat16 to read them as
                buffer = torch.empty(count, dtype=torch.uint8)
                if file.readinto(buffer.numpy().data) != count:
                    raise InvalidRequestError(f"{self.path} ends before its tensors do")
                yield buffer.view(DTYPES[self.dtype]).view(shape)

    def copy_to(self, tensor: Tensor) -> None:
        """Fill a tensor of the same shape, of whatever type and wherever it is."""
        rows, row = tensor if tensor.dim() else tensor[None], 0
        for block in self.blocks():
            rows[row : row + len(block)] = block
            row += len(block)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first row and the one after the last of each block; a number is a block of one row."""
    rows = shape[0] if shape else 1
    rows_per_block = max(1, BLOCK // max(1, prod(shape[1:])))
    for start in range(0, rows, rows_per_block):
        yield start, min(start + rows_per_block, rows)


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint.

    Attributes:
        path: the file.
        header: the bytes that describe what is in it.
        metadata: the texts in its header.
        tensors: what it holds, by name, in the order of the file.

    """

    path: Path
    header: bytes
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]

    @classmethod
    def of(cls, path: Path) -> Shard:
        """Read the header of a file.

        Raises:
            InvalidRequestError: there is no such file, it is no whole safetensors file, or it holds numbers
                of a kind that PyTorch has not.

        """
        try:
            with safe_open(path, "pt"):
                pass  # it has checked the header, and that the file is as long as that says
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
            content = json_files.require_object(json_files.parse_json(header), "its header")
        except (OSError, SafetensorError, ValueError) as error:
            raise InvalidRequestError(f"{path} cannot be read as safetensors: {error}") from error
        metadata = content.pop("__metadata__", None) or {}
        unsupported = {
            name: entry["dtype"] for name, entry in content.items() if entry["dtype"] not in DTYPES
        }
        for name, dtype in unsupported.items():
            raise InvalidRequestError(
                f"{path} holds {name} in {dtype}, which cannot be cut; those that can are "
                f"{', '.join(DTYPES)}"
            )
        # a file is 8 bytes with the header's length, the header, and the data that offsets count from
        tensors = {
            name: StoredTensor(
                path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
            )
            for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"])
        }
        return cls(path, header, metadata, tensors)

    def digest(self) -> str:
        """Return a digest of the header and of the first bytes of each tensor."""
        digest = hashlib.sha256(self.path.name.encode() + self.header)
        with self.path.open("rb") as file:
            for stored in self.tensors.values():
                file.seek(stored.start)
                digest.update(file.read(min(_SAMPLE, stored.bytes)))
        return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a safetensors file, or of a folder of several with an index.

    Attributes:
        path: the file or the folder.
        shards: its files, by name.
        index: what the index says beside where each tensor is; None without one.

    """

    path: Path
    shards: dict[str, Shard]
    index: dict[str, Any] | None = None

    @classmethod
    def of(cls, path: str | Path) -> Checkpoint:
        """Read the headers of a checkpoint's files.

        Raises:
            InvalidRequestError: a file is missing or not whole, or the index and its files do not agree.

        """
        path = Path(path)
        if not path.is_dir():
            return cls(path, {path.name: Shard.of(path)})
        if not (path / INDEX).exists():
            if not (path / SINGLE).exists():
                raise InvalidRequestError(
                    f"{path} holds neither {INDEX} nor {SINGLE}; save the weights as safetensors first"
                )
            return cls(path, {SINGLE: Shard.of(path / SINGLE)})
        index, weight_map = _read_index(path / INDEX)
        shards = {name: Shard.of(path / name) for name in dict.fromkeys(weight_map.values())}
        file_of_tensor = {name: file for file, shard in shards.items() for name in shard.tensors}
        misplaced = sorted(
            name
            for name in file_of_tensor.keys() | weight_map.keys()
            if file_of_tensor.get(name) != weight_map.get(name)
        )
        if misplaced:
            raise InvalidRequestError(
                f"{path / INDEX} says that {misplaced[0]} is in "
                f"{weight_map.get(misplaced[0], 'no file')}, and "
                f"{file_of_tensor.get(misplaced[0], 'no file')} holds it; {len(misplaced)} tensors are "
                "not where it says"
            )
        return cls(path, shards, index)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name in the files."""
        return {
            name: stored for shard in self.shards.values() for name, stored in shard.tensors.items()
        }


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        index = json_files.require_object(json_files.read(path), "it")
        weight_map = json_files.require_object(index.pop("weight_map", None), "its weight_map")
        json_files.require_object(index.setdefault("metadata", {}), "its metadata")
        for file in weight_map.values():
            if not (isinstance(file, str) and Path(file).name == file and file.endswith(_SUFFIX)):
                raise ValueError(f"{file!r} is no safetensors file beside it")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} is no index of a checkpoint: {error}") from error
    return index, weight_map


@dataclass(frozen=True)
class CheckpointWeights:
    """The tensors of a checkpoint as the values of a model.

    Attributes:
        checkpoint: the files.
        names: the name of each tensor in the files, and that in the model.
        by_name: where the values of each of the model's tensors are, a tied one under each of its names;
            without those that no checkpoint holds, being computed when the model is built.

    """

    checkpoint: Checkpoint
    names: dict[str, str]
    by_name: dict[str, StoredTensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module) -> CheckpointWeights:
        """Find the tensors of a model, whose own values are not read, in a checkpoint.

        Raises:
            InvalidRequestError: the checkpoint lacks a tensor that the model has, or the other way round.

        """
        model_tensors, kind = named_tensors(model), type(model).__name__
        prefix = getattr(model, "base_model_prefix", "")
        names = {name: _name_in(model_tensors, name, prefix) for name in checkpoint.tensors}
        unknown = [name for name, model_name in names.items() if model_name not in model_tensors]
        if unknown:
            raise InvalidRequestError(
                f"{checkpoint.path} holds {listed(unknown)}, which {kind} lacks; pass the model that the "
                "checkpoint is of"
            )
        stored_by_id: dict[int, StoredTensor] = {}
        for name, model_name in names.items():
            # by identity, so that tied tensors, one under several names, are found under each of them
            stored_by_id.setdefault(id(model_tensors[model_name]), checkpoint.tensors[name])
        by_name = {
            name: stored_by_id[id(tensor)]
            for name, tensor in model_tensors.items()
            if id(tensor) in stored_by_id
        }
        missing = [
            name for name in model.state_dict() if name in model_tensors and name not in by_name
        ]
        if missing:
            raise InvalidRequestError(
                f"{checkpoint.path} lacks {listed(missing)} of {kind}; pass the model that the "
                "checkpoint is of"
            )
        return cls(checkpoint, names, by_name)

    def without_values(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model on the meta device, but for what may be orders of its channels."""

        def drop_values(name: str, tensor: Tensor) -> Tensor:
            if not may_be_an_order(tensor):
                return tensor.detach().to("meta")
            if name not in self.by_name:
                return tensor.detach().clone()
            order = torch.empty_like(tensor, device="cpu")
            self.by_name[name].copy_to(order)
            return order

        return copy_with(model, drop_values)

    def check_shapes(self, model: nn.Module) -> None:
        """Check that the tensors of a model have the shapes of those in the files.

        Raises:
            InvalidRequestError: one has not.

        """
        for name, tensor in named_tensors(model).items():
            stored_shape = self.by_name[name].shape if name in self.by_name else tuple(tensor.shape)
            if stored_shape != tuple(tensor.shape):
                raise InvalidRequestError(
                    f"{name} has shape {stored_shape} in {self.checkpoint.path}, and "
                    f"{tuple(tensor.shape)} in {type(model).__name__}; pass the model that the "
                    "checkpoint is of"
                )


def _name_in(model_tensors: Mapping[str, Tensor], name: str, prefix: str) -> str:
    """Return the model's name for a tensor: a checkpoint may be of the model inside, or of one around."""
    if name in model_tensors or not prefix:
        return name
    # "pooler.weight" of a BertModel is "bert.pooler.weight" in a model around it, or the other way round
    within = f"{prefix}.{name}"
    return within if within in model_tensors else name.removeprefix(f"{prefix}.")
