"""A model as an ONNX file, with free dimensions, checked in ONNX Runtime against PyTorch."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.onnx import ONNXProgram
from torch.utils import _pytree as pytree

from graphprune.distributed.wrappers import unwrap
from graphprune.errors import ExportError, in_a_line, warn
from graphprune.inference.precision import find_coarsest_dtype, relative_difference, tolerance_of
from graphprune.onnx_export.cleanup import (
    free_lengths,
    remove_assertions,
    rename_symbols,
    tidy,
    values_of,
)
from graphprune.onnx_export.free_sizes import (
    BATCH,
    Dims,
    Free,
    batch_name,
    drop_names,
    guess_batch_dims,
    names_of,
    resolve_requested_dims,
)
from graphprune.onnx_export.providers import open_session
from graphprune.onnx_export.sparse_initializers import hold_sparsely
from graphprune.ops.onnx_scan import TRANSLATIONS
from graphprune.utils.atomic_files import check_target_path, draft_folder
from graphprune.utils.inputs import Inputs, output_tensors
from graphprune.utils.lru_caches import without_caches
from graphprune.utils.tensors import evaluation_mode, named_tensors, working_copy
from graphprune.utils.torch_context import (
    fused_modules,
    one_thread_at_a_time,
    plain_transformers,
    silence_torch,
    warn_of_fused,
)

aten = torch.ops.aten

PREFIX = "model."  # the attribute of _Flat that holds the model

_ORIGIN = "graphprune_origin"

Model = nn.Module | torch.export.ExportedProgram
Feed = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An ONNX file that ONNX Runtime was seen to compute as PyTorch does.

    `bytes` counts the whole model, external weights included (there are some above 2 GB only).
    `free` names the dimensions of which the file takes any size, `batch_free` says whether the batch is
    one, `batch` being its name; `checked` lists the batch sizes compared.
    `difference` is the largest found, relative to the largest value of the output it is in.
    """

    path: Path
    bytes: int
    opset: int
    free: tuple[str, ...]
    checked: tuple[int, ...]
    difference: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: str = BATCH

    @property
    def batch_free(self) -> bool:
        """Whether the file takes any batch size."""
        return self.batch in self.free

    def feed(self, example_inputs: Any) -> Feed:
        """Return what an ONNX Runtime session of this file takes for the model's arguments."""
        tensors = Inputs.of(example_inputs).tensors()
        return {name: _array(t) for name, t in zip(self.inputs, tensors, strict=True)}


@dataclasses.dataclass(frozen=True)
class TracedExport:
    """An exported file and the graph of ATen operators that it was translated from.

    The parameters of `program` are named as the model's, behind `PREFIX`. `origins` gives, by the name of
    a node or value in the file, the node of the program that it came from, where it came from one.
    """

    exported: Exported
    program: torch.export.ExportedProgram
    origins: dict[str, str]


def export(
    model: Model,
    example_inputs: Any,
    path: str | Path,
    *,
    free: Free | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    sparse_weights: bool = False,
) -> Exported:
    """Write the model, as it evaluates, to an ONNX file, and compare the file with PyTorch.

    What `free` names is free in the file, and so is the batch: the first dimension of every input
    tensor that shares the first tensor's size there, or where the model runs with such a batch (a state
    has it behind its layers). Other dimensions stay as in the example inputs. The file is compared at the
    example's sizes and at twice those that are free. Where one cannot be free (the model runs only at
    this size, say) it is fixed, with a `GraphPruneWarning` that names it, and the rest stays free.
    Outputs that are not tensors, such as key-value caches, are left out.

    Args:
        model: it is not changed, even if running it writes to its buffers.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments or `Inputs`.
        path: the file to write, ending in .onnx, in a folder that there is, with the weights inside up to
            2 GB.
        free: more dimensions that are free, by input and number, as in `{"tokens": {1: "length"}}`; what
            has one name has one size. A name for dimension 0 is the batch's, unless another is called
            "batch": `{"x": {0: "length", 1: "batch"}}`.
        opset: version of the ONNX operators; by default PyTorch's own choice.
        tolerance: largest difference accepted, relative to the largest value of the output; by default
            0.0001, 0.005 for a model with float16 numbers and 0.03 for one with bfloat16.
        sparse_weights: hold weights that are mostly zero by what is not, with its places, where that is
            smaller. ONNX Runtime makes them dense when it loads them: the file is smaller, memory and time
            are not.

    Raises:
        InvalidRequestError: `free` names inputs or dimensions that there are not, or of unlike sizes, or
            the path is not such a one.
        ExportError: the model cannot be run or exported, or the file disagrees with PyTorch;
            what was at the path before is left alone.
        CaptureError: the model cannot be copied.

    """
    target = check_target_path(path, ".onnx")
    inputs = Inputs.of(example_inputs)
    options = _Options(opset, tolerance, sparse_weights)
    return _export_exclusively(model, inputs, target, free or {}, options).exported


def export_traced(model: Model, inputs: Inputs, path: Path) -> TracedExport:
    """Return what `export` returns where nothing more is asked, with the graph that was translated."""
    return _export_exclusively(model, inputs, path, {}, _Options())


def _export_exclusively(
    model: Model, inputs: Inputs, path: Path, free: Free, options: _Options
) -> TracedExport:
    with one_thread_at_a_time():
        return _export_module(as_module(model), inputs, path, free, options)


def _export_module(
    module: nn.Module, inputs: Inputs, path: Path, free: Free, options: _Options
) -> TracedExport:
    if not isinstance(module, fx.GraphModule):  # which a copy would rob of its program's guards
        module = working_copy(module)
    with without_caches(module), evaluation_mode(module):
        flat = _Flat(module, inputs, free)
        request = _Request(flat, path, options)
        return _export_free(request, _first_case(flat))


def as_module(model: Model) -> nn.Module:
    """Return the model as a module: itself, what it wraps, or the graph module of an exported program."""
    return unwrap(model) if isinstance(model, nn.Module) else model.module(check_guards=False)


class _Flat(nn.Module):
    """A model as a function from its input tensors to the tuple of its output tensors."""

    def __init__(self, model: nn.Module, inputs: Inputs, free: Free) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.names = _input_names(model, inputs)
        self.asked = resolve_requested_dims(self.names, inputs.tensors(), free)
        self.batch_name = batch_name(self.asked)
        self.dims: Dims = self.asked
        self.dtype = find_coarsest_dtype([*named_tensors(model).values(), *inputs.tensors()])

    @property
    def batch(self) -> int:
        """The batch size of the example inputs: of what is called so, or of the first."""
        pairs = zip(self.inputs.tensors(), self.dims, strict=True)
        sizes = {name: t.shape[d] for t, dims in pairs for d, name in dims.items()}
        first_size = next((t.shape[0] for t in self.inputs.tensors() if t.dim()), 1)
        return sizes.get(self.batch_name, first_size)

    def repeat(self, times: int) -> list[Tensor]:
        """Return the example tensors repeated `times` times along what is free."""
        return [
            t.repeat([times if d in dims else 1 for d in range(t.dim())]) if dims else t
            for t, dims in zip(self.inputs.tensors(), self.dims, strict=True)
        ]

    def outputs(self, tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        """Return the output tensors with a name for each."""
        # `Inputs.map` meets the tensors in the order of `Inputs.tensors`.
        replacements = iter(tensors)
        inputs = self.inputs.map(lambda _: next(replacements))
        return list(output_tensors(self.model(*inputs.args, **inputs.kwargs)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in self.outputs(tensors))


@dataclasses.dataclass(frozen=True)
class _Case:
    """Input tensors at one size of what is free, and what PyTorch makes of them."""

    batch: int
    tensors: list[Tensor]
    expected: list[tuple[str, Tensor]]
    as_traced: list[tuple[str, Tensor]]
    """What it makes of them where torch's transformers run operator by operator, as in a file."""

    @classmethod
    def of(cls, flat: _Flat, times: int) -> _Case:
        """Return the case of the example repeated `times` times along what is free."""
        tensors = flat.repeat(times)
        with silence_torch(), torch.no_grad():
            expected = flat.outputs(tensors)
            if not fused_modules(flat.model):
                return cls(flat.batch * times, tensors, expected, expected)
            with plain_transformers():
                return cls(flat.batch * times, tensors, expected, flat.outputs(tensors))


class _FixedSizeError(Exception):
    """The exported graph holds at one size of a free dimension only."""


def _first_case(flat: _Flat) -> _Case:
    """Return the case of the example inputs."""
    try:
        case = _Case.of(flat, 1)
    except Exception as error:
        raise ExportError(
            f"the model cannot be run in PyTorch on {flat.inputs}: {in_a_line(error)}"
        ) from error
    if not case.expected:
        raise ExportError(f"the model gives no tensors for {flat.inputs}, so nothing to export")
    return case


@dataclasses.dataclass(frozen=True)
class _Options:
    """How the file is to be."""

    opset: int | None = None
    tolerance: float | None = None
    sparse_weights: bool = False


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the caller asked for."""

    flat: _Flat
    path: Path
    options: _Options

    @property
    def tolerance(self) -> float:
        """The largest difference accepted, relative to the largest value of an output."""
        requested = self.options.tolerance
        return tolerance_of(self.flat.dtype) if requested is None else requested


def _export_free(request: _Request, example_case: _Case) -> TracedExport:
    """Write a checked file, free in all that was asked and the batch, or with a warning in less."""
    flat = request.flat
    guessed_dims = next(guess_batch_dims(flat.asked, flat.inputs.tensors()))
    runnable_dims, obstacle = _find_runnable_dims(flat, guessed_dims)
    for dims in filter(any, [runnable_dims, *drop_names(runnable_dims, flat.batch_name)]):
        flat.dims = dims
        try:
            traced = _export_cases(request, [example_case, _Case.of(flat, 2)])
            break
        except Exception as error:
            obstacle = obstacle or in_a_line(error)
    else:  # no choice of free sizes could be exported
        flat.dims = [{} for _ in flat.asked]
        traced = _export_fixed(request, example_case)
    missing_names = set(names_of(guessed_dims)) - set(names_of(flat.dims))
    # Where the model ran with the missing names they stood there, otherwise where they were guessed.
    if missing_names:
        intended_dims = (
            runnable_dims if set(names_of(runnable_dims)) >= missing_names else guessed_dims
        )
        warn(_describe_fixed_dims(flat, intended_dims, request.path.name, obstacle))
    return traced


def _find_runnable_dims(flat: _Flat, guessed_dims: Dims) -> tuple[Dims, str]:
    """Return what to leave free: what was asked, and the batch where the model runs with twice of it.

    And where it runs nowhere so, what was asked alone, and what the model said to the first guess.
    """
    obstacle = ""
    for dims in guess_batch_dims(flat.asked, flat.inputs.tensors()):
        flat.dims = dims
        try:
            _Case.of(flat, 2)
        except Exception as error:
            obstacle = obstacle or in_a_line(error)
        else:
            return dims, "" if set(names_of(dims)) >= set(names_of(guessed_dims)) else obstacle
    return guessed_dims, obstacle


def _describe_fixed_dims(
    flat: _Flat, intended_dims: Sequence[Mapping[int, str]], file: str, obstacle: str
) -> str:
    """Say which dimensions are fixed."""
    inputs_by_dim: dict[tuple[int, int], list[str]] = {}
    for name, tensor, intended, free in zip(
        flat.names, flat.inputs.tensors(), intended_dims, flat.dims, strict=True
    ):
        for d in intended.keys() - free.keys():
            inputs_by_dim.setdefault((d, tensor.shape[d]), []).append(name)
    parts = [
        f"dimension {d} of {', '.join(names)} is fixed to {size}"
        for (d, size), names in sorted(inputs_by_dim.items())
    ]
    return f"{' and '.join(parts)} in {file}, because exporting it free did not work: {obstacle}"


def _export_fixed(request: _Request, example_case: _Case) -> TracedExport:
    """Write a checked file for the example's batch size alone."""
    try:
        return _export_cases(request, [example_case])
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"the model cannot be exported to ONNX: {in_a_line(error)}") from error


def _export_cases(request: _Request, cases: list[_Case]) -> TracedExport:
    """Write a file that agrees with PyTorch on the cases; what is to be free is, if there are two."""
    flat, is_free = request.flat, len(cases) > 1
    # At the doubled sizes, if there are two cases: a size of 1 would be taken for a constant.
    traced_program, onnx_program = _translate(
        flat, cases[-1].tensors, request.options.opset, is_free
    )
    if is_free:
        free_lengths(onnx_program.model)
        _name_free(flat, onnx_program.model)
    # Before `tidy`, which drops the metadata that origins are read from; the file's names come after it.
    origins = _origins(onnx_program)
    tidy(onnx_program.model, flat.names, [name for name, _ in cases[0].expected], PREFIX)
    size, difference = _save(onnx_program, request, cases)
    graph = onnx_program.model.graph
    exported = Exported(
        path=request.path,
        bytes=size,
        opset=onnx_program.model.opset_imports[""],
        free=names_of(flat.dims) if is_free else (),
        checked=tuple(case.batch for case in cases),
        difference=difference,
        inputs=tuple(str(value.name) for value in graph.inputs),
        outputs=tuple(str(value.name) for value in graph.outputs),
        batch=flat.batch_name,
    )
    origin_by_name = {str(node.name): origin for node, origin in origins}
    origin_by_name |= {
        str(value.name): origin for node, origin in origins for value in node.outputs
    }
    return TracedExport(exported, traced_program, origin_by_name)


def _save(onnx_program: ONNXProgram, request: _Request, cases: list[_Case]) -> tuple[int, float]:
    """Check the file elsewhere and put it in its place; return its bytes and its difference."""
    with draft_folder(request.path.parent, last=request.path.name) as folder:
        draft = folder / request.path.name
        onnx_program.save(draft)
        if request.options.sparse_weights:
            hold_sparsely(draft)
        difference = _difference(draft, cases, request)
        # Above 2 GB the weights have a file of their own.
        size = sum(file.stat().st_size for file in folder.iterdir())
    return size, difference


def _translate(
    flat: _Flat, tensors: list[Tensor], opset: int | None, is_free: bool
) -> tuple[torch.export.ExportedProgram, ONNXProgram]:
    """Return the traced model and what PyTorch's exporter makes of it, without its chatter."""
    # AUTO, since a named dynamic dimension raises once a recurrent net was exported before.
    auto_dims = [
        dict.fromkeys(dims, torch.export.Dim.AUTO) if is_free else {} for dims in flat.dims
    ]
    dynamic_shapes = {"tensors": tuple(dims or None for dims in auto_dims)}
    with _silence_output(), plain_transformers(), torch.no_grad():
        traced_program = torch.export.export(
            flat, tuple(tensors), dynamic_shapes=dynamic_shapes, strict=False
        )
        remove_assertions(traced_program)
        for node in traced_program.graph.nodes:
            node.meta["custom"] = {
                _ORIGIN: node.name
            }  # which later stages of the exporter carry along
        translation = torch.onnx.export(
            traced_program, dynamo=True, opset_version=opset, verbose=False,
            custom_translation_table=TRANSLATIONS,
        )  # fmt: skip
    onnx_program = cast(ONNXProgram, translation)
    version = onnx_program.model.opset_imports[""]
    if opset not in (None, version):
        raise ExportError(f"opset {opset} was asked for, but PyTorch could only write {version}")
    return traced_program, onnx_program


def _origins(onnx_program: ONNXProgram) -> list[tuple[ir.Node, str]]:
    """Return the nodes of a translated model with the node of the traced one that each came from."""
    traced_nodes = cast(torch.export.ExportedProgram, onnx_program.exported_program).graph.nodes
    origin_by_node = {node.name: node.meta.get("custom", {}).get(_ORIGIN) for node in traced_nodes}
    origins = []
    # An output has the name of the traced node that it came from; else the scopes say it, innermost last.
    for node in onnx_program.model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        candidates = [*(value.name for value in node.outputs), *reversed(ast.literal_eval(scopes))]
        origin = next(
            (origin_by_node[name] for name in candidates if origin_by_node.get(name)), None
        )
        if origin is not None:
            origins.append((node, origin))
    return origins


def _name_free(flat: _Flat, model: ir.Model) -> None:
    """Name the free dimensions, or raise if the exporter made a number of the batch.

    Tracing makes numbers of lengths that recurrent operators, in PyTorch and in ONNX alike, take as they
    come. What says so behind them is forgotten then; that the file runs at two lengths is seen later.
    """
    name_by_symbol: dict[str, str] = {}
    inputs = model.graph.inputs
    has_number = False
    for dims, value in zip(flat.dims, inputs, strict=True):
        sizes: list[int | ir.SymbolicDim | str] = list(value.shape or ())
        for d, name in dims.items():
            is_number = str(sizes[d]).isdigit()
            if is_number and name == flat.batch_name:
                raise _FixedSizeError("the traced graph holds at one batch size only")
            has_number |= is_number
            if is_number:
                sizes[d] = name
            else:
                name_by_symbol.setdefault(str(sizes[d]), name)
        value.shape = ir.Shape(sizes)
    for value in values_of(model.graph):
        if value.shape is not None and not value.is_initializer():
            is_unknown = has_number and value not in inputs
            value.shape = ir.Shape(
                [None if is_unknown else rename_symbols(d, name_by_symbol) for d in value.shape]
            )


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return a name for each input tensor: its argument's, with the place inside it."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]
    positional += [f"input_{position}" for position in range(len(positional), len(inputs.args))]
    # In ((x, [y]), {"mask": m}) the words of the three are 0 0, 0 1 0 and 1 mask: the second is the
    # argument's number or name, and those after it lead to the tensor inside.
    located_leaves, _ = pytree.tree_flatten_with_path((inputs.args, inputs.kwargs))
    words_by_tensor = [
        re.findall(r"\w+", pytree.keystr(path))
        for path, leaf in located_leaves
        if isinstance(leaf, Tensor)
    ]
    return [
        "_".join([positional[int(words[1])] if words[0] == "0" else words[1], *words[2:]])
        for words in words_by_tensor
    ]


def _difference(path: Path, cases: list[_Case], request: _Request) -> float:
    """Return the largest difference between PyTorch and ONNX Runtime, within the tolerance."""
    session = _session(path, request.flat)
    names = [value.name for value in session.get_inputs()]
    largest_difference = fused_difference = 0.0
    for case in cases:
        onnx_arrays = session.run(None, dict(zip(names, map(_array, case.tensors), strict=True)))
        outputs = zip(case.as_traced, case.expected, onnx_arrays, strict=True)
        for (name, tensor), (_, fused_tensor), onnx_array in outputs:
            where = f"{name} at batch {case.batch}"
            largest_difference = max(
                largest_difference, _require_equal(where, _array(tensor), onnx_array, request)
            )
            # One object where the model has no fused modules, so that there is nothing else to compare.
            if fused_tensor is not tensor:
                fused_difference = max(
                    fused_difference, relative_difference(_array(fused_tensor), onnx_array)
                )
    if fused_difference > request.tolerance:
        warn_of_fused(request.flat.model, path.name, fused_difference)
    return largest_difference


def _session(path: Path, flat: _Flat) -> Any:
    """Open the file; where it cannot be, for the sake of its type, say so."""
    try:
        return open_session(path)
    except Exception as error:
        if flat.dtype is not torch.bfloat16 and not _casts_to_bfloat16(path):
            raise
        raise ExportError(
            "the model computes with bfloat16 numbers, for which ONNX Runtime lacks operators here, so the "
            f"file cannot be checked: {in_a_line(error)}; let it compute in float32 or float16"
        ) from None


def _casts_to_bfloat16(path: Path) -> bool:
    """Say whether an exported model computes in bfloat16 somewhere, as under autocast."""
    nodes = ir.load(path).graph
    return any(
        node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16
        for node in nodes
    )


def _require_equal(
    where: str, torch_array: NDArray[Any], onnx_array: NDArray[Any], request: _Request
) -> float:
    """Return the relative difference between PyTorch's array and ONNX Runtime's."""
    if torch_array.shape != onnx_array.shape:
        raise ExportError(
            f"{where} has shape {list(torch_array.shape)} in PyTorch and "
            f"{list(onnx_array.shape)} in ONNX Runtime"
        )
    difference = relative_difference(torch_array, onnx_array)
    # Not `>`, which would let a difference of NaN pass.
    if not difference <= request.tolerance:
        raise ExportError(
            f"{where}, shape {list(torch_array.shape)}, differs between PyTorch and ONNX Runtime by "
            f"{difference:.3g} of its largest value; the tolerance is {request.tolerance:g} for "
            f"{str(request.flat.dtype).removeprefix('torch.')}, and tolerance= sets another"
        )
    return difference


def _array(tensor: Tensor) -> NDArray[Any]:
    # NumPy has no bfloat16.
    on_cpu = tensor.detach().cpu()
    return (on_cpu.float() if on_cpu.dtype is torch.bfloat16 else on_cpu).numpy()


@contextlib.contextmanager
def _silence_output() -> Iterator[None]:
    """Let nothing be printed, logged or warned about."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
