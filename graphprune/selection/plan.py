"""A plan: which slots of each group stay. It prints, saves and loads, and decides nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.errors import PlanError
from graphprune.groups.groups import Dependencies
from graphprune.layout import Axis
from graphprune.masks import Mask
from graphprune.utils import json_files
from graphprune.utils.atomic_files import check_target_path, write_text

FORMAT = "graphprune-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Which slots of each group stay.

    Attributes:
        keep: by group name, the kept slots, sorted and unique; groups not named stay whole.
        sizes: by group name, the number of slots before.
        request: what was asked for, for people to read.

    """

    keep: dict[str, list[int]]
    sizes: dict[str, int]
    request: dict[str, Any] = field(default_factory=dict)

    def masks(self, graph: Dependencies) -> dict[Axis, Mask]:
        """Return the kept slots of each axis that loses some.

        Raises:
            PlanError: the plan names a group that the graph lacks, or that has another size there.

        """
        masks: dict[Axis, Mask] = {}
        for name, kept in self.keep.items():
            group = graph.by_name.get(name)
            if group is None or group.size != self.sizes[name]:
                actual_size = "no such group" if group is None else f"{group.size} channels"
                raise PlanError(
                    f"the plan keeps {len(kept)} of {self.sizes[name]} channels of group {name!r}, "
                    f"but the model has {actual_size}; a plan fits the model that it was made for"
                )
            if len(kept) < group.size:
                masks[group.axis] = np.isin(np.arange(group.size), kept)
        return masks

    @property
    def removed(self) -> int:
        """Number of slots that go, over all groups."""
        return sum(self.sizes[name] - len(kept) for name, kept in self.keep.items())

    @property
    def digest(self) -> str:
        """A hash of what stays, the same for plans that keep the same."""
        kept = json.dumps([self.keep, self.sizes], sort_keys=True)
        return hashlib.sha256(kept.encode()).hexdigest()

    def without(self, names: Iterable[str]) -> Plan:
        """Return the plan that leaves these groups whole."""
        left_whole = set(names)
        remaining = {name: kept for name, kept in self.keep.items() if name not in left_whole}
        return Plan(remaining, {name: self.sizes[name] for name in remaining}, self.request)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        content = {"format": FORMAT, "version": VERSION, "request": self.request}
        groups = {
            name: {"size": self.sizes[name], "keep": kept} for name, kept in self.keep.items()
        }
        return json.dumps({**content, "groups": groups}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: it is no such plan.

        """
        return cls.of_content(json_files.parse_json(text))

    @classmethod
    def of_content(cls, value: Any) -> Plan:
        """Return the plan that the JSON of `to_json` says.

        Raises:
            ValueError: it is no such plan.

        """
        content = json_files.require_format(value, FORMAT, VERSION)
        request = json_files.require_object(content.get("request"), "its request")
        entries = json_files.require_object(content.get("groups"), "its list of groups")
        groups = {name: _slots_and_size(name, entry) for name, entry in entries.items()}
        keep = {name: slots for name, (slots, _) in groups.items()}
        return cls(keep, {name: size for name, (_, size) in groups.items()}, request)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            InvalidRequestError: the path is a folder, or in one that there is not.

        """
        write_text(check_target_path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: the file is not such a plan.

        """
        try:
            return cls.of_content(json_files.read(Path(path)))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} is not a plan that graphprune saved: {error}") from error

    def __str__(self) -> str:
        request_text = ", ".join(f"{name}={value}" for name, value in self.request.items())
        lines = [f"Plan({request_text}): {self.removed} channels go"]
        for name, kept in self.keep.items():
            lines.append(f"  {name}: {self.sizes[name]} -> {len(kept)}")
        return "\n".join(lines)


def _slots_and_size(name: str, value: Any) -> tuple[list[int], int]:
    """Return the slots that an entry keeps, and of how many."""
    entry = json_files.require_object(value, f"group {name!r}")
    size = json_files.require_integer(entry.get("size"), f"the size of group {name!r}")
    slots = entry.get("keep")
    if not isinstance(slots, list):
        raise ValueError(f"group {name!r} has no list of what it keeps")
    kept = [json_files.require_integer(slot, f"a slot of group {name!r}") for slot in slots]
    if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(f"group {name!r} does not keep sorted slots of its {size}")
    return kept, size
