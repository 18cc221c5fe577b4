"""The proof that held-out text is not in the training text: exact, near, and word for word.

The word-for-word search reads the whole training split and is independent of the MinHash search: a window is
13 words in a row (the length GPT-3's authors used, Brown et al. 2020), case and punctuation ignored.
"""

from typing import Any

import numpy as np

from handmill.data.corpus import Corpus, Ints, Tick
from handmill.data.duplicates import Comparer, Hashes, Signed, candidates, shingles
from handmill.data.splits import Parts

WINDOW = 13  # words
_HELD = 2_000_000  # bytes of held-out text whose windows are looked for; of more a sample is
_FILTER = 22  # bits of a hash in the table that lets most training windows go at once
_MOST = 0.5  # share of a document's windows seen in training, from which on it counts as mostly seen


def check(corpus: Corpus, parts: Parts, signed: Signed | None, threshold: float,
          tick: Tick) -> dict[str, Any]:
    """Counts of held-out documents and windows that are in the training split.

    `signed` is None where one text was cut by place: its parts are compared by windows alone.
    """
    assert not len(np.intersect1d(parts["train"], _held(parts))), "a document is on both sides"
    report: dict[str, Any] = {"windows": _windows(corpus, parts, tick)}
    if signed is not None:
        side = np.zeros(len(corpus), np.int8)  # 0 not used, 1 train, 2 held out
        side[parts["train"]], side[_held(parts)] = 1, 2
        report["exact"] = int(np.isin(signed.exact[side == 2, 0], signed.exact[side == 1, 0]).sum())
        report["near"] = _near(corpus, signed, side, threshold)
    return report


def _held(parts: Parts) -> Ints:
    return np.sort(np.concatenate([parts["validation"], parts["test"]]))


def _near(corpus: Corpus, signed: Signed, side: np.ndarray[Any, Any], threshold: float) -> dict[str, Any]:
    """Pairs across the split that agree in a band of their signatures, and those of them truly near."""
    similarity = Comparer(corpus)
    pairs: set[tuple[int, int]] = set()
    for left, right in candidates(signed, side > 0):
        across = side[left] != side[right]
        pairs.update(zip(left[across].tolist(), right[across].tolist(), strict=True))
    near = sum(similarity(a, b) >= threshold for a, b in sorted(pairs))
    return {"pairs": near, "compared": len(pairs), "jaccard": threshold}


def _windows(corpus: Corpus, parts: Parts, tick: Tick) -> dict[str, Any]:
    held = _held(parts)
    hashes, documents = _held_windows(corpus, held)
    wanted, place = np.unique(hashes, return_inverse=True)
    seen = _seen(corpus, parts["train"], wanted, tick)[place]
    numbers, row = np.unique(documents, return_inverse=True)
    share = np.bincount(row, weights=seen) / np.maximum(1, np.bincount(row))
    return {"words": WINDOW, "windows": len(hashes), "seen": int(seen.sum()),
            "share": float(seen.mean()) if len(seen) else None,
            "documents": len(numbers), "held_out_documents": len(held),
            "mostly_seen": int((share >= _MOST).sum())}


def _held_windows(corpus: Corpus, held: Ints) -> tuple[Hashes, Ints]:
    """Windows of the held-out documents, or of every n-th batch of them, and the document of each."""
    step = 1 + int(corpus.sizes[held].sum()) // _HELD
    found, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, batch in enumerate(corpus.batches(held)):
        if number % step == 0:
            hashes, rows = shingles(batch, WINDOW)
            found.append(hashes)
            documents.append(batch.documents[rows])
    return np.concatenate(found), np.concatenate(documents)


def _seen(corpus: Corpus, train: Ints, wanted: Hashes, tick: Tick) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each of the wanted hashes (ascending), whether the training split has it: (len(wanted),)."""
    assert (wanted[1:] > wanted[:-1]).all(), "the search needs them ascending"
    seen = np.zeros(len(wanted), bool)
    if not len(wanted):
        return seen
    shift = np.uint64(64 - _FILTER)
    table = np.zeros(1 << _FILTER, bool)
    table[(wanted >> shift).astype(np.int64)] = True
    for batch in corpus.batches(train, tick):
        hashes = shingles(batch, WINDOW)[0]
        hashes = hashes[table[(hashes >> shift).astype(np.int64)]]
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        seen[place[wanted[place] == hashes]] = True
    return seen
