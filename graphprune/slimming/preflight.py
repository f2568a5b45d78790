"""What is wrong with a request or a model before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from graphprune.errors import InvalidRequestError, listed, warn
from graphprune.importance import LOOK_AT_DATA, LOOK_AT_LOSS, check_loss
from graphprune.utils.inputs import Inputs, call, output_tensors
from graphprune.utils.tensors import parameter_names, working_copy
from graphprune.utils.torch_context import fixed_seed

# What says which channels go, in the place of which a plan may stand.
_CHOOSING = (
    "of", "importance", "ranking", "steps", "align", "include", "exclude", "renormalised", "seed",
    "latency_ms",
)  # fmt: skip


def check_use(
    ratio: float | None, given_options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Warn of what is asked for and nothing will read.

    Args:
        ratio: the fraction to remove, or None where none was given.
        given_options: the options of `slim` that were given.
        defaults: theirs; what is given as it would be anyway is not spoken of.

    Raises:
        InvalidRequestError: the loss is none.

    """
    if given_options.get("loss") is not None:
        check_loss(given_options["loss"])
    unusual_options = {
        n: value for n, value in given_options.items() if not _is_default(value, defaults.get(n))
    }
    if ratio is not None:
        unusual_options["ratio"] = ratio
    for names, why in _find_unread({**defaults, **given_options}):
        unread_names = [name for name in names if name in unusual_options]
        if unread_names:
            warn(f"{' and '.join(unread_names)} will not be read: {why}")


def _is_default(value: Any, default: Any) -> bool:
    # [] is as good as (); a list that holds something is never the default
    if isinstance(value, (tuple, list)) and isinstance(default, (tuple, list)):
        return not value and not default
    # `==` of arrays and tensors has no single truth
    return value is default or (isinstance(value, (str, int, float)) and bool(value == default))


def _find_unread(all_options: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield names of options and why nothing reads them."""
    importance, compensate = all_options["importance"], all_options["compensate"]
    has_plan, latency_ms = all_options["plan"] is not None, all_options["latency_ms"] is not None
    if has_plan:
        yield ("ratio", *_CHOOSING), "plan= says what goes; leave one of both out"
        yield ("loss",), "it is for choosing channels, and plan= says what goes; leave it out"
    elif latency_ms:
        yield ("ratio",), "latency_ms= says how much is to go; leave one of both out"
    if not has_plan and importance != "random":
        yield ("seed",), "it is for importance='random'"
    if has_plan or not (latency_ms or all_options["of"] == "latency"):
        yield (
            ("provider", "threads"),
            ("latency is measured only where latency_ms= or of='latency' ask for it"),
        )
    looks_at_data = not has_plan and importance in LOOK_AT_DATA
    looks_at_loss = not has_plan and importance in LOOK_AT_LOSS
    criterion = (
        f"importance={importance!r}" if isinstance(importance, str) else "the importance function"
    )
    if not looks_at_data and not compensate:
        cause = "plan= says what goes" if has_plan else f"{criterion} does not look at data"
        yield (
            ("data",),
            (
                f"{cause}, and no repair is asked for; compensate=True repairs the weights that stay on it"
                + ("" if has_plan else ", importance='reconstruction' chooses by it")
            ),
        )
    if not looks_at_loss and not has_plan:
        yield (
            ("loss",),
            (
                f"{criterion} does not look at a loss (those that do are {', '.join(LOOK_AT_LOSS)}), and a "
                "repair needs none"
            ),
        )


def refuse_nan(model: nn.Module, inputs: Inputs) -> None:
    """See that no parameter with NaN makes the model's output NaN.

    Raises:
        InvalidRequestError: so it is; the message names them.

    """
    names = [
        name for name, parameter in parameter_names(model).items() if _has_nan(parameter.detach())
    ]
    if names and _gives_nan(model, inputs):
        raise InvalidRequestError(
            f"the model gives NaN since its weights do: NaN in {listed(names)}; load the weights anew, or "
            "see what training did to them"
        )


def _has_nan(parameter: Tensor) -> bool:
    if parameter.is_meta or not (parameter.is_floating_point() or parameter.is_complex()):
        return False
    try:
        return bool(parameter.isnan().any())
    except (RuntimeError, NotImplementedError):
        # The smallest types and tensors of other kinds cannot be asked.
        return False


def _gives_nan(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with fixed_seed():
            output = call(working_copy(model).eval(), inputs.map(lambda tensor: tensor.clone()))
    except Exception:  # what is wrong with the inputs is said later
        return False
    return any(bool(tensor.isnan().any()) for _, tensor in output_tensors(output))
