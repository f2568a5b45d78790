"""A plan carried out on the files of a checkpoint, a block of rows at a time."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.checkpoint.config import slim_config
from graphprune.checkpoint.save import PLAN_FILE, folder_content
from graphprune.checkpoint.writer import TensorToWrite, header_of, write_safetensors
from graphprune.errors import InvalidRequestError, listed, warn
from graphprune.groups.cost import count_parameters
from graphprune.inference.orders import renumber
from graphprune.masks import Mask, mask_of
from graphprune.report.result import Slimmed
from graphprune.selection.plan import Plan
from graphprune.shrink.tensors import keep_positions
from graphprune.slimming.slim import slimmed
from graphprune.utils import json_files
from graphprune.utils.atomic_files import (
    DRAFT_SUFFIX,
    MAX_DRAFT_NAME_LETTERS,
    open_atomically,
    try_lock,
    write_text,
)
from graphprune.utils.progress import track
from graphprune.utils.safetensors_blocks import (
    INDEX,
    SINGLE,
    Checkpoint,
    CheckpointWeights,
    Shard,
    StoredTensor,
)

FINGERPRINT = "graphprune"
CONFIG = "config.json"
_LOCK = ".graphprune.lock"
ORIGINAL_CONFIG = "config.original.json"

# Without a config.json, transformers would build a model of default sizes, which takes a while to fail.
_NO_CONFIG = """No config says the sizes of the weights in this folder: load it with
graphprune.load(folder, model). config.original.json is that of the model before it was cut.
"""

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json",
    DRAFT_SUFFIX,
)  # fmt: skip


@dataclass(frozen=True)
class ShrunkCheckpoint:
    """What `shrink_checkpoint` wrote.

    Attributes:
        folder: where.
        files: names of the files with weights.
        kept: those of them that an earlier run had written already.
        bytes_before: of the weights of the source.
        bytes_after: of the weights that were written.
        has_config: whether its config.json says the new sizes, so that `from_pretrained` reads the folder.

    """

    folder: Path
    files: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    has_config: bool

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.files)} files, {self.bytes_before:,} bytes of weights -> "
            f"{self.bytes_after:,}"
        )


def shrink_checkpoint(
    model: nn.Module,
    plan: Plan,
    source: str | Path,
    target: str | Path,
    example_inputs: Any = None,
) -> ShrunkCheckpoint:
    """Write the checkpoint of the slim model, from that of the model, without loading either.

    What is written is what `slim` with this plan gives, bit for bit; it is not compared with the original,
    which would have to run. Files keep their names, and are put in place once they are whole, the index
    last; called again after an interruption, it goes on where it was. A file graphprune.json with the plan
    is written beside them: `graphprune.load(target, model)` builds the slim model from that. Other files of
    the source are copied, but for weights in other formats, and links to what is elsewhere, of which a
    warning tells.

    Where the source has a config.json of transformers that can say the new sizes, it is written changed,
    and `from_pretrained(target)` works too. Where it cannot (layers of uneven width, say) a warning says
    why; it is then written as config.original.json, and config.json has a sentence for people that
    `from_pretrained` refuses.

    Args:
        model: the original, on the meta device or with whatever weights: they are not read.
        plan: which channels stay, as of `slimmed(model, ..., weights=source)`.
        source: a folder with model.safetensors, or with model.safetensors.index.json and its files; or one
            safetensors file.
        target: another folder, which is made if need be.
        example_inputs: of the original, as for `slim`.

    Raises:
        InvalidRequestError: a file of the source is missing, not whole, or of another model; the target is
            the source or a file, holds weights of something else, has too little space, or is being written
            by another process.
        PlanError: the plan does not fit the model.

    """
    source, target = Path(source), Path(target)
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    checkpoint = Checkpoint.of(source)
    weights = CheckpointWeights.of(checkpoint, module)
    weights.check_shapes(module)
    empty = weights.without_values(module)
    result = slimmed(empty, example_inputs=inputs, plan=plan, verify=False)
    fingerprint = _fingerprint(checkpoint, result)
    files = {
        SINGLE if checkpoint.index is None else name: FileToShrink(
            shard, weights, result, fingerprint
        )
        for name, shard in checkpoint.shards.items()
    }
    check_target(source, target)
    with _make_and_lock(target):
        kept = _find_finished_files(target, files, fingerprint)
        remaining_files = {name: file for name, file in files.items() if name not in kept}
        _check_space(target, sum(file.bytes for file in remaining_files.values()))
        _remove_drafts(target, files)
        config = _copy_other_files(source, target)
        has_new_config = config is not None and _write_config(config, target, empty, result)
        _write_json(target / PLAN_FILE, folder_content(result.plan, result.form))
        for name, file in track(remaining_files.items(), "shrinking", len(remaining_files)):
            write_safetensors(target / name, file.tensors, file.metadata)
        # Last, since with it a folder counts as whole.
        if checkpoint.index is not None:
            _write_json(target / INDEX, _index(checkpoint, files, result, fingerprint))
    bytes_after = sum(file.bytes for file in files.values())
    bytes_before = sum(stored.bytes for stored in checkpoint.tensors.values())
    return ShrunkCheckpoint(
        target, tuple(files), tuple(kept), bytes_before, bytes_after, has_new_config
    )


class FileToShrink:
    """A file of the source, and what is to be written of it.

    Args:
        shard: the file.
        weights: whose tensors are what in the model.
        result: the slim model, without values.
        fingerprint: of the whole job, to be found in the file again.

    """

    def __init__(
        self, shard: Shard, weights: CheckpointWeights, result: Slimmed, fingerprint: str
    ) -> None:
        self.metadata = {**shard.metadata, FINGERPRINT: fingerprint}
        inference, masks = result.graph.inference, result.plan.masks(result.graph)
        first_names = {
            name: first_name for first_name, names in inference.names.items() for name in names
        }
        self.tensors: dict[str, TensorToWrite] = {}
        for name, stored in shard.tensors.items():
            # Inference knows a tied tensor by its first name; what it does not know stays as it is.
            first_name = first_names.get(weights.names[name], "")
            kept = [mask_of(layout, masks) for layout in inference.parameters.get(first_name, [])]
            shape = tuple(int(mask.sum()) for mask in kept) if kept else stored.shape
            order_layout = inference.addressed.get(first_name)
            blocks = CutBlocks(
                stored, kept, None if order_layout is None else mask_of(order_layout, masks)
            )
            self.tensors[name] = TensorToWrite(stored.dtype, shape, blocks)

    def is_at(self, path: Path) -> bool:
        """Say whether a file is whole, and what is to be written."""
        try:
            # Without the 8 bytes of its length. The header says names, shapes and the fingerprint,
            # and `Shard.of` has checked that the file is as long as it says.
            return Shard.of(path).header == header_of(self.tensors, self.metadata)[8:]
        except InvalidRequestError:
            return False

    @property
    def bytes(self) -> int:
        """Number of bytes of the tensors to be written."""
        return sum(tensor.bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class CutBlocks:
    """What is kept of a stored tensor, block after block.

    Attributes:
        stored: the tensor.
        kept: which positions of each of its dimensions stay.
        ordered: where it holds an order of slots, which of these stay.

    """

    stored: StoredTensor
    kept: list[Mask]
    ordered: Mask | None

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for block in self.stored.blocks():
            if self.kept:
                stop = start + len(block)
                # A block has some of the rows, and all of every other dimension.
                block, start = (
                    keep_positions(block, [self.kept[0][start:stop], *self.kept[1:]]),
                    stop,
                )
            yield block if self.ordered is None else renumber(block, self.ordered)


def _fingerprint(checkpoint: Checkpoint, result: Slimmed) -> str:
    """Return what tells a job from every other: of another plan, form or source."""
    parts = [shard.digest() for shard in checkpoint.shards.values()]
    text = json.dumps([result.plan.to_json(), result.form, *parts])
    return hashlib.sha256(text.encode()).hexdigest()


def check_target(source: Path, target: Path) -> None:
    """Check that the target is or can be a folder, and is not where the source is.

    Raises:
        InvalidRequestError: it is not.

    """
    if target.exists() and not target.is_dir():
        raise InvalidRequestError(f"{target} is a file; name a folder for the slim checkpoint")
    if target.resolve() in (
        source.resolve(),
        *([] if source.is_dir() else [source.resolve().parent]),
    ):
        raise InvalidRequestError(
            f"{target} is where the source is, which would be overwritten; name another folder"
        )


@contextmanager
def _make_and_lock(target: Path) -> Iterator[None]:
    """Make a folder, and let no other process write to it meanwhile."""
    target.mkdir(parents=True, exist_ok=True)
    with try_lock(target / _LOCK) as has_lock:
        if not has_lock:
            raise InvalidRequestError(
                f"another process is writing to {target}; wait for it, or name another folder"
            )
        yield


def _remove_drafts(target: Path, names: Iterable[str]) -> None:
    """Remove what runs that were killed had begun to write."""
    for name in names:
        for draft in target.glob(f"{glob.escape(name[:MAX_DRAFT_NAME_LETTERS])}.*{DRAFT_SUFFIX}"):
            draft.unlink()


def _find_finished_files(
    target: Path, files: Mapping[str, FileToShrink], fingerprint: str
) -> list[str]:
    """Return the names of the files that an earlier run of the same job wrote.

    Raises:
        InvalidRequestError: the target holds weights of something else.

    """
    present = sorted(path.name for path in target.glob("*.safetensors"))
    foreign = [
        name for name in present if name not in files or not files[name].is_at(target / name)
    ]
    if (target / INDEX).exists() and fingerprint.encode() not in (target / INDEX).read_bytes():
        foreign.append(INDEX)
    if foreign:
        raise InvalidRequestError(
            f"{target} holds {listed(foreign)} of another model, plan or source; name an empty folder, "
            "or remove them"
        )
    return present


def _check_space(target: Path, needed: int) -> None:
    # A folder that is still to be made will be on the disk of the one that it is in.
    existing_folder = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing_folder).free
    if free < needed:
        raise InvalidRequestError(
            f"{target} needs {needed:,} bytes more, and {free:,} are free there; name a folder on another "
            "disk"
        )


def _copy_other_files(source: Path, target: Path) -> dict[str, Any] | None:
    """Copy what is beside the weights of a folder, and return its config."""
    if not source.is_dir():
        return None
    outside = []
    for path in sorted(source.iterdir()):
        is_ours = path.name in (CONFIG, ORIGINAL_CONFIG, PLAN_FILE, _LOCK)
        if is_ours or path.name.endswith(_WEIGHTS) or not path.is_file():
            continue
        if not _is_inside(source, path):
            outside.append(path.name)
            continue
        with path.open("rb") as file, open_atomically(target / path.name) as copied_file:
            shutil.copyfileobj(file, copied_file)
    if outside:
        warn(
            f"{listed(outside)} in {source} links to a file outside of it, and was not copied to {target}; "
            "copy what you need"
        )
    if not (source / CONFIG).exists():
        return None
    try:
        return json_files.require_object(json_files.read(source / CONFIG, finite=False), "it")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{source / CONFIG} is no config: {error}") from error


def _is_inside(source: Path, path: Path) -> bool:
    """Say whether a file is in a folder, and not a link to elsewhere."""
    roots = [source.resolve()]
    if roots[0].parent.name == "snapshots":  # of the Hub's cache, which links to its blobs
        roots.append(roots[0].parent.parent / "blobs")
    return any(path.resolve().is_relative_to(root) for root in roots)


def _write_config(config: dict[str, Any], target: Path, empty: nn.Module, result: Slimmed) -> bool:
    """Write a config of the new sizes, or the old one under another name; say whether the first."""
    new_config, why = slim_config(config, empty, result)
    if new_config is not None:
        _write_json(target / CONFIG, new_config)
        return True
    _write_json(target / ORIGINAL_CONFIG, config)
    write_text(target / CONFIG, _NO_CONFIG)
    warn(
        f"no config.json says the sizes of the slim model ({why}), so from_pretrained cannot build it: "
        f"that of the source is {ORIGINAL_CONFIG}; load with graphprune.load({str(target)!r}, model)"
    )
    return False


def _index(
    checkpoint: Checkpoint, files: Mapping[str, FileToShrink], result: Slimmed, fingerprint: str
) -> dict[str, Any]:
    index = dict(checkpoint.index or {})
    metadata = dict(index["metadata"])
    metadata["total_size"] = sum(file.bytes for file in files.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = count_parameters(result.model)
    weight_map = {name: file_name for file_name, file in files.items() for name in file.tensors}
    return {
        **index,
        "metadata": {**metadata, FINGERPRINT: fingerprint},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
