"""Train, validation and test, by document."""

import re
from itertools import pairwise

import numpy as np

from handmill.data.corpus import Corpus, Ints
from handmill.data.duplicates import Hashes, mix
from handmill.errors import UserError

NAMES = ("train", "validation", "test")
Parts = dict[str, Ints]  # split -> numbers of its documents, ascending

_BLOCK = 2000  # bytes, the least of a block cut from a single text
_BLANK = re.compile(rb"\n(?:[ \t\r]*\n)+")


def by_hash(sizes: Ints, hashes: Hashes, seed: int, validation: float, test: float) -> Parts:
    """The documents with the lowest hash of (seed, text) are held out until the shares (of bytes) are met.

    A document's side hardly depends on the others. One larger than a whole share is not held out while a
    smaller one is there. Raises UserError when there are fewer documents than splits.
    """
    _enough(len(sizes), test)
    order = np.argsort(mix(hashes ^ mix(np.array([seed % (1 << 64)], np.uint64))), kind="stable")
    held: Parts = {"test": np.zeros(0, np.int64)}
    for name, share, spare in (("test", test, 2), ("validation", validation, 1)):
        if share:
            wanted = share * sizes.sum()
            small = order[sizes[order] <= max(wanted, sizes[order].min())]
            count = int(np.searchsorted(np.cumsum(sizes[small]), wanted)) + 1
            held[name] = small[:min(count, len(order) - spare)]
            order = order[~np.isin(order, held[name])]
    return {"train": np.sort(order), "validation": np.sort(held["validation"]), "test": np.sort(held["test"])}


def by_place(sizes: Ints, validation: float, test: float) -> Parts:
    """The last documents, up to their share of bytes, are the test split, those before them validation.

    Raises UserError as `by_hash`.
    """
    _enough(len(sizes), test)
    ends, total = np.cumsum(sizes), sizes.sum()
    cut = int(np.searchsorted(ends, total * (1 - test), side="right")) if test else len(sizes)
    cut = min(cut, len(sizes) - 1) if test else cut
    middle = max(1, min(cut - 1, int(np.searchsorted(ends, total * (1 - test - validation), side="right"))))
    cut = max(cut, middle + 1)
    assert 0 < middle < cut <= len(sizes)
    numbers = np.arange(len(sizes))
    return {"train": numbers[:middle], "validation": numbers[middle:cut], "test": numbers[cut:]}


def cut_by_place(corpus: Corpus, validation: float, test: float) -> tuple[Corpus, Parts]:
    """One text of n characters cut in order: train to int(n (1 - validation - test)), then validation to
    int(n (1 - test)), then test.

    Raises UserError when a part would be empty.
    """
    total = sum(len(text) for batch in corpus.batches() for text in batch.texts())
    cuts = [0, int(total * round(1 - validation - test, 9)), int(total * (1 - test)), total]
    cuts = cuts if test else cuts[:3]
    if any(a >= b for a, b in pairwise(cuts)):
        raise UserError(f"the corpus is one text of {total} characters, too short for data.validation = "
                        f"{validation:g} and data.test = {test:g}: add text or raise the shares")
    places = _bytes_at(corpus, cuts)
    parts = corpus.subset(np.zeros(len(cuts) - 1, np.int64))
    parts.begins[:], parts.ends[:] = places[:-1], places[1:]
    return parts, {name: np.arange(i, min(i + 1, len(parts))) for i, name in enumerate(NAMES)}


def cut_in_blocks(corpus: Corpus) -> Corpus:
    """One text as documents: its paragraphs, joined up to at least 2000 bytes."""
    place, line = int(corpus.begins[0]), int(corpus.lines[0])
    begins, lines = [place], [line]
    for batch in corpus.batches():
        at = 0
        while found := _BLANK.search(batch.data, max(at, begins[-1] + _BLOCK - place)):
            line += batch.data.count(b"\n", at, found.end())
            at = found.end()
            begins.append(place + at)
            lines.append(line)
        line += batch.data.count(b"\n", at)
        place += len(batch.data)
    if len(begins) > 1 and begins[-1] == place:  # the text ends in a blank line
        begins, lines = begins[:-1], lines[:-1]
    ends = [*begins[1:], place]
    assert [place] == corpus.ends.tolist()
    sources = np.full(len(begins), corpus.sources[0])
    return Corpus(corpus.path, np.array(begins), np.array(ends), sources, np.array(lines))


def _bytes_at(corpus: Corpus, characters: list[int]) -> Ints:
    """The places in bytes of some places in characters (ascending)."""
    places: list[int] = []
    seen, at = 0, int(corpus.begins[0])
    for batch in corpus.batches():
        text = batch.data.decode()
        while len(places) < len(characters) and characters[len(places)] <= seen + len(text):
            places.append(at + len(text[:characters[len(places)] - seen].encode()))
        seen += len(text)
        at += len(batch.data)
    assert len(places) == len(characters), "a place lies beyond the text"
    return np.array(places, np.int64)


def _enough(documents: int, test: float) -> None:
    if documents < (3 if test else 2):
        names = "train, validation and test" if test else "train and validation"
        many = f"{documents} document{'s' * (documents != 1)}"
        raise UserError(f"the corpus has {many}, too few for {names}: add documents, cut them smaller "
                        '(data.document = "paragraph" or "line"), or hold out the last part of a single text '
                        '(data.split = "tail")')
