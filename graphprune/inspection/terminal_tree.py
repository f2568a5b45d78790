"""A dependency graph in a terminal: the modules as a tree, with what each dimension of a tensor is."""

from __future__ import annotations

from rich.console import Group as Together
from rich.text import Text
from rich.tree import Tree

from graphprune.errors import InvalidRequestError
from graphprune.groups.groups import Dependencies, Group
from graphprune.layout import Layout, describe, free_axes, why_fixed

# What terminals of eight colours have, without black and white; names stand beside them.
_COLOURS = ("yellow", "cyan", "green", "magenta", "blue", "red")


def format_tree(graph: Dependencies, why: bool = False) -> Together:
    """Return the modules as a tree, their tensors as leaves, and a line about each group.

    Args:
        graph: made by `analyze`.
        why: say of each dimension in which nothing can be cut why.

    """
    numbers = {group.name: number for number, group in enumerate(graph.groups)}
    root = Tree(f"{len(graph.groups)} groups that can be cut")
    branches = {"": root}
    for name, layouts in graph.inference.parameters.items():
        owner, _, leaf = name.rpartition(".")
        line = Text(f"{leaf}  ")
        for position, layout in enumerate(layouts):
            line.append(" x " if position else "")
            line.append(_dimension(graph, layout, numbers))
        node = _branch(branches, owner).add(line)
        for dim, layout in enumerate(layouts):
            reason = why_fixed(layout)
            if why and reason is not None and not free_axes(layout):
                node.add(Text(f"dimension {dim} stays: {reason}", style="dim"))
    lines = [_line(group, numbers[group.name]) for group in graph.groups]
    lines += [
        Text(f"no rule, so its channels stay: {unknown_operator}", style="bold")
        for unknown_operator in graph.unknown
    ]
    return Together(root, *lines)


def describe_group(graph: Dependencies, name_or_number: str) -> Together:
    """Return all that there is to say of a group, called by its name or its number.

    Raises:
        InvalidRequestError: there is none.

    """
    by_number = {str(number): group for number, group in enumerate(graph.groups)}
    group = by_number.get(name_or_number) or graph.by_name.get(name_or_number)
    if group is None:
        raise InvalidRequestError(
            f"there is no group {name_or_number!r}; they are {', '.join(graph.by_name)}, or their numbers "
            f"from 0 to {len(graph.groups) - 1}"
        )
    lines = [_line(group, graph.groups.index(group))]
    lines += [
        Text(f"  {member.parameter} dimension {member.dim}: {describe(member.layout, graph.names)}")
        for member in group.members
    ]
    lines += [Text(f"  renormalised: {reason}") for reason in group.renormalised]
    return Together(*lines)


def _branch(branches: dict[str, Tree], path: str) -> Tree:
    if path not in branches:
        parent, _, name = path.rpartition(".")
        branches[path] = _branch(branches, parent).add(Text(name, style="bold"))
    return branches[path]


def _dimension(graph: Dependencies, layout: Layout, numbers: dict[str, int]) -> Text:
    """Return a dimension in words, groups as `#` and their number."""
    # `(heads dim)` with both cut by groups 0 and 1 is `(#0[12] #1[64])`, in the first group's colour.
    axes = [axis for axis in free_axes(layout) if axis in graph.names]
    labels = {axis: f"#{numbers[graph.names[axis]]}[{axis.size}]" for axis in axes}
    style = _COLOURS[numbers[graph.names[axes[0]]] % len(_COLOURS)] if axes else "dim"
    return Text(describe(layout, labels), style=style)


def _line(group: Group, number: int) -> Text:
    kind = "exact" if group.exact else "renormalised"
    inner = ", inner" if group.inner else ""
    text = Text(f"#{number} ", style=_COLOURS[number % len(_COLOURS)])
    return text.append(
        f"{group.name}  {group.size} channels, {kind}{inner}, in {len(group.members)} places",
        style="default",
    )
