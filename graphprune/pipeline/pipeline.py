"""What a pass is, and passes in a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassResult

from graphprune.capture.capture import capture, is_aten_graph, normalize_model_and_inputs, reexport
from graphprune.errors import GraphPruneError, InvalidRequestError
from graphprune.pipeline.spec import format_spec, parse_spec
from graphprune.utils.inputs import Inputs
from graphprune.utils.tensors import working_copy


@dataclass
class Program:
    """What a pass rewrites: a graph of ATen operators and inputs that it runs on.

    Attributes:
        graph_module: the graph; a pass may edit it or put another in its place.
        inputs: example inputs of the model.

    """

    graph_module: fx.GraphModule
    inputs: Inputs


class Pass:
    """A rewrite of a graph. A pass is a frozen dataclass whose fields are its options.

    Call it with a model and example inputs and it gives torch.fx's `PassResult`; the model that it
    was given stays as it is. Only `rewrite` is for a pass to write.
    """

    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        earlier = Pass.registry.get(cls.name(), cls)
        # The same class may be defined anew: by a cell of a notebook, or by dataclass(slots=True).
        if (earlier.__module__, earlier.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidRequestError(
                f"there is a pass {cls.name()!r} already, {earlier.__module__}.{earlier.__qualname__}; "
                f"give {cls.__module__}.{cls.__qualname__} another name"
            )
        Pass.registry[cls.name()] = cls

    def rewrite(self, program: Program) -> bool:
        """Change the program; return whether anything changed."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Return the name of the pass in a pipeline: `SlimChannels` is `slim-channels`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def text(self) -> str:
        """The pass as `Pipeline.parse` reads it: `slim-channels{ratio=0.3 of=macs}`.

        Raises:
            InvalidRequestError: an option is not a number, a text or a tuple of these.

        """
        return format_spec(self.name(), self)

    @torch.inference_mode(False)
    def __call__(self, model: Any, example_inputs: Any = None) -> PassResult:
        """Return the rewritten graph and whether it changed.

        Args:
            model: an nn.Module, fx.GraphModule or ExportedProgram.
            example_inputs: as everywhere; None where they can be guessed.

        Raises:
            GraphPruneError: the model cannot be traced, the pass broke the graph, or it changed the
                graph and said that it did not.

        """
        program = program_of(model, example_inputs)
        before = program.graph_module.code
        modified = self.rewrite(program)
        after = program.graph_module
        try:
            after.graph.lint()
        except RuntimeError as error:
            raise GraphPruneError(
                f"{self} left a graph that is not well formed: {error}"
            ) from error
        after.recompile()
        if not modified and after.code != before:
            raise GraphPruneError(f"{self} changed the graph and said that it did not")
        return PassResult(after, modified)


Callback: TypeAlias = Callable[[Pass, PassResult], None]


def program_of(model: Any, example_inputs: Any) -> Program:
    """Return a copy of the model as a program, traced where it is not a graph of ATen operators.

    Raises:
        CaptureError: the model cannot be traced.

    """
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    if is_aten_graph(module):
        return Program(cast(fx.GraphModule, working_copy(module)), inputs)
    return Program(capture(module, inputs), inputs)


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other: `Pipeline([a, b])(model, example_inputs)` is a model.

    Attributes:
        passes: in order.
        callback: called after each pass with the pass and its result; or several, called in order.
            `graphprune.pipeline.callbacks` has some.

    """

    passes: Sequence[Pass]
    callback: Callback | Sequence[Callback] = ()

    def __post_init__(self) -> None:
        """Check that there are passes.

        Raises:
            InvalidRequestError: there are none, or something is none.

        """
        if isinstance(self.passes, str):
            raise InvalidRequestError(
                f"passes={self.passes!r} is a text; Pipeline.parse makes a pipeline of one"
            )
        for graph_pass in self.passes:
            if not isinstance(graph_pass, Pass):
                raise InvalidRequestError(
                    f"{graph_pass!r} is no pass: a pipeline is of objects such as SlimChannels(ratio=0.5), "
                    "and Pipeline.parse reads a text of their names"
                )
        if not self.passes:
            raise InvalidRequestError(
                "a pipeline without passes would leave the model as it is; name at least one of "
                f"graphprune.passes: {', '.join(sorted(Pass.registry))}"
            )

    @classmethod
    def parse(cls, text: str, callback: Callback | Sequence[Callback] = ()) -> Pipeline:
        """Return the pipeline that a text describes: `"slim-channels{ratio=0.3 of=macs}, fold-batch-norm"`.

        Passes stand in order, with commas between them and options in braces: numbers, words, texts
        in quotes, `True`, `False`, `None`, or tuples in parentheses. Besides those of
        `graphprune.passes`, every subclass of `Pass` that was defined is known by its name.

        Raises:
            InvalidRequestError: the text is not of this form, or names no such pass or option, or no pass.

        """
        return cls(list(parse_spec(text, Pass.registry)), callback)

    @property
    def text(self) -> str:
        """The passes as `parse` reads them.

        Raises:
            InvalidRequestError: an option of a pass is not a number, a text or a tuple of these.

        """
        return ", ".join(graph_pass.text for graph_pass in self.passes)

    def __call__(self, model: Any, example_inputs: Any = None) -> Any:
        """Return the model after all passes: a graph, or an ExportedProgram where one was given."""
        inputs = normalize_model_and_inputs(model, example_inputs)[1]
        callbacks = [self.callback] if callable(self.callback) else self.callback
        current = model
        for graph_pass in self.passes:
            pass_result = graph_pass(current, inputs)
            for callback in callbacks:
                callback(graph_pass, pass_result)
            current = pass_result.graph_module
        return reexport(model, current, inputs) if isinstance(model, ExportedProgram) else current
