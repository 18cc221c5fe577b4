"""Where music comes from: MIDI files in folders, patterns and zip archives, and chorales in JSON with their splits.

What is broken in a folder or an archive, and a broken piece of chorales, is left out, counted and named; a broken
file that the user named is an error. Nothing is unpacked to the disk, and every size is checked before memory is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from handmill.data import image_files, sources
from handmill.data.corpus import Tick
from handmill.data.decoding import Refused, read
from handmill.data.image_files import Given
from handmill.data.sources import Broken, Source, printable
from handmill.errors import UserError, optional
from handmill.media import chorales, midi
from handmill.media.music import Data
from handmill.media.scores import MOST_STEPS, Grid, Score

MIDI = frozenset((".mid", ".midi", ".kar", ".rmi"))
FOREIGN = frozenset((".musicxml", ".mxl", ".mscz", ".mscx", ".abc", ".krn", ".sib", ".gp", ".gpx", ".gp5", ".ly",
                     ".mp3", ".wav", ".flac", ".ogg", ".m4a", ".aac"))
SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # of chorales -> ours


class Item(NamedTuple):
    """A piece as its file has it."""

    source: Source
    inside: str  # of an archive or chorales: which; "": the file itself
    name: str  # path below the given folder, and what is inside
    folder: str  # what it is named by; "": nothing
    score: Score
    tempo: float  # quarter notes a minute, over the whole piece; 0: unknown
    split: str = ""  # that its file brings; "": none


@dataclass
class Notes(image_files.Notes):
    """What was met on the way, for the report."""

    repeated: dict[str, float] = field(default_factory=dict)  # chorales -> share of steps that repeat the one before

    def unfit(self, item: "Item", error: Refused) -> None:
        """Note a sound piece that the settings have no room for."""
        self.kinds[error.kind] += 1
        self.skipped.file(f"{item.source.name}/{item.inside}" if item.inside else item.source.name, str(error))


def find(data: Data, cache: Path) -> list[Given]:
    """The files under data.paths, each file once.

    Raises UserError for a path that does not exist, and a folder or pattern without files.
    """
    if not data.paths:
        raise UserError('data.paths is empty: name MIDI files, folders of them, or chorales in .json, as in data.paths '
                        '= ["midi/"]')
    found, seen = [], set[tuple[int, int]]()
    for text in data.paths:
        given = tuple(source for source in _sources(text, cache) if source.identity not in seen)
        seen.update(source.identity for source in given)
        folder = Path(text).expanduser()
        found.append(Given(text, folder if folder.is_dir() else None, given, test=False))
    return found


def _sources(text: str, cache: Path) -> list[Source]:
    try:
        return sources.find((text,), cache)
    except UserError as error:
        raise UserError(str(error).replace("holds text", "holds MIDI files")) from None


def items(given: Given, data: Data, steps: int, notes: Notes, tick: Tick) -> Iterator[Item]:
    """The pieces of one given path; `steps` a quarter note of chorales. `tick` gets the bytes done.

    Raises UserError for a broken file that the user named.
    """
    for source in given.sources:
        suffix = source.path.suffix.lower()
        try:
            if suffix == ".zip":
                yield from _zip(source, given, data, notes)
            elif suffix == ".json":
                yield from _chorales(source, given, data, steps, notes)
            elif suffix in MIDI or (source.named and suffix not in FOREIGN):
                content = read(source.path, midi.LARGEST)
                yield _midi(source, given, "", content, _folder(source, given, data), data)
            elif suffix in FOREIGN:
                raise _foreign(suffix)
            elif source.path.is_dir():
                raise Refused("unreadable", "this folder cannot be read: make it readable or leave it out")
            else:
                notes.other += 1
        except Broken as error:
            notes.leave_out(source, error)
        tick(source.bytes)


def _foreign(suffix: str) -> Refused:
    return Refused("not MIDI", f"{suffix} is not read: export it as MIDI or leave it out")


def _midi(source: Source, given: Given, inside: str, content: bytes, folder: str, data: Data) -> Item:
    """The piece of a MIDI file, without the silence after its last note. Raises Refused."""
    if not content:
        raise Refused("empty", "it is empty: copy it again or leave it out")
    optional("mido", "music")
    try:
        score = midi.from_bytes(content, "it", data.pedal)
    except UserError as error:
        raise Refused("broken", str(error)) from None
    score = replace(score, length=0)
    pace = 60 * score.end / score.resolution / float(score.seconds(score.end))
    return Item(source, inside, _name(source, given, inside), folder, score, pace)


def _name(source: Source, given: Given, inside: str) -> str:
    below = source.path.relative_to(given.top).as_posix() if given.top else source.path.name
    return printable(f"{below}/{inside}" if inside else below)


def _folder(source: Source, given: Given, data: Data) -> str:
    """The first sub-folder of the given folder; of a file in none, or given otherwise, the folder that it lies in.

    Nothing where that is the only path: all pieces would be named alike.
    """
    below = source.path.relative_to(given.top) if given.top else source.path
    if given.top and len(below.parts) > 1:
        return printable(below.parts[0])
    return "" if given.top and len(data.paths) == 1 else printable(source.path.absolute().parent.name)


def _chorales(source: Source, given: Given, data: Data, steps: int, notes: Notes) -> Iterator[Item]:
    """The pieces of chorales, their splits kept where they have one for validation. Raises Refused."""
    try:
        found = chorales.read(source.path)
    except UserError as error:
        raise Refused("not chorales", str(error).removeprefix(f"{source.path} ")) from None
    _note_faults(found.report, source, notes)
    notes.repeated[source.name] = _repeated([piece for pieces in found.splits.values() for piece in pieces])
    folder = _folder(source, given, data)
    for split, pieces in found.splits.items():
        kept = "" if split == "train" and not found.splits.get("valid") else SPLITS[split]
        for number, piece in enumerate(pieces):
            inside = f"{split}[{number}]"
            try:
                score = _score(piece, steps, found.voices)
                yield Item(source, inside, _name(source, given, inside), folder, score, 0.0, kept)
            except Refused as error:
                notes.leave_out(source, error, inside)


def _score(piece: Grid, steps: int, voices: int) -> Score:
    if len(piece) > MOST_STEPS:
        raise Refused("too long", f"it has {len(piece):,} steps and at most {MOST_STEPS:,} fit: cut it")
    score = chorales.to_score(piece, steps, voices)
    if not score.notes:
        raise Refused("no notes", "it has no notes: leave it out")
    return score


def _note_faults(report: chorales.Report, source: Source, notes: Notes) -> None:
    """Note the pieces that were left out when the chorales were read; of many, only the first are named."""
    for fault in report.faults:
        notes.skipped.file(source.name, f"{fault}: mend it or leave it out")
    notes.skipped.files += report.skipped - len(report.faults)
    if report.skipped:
        notes.kinds["broken"] += report.skipped


def _repeated(pieces: list[Grid]) -> float:
    same = [a == b for piece in pieces for a, b in pairwise(piece)]
    return float(np.mean(same)) if same else 0.0


def _zip(source: Source, given: Given, data: Data, notes: Notes) -> Iterator[Item]:
    """The MIDI files of an archive, read where they lie. Raises Refused."""
    with image_files.opened(source) as archive:
        entries = {PurePosixPath(name): entry for name, entry in
                   image_files.entries_of(archive, source, notes).items()}
        top = len({path.parts[0] for path in entries}) == 1  # everything lies in one folder, which names nothing
        for path, entry in entries.items():
            suffix = path.suffix.lower()
            try:
                if suffix in MIDI:
                    folder = "" if len(path.parts) < 2 + top else printable(path.parts[top])
                    content = image_files.unpacked(archive, entry, midi.LARGEST)
                    yield _midi(source, given, path.as_posix(), content, folder, data)
                elif suffix in FOREIGN:
                    raise _foreign(suffix)
                else:
                    notes.other += 1
            except Broken as error:
                notes.leave_out(source, error, path.as_posix())
