"""A model as the parts that ONNX Runtime runs one after the other, each with the layouts inside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch.utils import _pytree as pytree

from graphprune.capture.capture import to_trainable_graph
from graphprune.groups.cost import Cost, work_of
from graphprune.groups.groups import Dependencies
from graphprune.inference.infer import infer
from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import Axis, leaves, size_of
from graphprune.masks import kept_size
from graphprune.onnx_export.export import PREFIX, TracedExport
from graphprune.utils.inputs import Inputs


@dataclass(frozen=True)
class Part:
    """Nodes of a traced program that ONNX Runtime runs as one.

    Attributes:
        name: the last of the nodes.
        steps: the operators that they call.

    """

    name: str
    steps: tuple[Step, ...]

    @cached_property
    def work(self) -> list[Cost]:
        """What its time is a function of."""
        return work_of(self.steps)

    def amount(self, kept: Mapping[Axis, int]) -> int:
        """Return the work once only `kept[axis]` slots of each axis are left."""
        return sum(cost.total(kept) for cost in self.work)

    def signature(self, kept: Mapping[Axis, int]) -> str:
        """Return what is the same for parts that take the same time: operators, sizes and options."""
        lines = []
        for step in self.steps:
            tensors = [
                [kept_size(dim, kept) for dim in value.layouts]
                for value in (*step.inputs, *step.outputs)
            ]
            arguments = pytree.tree_leaves(step.arguments, is_leaf=_is_value)
            options = [argument for argument in arguments if not _is_value(argument)]
            lines.append(f"{step.func} {tensors} {options}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _is_value(argument: object) -> bool:
    return isinstance(argument, Value)


class PartitionedProgram:
    """A traced program whose parts cost what the model's groups make them cost.

    Attributes:
        inference: the layouts of the program.
        order: its nodes' names.
        readers: by node, the names of the nodes that read its result.

    """

    def __init__(self, traced: TracedExport, inputs: Inputs) -> None:
        graph_module = to_trainable_graph(traced.program)
        self.inference: Inference = infer(graph_module, Inputs(*inputs.tensors()))
        nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
        self.order = [node.name for node in nodes]
        self.readers = {node.name: [reader.name for reader in node.users] for node in nodes}

    def parts(self, ends: Iterable[str]) -> dict[str, Part]:
        """Return by node the part that it belongs to, given the nodes that parts end with.

        A node that no part ends with was fused into the first that reads its result.
        """
        end_names = set(ends)
        end_of: dict[str, str] = {}
        # Backwards, so that the readers of a node have their part when its turn comes.
        for name in reversed(self.order):
            reader_ends = (end_of[reader] for reader in self.readers[name] if reader in end_of)
            end = name if name in end_names else next(reader_ends, None)
            if end is not None:
                end_of[name] = end
        steps_by_end: dict[str, list[Step]] = {}
        for step in self.inference.steps:
            if step.node in end_of:
                steps_by_end.setdefault(end_of[step.node], []).append(step)
        parts = {name: Part(name, tuple(part_steps)) for name, part_steps in steps_by_end.items()}
        return {node: parts[end] for node, end in end_of.items() if end in parts}

    def axes_of(self, graph: Dependencies) -> dict[Axis, Axis]:
        """Return by axis of the program the axis that it is in the model's own graph."""
        axes: dict[Axis, Axis] = {}
        for name, layouts in graph.inference.parameters.items():
            for program_layout, graph_layout in zip(
                self.inference.parameters.get(PREFIX + name, []), layouts, strict=False
            ):
                # Leaf by leaf, where both are divided alike: `(heads dim)` tells nothing of a plain 12.
                leaf_lists = list(leaves(program_layout)), list(leaves(graph_layout))
                if list(map(size_of, leaf_lists[0])) == list(map(size_of, leaf_lists[1])):
                    axes.update(zip(*leaf_lists, strict=True))
        return axes
