"""Recurrent layers, seen whole: torch would make ten operators of every time step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from graphprune.layout import Concat, Layout
from graphprune.rules.registry import Call, Layouts, rule

aten = torch.ops.aten

# By operator, how many gates stand one above the other in each matrix.
GATES = {aten.lstm: 4, aten.gru: 3, aten.rnn_tanh: 1, aten.rnn_relu: 1}


def overload_of(function: Any, args: Sequence[Any]) -> OpOverload | None:
    """Return the recurrent operator that a function called on these arguments is, or None.

    The function is an ATen overload or the binding in `torch._VF` that `nn.LSTM` and its kin call.
    """
    if isinstance(function, OpOverload):
        return function if function.overloadpacket in GATES else None
    packet = getattr(aten, getattr(function, "__name__", ""), None)
    if packet not in GATES or getattr(torch._VF, packet.__name__, None) is not function:
        return None
    is_packed = isinstance(args[3], (list, tuple))  # data, batch sizes, states, parameters
    return packet.data if is_packed else packet.input  # type: ignore[no-any-return]


@rule(*(getattr(packet, form) for packet in GATES for form in ("input", "data")))
def recurrent(call: Call) -> Sequence[Layouts]:
    """Let every layer and direction share one hidden axis, as `hidden_size` says once for all.

    A hidden slot whose rows, columns and biases are zero stays at zero through time: every gate then
    multiplies a candidate of tanh(0) or a state that began at zero. With a projection (`proj_size`),
    the slots that layers pass on are another axis.
    """
    if "batch_sizes" in call.arguments:
        positions, features = call.layouts("data")
        leading, time_dims = [positions], [positions, *call.layouts("batch_sizes")]
    else:
        *leading, features = call.layouts("input")
        time, batch = leading[::-1] if call["batch_first"] else leading
        time_dims = [time]
    for layout in time_dims:
        call.fix(layout, "steps of time, taken one by one")
    initial_states = call["hx"]
    # `h` and, for an LSTM, `c`: `[layers * directions, batch, passed]` and `[..., hidden]`.
    states = [
        call.layouts_of(state)
        for state in ([initial_states] if isinstance(initial_states, Tensor) else initial_states)
    ]
    for layers, state_batch, _ in states:
        call.fix(layers, "a state for each layer and direction")
        if len(leading) == 1:
            call.fix(state_batch, "sequences of different lengths")
        else:
            call.unify(state_batch, batch)
    output_features = _unify_layers(call, features, passed=states[0][2], hidden=states[-1][2])
    return [[*leading, output_features], *states]


def _unify_layers(call: Call, features: Layout, passed: Layout, hidden: Layout) -> Layout:
    """Unify the parameters of all layers; return what the last of them makes of the features."""
    is_projected = _is_projected(call)
    if not is_projected:
        call.unify(passed, hidden)
    gates = Concat((hidden,) * GATES[call.func.overloadpacket])
    parameters = iter(call.layouts_of(parameter) for parameter in call["params"])
    directions = 2 if call["bidirectional"] else 1
    for _ in range(call["num_layers"]):
        for _ in range(directions):
            # `weight_ih` is `[gates * hidden, features]`, `weight_hh` `[gates * hidden, passed]`; two
            # biases follow, then the projection `weight_hr`, `[passed, hidden]`.
            for columns in (features, passed):
                row_layout, column_layout = next(parameters)
                call.unify(row_layout, gates)
                call.unify(column_layout, columns)
            for _ in range(2 if call["has_biases"] else 0):
                call.unify(next(parameters)[0], gates)
            if is_projected:
                row_layout, column_layout = next(parameters)
                call.unify(row_layout, passed)
                call.unify(column_layout, hidden)
        # The next layer reads both directions side by side: `(passed + passed)`.
        features = Concat((passed,) * directions)
    return features


def _is_projected(call: Call) -> bool:
    """Say whether there are projections: one parameter more for each layer and direction."""
    cell_count: int = call["num_layers"] * (2 if call["bidirectional"] else 1)
    parameter_count = len(call["params"])
    return parameter_count > cell_count * (4 if call["has_biases"] else 2)


@rule(aten._pack_padded_sequence)
def pack(call: Call) -> Sequence[Layouts]:
    """Lay the steps of all sequences in one row, and count the sequences that reach each step."""
    *positions, features = call.layouts("input")
    for layout in (*positions, *call.layouts("lengths")):
        call.fix(layout, "sequences of different lengths")
    packed_row, steps = (
        call.fixed(output.shape[0], "sequences of different lengths") for output in call.outputs
    )
    return [[packed_row, features], [steps]]
