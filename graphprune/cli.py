"""The command line: graphprune slim | run | inspect | compare | demo."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Unpack

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.checkpoint import check_target, shrink_checkpoint
from graphprune.checkpoint.save import save
from graphprune.errors import InvalidRequestError, in_a_line
from graphprune.groups.cost import count_macs, count_parameters
from graphprune.importance import CRITERIA
from graphprune.inspection import SUFFIXES as GRAPH_SUFFIXES
from graphprune.inspection import build_document
from graphprune.inspection.dependency_graph import analyze
from graphprune.inspection.terminal_tree import describe_group, format_tree
from graphprune.onnx_export.export import export
from graphprune.pipeline.pipeline import Pass, Pipeline
from graphprune.report.compare import compare as compare_models
from graphprune.report.comparison import SUFFIXES as COMPARISON_SUFFIXES
from graphprune.selection.request import Ranking, Unit
from graphprune.slimming.slim import Options, slimmed
from graphprune.utils.atomic_files import check_target_path, open_atomically
from graphprune.utils.inputs import Inputs
from graphprune.utils.terminal import errors_to_exit_code, show_spinner

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make PyTorch models smaller.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:callable that returns a model, or a file torch.save wrote (.pt, .pth, .pt2). "
        "A file of other classes than PyTorch's own is unpickled, which runs whatever code it names: name "
        "such only if you trust it"
    ),
]
Shapes = Annotated[
    list[str],
    typer.Option(
        "--input", help="shape of an example input, as 2,3,224,224; int:2,16 for token numbers"
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="file to write, in a folder that there is: .onnx, or .pt for torch.save"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Ratio = Annotated[float | None, typer.Option(help="fraction to remove; half if not given")]

# Files that torch.save writes: by their endings, and by their first bytes, of archives and of older files.
_PICKLED = (".pt", ".pth")
_SAVED = (b"PK", b"\x80")

# Beside layers, what layers hold.
_FUNCTIONS = (nn.functional.relu, nn.functional.gelu, set)

# Where the code is that is not the user's own.
_INSTALLED = (
    sysconfig.get_path("purelib"),
    sysconfig.get_path("stdlib"),
    str(Path(__file__).parent),
)

# How many samples of a file run at once.
_SAMPLES = 32

_OR_A_FILE = {
    "a model": ", or a file ending in .pt or .pt2",
    "batches": ", or a file ending in .npy",
    "a loss": "",
}


@app.command()
def slim(
    out: Annotated[
        Path,
        typer.Option(
            help="file to write, in a folder that there is: .onnx, .pt for torch.save, or .safetensors for "
            "graphprune.load"
        ),
    ],
    model: Annotated[
        str,
        typer.Argument(
            help="as for the other commands; with --checkpoint of a transformers model it may be left out"
        ),
    ] = "",
    ratio: Ratio = None,
    of: Annotated[Unit, typer.Option(help="what the ratio counts")] = "channels",
    importance: Annotated[str, typer.Option(help=", ".join(CRITERIA))] = "l2",
    ranking: Annotated[
        Ranking, typer.Option(help="do the channels of all groups compete?")
    ] = "auto",
    data: Annotated[
        str, typer.Option(help="package.module:callable that returns batches, or a .npy of samples")
    ] = "",
    loss: Annotated[
        str,
        typer.Option(help="package.module:function of output and target, for criteria that ask"),
    ] = "",
    compensate: Annotated[bool, typer.Option(help="repair on the data, without training")] = False,
    renormalised: Annotated[bool, typer.Option(help="also cut along norms")] = False,
    latency_ms: Annotated[
        float | None, typer.Option(help="milliseconds to take, instead of a ratio")
    ] = None,
    provider: Annotated[
        str, typer.Option(help="where latency is measured: cpu, cuda, cuda-tf32, cuda-float16...")
    ] = "cpu",
    threads: Annotated[int, typer.Option(help="inside an operator, on the CPU")] = 1,
    report: Annotated[
        Path | None, typer.Option(help="page to write about it, .html, with a comparison")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="folder of safetensors to shrink on disk, for --out, a folder too"),
    ] = None,
    shapes: Shapes = [],  # noqa: B006 (typer reads the default and never changes it)
    as_json: AsJson = False,
) -> None:
    """Write a smaller, checked copy of a model; or of a checkpoint, without loading it.

    Under torchrun each process looks at its share of the data, and the first writes.
    """
    with errors_to_exit_code(), group() as writes:
        if checkpoint is not None:
            needs_a_model = {
                "--data": data, "--loss": loss, "--compensate": compensate, "--latency-ms": latency_ms,
                "--of latency": of == "latency", "--report": report,
            }  # fmt: skip
            _refuse_with_checkpoint([name for name, option in needs_a_model.items() if option])
            if not writes:
                return
            check_target(checkpoint, out)
            original, inputs = without_weights(model, checkpoint), example_inputs(shapes)
            slim_checkpoint(
                original, checkpoint, out, inputs, ratio, as_json=as_json, of=of,
                importance=importance, ranking=ranking, renormalised=renormalised,
            )  # fmt: skip
            return
        check_target_path(out, ".onnx", *_PICKLED, ".safetensors")
        if report is not None:
            check_target_path(report, ".html")
        original, inputs = load_model(model), example_inputs(shapes)
        options: Options = {
            "of": of, "importance": importance, "ranking": ranking,
            "data": load_batches(data) if data else None,
            "loss": _import_attribute(loss, "a loss") if loss else None,
            "compensate": compensate, "renormalised": renormalised, "latency_ms": latency_ms,
        }  # fmt: skip
        if latency_ms is not None or of == "latency":
            options["provider"], options["threads"] = provider, threads
        with show_spinner("slimming and verifying"):
            result = slimmed(original, ratio, inputs, **options)
        if not writes:
            return
        if out.suffix == ".safetensors":
            save(result, out)
        else:
            write(result.model, inputs or result.inputs, out)
        if report is not None:
            with show_spinner("exporting and timing"):
                comparison = compare_models(
                    original, result.model, result.inputs, providers=[provider], threads=threads
                )
            result.report(report, title=model, comparison=comparison)
        facts = {
            "form": result.form,
            "why": result.why_graph,
            "verified": result.verification is not None,
            "latency": "" if result.latency is None else str(result.latency),
            "file": str(out),
        }
        show(sizes(original, result.model, result.inputs), facts, as_json=as_json)


@app.command()
def run(
    model: Model,
    pipeline: Annotated[
        str, typer.Argument(help='passes, as in "slim-channels{ratio=0.3}, fold-batch-norm"')
    ],
    out: Out,
    shapes: Shapes = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Write what a pipeline of passes makes of a model."""
    with errors_to_exit_code():
        check_target_path(out, ".onnx", *_PICKLED)
        changed: list[str] = []

        def note(graph_pass: Pass, result: PassResult) -> None:
            if result.modified:
                changed.append(graph_pass.name())

        passes = Pipeline.parse(pipeline, note)
        original, inputs = normalize_model_and_inputs(load_model(model), example_inputs(shapes))
        with show_spinner("running the passes"):
            result = passes(original, inputs)
        write(result, inputs, out)
        facts = {"changed": ", ".join(changed), "file": str(out)}
        show(sizes(original, result, inputs), facts, as_json=as_json)


@app.command()
def inspect(
    model: Model,
    parameter: Annotated[str, typer.Option(help="explain this parameter's dimensions")] = "",
    group: Annotated[str, typer.Option(help="all of a group, by its name or number")] = "",
    why: Annotated[bool, typer.Option("--why", help="say why the rest stays")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--html", help="file to write: .html, .svg, .png, .json or .graphml"),
    ] = None,
    shapes: Shapes = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show what can be cut from a model, what goes with it, and why the rest stays."""
    with errors_to_exit_code():
        if out is not None:
            check_target_path(out, *GRAPH_SUFFIXES)
        with show_spinner("analysing"):
            graph = analyze(load_model(model), example_inputs(shapes))
        if out is not None:
            graph.save(out, title=model)
        if parameter:
            explanations = graph.explain_all(parameter)
            if as_json:
                print(json.dumps([explanation.as_dict() for explanation in explanations]))
            else:
                print("\n".join(map(str, explanations)))
        elif as_json:
            print(json.dumps(build_document(graph, model)))
        elif out is None:
            Console(highlight=False).print(
                describe_group(graph, group) if group else format_tree(graph, why=why),
                soft_wrap=True,
            )


@app.command()
def compare(
    model: Model,
    slimmer: Model,
    providers: Annotated[
        list[str], typer.Option("--provider", help="cpu, cuda, cuda-tf32, cuda-float16...")
    ] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(help="inside an operator, on the CPU")] = 1,
    load_batches: Annotated[
        list[int], typer.Option("--batch", help="times the example input, for more latencies")
    ] = [],  # noqa: B006
    in_torch: Annotated[bool, typer.Option(help="time in PyTorch too")] = False,
    out: Annotated[Path | None, typer.Option(help="report to write: .html or .json")] = None,
    shapes: Shapes = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compare two models: parameters, MACs, file, memory, latency, agreement with PyTorch."""
    with errors_to_exit_code():
        if out is not None:
            check_target_path(out, *COMPARISON_SUFFIXES)
        original, slim_model = load_model(model), load_model(slimmer)
        inputs = normalize_model_and_inputs(original, example_inputs(shapes))[1]
        with show_spinner("exporting and timing"):
            comparison = compare_models(
                original,
                slim_model,
                inputs,
                providers=providers or None,
                threads=threads,
                batches=load_batches,
                in_torch=in_torch,
            )
        if out is not None:
            comparison.save(out)
        print(comparison.to_json() if as_json else comparison)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the ONNX files")] = Path("demo-output"),
) -> None:
    """Run the main job on a trained network and real images that come with the package."""
    from graphprune.demo.main import run

    with errors_to_exit_code():
        run(out)


def _refuse_with_checkpoint(names: list[str]) -> None:
    if names:
        raise InvalidRequestError(
            f"{', '.join(names)} would run the model, and --checkpoint is shrunk without running it; leave "
            "them out, or load the model and write a file"
        )


def slim_checkpoint(
    model: nn.Module,
    source: Path,
    target: Path,
    inputs: Inputs | None,
    ratio: float | None,
    *,
    as_json: bool,
    **options: Unpack[Options],
) -> None:
    """Plan by the weights in the files and shrink them there."""
    options["weights"] = source
    with show_spinner("planning"):
        result = slimmed(model, ratio, inputs, **options)
    done = shrink_checkpoint(model, result.plan, source, target, result.inputs)
    facts = {
        "form": result.form, "why": result.why_graph, "files": len(done.files),
        "files of an earlier run": len(done.kept), "from_pretrained": done.has_config,
        "folder": str(target),
    }  # fmt: skip
    numbers = sizes(model, result.model, result.inputs)
    show(numbers | {"bytes": [done.bytes_before, done.bytes_after]}, facts, as_json=as_json)


def without_weights(name: str, folder: Path) -> nn.Module:
    """Return the model that a name stands for, or that a folder's config.json describes, without values.

    Raises:
        InvalidRequestError: it cannot be built so, or transformers, which reads the config, is missing.

    """
    if not name or Path(name).resolve() == folder.resolve():
        return _build_from_config(folder)
    build = _import_attribute(name, "a model")
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:
        raise InvalidRequestError(
            f"{name!r} gives no model under torch.device('meta'), where --checkpoint builds it to save "
            f"memory: {in_a_line(error)}"
        ) from error
    return _require_model(model, name)


def _build_from_config(folder: Path) -> nn.Module:
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        with torch.device("meta"):
            model: nn.Module = kind(config).eval()
    except Exception as error:
        raise InvalidRequestError(
            f"transformers cannot build a model from {folder / 'config.json'}; name one as "
            f"package.module:callable: {in_a_line(error)}"
        ) from error
    return model


def write(model: nn.Module, inputs: Any, out: Path) -> None:
    """Write a model in the format that the file's name asks for."""
    if out.suffix == ".onnx":
        with show_spinner("exporting"):
            export(model, inputs, out)
    else:
        with open_atomically(out) as file:
            torch.save(model, file)


def sizes(original: nn.Module, slimmer: nn.Module, inputs: Inputs) -> dict[str, list[int]]:
    """Return parameters and MACs of both."""
    return {
        "parameters": [count_parameters(original), count_parameters(slimmer)],
        "macs": [count_macs(original, inputs), count_macs(slimmer, inputs)],
    }


def show(report: dict[str, list[int]], facts: dict[str, Any], *, as_json: bool) -> None:
    """Print what became smaller, and facts beside it."""
    if as_json:
        print(json.dumps(report | facts))
        return
    table = Table("", "original", "slim", "ratio")
    for name, (before, after) in report.items():
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.2f}")
    Console().print(table)
    for name, fact in facts.items():
        if fact != "":
            Console().print(f"{name}: {fact}", highlight=False)


def load_model(name: str) -> nn.Module:
    """Return the model that a name stands for.

    Raises:
        InvalidRequestError: there is no such module, callable or file, or it gives no model.

    """
    path = Path(name)
    if path.suffix not in (*_PICKLED, ".pt2"):
        return _require_model(_call(name, "a model"), name)
    if not path.exists():
        raise InvalidRequestError(f"there is no file {name}")
    try:
        model = torch.export.load(path) if path.suffix == ".pt2" else _unpickle(path)
    except Exception as error:
        raise InvalidRequestError(f"{name} cannot be loaded: {in_a_line(error)}") from error
    return _require_model(model, name)


def _unpickle(path: Path) -> Any:
    """Return what torch.save wrote: without running any code where it is of PyTorch's own classes."""
    try:
        with torch.serialization.safe_globals([*_layers(), *_FUNCTIONS]):
            return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        # either no file of torch.save at all, or one of classes that only the load below takes
        with path.open("rb") as file:
            if not file.read(2).startswith(_SAVED):
                raise InvalidRequestError("it is nothing that torch.save writes") from error
    print(
        f"graphprune: {path} is of other classes than PyTorch's own, so loading it runs the code that it "
        "names; do that with files you trust only",
        file=sys.stderr,
    )
    return torch.load(path, weights_only=False)


def _layers() -> Iterator[type[nn.Module]]:
    """Yield PyTorch's own modules."""
    for name, module in list(sys.modules.items()):
        if name.startswith(nn.modules.__name__):
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, nn.Module):
                    yield value


def _require_model(value: Any, name: str) -> nn.Module:
    if isinstance(value, dict):
        raise InvalidRequestError(
            f"{name} gives a dict, as of weights without their model; name a package.module:callable that "
            "builds the model and loads them"
        )
    if not isinstance(value, (nn.Module, torch.export.ExportedProgram)):
        raise InvalidRequestError(f"{name} gives a {type(value).__name__}, not a model")
    return value  # type: ignore[return-value]


def _call(name: str, expected: str) -> Any:
    function = _import_attribute(name, expected)
    try:
        return function()
    except Exception as error:
        raise _explain_failure(name, expected, error) from error


def _explain_failure(name: str, expected: str, error: Exception) -> InvalidRequestError:
    """Return the error that says what failed in someone's own code, and where."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the call here
    file_frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
    # the last line of the user's own code says more than where inside torch it failed
    user_frames = [frame for frame in file_frames if not frame.filename.startswith(_INSTALLED)]
    if not user_frames:
        return InvalidRequestError(f"{name!r} does not give {expected}: {error}")
    last_frame = user_frames[-1]
    return InvalidRequestError(
        f"{name!r} does not give {expected}: {in_a_line(error)} "
        f"({last_frame.filename}:{last_frame.lineno}, in {last_frame.name})"
    )


def _import_attribute(name: str, expected: str) -> Any:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InvalidRequestError(
            f"{name!r} names no {expected.split()[-1]}; write package.module:callable{_OR_A_FILE[expected]}"
        )
    try:
        with _look_here_first(module.partition(".")[0]):
            return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise _explain_failure(name, expected, error) from error


@contextmanager
def _look_here_first(package: str) -> Iterator[None]:
    """Look for one package in the current folder first; others of its files hide no installed package."""

    class Here:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            spec = PathFinder.find_spec(name, [""]) if name == package else None
            # a folder of that name without code has no origin, and must not hide an installed package
            return spec if spec is not None and spec.origin else None

    sys.meta_path.insert(0, Here)
    try:
        yield
    finally:
        sys.meta_path.remove(Here)


def load_batches(name: str) -> Any:
    """Return the batches that a name stands for.

    Raises:
        InvalidRequestError: there is no such callable or file.

    """
    if not name.endswith(".npy"):
        return _call(name, "batches")
    if not Path(name).exists():
        raise InvalidRequestError(f"there is no file {name}")
    try:
        samples = torch.from_numpy(np.load(name, allow_pickle=False))
    except Exception as error:  # numpy raises what the format of the first bytes does
        raise InvalidRequestError(f"{name} holds no array: {error}") from error
    if not samples.dim() or not len(samples):
        raise InvalidRequestError(
            f"{name} holds no samples: its shape {tuple(samples.shape)} has to begin with their number"
        )
    return samples.split(_SAMPLES)


def example_inputs(shapes: list[str]) -> Inputs | None:
    """Return inputs of the given shapes, or None where none are given.

    Raises:
        InvalidRequestError: a shape is not one.

    """
    return Inputs(*map(_example_input, shapes)) if shapes else None


def _example_input(text: str) -> torch.Tensor:
    kind, _, numbers = text.rpartition(":")
    try:
        shape = [int(number) for number in numbers.split(",")]
        if kind not in ("", "int") or min(shape) < 1:
            raise ValueError
    except ValueError:
        raise InvalidRequestError(f"--input {text!r} is not a shape such as 2,3,224,224") from None
    return torch.zeros(shape, dtype=torch.int64) if kind == "int" else torch.randn(shape)


@contextmanager
def group() -> Iterator[bool]:
    """Join the process group of torchrun, where that started this; say whether this process writes."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield True
        return
    dist.init_process_group()
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
