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
from graphprune.masks import count_kept_slots, kept_size
from graphprune.report.result import Slimmed
from graphprune.transformers_config.configs import (
    Architecture,
    Changes,
    Number,
    NumberPath,
    Shapes,
    shapes,
    tensors_of,
)
from graphprune.utils.torch_context import one_thread_at_a_time

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

ContentOf: TypeAlias = Callable[[Changes], Mapping[str, Any]]


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


def find(result: Slimmed, content_of: ContentOf | None = None) -> Fit:
    """Look for a config that says the sizes of a slim model in module form.

    Args:
        result: the slim model, with or without values.
        content_of: from changes of numbers to the content of the config.json that is to be written;
            by default what the config itself writes.

    Raises:
        InvalidRequestError: the model's class cannot be built from its config alone.

    """
    with one_thread_at_a_time():  # reads of the config's class are watched, whoever reads
        return _find_fit(result, content_of)


def _find_fit(result: Slimmed, content_of: ContentOf | None) -> Fit:
    architecture = Architecture(result.model)
    search = Search(architecture, shapes(result.model), Numbers(architecture, result))
    first_difference: Difference | None = None
    for changes in islice(search.fitting(), _MOST_COMPARED):
        try:
            content = (content_of or architecture.file_of)(changes)
            model = architecture.build(architecture.config_of(content))
        except Exception as refusal:  # a config refuses some numbers in whatever way it likes
            first_difference = first_difference or Difference(in_a_line(refusal))
            continue
        difference = _find_difference(architecture, model, result, search.numbers)
        if difference is None:
            return Fit(result, model, content, search)
        first_difference = first_difference or difference
    return Fit(result, None, {}, search, first_difference)


class Numbers:
    """The numbers that a model's operators go by: those of the original and those of its slim model."""

    def __init__(self, architecture: Architecture, result: Slimmed) -> None:
        self._architecture = architecture
        self._result = result
        self._seen: dict[frozenset[tuple[NumberPath, Number]], list[Any] | None] = {
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
        kept = count_kept_slots(plan.masks(self._result.graph))
        values = [value for step in original.steps for value in (*step.inputs, *step.outputs)]
        # Sizes of dimensions; below also the numbers that operators are called with.
        pairs = [(size_of(x), kept_size(x, kept)) for value in values for x in value.layouts]
        before, after = _leaves(original), _leaves(self.slim)
        # As many leaves: they stand for the same arguments. Else no pair of them can be told.
        if len(before) == len(after):
            pairs += zip(before, after, strict=True)
        counts: dict[int, Counter[int]] = {}
        for old, new in pairs:
            if type(old) is int and type(new) is int and old != new:
                counts.setdefault(old, Counter())[new] += 1
        return {old: [new for new, _ in count.most_common()] for old, count in counts.items()}

    def are_said_by(self, path: NumberPath, value: int, other_changes: Changes) -> bool:
        """Say whether a number at a place of the config makes an operator's number that of the slim model.

        Where no model of the config with that number can be run, it may.
        """
        slim_leaves = _leaves(self.slim)
        # With the other changes first; where no model of these runs, with this one alone.
        for start in (other_changes, {}):
            before, after = self._find_leaves(start), self._find_leaves({**start, path: value})
            if before is not None and after is not None:
                same_length = len(before) == len(after) == len(slim_leaves)
                return not same_length or any(
                    old != slim == new
                    for old, new, slim in zip(before, after, slim_leaves, strict=True)
                )
        return True

    def _find_leaves(self, changes: Changes) -> list[Any] | None:
        key = frozenset(changes.items())
        if key not in self._seen:
            try:
                model = self._architecture.build_with(changes)
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
        target_shapes: the shapes.
        numbers: those of the operators.
        hidden: whether to try numbers that show in no shape too.

    """

    def __init__(
        self,
        architecture: Architecture,
        target_shapes: Shapes,
        numbers: Numbers,
        hidden: bool = True,
    ) -> None:
        self.architecture = architecture
        self.numbers = numbers
        self._wanted = target_shapes
        self._places = architecture.numbers
        self._hidden = hidden
        self._asked = {path: self._find_followers(path, {}) for path in self._places}
        self.needed: dict[NumberPath, Number] = {}
        self.conflicts: dict[NumberPath, dict[Dim, Number | None]] = {}  # what is asked for in vain
        self.alone: dict[NumberPath, list[Dim]] = {}  # dimensions that no other number moves
        self._find_needed()
        self.nearest: Changes = {}
        self.missed = self._find_missed({})

    def fitting(self) -> Iterator[dict[NumberPath, Number]]:
        """Yield changes of the config that give the shapes, the likeliest first."""
        open_paths = [
            path for path, followers in self._asked.items() if self._is_open(path) and followers
        ]
        choices = dict(self._choices())
        yielded_changes: list[dict[NumberPath, Number]] = []
        if not self.missed:
            yielded_changes.append({})
            yield {}
        for picks in islice(_yield_likeliest_first(list(choices.values())), self._limit_tries()):
            picked = dict(zip(choices, picks, strict=True))
            changes = {p: v for p, v in (self.needed | picked).items() if v != self._places[p]}
            missed = self._find_missed(changes)
            if missed and open_paths:
                changes |= self._choose_open_numbers(open_paths, changes, missed)
                missed = self._find_missed(changes)
            if len(missed) < len(self.missed):
                self.nearest, self.missed = changes, missed
            if not missed and changes not in yielded_changes:
                yielded_changes.append(changes)
                yield changes

    def _limit_tries(self) -> int:
        moved = {dim for followers in self._asked.values() for dim in followers}
        in_vain = self.conflicts or any(dim not in moved for dim in self.missed)
        return _MOST_TRIED_IN_VAIN if in_vain else _MOST_TRIED

    def _find_missed(self, changes: Changes) -> list[Dim]:
        """Return the dimensions that are not as they should be."""
        actual = self.architecture.shapes(changes)
        return [
            (name, dim)
            for name, shape in self._wanted.items()
            for dim, size in enumerate(shape)
            # A config that is refused has no shapes, so that everything is missed.
            if name not in actual or len(actual[name]) != len(shape) or actual[name][dim] != size
        ] or ([] if actual.keys() == self._wanted.keys() else [(name, 0) for name in actual])

    def _is_open(self, path: NumberPath) -> bool:
        return self._places[path] is None

    def _find_followers(self, path: NumberPath, start: Changes) -> dict[Dim, Number | None]:
        """Return which dimensions follow a number, and what each would have it be; None for nothing.

        Dimensions are taken to grow evenly with it.
        """
        value = start.get(path, self._places[path])
        low: Changes = start
        probed: tuple[Number, Number] = _PROBES
        if value is None:
            low, high = ({**start, path: probe} for probe in _PROBES)
        else:
            probed = value, self._find_accepted(path, value, start)
            high = {**start, path: probed[1]}
        before = self.architecture.shapes(low)
        # Set to the first probe it changes nothing from where it is open: nothing goes by it.
        if value is None and before == self.architecture.shapes(start):
            return {}
        after = self.architecture.shapes(high)
        followers: dict[Dim, Number | None] = {}
        for name in before.keys() & after.keys() & self._wanted.keys():
            sizes = zip(before[name], after[name], self._wanted[name], strict=False)
            for dim, (old, new, target) in enumerate(sizes):
                if old != new:
                    # The line through two points, read backwards. A head size of 16 gives 64 rows,
                    # one of 32 gives 128: 48 rows want 16 + (48 - 64) * 16 / (128 - 64) = 12.
                    exact = probed[0] + (target - old) * (probed[1] - probed[0]) / (new - old)
                    followers[name, dim] = _as_number(exact, value)
        return followers

    def _find_accepted(self, path: NumberPath, value: Number, start: Changes) -> Number:
        """Return another number that the config does not refuse, or this one where there is none."""
        # A width that heads have to divide takes twice its size; a number of heads may not.
        candidates: list[Number] = [2 * value, 3 * value]
        candidates += [value // 2, value + 1] if isinstance(value, int) else [value / 2]
        accepted = (x for x in candidates if self.architecture.shapes({**start, path: x}))
        return next(accepted, value)

    def _find_needed(self) -> None:
        """Keep the numbers that have to be what they are asked to be: nothing else moves a dimension."""
        mover_counts = Counter(dim for followers in self._asked.values() for dim in followers)
        for path, followers in self._asked.items():
            sole_followers = {
                dim: value for dim, value in followers.items() if mover_counts[dim] == 1
            }
            self.alone[path] = list(sole_followers)
            wanted_numbers = set(sole_followers.values())
            if self._is_open(path) or not sole_followers:
                continue
            if len(wanted_numbers) == 1 and None not in wanted_numbers:
                self.needed |= {path: value for value in wanted_numbers if value is not None}  # noqa: B035
            else:
                self.conflicts[path] = sole_followers

    def _choices(self) -> Iterator[tuple[NumberPath, list[Number]]]:
        """Yield the places whose numbers are still to be chosen, and what they may be, likely first."""
        hidden: list[tuple[NumberPath, int]] = []
        for path, value in self._places.items():
            if value is None or path in self.needed:
                continue
            successors: list[Number] = []
            if isinstance(value, int):
                successors += self.numbers.became.get(value, ())
                hidden += [(path, value)] if successors and not self._asked[path] else []
            if self._asked[path]:
                yield path, self._rank_candidates(path, value, successors)
        for path, value in hidden[: _MOST_HIDDEN if self._hidden else 0]:
            successors = [
                successor
                for successor in self.numbers.became[value]
                if self.numbers.are_said_by(path, successor, self.needed)
            ]
            if successors:
                yield path, [*successors, value]

    def _rank_candidates(
        self, path: NumberPath, value: Number, successors: Sequence[Number]
    ) -> list[Number]:
        """Return what a number that dimensions follow may be, likely ones first."""
        wanted_numbers = [
            *self._find_followers(path, self.needed).values(),
            *self._asked[path].values(),
        ]
        wanted_by_most = [x for x, _ in Counter(wanted_numbers).most_common() if x is not None]
        # Seen in the operators and wanted by dimensions; seen alone; unchanged; wanted alone.
        seen_and_wanted = [x for x in successors if x in wanted_by_most]
        return list(dict.fromkeys([*seen_and_wanted, *successors, value, *wanted_by_most]))

    def _choose_open_numbers(
        self, paths: Sequence[NumberPath], changes: Changes, missed: Sequence[Dim]
    ) -> dict[NumberPath, Number]:
        """Return numbers for places that the config leaves open, so that dimensions fit that do not yet."""
        followers_by_path = {path: self._find_followers(path, changes) for path in paths}
        mover_counts = Counter(dim for followers in followers_by_path.values() for dim in followers)
        numbers: dict[NumberPath, Number] = {}
        for path, followers in followers_by_path.items():
            wanted_numbers = {
                followers[dim] for dim in missed if dim in followers and mover_counts[dim] == 1
            }
            if len(wanted_numbers) == 1 and None not in wanted_numbers:
                numbers |= {path: value for value in wanted_numbers if value is not None}  # noqa: B035
        return numbers


def _as_number(exact: float, original: Number | None) -> Number | None:
    """Return a number of the kind that was there, or None where it cannot be one."""
    if exact <= 0:
        return None
    if isinstance(original, float):
        # A factor may be rounded down with what it multiplies: a little above gives the size still.
        return exact if (exact * 1024).is_integer() else exact * (1 + 1e-12)
    return int(exact) if exact == int(exact) else None


def _yield_likeliest_first(choices: Sequence[Sequence[Number]]) -> Iterator[tuple[Number, ...]]:
    """Yield picks of one from each of the choices, those that take the first of most first."""
    # [a, b] and [c, d] give ac; then, with one that is not the first, bc, ad; then bd.
    for count in range(len(choices) + 1):
        for deviating in combinations(range(len(choices)), count):
            yield from product(
                *(choice[1:] if i in deviating else choice[:1] for i, choice in enumerate(choices))
            )


def _find_difference(
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
        # Without values there are no computed buffers either: those of the original stand for them.
        reference = tensors_of(architecture.build_with({}))
    for name, tensor in tensors_of(model).items():
        if name not in state and not _is_equal(tensor, reference[name]):
            return Difference(f"one that gives them computes another {name}", buffer=name)
    try:
        rebuilt_inference = infer(model, result.inputs)
    except GraphPruneError as failure:
        return Difference(in_a_line(failure))
    return _find_other_operator(rebuilt_inference.steps, numbers.slim.steps)


def _give_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a model hold these tensors themselves; what it tied stays tied."""
    ties: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        ties.setdefault(id(tensor), []).append(name)
    # Each name gets a tensor of its own by this, tied or not.
    model.load_state_dict(state, assign=True)
    new_tensors = tensors_of(model)
    for first_name, *tied_names in ties.values():
        for name in tied_names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, new_tensors[first_name])


def _is_equal(tensor: Tensor, reference: Tensor) -> bool:
    """Say whether a computed buffer is that of the reference, which may have been cast since."""
    if tensor.is_meta or reference.is_meta:
        return False
    return torch.equal(tensor.to(reference.device, reference.dtype), reference)


def _find_other_operator(steps: Sequence[Step], slim_steps: Sequence[Step]) -> Difference | None:
    """Return the first operator that is another, or is called with other numbers or on something else."""
    for number, (step, slim) in enumerate(zip(steps, slim_steps, strict=False)):
        rebuilt_leaves, slim_leaves = _describe_step(step), _describe_step(slim)
        if step.func is not slim.func or rebuilt_leaves != slim_leaves:
            pairs = zip(rebuilt_leaves, slim_leaves, strict=False)
            odd_pair = next(((a, b) for a, b in pairs if a != b), ("another operator", slim.func))
            call_text = f"{slim.place.operator} in {slim.place.module} ({slim.place.source})"
            return Difference(f"{call_text} would have {odd_pair[0]} for {odd_pair[1]}", number)
    if len(steps) != len(slim_steps):
        return Difference(f"it would call {len(steps)} operators, not {len(slim_steps)}")
    return None


def _leaves(inference: Inference) -> list[Any]:
    return [leaf for step in inference.steps for leaf in _describe_step(step)]


def _describe_step(step: Step) -> list[Any]:
    """Return an operator's arguments: numbers as they are, tensors as their sources and sizes."""

    def describe(leaf: Any) -> Any:
        return [leaf.source, *map(size_of, leaf.layouts)] if isinstance(leaf, Value) else leaf

    arguments = pytree.tree_map(
        describe, step.arguments, is_leaf=lambda leaf: isinstance(leaf, Value)
    )
    return [str(step.func), *pytree.tree_leaves(arguments, is_leaf=lambda leaf: leaf is None)]
