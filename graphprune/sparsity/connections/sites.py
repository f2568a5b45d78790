"""Where connections can be switched off, and which filters are read by what comes after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from graphprune.groups.groups import Dependencies
from graphprune.inference.recorded import Step, Value
from graphprune.layout import Axis, Layout, free_axes, resolve, size_of
from graphprune.masks import slots_of

aten = torch.ops.aten

Flags: TypeAlias = npt.NDArray[np.bool_]
"""One truth a slot, filter or channel."""

Connections: TypeAlias = npt.NDArray[np.bool_]
"""Which connections of a convolution are on, `[outputs, inputs]`."""

MANY_CHANNELS = 8  # a convolution of fewer has no connections to spare


@dataclass(frozen=True)
class ConnectionSite:
    """An ungrouped convolution whose connections may be switched off.

    Attributes:
        weight: the name of its weight, `[outputs, inputs, *window]`.
        outputs: how many filters it has.
        inputs: how many channels each of them reads.

    """

    weight: str
    outputs: int
    inputs: int


def sites_of(graph: Dependencies, first: bool = False) -> list[ConnectionSite]:
    """Return the convolutions whose connections may be switched off, in order of execution.

    They are ungrouped, not transposed, read and make eight channels or more, and have a parameter as
    weight that no other operator reads.

    Args:
        graph: of the model.
        first: also those that read the model's input.

    """
    inference = graph.inference
    reads = Counter(id(value) for step in inference.steps for value in step.inputs)
    input_dims = [resolve(dim) for layouts in inference.inputs.values() for dim in layouts]
    sites = []
    for step in inference.steps:
        weight = _weight(step)
        if weight is None or weight.source not in inference.trainable or reads[id(weight)] > 1:
            continue
        reads_input = resolve(step.inputs[0].layouts[1]) in input_dims  # of [batch, channels, ...]
        site = ConnectionSite(str(weight.source), *map(size_of, weight.layouts[:2]))
        if min(site.outputs, site.inputs) >= MANY_CHANNELS and (first or not reads_input):
            sites.append(site)
    return sites


def _weight(step: Step) -> Value | None:
    """Return the weight of an ungrouped convolution."""
    if step.func.overloadpacket is not aten.convolution:
        return None
    is_plain = step.arguments["groups"] == 1 and not step.arguments["transposed"]
    return step.inputs[1] if is_plain else None


def choose_connections(
    graph: Dependencies,
    sites: Sequence[ConnectionSite],
    choose: Callable[[ConnectionSite, Flags], Connections],
) -> dict[str, Connections]:
    """Return the connections that are chosen for each site, by the name of its weight.

    Sites are asked last to first, so that of each it is known which of its filters are read. Channels
    that have to stand or go together (the halves of a channel shuffle, say) count as read together.

    Args:
        graph: of the model.
        sites: of that graph.
        choose: from a site and which of its filters an output depends on, `[outputs]`, to its connections.

    """
    by_weight = {site.weight: site for site in sites}
    read_slots = _ReadSlots()
    connections: dict[str, Connections] = {}
    for step in reversed(graph.inference.steps):
        weight = _weight(step)
        site = by_weight.get(str(weight.source)) if weight is not None else None
        if site is not None:
            live = read_slots.positions(step.outputs[0].layouts[1], step.outputs[0])
            connections[site.weight] = choose(site, live)
        # a channel is read by a site if any of its filters has a connection to it
        site_reads = (
            None if site is None else (step.inputs[0], np.asarray(connections[site.weight].any(0)))
        )
        read_slots.note_step(step, site_reads)
    return {site.weight: connections[site.weight] for site in sites}


class _ReadSlots:
    """Which slots of its axes are read, of each value, by what comes after it."""

    def __init__(self) -> None:
        self.slots: dict[int, dict[Axis, Flags]] = {}

    def get(self, value: Value, axis: Axis) -> Flags:
        """Return the slots that are read, `[slots]`."""
        nothing = np.zeros(axis.size, dtype=bool)
        return self.slots.get(id(value), {}).get(axis, nothing)

    def positions(self, layout: Layout, value: Value) -> Flags:
        """Return the positions of a dimension of a value that are read; what is fixed counts as read."""
        position_is_read = np.ones(size_of(layout), dtype=bool)
        for axis in free_axes(layout):
            slot_is_read = self.get(value, axis)
            for slots in slots_of(layout, axis):
                # -1 is a position of other slots; one of `(heads dim)` is read if its head and its
                # dim are
                position_is_read &= (slots < 0) | slot_is_read[slots]
        return position_is_read

    def note_step(self, step: Step, site_reads: tuple[Value, Flags] | None) -> None:
        """Note what an operator reads.

        Args:
            step: the operator, whose results' readers are noted already.
            site_reads: for a site, its data and which of their channels it reads; other operators read
                all channels that their results lack.

        """
        read_later: dict[Axis, Flags] = {}
        for value in step.outputs:
            for axis in _axes(value):
                read_later[axis] = read_later.get(axis, False) | self.get(value, axis)
        # what nobody reads reads nothing itself, so that whole dead branches free their channels
        if read_later and not any(slots.any() for slots in read_later.values()):
            return
        for value in step.inputs:
            for axis in _axes(value):
                everything = np.ones(axis.size, dtype=bool)
                # an axis that a result has too is read as there; any other was summed over here
                if axis in read_later:
                    self._note(value, axis, read_later[axis])
                elif site_reads is not None and value is site_reads[0]:
                    for slots in slots_of(value.layouts[1], axis):
                        # the slots that stand at the positions that some connection reads
                        self._note(value, axis, np.isin(np.arange(axis.size), slots[site_reads[1]]))
                else:
                    self._note(value, axis, everything)

    def _note(self, value: Value, axis: Axis, slots: Flags) -> None:
        slots_by_axis = self.slots.setdefault(id(value), {})
        slots_by_axis[axis] = slots_by_axis[axis] | slots if axis in slots_by_axis else slots


def _axes(value: Value) -> list[Axis]:
    return list(dict.fromkeys(axis for layout in value.layouts for axis in free_axes(layout)))
