"""What to cut, as it is asked for: how much of what, of which groups, by which ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from graphprune.errors import InvalidRequestError
from graphprune.groups.name_patterns import Pattern, by_name
from graphprune.selection.allocation import Align

Unit: TypeAlias = Literal["channels", "parameters", "macs", "latency"]
Ranking: TypeAlias = Literal["auto", "uniform", "global"]


@dataclass(frozen=True)
class Request:
    """What to cut: the arguments of `slim` that concern the choice.

    Attributes:
        ratio: fraction to remove, 0 <= ratio < 1.
        of: what the ratio counts: "channels" of the groups that may be cut, "parameters", "macs" or
            measured "latency" of the whole model.
        ranking: "uniform" removes the same fraction of each group; "global" has the channels of all
            groups compete; "auto" is uniform for channels and global for the others.
        steps: how many times the channels that are left are scored while the ratio is approached: 1
            for a single ranking, more for iterative re-ranking.
        align: keep a multiple of this many channels where they belong to convolutions; "auto" keeps
            multiples of 16, of 8 in groups under 64, of 4 under 16; 1 keeps any number.
        include: cut only groups with a name, or a member parameter's or its module's name, that fits one
            of these globs; a module stands for all parameters in it.
        exclude: never cut groups with such a name.
        renormalised: also cut groups that a norm, mean or softmax runs along.

    """

    ratio: float
    of: Unit = "channels"
    align: Align = "auto"
    include: Sequence[Pattern] = ()
    exclude: Sequence[Pattern] = ()
    renormalised: bool = False
    ranking: Ranking = "auto"
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", _fraction(self.ratio))
        if self.of not in get_args(Unit):
            raise InvalidRequestError(
                f"of={self.of!r} must be 'channels', 'parameters', 'macs' or 'latency'"
            )
        if self.ranking not in ("auto", "uniform", "global"):
            raise InvalidRequestError(
                f"ranking={self.ranking!r} must be 'auto', 'uniform' or 'global'"
            )
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise InvalidRequestError(f"steps={self.steps!r} must be a whole number from 1")
        if self.align != "auto" and (not isinstance(self.align, Integral) or self.align < 1):
            raise InvalidRequestError(
                f"align={self.align!r} must be 'auto' or a whole number from 1"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, (str, nn.Module)) or not all(
                isinstance(pattern, (str, nn.Module)) for pattern in patterns
            ):
                raise InvalidRequestError(
                    f"{name} must be a list of patterns or modules, as in {name}=['head*'], not "
                    f"{_in_short(patterns)}"
                )
        for name in ("steps", "align"):  # plans are saved, and numpy's numbers cannot be
            value = getattr(self, name)
            object.__setattr__(self, name, value if value == "auto" else int(value))

    def with_names(self, model: nn.Module) -> Request:
        """Return the request with globs of names for the modules among its patterns.

        Raises:
            InvalidRequestError: one is no module of the model, or holds no parameters.

        """
        include, exclude = (
            by_name(getattr(self, what), model, what) for what in ("include", "exclude")
        )
        return replace(self, include=include, exclude=exclude)

    @property
    def is_global(self) -> bool:
        """Whether the channels of all groups compete."""
        return self.ranking == "global" or (self.ranking == "auto" and self.of != "channels")

    @property
    def is_by_group(self) -> bool:
        """Whether each group loses the same fraction of its channels, whatever they are worth."""
        return self.of == "channels" and not self.is_global


def _fraction(ratio: Any) -> float:
    if isinstance(ratio, Real) and not isinstance(ratio, bool) and 0 <= float(ratio) < 1:
        return float(ratio)
    order = (
        "; the arguments are slim(model, ratio, example_inputs)"
        if not isinstance(ratio, (Real, str))
        else ""
    )
    raise InvalidRequestError(
        f"ratio={_in_short(ratio)} is the fraction to remove; it must be a number with 0 <= ratio < 1"
        f"{order}"
    )


def _in_short(value: Any) -> str:
    """Return a number or a text as it is written, of other things what they are."""
    return repr(value) if isinstance(value, (Real, str)) else f"a {type(value).__name__}"
