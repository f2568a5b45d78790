"""In which turn the connections of a convolution come: as many are on as are asked for, the first of them.

Filters stand in blocks that read the same channels. With a block of one filter this is the wiring of
The Power of Sparsity in Convolutional Neural Networks (arXiv 1702.06257): each filter reads a
fixed number of channels, the same at every position of its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphprune.sparsity.connections.sites import Connections, Flags

ChannelOrder: TypeAlias = npt.NDArray[np.int64]
"""By block of filters, the channels in the order in which it comes to read them, `[blocks, inputs]`."""

Pattern: TypeAlias = Callable[[int, int, int, Flags, np.random.Generator], ChannelOrder]
"""From blocks, inputs, fan-in, which blocks are read, and chance, to an order."""


def fan_in(fraction: float, inputs: int) -> int:
    """Return how many channels a filter reads: the fraction of the inputs, rounded up, one at least."""
    # less a little, since 0.07 * 100 is 7.000000000000001
    return max(1, math.ceil(fraction * inputs - 1e-9))


def blocks_of(outputs: int, inputs: int, count: int, share: int) -> npt.NDArray[np.int64]:
    """Return the block of each filter, `[outputs]`: consecutive ones, as many in each, or one fewer.

    Blocks have `share` filters at most, and fewer where the blocks would otherwise be too few to reach
    all channels, each of them reading `count`.
    """
    # -(-a // b) is a / b rounded up; 10 filters in 4 blocks are 0 0 0 1 1 2 2 2 3 3
    blocks = min(outputs, max(-(-outputs // share), -(-inputs // count)))
    return np.arange(outputs) * blocks // outputs


def random(
    blocks: int, inputs: int, count: int, live_blocks: Flags, rng: np.random.Generator
) -> ChannelOrder:
    """Let chance order the channels of each block; then exchange some, so that none is left without reader.

    Source: arXiv 1702.06257, with its rule that no connection leads to or from a dead filter.
    """
    order = np.argsort(rng.random((blocks, inputs)), axis=1)
    # `[inputs]`: how many blocks read each channel; those without live filters read none
    reader_counts = np.bincount(order[live_blocks, :count].flatten(), minlength=inputs)
    for channel in rng.permutation(np.flatnonzero(reader_counts == 0)):
        # connections to channels that another block reads too
        exchangeable = [
            (block, position)
            for block in np.flatnonzero(live_blocks)
            for position in range(count)
            if reader_counts[order[block, position]] > 1
        ]
        if not exchangeable:
            break
        block, position = exchangeable[rng.integers(len(exchangeable))]
        old_position = int(np.flatnonzero(order[block] == channel)[0])
        reader_counts[order[block, position]] -= 1
        reader_counts[channel] += 1
        # an exchange, so that the row stays an order of all channels
        order[block, [position, old_position]] = order[block, [old_position, position]]
    return order


def expander(
    blocks: int, inputs: int, count: int, live_blocks: Flags, rng: np.random.Generator
) -> ChannelOrder:
    """Deal the channels like cards: each block gets as many, and each channel is read about as often.

    Source: Prabhu et al., Deep Expander Networks (arXiv 1711.08757), regular on both sides.
    """
    order = np.argsort(rng.random((blocks, inputs)), axis=1)
    deck: list[int] = []
    for block in np.flatnonzero(live_blocks):
        hand: list[int] = []
        while len(hand) < count:
            # a deck is used up before the next one, but for cards that this hand has already
            if set(deck) <= set(hand):
                deck += rng.permutation(inputs).tolist()
            card = next(card for card in deck if card not in hand)
            deck.remove(card)
            hand.append(card)
        # the others come after the fan-in, in the random order that the row had
        order[block] = [*hand, *(card for card in order[block].tolist() if card not in hand)]
    return order


PATTERNS: dict[str, Pattern] = {"random": random, "expander": expander}
"""The patterns that look at no weights, by name."""


def ranks_of(order: ChannelOrder, block_of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the turn of each connection, `[outputs, inputs]`, given each filter's block, `[outputs]`."""
    # the inverse: `order` has the channel of each turn, this the turn of each channel
    return np.argsort(order, axis=1)[block_of]


def connections_up_to(turns: npt.NDArray[np.int64], fraction: float, live: Flags) -> Connections:
    """Return the connections of the first turns, as many as the fraction is, of live filters alone."""
    return (turns < fan_in(fraction, turns.shape[1])) & live[:, None]
