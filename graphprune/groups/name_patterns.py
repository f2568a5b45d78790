"""Which groups the patterns of a request mean: by their names, or those of parameters or modules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from typing import TypeAlias

from torch import nn

from graphprune.errors import InvalidRequestError, listed
from graphprune.groups.groups import Dependencies, Group

Pattern: TypeAlias = str | nn.Module
"""A glob of names of groups, parameters or modules; or a module, for all that is in it."""


def by_name(patterns: Sequence[Pattern], model: nn.Module, option: str) -> tuple[str, ...]:
    """Return the patterns with globs of its parameters for each module.

    Args:
        patterns: globs, and modules of the model.
        model: where the modules are.
        option: the name under which they are passed, for messages.

    Raises:
        InvalidRequestError: a module is not in the model, or holds nothing.

    """
    globs: list[str] = []
    for pattern in patterns:
        globs += [pattern] if isinstance(pattern, str) else _globs(pattern, model, option)
    return tuple(globs)


def _globs(module: nn.Module, model: nn.Module, option: str) -> list[str]:
    modules = model.named_modules(remove_duplicate=False)
    paths = [path for path, submodule in modules if submodule is module]
    if not paths:
        raise InvalidRequestError(
            f"{option} holds a {type(module).__name__} that is no module of the model itself; pass one of "
            f"model.modules(), not of a copy or of another form of it, or its name, as in {option}=['head']"
        )
    if next(module.parameters(), None) is None:
        raise InvalidRequestError(
            f"{option} holds {paths[0]!r}, a {type(module).__name__} without parameters, so it says of no "
            "channels that they should go or stay; name the layer before or after it"
        )
    return [f"{escape(path)}.*" if path else "*" for path in paths]


@dataclass(frozen=True)
class Selection:
    """The groups that may be cut.

    Attributes:
        graph: has the groups.
        include: the globs by the patterns that ask for them; only what they fit may be cut, if any.
        exclude: the globs by the patterns of what may not.
        renormalised: whether groups may be cut along which a statistic is taken.

    """

    graph: Dependencies
    include: Mapping[str, str]
    exclude: Mapping[str, str]
    renormalised: bool

    @classmethod
    def of(
        cls,
        graph: Dependencies,
        include: Iterable[str],
        exclude: Iterable[str],
        *,
        renormalised: bool,
    ) -> Selection:
        """Return what the patterns select.

        Raises:
            InvalidRequestError: a pattern fits nothing.

        """
        all_names = [name for names in graph.inference.names.values() for name in names]
        all_names += [group.name for group in graph.groups]
        included, excluded = ({p: _glob(p, all_names) for p in ps} for ps in (include, exclude))
        return cls(graph, included, excluded, renormalised)

    def names(self, group: Group) -> list[str]:
        """Return the names that a group answers to: its own, and all names of its members."""
        names_by_tensor = self.graph.inference.names
        parameters = dict.fromkeys(member.parameter for member in group.members)
        aliases = (alias for name in parameters for alias in names_by_tensor.get(name, [name]))
        return [group.name, *aliases]

    def includes(self, group: Group) -> bool:
        """Whether the group is asked for by a pattern."""
        return bool(self.include) and _any_fits(self.names(group), self.include.values())

    def excludes(self, group: Group) -> bool:
        """Whether the group is to stay by a pattern."""
        return bool(self.exclude) and _any_fits(self.names(group), self.exclude.values())

    def may_cut(self, group: Group) -> bool:
        """Whether the group may be cut."""
        return not self.excludes(group) and self._is_asked_for(group)

    def _is_asked_for(self, group: Group) -> bool:
        if group.size < 2 or not (group.exact or self.renormalised):
            return False
        if self.include and not self.includes(group):
            return False
        # an inner group goes only where a pattern means it by its own name, not by one of a member
        return not group.inner or _any_fits([group.name], self.include.values())

    def why_overruled(self) -> str:
        """Return what to say of groups that are asked for and that a pattern of few members takes out.

        A pattern that fits a group's own name, or at least half of its members, means the group.
        """
        groups_by_pattern: dict[str, list[str]] = {}
        for group in self.graph.groups:
            if not (self._is_asked_for(group) and (self.include or not group.exact)):
                continue
            group_name, *member_names = self.names(group)
            fitting = [n for n in member_names if _any_fits([n], self.exclude.values())]
            if not fitting or _any_fits([group_name], self.exclude.values()):
                continue
            if 2 * len(fitting) < len(member_names):
                pattern = next(
                    p for p, glob in self.exclude.items() if fnmatchcase(fitting[0], glob)
                )
                description = (
                    f"{group_name!r} ({len(member_names)} tensors, of which {listed(fitting)})"
                )
                groups_by_pattern.setdefault(pattern, []).append(description)
        option = "include" if self.include else "renormalised=True"
        return "; ".join(
            f"exclude={pattern!r} takes {listed(groups)} out of what {option} asks for: channels go from "
            "all tensors of a group or from none; leave the pattern out to have it cut (what a model "
            "gives keeps its size)"
            for pattern, groups in groups_by_pattern.items()
        )


def _any_fits(names: Iterable[str], globs: Iterable[str]) -> bool:
    # gone through for each name, which an iterator would not bear
    globs = list(globs)
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _glob(pattern: str, all_names: Sequence[str]) -> str:
    """Return the glob that a pattern stands for: itself, or all in the modules that it names.

    Raises:
        InvalidRequestError: it fits nothing.

    """
    for glob in (pattern, f"{pattern}.*"):
        if any(fnmatchcase(name, glob) for name in all_names):
            return glob
    modules = {name[:at] for name in all_names for at, sign in enumerate(name) if sign == "."}
    alike = difflib.get_close_matches(pattern, [*sorted(modules), *all_names], cutoff=0.5)
    raise InvalidRequestError(
        f"the pattern {pattern!r} fits no parameter, module or group of the model; names are like "
        f"{', '.join(alike or all_names[:5])}"
    )
