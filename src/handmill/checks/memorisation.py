"""Copying: how much of a text is found word for word in the training text.

The training text streams past the windows of the texts in question: a rolling hash names candidates and a
comparison of the characters decides, so nothing is counted that is not there. Memory grows with the texts in
question, not with the training text.

M characters of the texts, L characters of a window, W windows, K distinct windows, N characters of a piece.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handmill.checks.characters import END, Codes, string

_BETWEEN = END + 1  # stands between texts; the training text does not hold it
_BASE = 0x9E3779B97F4A7C15  # of the hash: any odd number of 64 bits
_TABLE = 22  # bits of the hash that the first look-up uses: a table of 4 MiB
_COMPARED = 1 << 22  # characters compared at once


class Longest(NamedTuple):
    """The longest run of a text that stands in the training text too."""

    characters: int
    text: int  # which of the texts
    document: int  # of the training split, from 0
    copied: str


class Counts(NamedTuple):
    """Windows of one length in each text, and those found in the training text; both (texts,)."""

    found: NDArray[np.int64]
    windows: NDArray[np.int64]


class Windows:
    """All windows of `length` characters of some text (M,), and which of them have been found elsewhere."""

    def __init__(self, codes: Codes, length: int, base: int = _BASE) -> None:
        assert length > 0
        self.codes, self.length = codes, length
        before = np.concatenate(([0], np.cumsum(codes == _BETWEEN)))
        self.starts = np.flatnonzero(before[length:] == before[:max(0, len(before) - length)])  # (W,)
        self.base, perfect = base, False
        while not perfect:
            hashes = rolling_hash(codes, length, self.base)[self.starts] if len(self.starts) else _NONE
            self.hashes, first, self.which = np.unique(hashes, return_index=True, return_inverse=True)
            self.first = self.starts[first]  # (K,), and which of them each window is: (W,)
            perfect = self._same_text(self.starts, self.first[self.which])
            self.base = self.base if perfect else (self.base * _BASE + 2) % (1 << 64)
        self.found = np.zeros(len(self.hashes), bool)  # (K,)
        self.where = np.full(len(self.hashes), -1)  # (K,) a place where it was found
        self.table = np.zeros(1 << _TABLE, bool)
        self.table[self.hashes >> np.uint64(64 - _TABLE)] = True

    def search(self, text: Codes, offset: int = 0) -> None:
        """Mark the windows that stand in `text` (N,); `offset` is added to the places kept."""
        if len(text) < self.length or not len(self.hashes):
            return
        hashes = rolling_hash(text, self.length, self.base)
        places = np.flatnonzero(self.table[hashes >> np.uint64(64 - _TABLE)])
        slots = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        hit = self.hashes[slots] == hashes[places]
        for place, slot in _pieces(places[hit], slots[hit], max(1, _COMPARED // self.length)):
            new = ~self.found[slot]
            place, slot = place[new], slot[new]
            mine = _windows(self.codes, self.first[slot], self.length)
            same = (_windows(text, place, self.length) == mine).all(1)
            self.found[slot[same]] = True
            self.where[slot[same]] = place[same] + offset

    def _same_text(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
        """Whether windows that share a hash are the same text, so that one of them may stand for all."""
        return all((_windows(self.codes, x, self.length) == _windows(self.codes, y, self.length)).all()
                   for x, y in _pieces(a, b, max(1, _COMPARED // self.length)))


_NONE = np.empty(0, np.uint64)


def copied(texts: Sequence[Codes], training: Iterable[Codes], lengths: Sequence[int],
           longest_of: int = 0) -> tuple[dict[int, Counts], Longest | None]:
    """For each length, how many windows of each text stand in `training`: pieces, with END between documents.

    Of the first `longest_of` texts the longest run found is given too, unless no character of them is found.
    """
    joined, owner = _join(texts)
    searches = [Windows(joined, length) for length in lengths]
    asked = joined[:int((owner < longest_of).sum())]
    best, longest = 0, None
    overlap = max([*lengths, *(len(text) for text in texts)])
    for piece, begun in _overlapping(training, overlap):
        for windows in searches:
            windows.search(piece)
        run, found = _longest(asked, piece, best)
        if found is not None:
            start, place = found
            document = begun + int((piece[:place + 1] == END).sum()) - 1
            best, longest = run, Longest(run, int(owner[start]), document, string(asked[start:start + run]))
    return {w.length: _count(w, owner, len(texts)) for w in searches}, longest


def rolling_hash(codes: Codes, length: int, base: int = _BASE) -> NDArray[np.uint64]:
    """sum over j of codes[i + j] base^(L - 1 - j) mod 2^64, for every i: (M - L + 1,) (Karp and Rabin 1987).

    The hash of 2n characters comes from two hashes of n, so the work is log L passes.
    """
    count = len(codes) - length + 1
    assert count > 0
    power, span, done = codes.astype(np.uint64), 1, 0
    total = np.zeros(len(codes) + 1, np.uint64)
    factor = base
    while True:
        if length & span:  # the window so far, then `span` characters more
            total = total[:len(power) - done] * np.uint64(factor) + power[done:]
            done += span
        if done == length:
            return total[:count]
        power = power[:-span] * np.uint64(factor) + power[span:]
        span, factor = 2 * span, factor * factor % (1 << 64)


def _longest(asked: Codes, piece: Codes, best: int) -> tuple[int, tuple[int, int] | None]:
    """The longest run over `best` that both hold, with its place in each: growing steps, then bisection."""
    found, low, high, step = None, best, min(len(asked), len(piece)) + 1, 1
    while low + 1 < high:
        middle = low + step if step and low + step < high else (low + high) // 2
        match = _first_match(asked, piece, middle)
        if match is None:
            high, step = middle, 0
        else:
            found, low, step = match, middle, 2 * step
    return low, found


def _first_match(asked: Codes, piece: Codes, length: int) -> tuple[int, int] | None:
    windows = Windows(asked, length)
    windows.search(piece)
    slot = int(windows.found.argmax()) if windows.found.any() else -1
    return (int(windows.first[slot]), int(windows.where[slot])) if slot >= 0 else None


def _overlapping(training: Iterable[Codes], overlap: int) -> Iterator[tuple[Codes, int]]:
    """Pieces that repeat the last characters of the one before, with the ends that came before each piece."""
    tail, begun = np.empty(0, np.int32), 0
    for codes in training:
        piece = np.concatenate((tail, codes))
        yield piece, begun
        tail = piece[max(0, len(piece) - overlap):]
        begun += int((piece[:len(piece) - len(tail)] == END).sum())


def _join(texts: Sequence[Codes]) -> tuple[Codes, NDArray[np.int64]]:
    """All texts in one, each followed by a symbol of its own, and which text each symbol belongs to, (M,)."""
    joined = np.concatenate([np.append(text, _BETWEEN) for text in texts]).astype(np.int32)
    return joined, np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])


def _count(windows: Windows, owner: NDArray[np.int64], texts: int) -> Counts:
    belongs = owner[windows.starts]  # (W,)
    found = np.bincount(belongs, windows.found[windows.which], minlength=texts)
    return Counts(found.astype(np.int64), np.bincount(belongs, minlength=texts))


def _windows(codes: Codes, starts: NDArray[np.int64], length: int) -> Codes:
    rows: Codes = codes[starts[:, None] + np.arange(length)]  # (K, L)
    return rows


def _pieces(a: NDArray[np.int64], b: NDArray[np.int64],
            size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for start in range(0, len(a), size):
        yield a[start:start + size], b[start:start + size]
