"""From MIDI files and chorales to packed tokens: read and fit, find copies, split, write; then one rename.

The tokens go through a temporary file beside the result; in memory there is less than a kilobyte a piece.

T tokens, V vocabulary.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data import music_files, music_fit, music_report, splits
from handmill.data.corpus import Tick
from handmill.data.decoding import Refused
from handmill.data.image_files import Given
from handmill.data.music import FORMAT, Pieces, write_split
from handmill.data.music_files import Item, Notes
from handmill.data.music_read import Copies, Piece, Read
from handmill.data.prepared import write_json
from handmill.data.progress import Bar
from handmill.data.splits import NAMES, Parts
from handmill.data.staging import ready
from handmill.errors import UserError
from handmill.media.keys import key_of_score
from handmill.media.music import Data
from handmill.media.music_tokens import UNKNOWN, Asked, Events, Frames, Tokens
from handmill.media.music_words import key_of
from handmill.recipe import Recipe

_EVENTS_GRID = 4  # steps a quarter note of chorales that become events
ROOM = "about the size of the MIDI files"  # that preparing takes on the disk


def prepare(recipe: Recipe, cache: Path, progress: bool = True) -> Pieces:
    """The prepared pieces in `cache`/<fingerprint>, made there if they are not whole. Raises UserError."""
    cache = Path(cache)
    found = music_files.find(recipe.data, cache)
    mark = fingerprint(recipe, found)
    return ready(Pieces, cache / mark, lambda work: _make(recipe, found, mark, work, progress), ROOM)


def fingerprint(recipe: Recipe, found: list[Given]) -> str:
    """16 hexadecimal digits of all that prepared pieces depend on; a changed file shows by its size or time."""
    settings = {key: value for key, value in dataclasses.asdict(recipe.data).items() if not key.startswith("transpose")}
    parts = [FORMAT, settings, dataclasses.asdict(recipe.codec), recipe.seed,
             [(source.name, source.bytes, source.modified) for given in found for source in given.sources]]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make(recipe: Recipe, found: list[Given], mark: str, work: Path, progress: bool) -> None:
    """Fill the work folder."""
    began = time.perf_counter()
    data, notes, scratch = recipe.data, Notes(), work / "scratch"
    with Bar("1/2 reading", sum(source.bytes for given in found for source in given.sources), progress) as bar:
        read = _read(found, recipe, notes, scratch, bar.tick)
    if notes.skipped.first:
        print(f"warning: {notes.skipped.summary()}", file=sys.stderr)
    copies = find_copies(read.pieces)
    kept = [number for number in range(len(read.pieces)) if number not in copies.of]
    codec = _codec(recipe, [read.pieces[number] for number in kept])
    codec.save(work / "codec")
    parts = _split(read.pieces, kept, recipe)
    with Bar("2/2 writing", 2 * sum(read.pieces[number].tokens for number in kept), progress) as bar:
        about = {name: _write(work, name, read, parts[name], codec, bar.tick) for name in NAMES}
    report = music_report.compose(recipe, notes, read, copies, parts, about, codec)
    music_report.rolls(work / "roll.png", read, parts["train"])
    scratch.unlink()
    report |= {"seconds": round(time.perf_counter() - began, 3)}
    write_json(work / "report.json", report)
    write_json(work / "manifest.json", {
        "format": FORMAT, "fingerprint": mark, "licence": data.licence, "left_out": notes.skipped.first,
        "sources": [_entry(given, number, read, kept, data) for number, given in enumerate(found)]})
    write_json(work / "data.json", {
        "format": FORMAT, "fingerprint": mark, "dtype": codec.dtype.name, "size": codec.size, "end": codec.end,
        "codec": dataclasses.asdict(codec.settings), "splits": about})


def _read(found: list[Given], recipe: Recipe, notes: Notes, scratch: Path, tick: Tick) -> Read:
    """Fit everything into the file `scratch`. Raises UserError where a path gives no piece."""
    data, read = recipe.data, Read(scratch, music_fit.bare(recipe.codec))
    steps = data.grid or getattr(recipe.codec, "steps", _EVENTS_GRID)
    is_note, place = music_fit.struck(read.bare), 0
    with scratch.open("wb") as file:
        for number, given in enumerate(found):
            for item in music_files.items(given, data, steps, notes, tick):
                try:
                    tokens, changes = music_fit.fit(item.score, read.bare)
                    count = int(is_note[tokens].sum())
                    if count < data.shortest:
                        raise Refused("too short", f"it has {count} notes, below data.shortest = {data.shortest}: "
                                      "leave it out or lower that")
                except Refused as error:
                    notes.unfit(item, error)
                    continue
                file.write(tokens.astype("<u2").data)
                read.pieces.append(_piece(item, number, tokens, place, count, read.bare, data))
                _count(read.changes, changes)
                place += len(tokens)
            if not read.pieces or read.pieces[-1].given != number:
                raise _nothing(given, notes)
    return read


def _nothing(given: Given, notes: Notes) -> UserError:
    reason = f" ({notes.skipped.first[-1]})" if notes.skipped.first else ""
    return UserError(f"{given.text} in data.paths holds no pieces that can be used and were not named before{reason}: "
                     "name MIDI files, folders or .zip archives of them, or chorales in .json")


def _piece(item: Item, given: int, tokens: Tokens, place: int, notes: int, codec: Frames | Events,
           data: Data) -> Piece:
    score = item.score
    signature, estimate = score.keys[0][1] if score.keys else UNKNOWN, key_of_score(score).key
    key = signature if signature != UNKNOWN and data.key == "file" else estimate
    if data.key not in ("file", "estimate"):
        key = key_of(data.key)
    steps = codec.steps(tokens) if isinstance(codec, Frames) else 0
    return Piece(item.name, given, item.split, Asked(key, item.tempo, item.folder), signature, estimate,
                 music_fit.shape(tokens, codec), place, len(tokens), notes, steps, float(score.seconds(score.end)))


def _count(counts: dict[str, Counter[str]], changes: Counter[str]) -> None:
    for change, times in changes.items():
        if times:
            counts.setdefault(change, Counter()).update(pieces=1, times=times)


def find_copies(pieces: list[Piece]) -> Copies:
    """The pieces that have the intervals and durations of another, of which the first stays.

    One whose file brings its split always stays, and before others, so that published splits are kept as they are.
    """
    first: dict[bytes, int] = {}
    of, across = {}, 0
    for number in sorted(range(len(pieces)), key=lambda number: not pieces[number].split):
        other = first.setdefault(pieces[number].shape.mark, number)
        if other != number and not pieces[number].split:
            of[number] = other
        across += bool(pieces[number].split) and pieces[number].split != pieces[other].split
    return Copies(of, across)


def _codec(recipe: Recipe, pieces: list[Piece]) -> Frames | Events:
    """The codec, with the names that were found where the recipe lists none. Raises UserError where there are none."""
    settings = recipe.codec
    if recipe.data.names == "none":
        if settings.names:
            raise UserError('codec.names is given, but data.names = "none" names no piece: set data.names = "folder"')
        return music_fit.codec_of(settings)
    found = {piece.asked.name for piece in pieces} - {""}
    if not found & {*(settings.names or found)}:
        there = f"; the sub-folders are {', '.join(sorted(found)[:8])}" if found else ""
        raise UserError('data.names = "folder", but no piece lies in a sub-folder '
                        + (f"of codec.names = {list(settings.names)}{there}" if settings.names else
                           "of the folder in data.paths")
                        + ': put the pieces of each composer or genre into one, or set data.names = "none"')
    return music_fit.codec_of(dataclasses.replace(settings, names=settings.names or tuple(sorted(found))))


def _split(pieces: list[Piece], kept: list[int], recipe: Recipe) -> Parts:
    """The pieces of each split: as their files bring them, the others by hash.

    Where files bring a validation split, all others are trained on. Raises UserError where there are too few.
    """
    data = recipe.data
    brought = {name: [i for i in kept if pieces[i].split == name] for name in NAMES}
    free = np.array([i for i in kept if not pieces[i].split], np.int64)
    drawn = {name: free[:0] for name in NAMES} | {"train": free}
    if not brought["validation"]:
        test = 0.0 if brought["test"] else data.test
        _enough(len(free), test)
        sizes = np.ones(len(free), np.int64)  # shares are of pieces, so that one of hours takes no split for itself
        hashes = np.frombuffer(b"".join(pieces[i].shape.mark[:8] for i in free), np.uint64)
        parts = splits.by_hash(sizes, hashes, recipe.seed, data.validation, test)
        drawn = {name: free[numbers] for name, numbers in parts.items()}
    parts = {name: np.sort(np.concatenate([np.array(brought[name], np.int64), drawn[name]])) for name in NAMES}
    if not len(parts["train"]):
        raise UserError("no piece in data.paths is for training: give the chorales a split named train, or add MIDI "
                        "files")
    return parts


def _enough(pieces: int, test: float) -> None:
    if pieces < (3 if test else 2):
        raise UserError(f"{pieces} piece{'s' * (pieces != 1)} that {'are' if pieces != 1 else 'is'} no copy "
                        f"{'are' if pieces != 1 else 'is'} too few for train and validation{' and test' * bool(test)}: "
                        f"add pieces{' or set data.test = 0' * (bool(test) and pieces == 2)}")


def _write(work: Path, split: str, read: Read, chosen: Any, codec: Frames | Events, tick: Tick) -> dict[str, Any]:
    """Write a split; returns what data.json says of it."""
    pieces = [read.pieces[number] for number in chosen]
    tokens = write_split(work, split, codec, [piece.name for piece in pieces], _whole(read, pieces, codec, tick))
    return {"documents": len(pieces), "tokens": tokens, "notes": sum(piece.notes for piece in pieces),
            "steps": sum(piece.steps for piece in pieces),
            "seconds": round(sum(piece.seconds for piece in pieces), 3)}


def _whole(read: Read, pieces: list[Piece], codec: Frames | Events, tick: Tick) -> Iterator[Tokens]:
    """Header and tokens of each piece: those of the bare codec, moved behind the sections of what is asked."""
    names = codec.settings.names
    for piece in pieces:
        asked = piece.asked if piece.asked.name in names else dataclasses.replace(piece.asked, name="")
        tokens = read.tokens(piece) + np.uint16(codec.size - read.bare.size)
        yield np.concatenate([np.array(codec.header(asked), np.uint16), tokens])
        tick(tokens.nbytes)


def _entry(given: Given, number: int, read: Read, kept: list[int], data: Data) -> dict[str, Any]:
    """The manifest's line of a given path. The checksum of a folder is that of its files' checksums and names."""
    latest = max(source.modified for source in given.sources)
    entry = {"path": given.text, "files": len(given.sources), "bytes": sum(s.bytes for s in given.sources),
             "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(latest / 1e9)),
             "sha256": _checksum(given), "licence": data.licence,
             "pieces": sum(piece.given == number for piece in read.pieces),
             "kept": sum(read.pieces[i].given == number for i in kept)}
    licences = sorted({source.licence for source in given.sources if source.licence})
    return entry | ({"licence_file": licences[0]} if licences else {})


def _checksum(given: Given) -> str | None:
    """sha256 of the one file, or of the lines "checksum, two spaces, path below the folder" in order of path."""
    lines = []
    for source in given.sources:
        if digest := _digest(source.path):
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
        return None  # a folder that cannot be read
