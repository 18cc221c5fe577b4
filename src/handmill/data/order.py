"""The order of the data: a pure function of (seed, epoch, position), so that nothing about it is ever saved.

An epoch cuts the token stream into consecutive windows of `context` + 1 tokens that overlap by one, at an offset
drawn for that epoch, and visits every window once in the order of a keyed permutation. The permutation is a
Feistel network on the window's number with cycle walking (Black & Rogaway 2002), so a window's place costs
O(1) memory whatever the size of the corpus, and does not depend on how many processes share the work.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def draw(*key: int | str) -> int:
    """A 63-bit number that is a pure function of its arguments."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where a keyed permutation of 0..size-1 sends each of `positions` (N,)."""
    assert size > 0, size
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < size)
    half = max(1, -(-(size - 1).bit_length() // 2))  # bits in each half of the Feistel block
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(draw(key, r)) for r in range(ROUNDS)]
    out = positions.astype(np.uint64)
    walking = np.arange(out.size)
    while walking.size:  # a value outside the range walks on; the block is at most 4 times the range
        out[walking] = _feistel(out[walking], keys, np.uint64(half), mask)
        walking = walking[out[walking] >= np.uint64(size)]
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], keys: list[np.uint64], half: np.uint64,
             mask: np.uint64) -> NDArray[np.uint64]:
    left, right = x >> half, x & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, wraps modulo 2^64
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right


def windows_in_epoch(tokens: int, context: int) -> int:
    """How many windows one epoch of `tokens` tokens has, whatever its offset."""
    return max(0, (tokens - context) // context)


def window_starts(items: NDArray[np.int64], tokens: int, context: int, seed: int) -> NDArray[np.int64]:
    """The first token of the windows that stand at places `items` (N,) of the endless order.

    Place i belongs to epoch i // windows. Each window has context + 1 tokens: inputs and, one on, targets.
    """
    per_epoch = windows_in_epoch(tokens, context)
    assert per_epoch > 0, "the corpus is shorter than one window"
    starts = np.empty(items.size, np.int64)
    epochs, places = np.divmod(items, per_epoch)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        spare = tokens - 1 - per_epoch * context  # the offset may be anything in [0, spare]
        offset = draw(seed, "offset", int(epoch)) % (spare + 1)
        starts[here] = offset + context * permute(places[here], per_epoch, draw(seed, "order", int(epoch)))
    assert starts.size == 0 or starts.max() + context + 1 <= tokens
    return starts


def items_at(places: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Which of `size` items stand at `places` (N,) of the endless order: every epoch is a permutation of its own."""
    epochs, positions = np.divmod(places, size)
    chosen = np.empty(places.size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permute(positions[here], size, draw(seed, "order", int(epoch)))
    return chosen
