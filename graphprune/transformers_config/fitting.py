"""The config that says the sizes of a slim transformers model, where there is one.

A config counts only if the model that is built from it, as it is read from config.json, has the slim
model's shapes, computes the same buffers, and calls the same operators with the same numbers. Values of
outputs do not tell: where weights are small, those of two heads and of four look alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import GraphPruneError, in_a_line
from graphprune.inference.infer import infer
from graphprune.inference.recorded import Inference, Step, Value
from graphprune.layout import size_of
from graphprune.masks import counts_of, kept_size
from graphprune.report.result import Slimmed
from graphprune.transformers_config.configs import (
    Architecture,
    Changes,
    Number,
    Place,
    Shapes,
    shapes,
    tensors_of,
)
from graphprune.utils.torch_context import alone

# Sets of changes that are tried at most; each is a model built without memory.
_MOST_TRIED = 300

# The same where a dimension moves with no number, or with one alone that another wants otherwise: only
# numbers that dimensions do not grow evenly with could fit then.
_MOST_TRIED_IN_VAIN = 12

# Those of them that are compared operator by operator at most; each is a run without data.
_MOST_COMPARED = 20

# Numbers that show in no shape and are tried at most; each is a run without data too.
_MOST_HIDDEN = 16

# Two numbers for a place that the config leaves open, to see what follows it; few sizes are like them.
_PROBES = (14, 28)

Dim: TypeAlias = tuple[str, int]
"""A dimension of a tensor: its name and position."""

Written: TypeAlias = Callable[[Changes], Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Why a config that gives the right shapes does not fit.

    Attributes:
        text: what differs.
        step: the number of the first operator that differs, if one does.
        buffer: the name of a computed buffer that differs, if one does.

    """

    text: str
    step: int | None = None
    buffer: str | None = None


@dataclass(frozen=True)
class Fit:
    """What the search for a config came to.

    Attributes:
        result: what the config is of.
        model: built from the config that fits, with the slim model's values where it has any; None where
            no config fits.
        content: of config.json.
        search: where it was looked for.
        difference: of the first config that gives the shapes, where none fits.

    """

    result: Slimmed
    model: nn.Module | None
    content: Mapping[str, Any]
    search: Search
    difference: Difference | None = None


def find(result: Slimmed, written: Written | None = None) -> Fit:
    """Look for a config that says the sizes of a slim model in module form.

    Args:
        result: the slim model, with or without values.
        written: from changes of numbers to the content of the config.json that is to be written; by
            default what the config itself writes.

    Raises:
        InvalidRequestError: the model's class cannot be built from its config alone.

    """
    with alone():  # reads of the config's class are watched, whoever reads
        return _found(result, written)


def _found(result: Slimmed, written: Written | None) -> Fit:
    architecture = Architecture(result.model)
    search = Search(architecture, shapes(result.model), Numbers(architecture, result))
    first: Difference | None = None
    for changes in islice(search.fitting(), _MOST_COMPARED):
        try:
            content = (written or architecture.file_of)(changes)
            model = architecture.built(architecture.config_of(content))
        except Exception as refusal:  # a config refuses some numbers in whatever way it likes
            first = first or Difference(in_a_line(refusal))
            continue
        difference = _difference(architecture, model, result, search.numbers)
        if difference is None:
            return Fit(result, model, content, search)
        first = first or difference
    return Fit(result, None, {}, search, first)


class Numbers:
    """The numbers that a model's operators go by: those of the original and those of its slim model."""

    def __init__(self, architecture: Architecture, result: Slimmed) -> None:
        self._architecture = architecture
        self._result = result
        self._seen: dict[frozenset[tuple[Place, Number]], list[Any] | None] = {
            frozenset(): _leaves(result.graph.inference)
        }

    @cached_property
    def slim(self) -> Inference:
        """The operators of the slim model."""
        return infer(self._result.model, self._result.inputs)

    @cached_property
    def became(self) -> dict[int, list[int]]:
        """By each number in the original, what stands where it stood, other than itself, often first."""
        original, plan = self._result.graph.inference, self._result.plan
        kept = counts_of(plan.masks(self._result.graph))
        values = [value for step in original.steps for value in (*step.inputs, *step.outputs)]
        pairs = [(size_of(x), kept_size(x, kept)) for value in values for x in value.layouts]
        before, after = _leaves(original), _leaves(self.slim)
        if len(before) == len(after):
            pairs += zip(before, after, strict=True)
        counts: dict[int, Counter[int]] = {}
        for old, new in pairs:
            if type(old) is int and type(new) is int and old != new:
                counts.setdefault(old, Counter())[new] += 1
        return {old: [new for new, _ in count.most_common()] for old, count in counts.items()}

    def are_said_by(self, place: Place, value: int, others: Changes) -> bool:
        """Say whether a number at a place of the config makes an operator's number that of the slim model.

        Where no model of the config with that number can be run, it may.
        """
        wanted = _leaves(self.slim)
        for start in (others, {}):
            before, after = self._of(start), self._of({**start, place: value})
            if before is not None and after is not None:
                same_length = len(before) == len(after) == len(wanted)
                return not same_length or any(
                    old != slim == new for old, new, slim in zip(before, after, wanted, strict=True)
                )
        return True

    def _of(self, changes: Changes) -> list[Any] | None:
        key = frozenset(changes.items())
        if key not in self._seen:
            try:
                model = self._architecture.changed(changes)
                self._seen[key] = _leaves(infer(model, self._result.inputs))
            except Exception:  # a config or its model refuses some numbers in whatever way it likes
                self._seen[key] = None
        return self._seen[key]


class Search:
    """Looks for changes of a config that give a model these shapes.

    Each number is changed by itself: what follows it says which number it would want. One that is the only
    one to move some dimension has to have that. The others (numbers of heads beside the size of a head) are
    tried together: what became of such a number in the operators first. A number that the config leaves
    open is asked for last, when the others are as they are to be.

    Args:
        architecture: the class and the config of the original.
        wanted: the shapes.
        numbers: those of the operators.
        hidden: whether to try numbers that show in no shape too.

    """

    def __init__(
        self, architecture: Architecture, wanted: Shapes, numbers: Numbers, hidden: bool = True
    ) -> None:
        self.architecture = architecture
        self.numbers = numbers
        self._wanted = wanted
        self._places = architecture.numbers
        self._hidden = hidden
        self._asked = {place: self._asks(place, {}) for place in self._places}
        self.needed: dict[Place, Number] = {}
        self.conflicts: dict[Place, dict[Dim, Number | None]] = {}  # what is asked for in vain
        self.alone: dict[Place, list[Dim]] = {}  # dimensions that no other number moves
        self._find_needed()
        self.nearest: Changes = {}
        self.missed = self._missed({})

    def fitting(self) -> Iterator[dict[Place, Number]]:
        """Yield changes of the config that give the shapes, the likeliest first."""
        open_places = [
            place for place, asks in self._asked.items() if self._is_open(place) and asks
        ]
        choices = dict(self._choices())
        done: list[dict[Place, Number]] = []
        if not self.missed:
            done.append({})
            yield {}
        for picks in islice(_likeliest_first(list(choices.values())), self._most_tried()):
            picked = dict(zip(choices, picks, strict=True))
            changes = {p: v for p, v in (self.needed | picked).items() if v != self._places[p]}
            missed = self._missed(changes)
            if missed and open_places:
                changes |= self._open(open_places, changes, missed)
                missed = self._missed(changes)
            if len(missed) < len(self.missed):
                self.nearest, self.missed = changes, missed
            if not missed and changes not in done:
                done.append(changes)
                yield changes

    def _most_tried(self) -> int:
        moved = {dim for asks in self._asked.values() for dim in asks}
        in_vain = self.conflicts or any(dim not in moved for dim in self.missed)
        return _MOST_TRIED_IN_VAIN if in_vain else _MOST_TRIED

    def _missed(self, changes: Changes) -> list[Dim]:
        """Return the dimensions that are not as they should be."""
        now = self.architecture.shapes(changes)
        return [
            (name, dim)
            for name, shape in self._wanted.items()
            for dim, size in enumerate(shape)
            if name not in now or len(now[name]) != len(shape) or now[name][dim] != size
        ] or ([] if now.keys() == self._wanted.keys() else [(name, 0) for name in now])

    def _is_open(self, place: Place) -> bool:
        return self._places[place] is None

    def _asks(self, place: Place, start: Changes) -> dict[Dim, Number | None]:
        """Return which dimensions follow a number, and what each would have it be; None for nothing.

        Dimensions are taken to grow evenly with it.
        """
        value = start.get(place, self._places[place])
        low: Changes = start
        values: tuple[Number, Number] = _PROBES
        if value is None:
            low, high = ({**start, place: probe} for probe in _PROBES)
        else:
            values = value, self._moved(place, value, start)
            high = {**start, place: values[1]}
        before = self.architecture.shapes(low)
        if value is None and before == self.architecture.shapes(start):
            return {}
        after = self.architecture.shapes(high)
        asked: dict[Dim, Number | None] = {}
        for name in before.keys() & after.keys() & self._wanted.keys():
            sizes = zip(before[name], after[name], self._wanted[name], strict=False)
            for dim, (old, new, wanted) in enumerate(sizes):
                if old != new:
                    exact = values[0] + (wanted - old) * (values[1] - values[0]) / (new - old)
                    asked[name, dim] = _as_number(exact, value)
        return asked

    def _moved(self, place: Place, value: Number, start: Changes) -> Number:
        """Return another number that the config does not refuse, or this one where there is none."""
        others: list[Number] = [2 * value, 3 * value]
        others += [value // 2, value + 1] if isinstance(value, int) else [value / 2]
        accepted = (x for x in others if self.architecture.shapes({**start, place: x}))
        return next(accepted, value)

    def _find_needed(self) -> None:
        """Keep the numbers that have to be what they are asked to be: nothing else moves a dimension."""
        movers = Counter(dim for asks in self._asked.values() for dim in asks)
        for place, asks in self._asked.items():
            alone = {dim: value for dim, value in asks.items() if movers[dim] == 1}
            self.alone[place] = list(alone)
            values = set(alone.values())
            if self._is_open(place) or not alone:
                continue
            if len(values) == 1 and None not in values:
                self.needed |= {place: value for value in values if value is not None}  # noqa: B035
            else:
                self.conflicts[place] = alone

    def _choices(self) -> Iterator[tuple[Place, list[Number]]]:
        """Yield the places whose numbers are still to be chosen, and what they may be, likely first."""
        hidden: list[tuple[Place, int]] = []
        for place, value in self._places.items():
            if value is None or place in self.needed:
                continue
            became: list[Number] = []
            if isinstance(value, int):
                became += self.numbers.became.get(value, ())
                hidden += [(place, value)] if became and not self._asked[place] else []
            if self._asked[place]:
                yield place, self._likely(place, value, became)
        for place, value in hidden[: _MOST_HIDDEN if self._hidden else 0]:
            became = [
                new
                for new in self.numbers.became[value]
                if self.numbers.are_said_by(place, new, self.needed)
            ]
            if became:
                yield place, [*became, value]

    def _likely(self, place: Place, value: Number, became: Sequence[Number]) -> list[Number]:
        """Return what a number that dimensions follow may be, likely ones first."""
        asked = [*self._asks(place, self.needed).values(), *self._asked[place].values()]
        often = [x for x, _ in Counter(asked).most_common() if x is not None]
        likely = [x for x in became if x in often]
        return list(dict.fromkeys([*likely, *became, value, *often]))

    def _open(
        self, places: Sequence[Place], changes: Changes, missed: Sequence[Dim]
    ) -> dict[Place, Number]:
        """Return numbers for places that the config leaves open, so that dimensions fit that do not yet."""
        asked = {place: self._asks(place, changes) for place in places}
        movers = Counter(dim for asks in asked.values() for dim in asks)
        values: dict[Place, Number] = {}
        for place, asks in asked.items():
            wanted = {asks[dim] for dim in missed if dim in asks and movers[dim] == 1}
            if len(wanted) == 1 and None not in wanted:
                values |= {place: value for value in wanted if value is not None}  # noqa: B035
        return values


def _as_number(exact: float, before: Number | None) -> Number | None:
    """Return a number of the kind that was there, or None where it cannot be one."""
    if exact <= 0:
        return None
    if isinstance(before, float):
        # A factor may be rounded down with what it multiplies: a little above gives the size still.
        return exact if (exact * 1024).is_integer() else exact * (1 + 1e-12)
    return int(exact) if exact == int(exact) else None


def _likeliest_first(choices: Sequence[Sequence[Number]]) -> Iterator[tuple[Number, ...]]:
    """Yield picks of one from each of the choices, those that take the first of most first."""
    for count in range(len(choices) + 1):
        for odd in combinations(range(len(choices)), count):
            yield from product(
                *(choice[1:] if i in odd else choice[:1] for i, choice in enumerate(choices))
            )


def _difference(
    architecture: Architecture, model: nn.Module, result: Slimmed, numbers: Numbers
) -> Difference | None:
    """Give a rebuilt model the slim model's values, and return in what it is not the slim model."""
    if shapes(model) != shapes(result.model):
        return Difference("a model read from config.json has other shapes")
    state = result.model.state_dict()
    if not any(tensor.is_meta for tensor in state.values()):
        _give_values(model, state)
    reference = tensors_of(result.model)
    if any(tensor.is_meta for tensor in reference.values()):
        reference = tensors_of(architecture.changed({}))
    for name, tensor in tensors_of(model).items():
        if name not in state and not _equal(tensor, reference[name]):
            return Difference(f"one that gives them computes another {name}", buffer=name)
    try:
        found = infer(model, result.inputs)
    except GraphPruneError as failure:
        return Difference(in_a_line(failure))
    return _other_operator(found.steps, numbers.slim.steps)


def _give_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a model hold these tensors themselves; what it tied stays tied."""
    ties: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        ties.setdefault(id(tensor), []).append(name)
    model.load_state_dict(state, assign=True)
    now = tensors_of(model)
    for first, *others in ties.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, now[first])


def _equal(tensor: Tensor, reference: Tensor) -> bool:
    """Say whether a computed buffer is that of the reference, which may have been cast since."""
    if tensor.is_meta or reference.is_meta:
        return False
    return torch.equal(tensor.to(reference.device, reference.dtype), reference)


def _other_operator(steps: Sequence[Step], wanted: Sequence[Step]) -> Difference | None:
    """Return the first operator that is another, or is called with other numbers or on something else."""
    for number, (step, slim) in enumerate(zip(steps, wanted, strict=False)):
        mine, its = _described(step), _described(slim)
        if step.func is not slim.func or mine != its:
            pairs = zip(mine, its, strict=False)
            odd = next(((a, b) for a, b in pairs if a != b), ("another operator", slim.func))
            place = f"{slim.place.operator} in {slim.place.module} ({slim.place.source})"
            return Difference(f"{place} would have {odd[0]} for {odd[1]}", number)
    if len(steps) != len(wanted):
        return Difference(f"it would call {len(steps)} operators, not {len(wanted)}")
    return None


def _leaves(inference: Inference) -> list[Any]:
    return [leaf for step in inference.steps for leaf in _described(step)]


def _described(step: Step) -> list[Any]:
    """Return an operator's arguments: numbers as they are, tensors as their sources and sizes."""

    def describe(leaf: Any) -> Any:
        return [leaf.source, *map(size_of, leaf.layouts)] if isinstance(leaf, Value) else leaf

    arguments = pytree.tree_map(
        describe, step.arguments, is_leaf=lambda leaf: isinstance(leaf, Value)
    )
    return [str(step.func), *pytree.tree_leaves(arguments, is_leaf=lambda leaf: leaf is None)]
