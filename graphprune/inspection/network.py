"""The operators and tensors of a model as a graph of networkx, with the groups that run through them."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from graphprune.groups.groups import Dependencies
from graphprune.inference.recorded import Value
from graphprune.layout import Layout, describe, free_axes


def operator_id(number: int) -> str:
    """Return what a step is called as a node."""
    return f"operator {number}"


def to_networkx(dependencies: Dependencies) -> nx.MultiDiGraph:
    """Return operators and tensors with the values between them; see `DependencyGraph.to_networkx`."""
    inference = dependencies.inference
    network = nx.MultiDiGraph()

    def in_words(layouts: Sequence[Layout]) -> dict[str, str]:
        names = dependencies.names
        axes = dict.fromkeys(axis for layout in layouts for axis in free_axes(layout))
        return {
            "layout": ", ".join(describe(layout, names) for layout in layouts),
            "groups": ", ".join(names[axis] for axis in axes if axis in names),
        }

    def add_edge(value: Value, target: str) -> None:
        # A step is known by its number, an input, parameter or constant by its name.
        source = value.source
        if isinstance(source, int):
            source = operator_id(source)
        elif source in inference.inputs:
            source = f"input {source}"
        if source not in network:
            network.add_node(source, kind="constant", label=source)
        network.add_edge(source, target, **in_words(value.layouts))

    for name, layouts in inference.parameters.items():
        kind = "parameter" if name in inference.trainable else "buffer"
        owner = name.rpartition(".")[0]
        network.add_node(name, kind=kind, label=name, module=owner, **in_words(layouts))
    for name, layouts in inference.inputs.items():
        network.add_node(f"input {name}", kind="input", label=name, **in_words(layouts))
    for number, step in enumerate(inference.steps):
        node = operator_id(number)
        network.add_node(
            node, kind="operator", label=step.place.operator,
            module=step.place.module, source=step.place.source,
            **in_words([layout for value in step.outputs for layout in value.layouts]),
        )  # fmt: skip
        for value in step.inputs:
            add_edge(value, node)
    for name, layouts in inference.outputs.items():
        node = f"output {name}"
        network.add_node(node, kind="output", label=name, **in_words(layouts))
        add_edge(Value(layouts, inference.output_sources[name]), node)
    return network
