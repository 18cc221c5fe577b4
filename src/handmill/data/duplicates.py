"""Exact and near duplicates, in memory that grows by a few numbers a document.

A document is the set of its 5-word shingles (Broder 1997), case and punctuation ignored. One permutation
hashing (Li, Owen & Zhang 2012), made dense by rotation (Shrivastava & Li 2014), gives its MinHash signature;
documents whose signatures agree in a band are compared, and what counts is their exact Jaccard similarity.
Documents above a MiB are compared by their first MiB.

W words, S shingles, D documents, K bins of the signature.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from handmill.data.corpus import Batch, Corpus, Ints, Tick

Hashes = npt.NDArray[np.uint64]

SHINGLE = 5  # words
BINS = 128  # K
_RECALL = 0.99  # of pairs at the threshold, by the choice of bands
_MASK = (1 << 64) - 1
_PRIME = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
_EMPTY = np.uint64(_MASK)
_SHUFFLED = np.arange(BINS) * 37 % BINS  # bins beside each other may be copies, so a band takes distant ones
_REJECTED = 1 << 20  # compared pairs that are remembered
# letters and digits in lower case, every byte of a character beyond ASCII as it is, nothing else
_LETTERS = bytes(b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else 0 for b in range(256))


def mix(values: Hashes) -> Hashes:
    """A bijection of 64 bits that spreads every bit over all (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(4)
def _powers(base: int, count: int) -> Hashes:
    values = np.full(count, base, np.uint64)
    values[0] = 1
    assert base % 2, "an even base has no inverse"
    return np.cumprod(values)


def words(data: bytes) -> tuple[Hashes, Ints]:
    """A hash of each word, and where it begins: (W,), (W,).

    The hash is a polynomial in the word's bytes, from the running sum of byte times power over all the data.
    Han characters and kana are words of their own.
    """
    letters = np.frombuffer(data.translate(_LETTERS), np.uint8)  # (N,)
    count = 1 << max(20, len(letters).bit_length())
    inside = letters > 0
    start = inside & ~np.concatenate([[False], inside[:-1]])
    if not data.isascii():
        start |= (letters >= 0xE3) & (letters <= 0xED)
    begins = np.flatnonzero(start)
    stops = np.flatnonzero(inside & ~np.concatenate([inside[1:], [False]])) + 1
    last = stops[np.searchsorted(stops, begins, side="right")]  # the end of the run of letters
    ends = np.minimum(last, np.concatenate([begins[1:], [len(letters)]]))
    terms = letters * _powers(_PRIME, count)[:len(letters)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    inverse = _powers(pow(_PRIME, -1, 1 << 64), count)
    return mix((sums[ends] - sums[begins]) * inverse[begins]), begins


def shingles(batch: Batch, size: int) -> tuple[Hashes, Ints]:
    """A hash of every run of `size` words in a document, and the document's row in the batch: (S,), (S,)."""
    hashes, places = words(batch.data)
    total = len(hashes) - size + 1
    if total < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    runs = np.zeros(total, np.uint64)
    for i in range(size):
        runs = runs * np.uint64(_PRIME) + hashes[i:i + total]
    first = np.searchsorted(batch.begins, places[:total], side="right") - 1
    inside = (first >= 0) & (places[size - 1:] < batch.ends[first])
    return mix(runs[inside]), first[inside]


def signatures(hashes: Hashes, rows: Ints, documents: int) -> Hashes:
    """The MinHash signatures of documents that have shingles: (D, K).

    Each shingle falls in one bin and each bin keeps its smallest; an empty bin copies the next filled one on
    its left, in a circle.
    """
    flat = np.full(documents * BINS, _EMPTY)
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    np.minimum.at(flat, rows * BINS + bins, hashes & np.uint64(_MASK >> 7))
    table = flat.reshape(documents, BINS)
    filled = np.where(table != _EMPTY, np.arange(BINS), -1)
    nearest = np.maximum.accumulate(filled, axis=1)
    nearest = np.where(nearest < 0, nearest[:, -1:], nearest)
    assert (nearest >= 0).all(), "a document without shingles has no signature"
    return np.take_along_axis(table, nearest, 1)[:, _SHUFFLED]


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the most selective that still finds 99 % of pairs at the threshold."""
    for rows in range(16, 0, -1):
        bands = BINS // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return BINS, 1


@dataclass(frozen=True)
class Signed:
    """What comparing documents needs: exact hashes in memory, the bands of the signatures on disk."""

    folder: Path
    exact: Hashes  # (D, 2) 128 bits of each document's text
    rows: Ints  # documents with shingles, in order: row -> document
    bands: int

    def band(self, number: int) -> Hashes:
        return np.fromfile(self.folder / f"band-{number}", np.uint64)


def sign(corpus: Corpus, folder: Path, threshold: float, tick: Tick) -> Signed:
    """Hash every document; `folder` gets one file a band."""
    folder.mkdir()
    bands, width = banding(threshold)
    assert bands * width <= BINS
    files = [(folder / f"band-{i}").open("wb") for i in range(bands)]
    exact = np.zeros((len(corpus), 2), np.uint64)
    rows: list[Ints] = []
    try:
        for batch in corpus.batches(tick=tick):
            if batch.continued:
                continue
            hashes, places = shingles(batch, SHINGLE)
            which, places = np.unique(places, return_inverse=True)
            rows.append(batch.documents[which])
            table = signatures(hashes, places, len(which))  # (D, K)
            for i, file in enumerate(files):
                file.write(_fold(table[:, i * width:(i + 1) * width], i).tobytes())
            exact[batch.documents] = _digests(batch, corpus)
    finally:
        for file in files:
            file.close()
    return Signed(folder, exact, np.concatenate([*rows, np.zeros(0, np.int64)]), bands)


def _fold(columns: Hashes, seed: int) -> Hashes:
    folded = np.full(len(columns), seed, np.uint64)
    for column in columns.T:
        folded = mix(folded * np.uint64(_PRIME) + column)
    return folded


def _digests(batch: Batch, corpus: Corpus) -> Hashes:
    """128 bits of each document's text, white space around it ignored: (D, 2)."""
    digests = [hashlib.blake2b(chunk.strip(), digest_size=16).digest() for chunk in batch.chunks()]
    if len(digests) == 1 and batch.ends[0] < corpus.sizes[batch.documents[0]]:  # it goes on
        whole = hashlib.blake2b(digest_size=16)
        for piece in corpus.batches(batch.documents):
            whole.update(piece.data)
        digests = [whole.digest()]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def exact_duplicates(exact: Hashes) -> Ints:
    """(D,) for each document the first with the same text, itself where it is the first."""
    assert exact.shape[1:] == (2,)
    order = np.lexsort((exact[:, 1], exact[:, 0]))  # stable
    ordered = exact[order]
    fresh = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    run = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
    first = np.empty(len(order), np.int64)
    first[order] = order[run]
    return first


def candidates(signed: Signed, alive: npt.NDArray[np.bool_]) -> Iterator[tuple[Ints, Ints]]:
    """Band by band, the documents that agree in it, each with the first and the previous of its bucket."""
    chosen = alive[signed.rows]
    rows = signed.rows[chosen]
    for number in range(signed.bands):
        values = signed.band(number)[chosen]
        order = np.argsort(values, kind="stable")
        same = np.concatenate([[False], values[order[1:]] == values[order[:-1]]]) if len(order) else chosen
        head = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        at = np.flatnonzero(same)
        before, first, this = rows[order[at - 1]], rows[order[head[at]]], rows[order[at]]
        again = before != first
        yield np.concatenate([first, before[again]]), np.concatenate([this, this[again]])


class Comparer:
    """Exact Jaccard similarity of documents, with the shingles of the latest ones remembered."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.shingles = lru_cache(64)(self._shingles)

    def __call__(self, a: int, b: int) -> float:
        one, other = self.shingles(a), self.shingles(b)
        common = len(np.intersect1d(one, other, assume_unique=True))
        return common / max(1, len(one) + len(other) - common)

    def _shingles(self, document: int) -> Hashes:
        data = self.corpus.head(document)
        whole = Batch(np.array([document]), data, np.array([0]), np.array([len(data)]))
        return np.unique(shingles(whole, SHINGLE)[0])


def near_duplicates(corpus: Corpus, signed: Signed, alive: npt.NDArray[np.bool_],
                    threshold: float) -> tuple[dict[int, int], list[tuple[int, int, float]]]:
    """Clusters of documents linked by a Jaccard similarity of at least the threshold.

    Returns document -> the first of its cluster, and the pairs that linked them with their similarity.
    """
    similarity = Comparer(corpus)
    parent: dict[int, int] = {}
    rejected: set[tuple[int, int]] = set()
    links: list[tuple[int, int, float]] = []
    for left, right in candidates(signed, alive):
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            one, other = _root(parent, a), _root(parent, b)
            if one == other or (a, b) in rejected:
                continue
            jaccard = similarity(a, b)
            assert a < b, "a bucket is in the order of the documents"
            if jaccard >= threshold:
                parent[max(one, other)] = min(one, other)
                links.append((a, b, jaccard))
            elif len(rejected) < _REJECTED:
                rejected.add((a, b))
    return {document: _root(parent, document) for document in parent}, links


def _root(parent: dict[int, int], document: int) -> int:
    while (above := parent.get(document, document)) != document:
        parent[document] = parent.get(above, above)  # halve the path
        document = above
    return document
