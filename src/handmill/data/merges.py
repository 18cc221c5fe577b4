"""Learning the merges of a byte-pair encoding (Sennrich et al. 2016) in NumPy.

All distinct words lie in one array, joined by a separator. A merge touches only the places where its pair
occurs, and all of those at once; the counts of the pairs around them are taken off before and put back after.
The cost is that of the places touched, not of the whole text times the merges.
"""

import heapq
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int32]  # in the array of symbols, which is at most a few million long
_BREAK, _GONE = -1, -2  # between words; absorbed into the symbol on the left
_CUT = 256  # bytes; longer words are learnt from in pieces


@dataclass(frozen=True)
class Learnt:
    """The merges, and how they cut the words they were learnt from."""

    merges: list[tuple[int, int]]
    words: list[bytes]
    tokens: "array[int]"  # of all words, one after another
    bounds: "array[int]"  # where each word begins, and the end


def learn(words: Mapping[bytes, int], merges: int) -> Learnt:
    """At most `merges` pairs of tokens in the order learnt: each the most frequent, of equals the smallest.

    Fewer when no pair occurs twice. A pair whose bytes are a token already is passed over, so that bytes and
    tokens stay one to one and the result can be written as an ordinary vocabulary.
    """
    state = _Words(words, 257 + merges)
    pieces = [bytes([value]) for value in range(256)]
    known = set(pieces)
    learnt: list[tuple[int, int]] = []
    while len(learnt) < merges and (pair := state.best()) is not None:
        left, right = pair
        piece = pieces[left] + pieces[right]
        if piece in known:
            continue
        known.add(piece)
        pieces.append(piece)
        state.merge(left, right, 256 + len(learnt))
        learnt.append(pair)
    tokens, bounds = state.cuts()
    whole = [word for word in words if len(word) <= _CUT]
    assert len(bounds) == len(whole) + 1
    assert bounds[-1] == len(tokens)
    return Learnt(learnt, whole, tokens, bounds)


class _Words:
    """The words as linked symbols, with the count and the places of every pair of neighbours."""

    def __init__(self, words: Mapping[bytes, int], base: int) -> None:
        chunks = [(word, n) for word, n in words.items() if len(word) <= _CUT]
        self.whole = len(chunks)  # words, and after them the pieces of long ones
        chunks += [(word[i:i + _CUT], n) for word, n in words.items() if len(word) > _CUT
                   for i in range(0, len(word), _CUT)]
        joined = b"\xff" + b"".join(chunk + b"\xff" for chunk, _ in chunks)  # no UTF-8 text holds byte 255
        self.symbols = np.frombuffer(joined, np.uint8).astype(np.int32)  # (N,)
        self.symbols[self.symbols == 0xFF] = _BREAK
        lengths = np.array([1] + [len(chunk) + 1 for chunk, _ in chunks])
        self.weights = np.repeat(np.array([0] + [n for _, n in chunks], np.int64), lengths)  # (N,)
        size = len(self.symbols)
        self.after, self.before = np.arange(1, size + 1, dtype=np.int32), np.arange(-1, size - 1, dtype=np.int32)
        self.base = base
        self.counts: dict[int, int] = {}
        self.places: dict[int, Places] = {}
        self.heap: list[tuple[int, int]] = []
        self._put(np.arange(size - 1, dtype=np.int32))

    def best(self) -> tuple[int, int] | None:
        """Take out the pair with the highest count, or None when none occurs twice."""
        while self.heap:
            negative, key = heapq.heappop(self.heap)
            count = self.counts[key]
            if count > 1 and count < -negative:  # a merge nearby has taken some away since
                heapq.heappush(self.heap, (-count, key))
            else:
                del self.counts[key]
                if count > 1:
                    return divmod(key, self.base)
        return None

    def merge(self, left: int, right: int, new: int) -> None:
        """Make every occurrence of the pair one symbol."""
        at = self._occurrences(left, right)  # (P,) ascending
        assert len(at), "a pair with a count stands somewhere"
        absorbed = self.after[at]
        following = self.after[absorbed]
        fresh = np.flatnonzero(np.concatenate([[True], following[:-1] != at[1:]]))  # not right behind another
        self._take(np.concatenate([self.before[at[fresh]], absorbed]))
        self.symbols[at], self.symbols[absorbed] = new, _GONE
        self.after[at], self.before[following] = following, at
        self._put(np.concatenate([self.before[at[fresh]], at]))

    def cuts(self) -> "tuple[array[int], array[int]]":
        """The tokens of the words as they are merged now, and where each word's begin."""
        tokens = self.symbols[np.flatnonzero(self.symbols != _GONE)][1:]
        ends = np.flatnonzero(tokens == _BREAK)[:self.whole]
        tokens = tokens[:ends[-1] + 1] if self.whole else tokens[:0]
        bounds = np.concatenate([[0], ends - np.arange(len(ends))])
        return array("I", tokens[tokens >= 0].astype(np.uint32).tobytes()), array("q", bounds.tobytes())

    def _occurrences(self, left: int, right: int) -> Places:
        at = np.sort(self.places.pop(left * self.base + right))
        at = at[np.flatnonzero((self.symbols[at] == left) & (self.symbols[self.after[at]] == right))]
        if left != right or len(at) < 2:
            return at
        # in "aaaa" only every other pair can be merged: keep the even places of each run
        fresh = np.concatenate([[True], at[1:] != self.after[at[:-1]]])
        first = np.maximum.accumulate(np.where(fresh, np.arange(len(at)), 0))
        return at[np.flatnonzero((np.arange(len(at)) - first) % 2 == 0)]

    def _groups(self, at: Places, least: int = 1) -> Iterator[tuple[int, int, Places]]:
        """Key, count and places of each pair that begins at one of the places, if it occurs `least` times there."""
        left, right = self.symbols[at], self.symbols[self.after[at]]
        inside = (left >= 0) & (right >= 0)
        at, keys = at[inside], left[inside].astype(np.int64) * self.base + right[inside]
        if not len(at):
            return
        order = np.argsort(keys, kind="stable")
        at, keys = at[order], keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.add.reduceat(self.weights[at], begins)
        often = np.flatnonzero(counts >= least)
        ends = np.append(begins[1:], len(at))[often].tolist()
        columns = (keys[begins[often]].tolist(), counts[often].tolist(), begins[often].tolist(), ends)
        for key, count, begin, end in zip(*columns, strict=True):
            yield key, count, at[begin:end]

    def _take(self, at: Places) -> None:
        for key, count, _ in self._groups(at):
            if key in self.counts:
                self.counts[key] -= count
                assert self.counts[key] >= 0, "more taken off than was there"

    def _put(self, at: Places) -> None:
        """Count pairs that a merge has made. All of a pair are made at once, by the merge that makes the younger of
        its symbols, so one that occurs only once will never be merged."""
        for key, count, places in self._groups(at, least=2):
            assert key not in self.places
            self.counts[key] = count
            self.places[key] = places
            heapq.heappush(self.heap, (-count, key))
