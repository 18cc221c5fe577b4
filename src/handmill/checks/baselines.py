"""What a compressor and a trigram model reach on the same text, so that a network's figure means something.

N characters, K distinct n-grams, Q queries.
"""

import lzma
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handmill.checks.characters import END, Codes, Spelling

SMOOTHING = "interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999)"
_BITS = 21  # of a symbol's number: three of them fit an int64
_CHARACTERS = 0x110000  # code points there are
_STRETCHES = 64  # a large corpus is sampled in this many places
_PIECE = 1 << 20  # queries at once


def excerpt(tokens: NDArray[Any], spelling: Spelling, limit: int) -> NDArray[Any]:
    """About `limit` bytes of the tokens (N,) in stretches spread evenly over them, or all where fewer."""
    sample = np.asarray(tokens[:_PIECE])
    wanted = int(limit / max(1e-9, float(spelling.bytes[sample].mean()))) if len(sample) else 0
    if wanted >= len(tokens):
        return np.asarray(tokens)
    length = max(1, wanted // _STRETCHES)
    starts = np.linspace(0, len(tokens) - length, _STRETCHES).astype(np.int64)
    return np.concatenate([tokens[start:start + length] for start in starts])


def xz(text: NDArray[np.uint8], before: NDArray[np.uint8] | None = None) -> int:
    """Bits that `xz -9e` needs for `text`, or needs more once it has read `before`; without file headers."""
    if before is None:
        return 8 * _compressed(text.tobytes())
    known = before.tobytes()
    return 8 * (_compressed(known + text.tobytes()) - _compressed(known))


def _compressed(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


class Trigram:
    """A character trigram model, smoothed by interpolated Kneser-Ney; a document's end is a symbol too.

    p(c | ab) = (max(n(abc) - D, 0) + D t(ab) p(c | b)) / n(ab), where t counts the distinct symbols after a
    context. Below the trigrams, n(bc) counts the distinct symbols before bc. D = n1 / (n1 + 2 n2), from the
    n-grams seen once and twice. Below the single symbols lies a uniform distribution over the symbols seen
    and one more, which stands for every character not seen: the probabilities of all Unicode sum to one.
    """

    def __init__(self, codes: Codes) -> None:
        assert len(codes), "a trigram model needs some text"
        trigrams, counts = np.unique(_keys(*_in_context(_padded(codes))), return_counts=True)  # (K,)
        pairs, continued = np.unique(trigrams & _mask(2), return_counts=True)
        single, heard = np.unique(pairs & _mask(1), return_counts=True)
        self.orders = [_Order(single, heard), _Order(pairs, continued), _Order(trigrams, counts)]
        self.symbols = np.union1d(single, [END])
        self.unseen = _CHARACTERS - (len(self.symbols) - 1)  # characters not seen; END is none

    def nats(self, codes: Codes) -> NDArray[np.float64]:
        """-log p of every symbol (N,) of a text that begins where a document begins."""
        padded = _padded(codes)
        pieces = (_in_context(padded[at:at + _PIECE + 2]) for at in range(0, len(codes), _PIECE))
        return np.concatenate([-np.log(self.probability(*piece)) for piece in pieces])

    def probability(self, a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[np.float64]:
        """p(c | ab), all (Q,)."""
        known = _find(self.symbols, c) >= 0
        p = np.where(known, 1.0, 1.0 / max(1, self.unseen)) / (len(self.symbols) + 1)
        keys = _keys(a, b, c)
        for n, order in enumerate(self.orders, 1):
            p = order.refine(keys & _mask(n), p)
        return p


class _Order:
    """Counts of the n-grams of one length: keys (K,) sorted, so that those of one context are neighbours."""

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self.keys, self.counts = keys, counts
        self.contexts, first = np.unique(keys >> _BITS, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.types = np.diff(first, append=len(keys))
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # the lower bound keeps some probability for the unseen where nothing was seen only once
        self.discount = max(0.1, once / (once + 2 * twice) if once else 0.0)

    def refine(self, keys: NDArray[np.int64], p: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability at this order, from that of the order below; unchanged in a context never seen."""
        at, context = _find(self.keys, keys), _find(self.contexts, keys >> _BITS)
        count = np.where(at >= 0, self.counts[at], 0)
        refined = np.maximum(count - self.discount, 0) + self.discount * self.types[context] * p
        return np.where(context >= 0, refined / self.totals[context], p)


def _padded(codes: Codes) -> Codes:
    return np.concatenate((np.array([END, END], np.int32), codes))


def _in_context(padded: Codes) -> tuple[Codes, Codes, Codes]:
    """The two symbols before each from the third on, and it, all (N,); nothing is seen through a document's end."""
    a, b, c = padded[:-2], padded[1:-1], padded[2:]
    return np.where(b == END, np.int32(END), a), b, c


def _keys(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[np.int64]:
    return (a.astype(np.int64) << 2 * _BITS) | (b.astype(np.int64) << _BITS) | c.astype(np.int64)


def _mask(symbols: int) -> int:
    return (1 << symbols * _BITS) - 1


def _find(ordered: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Places of `wanted` in `ordered`, -1 where it is not there."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)


def bits(nats: float, per: int) -> float:
    """Nats over a text to bits for each of its characters or bytes."""
    return nats / math.log(2) / per
