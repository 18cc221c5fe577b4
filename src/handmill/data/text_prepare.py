"""From sources to packed tokens: read and clean, compare, split, learn the tokenizer, pack; then one rename.

The text goes through a temporary file beside the result; in memory there are a few numbers a document.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data import duplicates, overlap, splits
from handmill.data.corpus import Corpus, Ints, Tick
from handmill.data.ingest import ingest
from handmill.data.packed import FORMAT, Packed, write_split
from handmill.data.prepared import write_json
from handmill.data.progress import Bar
from handmill.data.sources import Source, find
from handmill.data.splits import Parts
from handmill.data.staging import ready
from handmill.data.text_report import compose
from handmill.media import tokenizers
from handmill.media.tokenizers import Tokenizer
from handmill.recipe import Recipe

_THRESHOLD = 0.8  # Jaccard similarity of the overlap check where near duplicates are kept
_EXAMPLES = 20  # duplicates named in the report
ROOM = "about three times the unpacked size of the corpus"


def prepare(recipe: Recipe, cache: Path, progress: bool = True) -> Packed:
    """The prepared corpus in `cache`/<fingerprint>, made there if it is not whole. Raises UserError."""
    cache = Path(cache)
    sources = find(recipe.data.paths, cache)
    mark = fingerprint(recipe, sources)
    return ready(Packed, cache / mark, lambda work: _make(recipe, sources, mark, work, progress), ROOM)


def fingerprint(recipe: Recipe, sources: list[Source]) -> str:
    """16 hexadecimal digits of all that prepared data depend on; a changed file shows by its size or time."""
    parts = [FORMAT, dataclasses.asdict(recipe.data), _codec(recipe), recipe.seed,
             [(source.name, source.bytes, source.modified) for source in sources]]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make(recipe: Recipe, sources: list[Source], mark: str, work: Path, progress: bool) -> None:
    """Fill the work folder."""
    began = time.perf_counter()
    data, scratch = recipe.data, work / "scratch"
    scratch.mkdir()
    with Bar("1/4 reading", sum(source.bytes for source in sources), progress) as bar:
        corpus, notes = ingest(sources, data, scratch, bar.tick)
    if notes.skipped.first:
        print(f"warning: {notes.skipped.summary()}", file=sys.stderr)
    notes.bytes, notes.read = int(corpus.sizes.sum()), len(corpus)
    if len(corpus) == 1 and data.split == "hash":
        corpus = splits.cut_in_blocks(corpus)
        notes.cut = f"cut at blank lines into {len(corpus):,}"
    with Bar("2/4 comparing", 2 * notes.bytes, progress) as bar:
        threshold = data.near_duplicates or _THRESHOLD
        signed = duplicates.sign(corpus, scratch / "bands", threshold, bar.tick)
        kept, notes.copies = _unique(corpus, signed, data.near_duplicates, sources)
        cut, parts = _split(corpus, kept, signed, recipe)
        notes.cut = notes.cut if cut is corpus else "cut by place"
        notes.overlap = overlap.check(cut, parts, signed if cut is corpus else None, threshold, bar.tick)
    with Bar("3/4 tokenizer", int(cut.sizes[parts["train"]].sum()), progress) as bar:
        codec = tokenizers.train(recipe.codec, _sample(cut, parts["train"], recipe.codec, bar.tick))
        codec.save(work / "codec")
    with Bar("4/4 packing", int(cut.sizes.sum()), progress) as bar:
        about = {name: _pack(cut, parts[name], work, name, codec, bar.tick) for name in splits.NAMES}
    report = compose(recipe, notes, cut, parts, about, codec, work, sources)
    shutil.rmtree(scratch)
    assert sum(split["documents"] for split in about.values()) == len(kept) or cut is not corpus
    seconds = time.perf_counter() - began
    report |= {"seconds": round(seconds, 3), "megabytes_per_second": round(notes.bytes / 1e6 / seconds, 3)}
    write_json(work / "report.json", report)
    write_json(work / "manifest.json", {"format": FORMAT, "fingerprint": mark, "licence": data.licence,
                                        "sources": notes.manifest, "left_out": notes.skipped.first})
    write_json(work / "data.json", {
        "format": FORMAT, "fingerprint": mark, "dtype": codec.dtype.name, "size": codec.size,
        "end": codec.end, "codec": _codec(recipe), "splits": about})


def _unique(corpus: Corpus, signed: duplicates.Signed, threshold: float,
            sources: list[Source]) -> tuple[Ints, dict[str, Any]]:
    """The documents that are not copies of earlier ones, and what the report says of the copies."""
    first = duplicates.exact_duplicates(signed.exact)
    alive = first == np.arange(len(corpus))
    exact = np.flatnonzero(~alive)
    examples = [(document, int(first[document]), 1.0) for document in exact[:_EXAMPLES].tolist()]
    dropped: dict[int, int] = {}
    if threshold:
        dropped, links = duplicates.near_duplicates(corpus, signed, alive, threshold)
        dropped = {document: root for document, root in dropped.items() if document != root}
        alive[list(dropped)] = False
        examples += [(max(a, b), min(a, b), jaccard) for a, b, jaccard in links[:_EXAMPLES]]

    def name(document: int) -> str:
        return f"{sources[corpus.sources[document]].name}:{corpus.lines[document]}"

    return np.flatnonzero(alive), {
        "exact": len(exact), "near": len(dropped), "jaccard": threshold,
        "first": [{"copy": name(a), "of": name(b), "jaccard": round(j, 3)} for a, b, j in examples]}


def _split(corpus: Corpus, kept: Ints, signed: duplicates.Signed, recipe: Recipe) -> tuple[Corpus, Parts]:
    """The documents of each split; the corpus is another one only where a single text was cut by place."""
    data, sizes = recipe.data, corpus.sizes[kept]
    if data.split == "tail" and len(kept) == 1:
        return splits.cut_by_place(corpus.subset(kept), data.validation, data.test)
    if data.split == "tail":
        parts = splits.by_place(sizes, data.validation, data.test)
    else:
        parts = splits.by_hash(sizes, signed.exact[kept, 0], recipe.seed, data.validation, data.test)
    return corpus, {name: kept[numbers] for name, numbers in parts.items()}


def _sample(corpus: Corpus, train: Ints, settings: Any, tick: Tick) -> Iterator[str]:
    """The training split's text, or for BPE every n-th batch of it so that it comes to about `sample` MB."""
    step = 1
    if settings.kind == "bpe":
        step = -(-int(corpus.sizes[train].sum()) // (settings.sample * 1_000_000))
    for number, batch in enumerate(corpus.batches(train, tick)):
        if number % step == 0:
            yield from batch.texts()


def _pack(corpus: Corpus, chosen: Ints, work: Path, split: str, codec: Tokenizer,
          tick: Tick) -> dict[str, int]:
    texts = ((batch.texts(), batch.continued) for batch in corpus.batches(chosen, tick))
    return write_split(work, split, codec, texts) | {"bytes": int(corpus.sizes[chosen].sum())}


def _codec(recipe: Recipe) -> dict[str, Any]:
    """The [codec] table; special tokens only where there are some, so that data prepared without them stay good."""
    return {key: value for key, value in dataclasses.asdict(recipe.codec).items() if value != ()}
