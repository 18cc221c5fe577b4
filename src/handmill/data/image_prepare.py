"""From image files to prepared arrays: read and decode, find copies, split, write; then one rename.

Decoded images go through a temporary file beside the result; in memory there are their names and less than a
kilobyte each.

N images, H height, W width, C channels.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data import image_copies, image_files, image_report
from handmill.data.corpus import Ints, Tick
from handmill.data.decoding import Decoded, Payload, Refused, decode
from handmill.data.duplicates import Hashes, mix
from handmill.data.image_copies import Copies
from handmill.data.image_files import Given, Item, Notes
from handmill.data.image_read import Read
from handmill.data.images import FORMAT, Images, write_split
from handmill.data.prepared import write_json
from handmill.data.progress import Bar
from handmill.data.splits import NAMES, Parts
from handmill.data.staging import ready
from handmill.errors import UserError
from handmill.media.image import Data
from handmill.recipe import Recipe

_AUGMENTATION = ("flip", "shift", "rotation", "colour_jitter", "binarise")
_THREADS = 4  # that decode
_AHEAD = 16  # payloads read before they are decoded
ROOM = "about three times the size of the images as raw pixels"  # that preparing takes on the disk


def prepare(recipe: Recipe, cache: Path, progress: bool = True) -> Images:
    """The prepared images in `cache`/<fingerprint>, made there if they are not whole. Raises UserError."""
    cache = Path(cache)
    found = image_files.find(recipe.data, cache)
    mark = fingerprint(recipe, found)
    return ready(Images, cache / mark, lambda work: _make(recipe, found, mark, work, progress), ROOM)


def fingerprint(recipe: Recipe, found: list[Given]) -> str:
    """16 hexadecimal digits of all that prepared images depend on; a changed file shows by its size or time."""
    settings = {key: value for key, value in dataclasses.asdict(recipe.data).items() if key not in _AUGMENTATION}
    parts = [FORMAT, settings, recipe.seed,
             [(given.test, source.name, source.bytes, source.modified) for given in found for source in given.sources]]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make(recipe: Recipe, found: list[Given], mark: str, work: Path, progress: bool) -> None:
    """Fill the work folder."""
    began = time.perf_counter()
    data, notes, scratch = recipe.data, Notes(), work / "scratch"
    total = sum(source.bytes for given in found for source in given.sources)
    with Bar("1/3 reading", total, progress) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoder's, on files that are read or refused all the same
        read = _read(found, data, notes, scratch, bar.tick)
    if notes.skipped.first:
        print(f"warning: {notes.skipped.summary()}", file=sys.stderr)
    with Bar("2/3 comparing", read.pixels.size, progress) as bar:
        signed = image_copies.sign(read.pixels, bar.tick)
        copies = image_copies.find(signed, data.near_duplicates, read.tests)
    classes, labels = _classes(read, data)
    parts = _split(copies.kept, labels, signed.exact[:, 0], read.tests, recipe)
    with Bar("3/3 writing", len(copies.kept) * int(np.prod(read.shape)), progress) as bar:
        moments = {name: _write(work, name, read, parts[name], labels, bar.tick) for name in NAMES if len(parts[name])}
    report = image_report.compose(data, notes, read, copies, classes, labels, parts, moments["train"])
    image_report.contact_sheet(work / "contact.png", read.pixels, labels, classes, copies.kept)
    manifest = {"format": FORMAT, "fingerprint": mark, "licence": data.licence,
                "sources": [_entry(given, number, read, copies, data) for number, given in enumerate(found)],
                "left_out": notes.skipped.first}
    scratch.unlink()
    seconds = time.perf_counter() - began
    report |= {"seconds": round(seconds, 3), "images_per_second": round(len(read.names) / seconds, 1)}
    write_json(work / "report.json", report)
    write_json(work / "manifest.json", manifest)
    write_json(work / "data.json", {
        "format": FORMAT, "fingerprint": mark, "shape": list(data.shape), "classes": list(classes),
        "splits": {name: {"images": len(parts[name])} for name in NAMES}})


def _read(found: list[Given], data: Data, notes: Notes, scratch: Path, tick: Tick) -> Read:
    """Decode everything into the file `scratch`. Raises UserError where no image is left."""
    read = Read(scratch, data.shape)
    with scratch.open("wb") as file:
        for number, given in enumerate(found):
            for item, result in in_order(image_files.items(given, data, notes), data):
                if isinstance(result, Refused):
                    notes.leave_out(item.source, result, item.inside)
                else:
                    file.write(np.ascontiguousarray(result.pixels).data)
                    _note(read, item, result, number, given.test)
                tick(_bytes(item))
            if not read.names or read.given[-1] != number:
                raise _nothing(given, notes)
    return read


def _nothing(given: Given, notes: Notes) -> UserError:
    key = "test_paths" if given.test else "paths"
    reason = f" ({notes.skipped.first[-1]})" if notes.skipped.first else ""
    return UserError(f"{given.text} in data.{key} holds no images that can be used and were not named before{reason}: "
                     "name PNG, JPEG, WebP, GIF or BMP images, or .zip or .npz files of them")


def _bytes(item: Item) -> int:
    if isinstance(item.payload, Path):
        return item.source.bytes
    return len(item.payload) if isinstance(item.payload, bytes) else item.payload.nbytes


def _note(read: Read, item: Item, result: Decoded, number: int, test: bool) -> None:
    count = len(item.names)
    assert len(result.pixels) == count == len(item.labels) == len(item.captions)
    read.names += item.names
    read.labels += item.labels
    read.captions += item.captions
    read.given += [number] * count
    read.tests += count * test
    read.sizes[result.height, result.width] += count
    for remark in result.remarks:
        read.remarks[remark] += count
    if isinstance(item.payload, Path):
        read.digests[item.source.name] = result.digest


def in_order(items: Iterable[Item], data: Data) -> Iterator[tuple[Item, Decoded | Refused]]:
    """The items, decoded by a few threads, in their order; only a few stand in memory at a time."""
    waiting: deque[tuple[Item, Future[Decoded | Refused]]] = deque()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for item in items:
            waiting.append((item, pool.submit(_decoded, item.payload, data)))
            if len(waiting) > _AHEAD:
                yield waiting[0][0], waiting.popleft()[1].result()
        for item, future in waiting:
            yield item, future.result()


def _decoded(payload: Payload, data: Data) -> Decoded | Refused:
    try:
        return decode(payload, data)
    except Refused as error:
        return error


def _classes(read: Read, data: Data) -> tuple[tuple[str, ...], Ints]:
    """The names of the classes in order, and each image's number among them, -1 where it has none: (N,).

    Raises UserError where a column that the recipe names is empty.
    """
    names = sorted(set(read.labels) - {""}, key=_natural)
    if data.label == "auto" and len(names) < 2:  # one sub-folder says nothing
        names = []
    for key, plain, values in (("label", ("auto", "none"), names), ("caption", ("auto",), read.captions)):
        if getattr(data, key) not in plain and not any(values):
            raise UserError(f'no image has a value in the column data.{key} = "{getattr(data, key)}": fill it in '
                            f"{image_files.TABLES[0]} or remove the setting")
    number = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([number.get(label, -1) for label in read.labels], np.int64)


def _natural(name: str) -> tuple[bool, int, str]:
    """Whole numbers in their order, before all other names."""
    number = name.isdecimal() and name.isascii() and len(name) < 20
    return not number, int(name) if number else 0, name


def _split(kept: Ints, labels: Ints, hashes: Hashes, tests: int, recipe: Recipe) -> Parts:
    data, official = recipe.data, kept[kept < tests]
    free = kept[kept >= tests]
    parts = by_class(labels[free], hashes[free], recipe.seed, data.validation, 0.0 if tests else data.test)
    parts = {name: free[numbers] for name, numbers in parts.items()}
    return parts | {"test": official} if tests else parts


def by_class(labels: Ints, hashes: Hashes, seed: int, validation: float, test: float) -> Parts:
    """Of every class, the images with the lowest hash of (seed, pixels) are held out, up to the share.

    Each class gives its share rounded so that the sum over the classes is right, and keeps one image at least for
    training. Every split asked for gets an image. Raises UserError where there are too few.
    """
    key = mix(hashes ^ mix(np.array([seed % (1 << 64)], np.uint64)))
    order = np.lexsort((key, labels))  # class after class
    _, sizes = np.unique(labels, return_counts=True)
    parts = {}
    spare = sizes - 1
    taken = np.zeros_like(sizes)
    for name, share in (("test", test), ("validation", validation)):
        wanted = np.diff(np.floor(np.cumsum(sizes) * share + 0.5).astype(np.int64), prepend=0)
        quota = np.minimum(wanted, spare)
        if share and not quota.sum():
            quota[np.argmax(spare)] = min(1, spare.max(initial=0))
            if not quota.sum():
                raise _too_few(len(labels), len(sizes))
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # (N,) place in its class
        low, high = np.repeat(taken, sizes), np.repeat(taken + quota, sizes)
        parts[name] = np.sort(order[(low <= rank) & (rank < high)])
        taken, spare = taken + quota, spare - quota
    held = np.concatenate([parts["test"], parts["validation"]])
    return {"train": np.setdiff1d(np.arange(len(labels)), held), "validation": parts["validation"],
            "test": parts["test"]}


def _too_few(images: int, classes: int) -> UserError:
    return UserError(f"{images} image{'s' * (images != 1)} in {classes} class{'es' * (classes != 1)} are too few to "
                     "hold some out, where each class keeps one for training: add images, set data.test = 0, or "
                     'data.label = "none"')


def _write(work: Path, name: str, read: Read, chosen: Ints, labels: Ints, tick: Tick) -> tuple[Any, Any]:
    """Write a split; returns mean and standard deviation of each channel, 0 to 1."""
    texts = {"names": [read.names[i] for i in chosen], "captions": [read.captions[i] for i in chosen]}
    sums = np.zeros((2, read.shape[2]))
    for block in write_split(work, name, read.pixels, chosen, labels[chosen], texts):
        values = block.reshape(-1, read.shape[2]).astype(np.float32) / 255
        sums += values.sum(0, np.float64), np.square(values).sum(0, np.float64)
        tick(block.nbytes)
    mean, square = sums / (len(chosen) * read.shape[0] * read.shape[1])
    return mean, np.sqrt(np.maximum(0, square - mean**2))


def _entry(given: Given, number: int, read: Read, copies: Copies, data: Data) -> dict[str, Any]:
    """The manifest's line of a given path. The checksum of a folder is that of its files' checksums and names."""
    mine = np.array(read.given) == number
    latest = max((source.modified for source in given.sources), default=0)
    entry = {"path": given.text, "files": len(given.sources), "bytes": sum(s.bytes for s in given.sources),
             "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(latest / 1e9)),
             "sha256": _checksum(given, read), "licence": data.licence, "images": int(mine.sum()),
             "kept": int(mine[copies.kept].sum())}
    licences = sorted({source.licence for source in given.sources if source.licence})
    return entry | ({"licence_file": licences[0]} if licences else {})


def _checksum(given: Given, read: Read) -> str | None:
    """sha256 of the one file, or of the lines "checksum, two spaces, path below the folder" in order of path."""
    lines = []
    for source in given.sources:
        digest = read.digests.get(source.name) or _digest(source.path)
        if digest:
            below = source.path.relative_to(given.top) if given.top else source.path
            lines.append((below.as_posix(), digest))
    if len(lines) == 1 and given.top is None:
        return lines[0][1]
    text = "".join(f"{digest}  {path}\n" for path, digest in sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() if lines else None


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # a folder that cannot be read, or no file at all
