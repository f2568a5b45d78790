"""The dependency graph as people meet it: made by `analyze`, asked for reasons, saved as a page or data."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from graphprune.capture.capture import normalize_model_and_inputs
from graphprune.errors import InvalidRequestError
from graphprune.groups.explain import Explainer, Explanation
from graphprune.groups.groups import Dependencies, Scores
from graphprune.inference.infer import infer
from graphprune.inspection.files import render_frame, save
from graphprune.inspection.network import to_networkx
from graphprune.selection.plan import Plan


class DependencyGraph(Dependencies):
    """Which channels of a model go together, which stay, and why; made by `analyze`."""

    def explain(self, parameter: str, dim: int) -> Explanation:
        """Return what a dimension of a parameter is tied to, or why it stays, and by which operators.

        Raises:
            InvalidRequestError: the model has no such parameter or dimension.

        """
        explanations = self.explain_all(parameter)
        if not -len(explanations) <= dim < len(explanations):
            raise InvalidRequestError(
                f"there is no dimension {dim} of {parameter!r}, which has {len(explanations)}"
            )
        return explanations[dim]

    def explain_all(self, parameter: str) -> list[Explanation]:
        """Return the explanations of all dimensions of a parameter, buffer or tensor attribute.

        Raises:
            InvalidRequestError: the model has none of that name.

        """
        inference = self.inference
        # A tied tensor has several names, and its layouts stand under the first.
        first_names = (
            first_name for first_name, names in inference.names.items() if parameter in names
        )
        first_name = next(first_names, parameter)
        if first_name not in inference.parameters:
            similar_names = difflib.get_close_matches(parameter, inference.parameters, cutoff=0)
            raise InvalidRequestError(
                f"the model has no parameter or buffer {parameter!r}; the nearest names are "
                f"{', '.join(similar_names)}"
            )
        explainer = Explainer(inference)
        return [
            explainer.explain(first_name, dim, self.names)
            for dim in range(len(inference.parameters[first_name]))
        ]

    def to_networkx(self) -> nx.MultiDiGraph:
        """Return operators and tensors as nodes, and the flow of values between them as edges.

        All attributes are texts, so that every format can hold them. Nodes carry `kind` ("operator",
        "parameter", "buffer", "input", "output", "constant"), `label`, `module`, `source`, `layout` (in
        words, a dimension each) and `groups` (what of it can be cut); edges carry `layout` and `groups`.
        """
        return to_networkx(self)

    def save(
        self,
        path: str | Path,
        *,
        title: str = "",
        scores: Scores | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Write the graph as a page (.html), a picture (.svg, .png) or data (.json, .graphml).

        Args:
            path: where to, and by its ending, what.
            title: what to call the model; the name of the file by default.
            scores: by group, the importance of each channel, drawn as histograms on the page.
            plan: a `Plan`, whose kept and removed channels the page shows.

        Raises:
            InvalidRequestError: the path ends otherwise, or matplotlib, which draws, is missing.

        """
        save(self, Path(path), title, scores, plan)

    def _repr_html_(self) -> str:
        """Return the page in a frame, as notebooks show it."""
        return render_frame(self)


def analyze(model: nn.Module, example_inputs: Any = None) -> DependencyGraph:
    """Return the dependency graph of a model: groups of channels, and why others are fixed.

    Args:
        model: any module; its weights are not read, so one on the meta device will do.
        example_inputs: a tensor, a tuple, a dict or `Inputs`; None where they can be guessed.

    Raises:
        CaptureError: the model does not run on the inputs, or none were given and none fit.

    """
    module, inputs = normalize_model_and_inputs(model, example_inputs)
    return DependencyGraph(infer(module, inputs))
