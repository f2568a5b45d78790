"""A recurrent layer whose matrices are packed, as one operator of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from graphprune.ops.block_packing import product
from graphprune.rules import Call, recurrent, rule

GATES = {operator.__name__: count for operator, count in recurrent.GATES.items()}

State = tuple[Tensor, ...]
"""Of one step: `[hidden, batch]`, and for an LSTM its cell behind it."""


def _gru(from_data: Tensor, from_state: Tensor, state: State) -> State:
    (hidden,) = state
    (reset, update, new), (state_reset, state_update, state_new) = from_data, from_state
    update = torch.sigmoid(update + state_update)
    new = torch.tanh(new + torch.sigmoid(reset + state_reset) * state_new)
    return (new + update * (hidden - new),)  # (1 - update) * new + update * hidden


def _lstm(from_data: Tensor, from_state: Tensor, state: State) -> State:
    enter, forget, candidate, leave = from_data + from_state
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda data, state, _: (torch.tanh(data + state)[0],),
    "rnn_relu": lambda data, state, _: (torch.relu(data + state)[0],),
}


def _run(
    data: Tensor,
    states: Sequence[Tensor],
    input_blocks: Tensor,
    input_places: Tensor | None,
    hidden_blocks: Tensor,
    hidden_places: Tensor | None,
    input_bias: Tensor | None,
    hidden_bias: Tensor | None,
    kind: str,
    reverse: bool,
) -> list[Tensor]:
    """Run one layer, in one direction, over time.

    Args:
        data: `[time, features, batch]`.
        states: the first one, `[hidden, batch]`, and for "lstm" the cell's.
        input_blocks: `Packed.blocks` of the matrix that meets the data, or that matrix, `[gates *
            hidden, features]`. Gates stand as in torch.nn.
        input_places: `Packed.places`, or None for a matrix that is whole.
        hidden_blocks: likewise, of the matrix that meets the state.
        hidden_places: likewise.
        input_bias: `[gates * hidden]`.
        hidden_bias: likewise.
        kind: of `GATES`.
        reverse: from the last step to the first.

    Returns:
        The output, `[time, hidden, batch]`, and the last states, as the first ones are.

    """
    gates, (time, _, batch), height = GATES[kind], data.shape, states[0].shape[0]

    def multiply(
        blocks: Tensor, places: Tensor | None, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return `[gates, hidden, count]`."""
        # A gate's last block may reach beyond its height: those rows go.
        by_gate: Tensor = product(blocks, places, value).unflatten(0, (gates, -1))[:, :height]
        return by_gate if bias is None else by_gate + bias.view(gates, -1, 1)

    # All steps at once: [features, time * batch] -> [gates, hidden, time * batch]
    from_data = multiply(input_blocks, input_places, data.transpose(0, 1).flatten(1), input_bias)
    by_step = from_data.unflatten(2, (time, batch)).movedim(2, 0)  # [time, gates, hidden, batch]
    state = tuple(states)
    outputs = []
    for step in reversed(range(time)) if reverse else range(time):
        from_state = multiply(hidden_blocks, hidden_places, state[0], hidden_bias)
        state = _STEPS[kind](by_step[step], from_state, state)
        outputs.append(state[0])
    # Copies: an operator may not return an input, as without any step, nor one value twice.
    last_states = [tensor.clone(memory_format=torch.contiguous_format) for tensor in state]
    return [torch.stack(outputs[::-1] if reverse else outputs), *last_states]


block_sparse_recurrent = library.custom_op(
    "graphprune::block_sparse_recurrent", _run, mutates_args=()
)


@block_sparse_recurrent.register_fake
def _(data: Tensor, states: Sequence[Tensor], *_: Any) -> list[Tensor]:
    output = data.new_empty(data.shape[0], *states[0].shape)
    return [output, *(state.new_empty(state.shape) for state in states)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.inputs = inputs


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """Run the layer once more, this time with derivatives."""
    # Flat for autograd: the states, which come as a list, stand between the data and all else.
    data, states, *other_inputs = ctx.inputs
    arguments: list[Any] = [
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in (data, *states, *other_inputs)
    ]
    count = len(states)
    with torch.enable_grad():
        outputs = _run(arguments[0], arguments[1 : 1 + count], *arguments[1 + count :])
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    gradients_by_leaf = dict(
        zip(leaves, torch.autograd.grad(outputs, leaves, gradients, allow_unused=True), strict=True)
    )
    data_gradient, *other_gradients = (
        gradients_by_leaf.get(x) if isinstance(x, Tensor) else None for x in arguments
    )
    return data_gradient, list(other_gradients[:count]), *other_gradients[count:]


block_sparse_recurrent.register_autograd(_differentiate, setup_context=_keep)

OPERATOR = torch.ops.graphprune.block_sparse_recurrent


@rule(OPERATOR)
def _recurrent(call: Call) -> Sequence[list[Any]]:
    """Fix everything but the batch: blocks have taken their sizes, and lowering comes last."""
    why = "a recurrent layer whose blocks are packed"
    *fixed, batch = call.layouts("data")
    for tensor in call["states"]:
        height, state_batch = call.layouts_of(tensor)
        call.unify(state_batch, batch)
        fixed.append(height)
    fixed += [
        layout
        for tensor in call.tensors[1 + len(call["states"]) :]
        for layout in call.layouts_of(tensor)
    ]
    for layout in fixed:
        call.fix(layout, why)
    return [[*(call.fixed(n, why) for n in t.shape[:-1]), batch] for t in call.outputs]
