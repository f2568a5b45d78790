"""Recurrent layers as the operators of their steps, which torch can differentiate and run in batches.

Torch's own recurrent operators have no rule for vmap and no second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._decomp import decomposition_table
from torch.overrides import TorchFunctionMode

from graphprune.rules.recurrent import overload_of


class StepByStep(TorchFunctionMode):
    """Within it, RNN, LSTM and GRU layers run step by step; results are the same but for rounding."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, or the steps that it stands for."""
        # `overload_of` looks at the fourth argument, which every recurrent operator has.
        recurrent_operator = overload_of(func, args) if len(args) > 3 else None
        stepwise_func = (
            func if recurrent_operator is None else decomposition_table[recurrent_operator]
        )
        return stepwise_func(*args, **(kwargs or {}))
