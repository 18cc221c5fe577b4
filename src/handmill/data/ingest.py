"""Reading the sources: every document cleaned into the corpus file, what the report says of them noted."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from handmill.data import cleaning, sources
from handmill.data.corpus import Corpus, Spool, Tick
from handmill.data.pieces import PIECE
from handmill.data.sensitive import Findings, scan
from handmill.data.sources import Broken, Empty, Piece, Skipped, Source
from handmill.errors import UserError

_BLANK = re.compile(r"\n(?:[ \t\r]*\n)+")
_LONGEST = 1 << 24  # characters of a paragraph
_TOP = 10  # boilerplate lines shown


@dataclass
class Notes:
    """What was found on the way, for the report."""

    settings: Any  # the [data] table
    skipped: Skipped = field(default_factory=Skipped)
    cleaned: Counter[str] = field(default_factory=Counter)
    secrets: Findings = field(default_factory=Findings)
    emails: Findings = field(default_factory=Findings)
    manifest: list[dict[str, Any]] = field(default_factory=list)  # one entry a source
    boilerplate: dict[str, Any] = field(default_factory=lambda: {"lines": 0, "top": []})
    copies: dict[str, Any] = field(default_factory=dict)  # the duplicates
    overlap: dict[str, Any] = field(default_factory=dict)  # between the splits
    cut: str = ""  # how a single text was made into documents
    read: int = 0  # documents
    bytes: int = 0  # of their text
    empty: int = 0  # documents dropped because they were blank or shorter than data.shortest


def ingest(found: list[Source], settings: Any, folder: Path, tick: Tick) -> tuple[Corpus, Notes]:
    """Read all sources into a file in `folder`.

    Raises UserError for a broken file that the user named, and when no text is left.
    """
    notes = Notes(settings)
    lines = cleaning.Boilerplate(settings.boilerplate)
    prose = np.array([settings.clean and settings.document == "file" and _is_prose(source) for source in found])
    with Spool(folder / "corpus") as spool:
        for number, source in enumerate(found):
            before = len(spool.begins)
            try:
                notes.manifest.append(_entry(source, settings.licence))
                for piece in _documents(source, notes, tick):
                    _add(spool, piece, number, notes)
                    if piece.first and prose[number]:
                        lines.see(piece.text)
            except Broken as error:
                _leave_out(source, error, len(spool.begins) - before, notes)
            notes.manifest[-1]["documents"] = len(spool.begins) - before
    corpus = spool.corpus()
    if not len(corpus):
        reason = notes.skipped.first[0] if notes.skipped.first else "every document is empty"
        raise UserError(f"nothing is left of data.paths to learn from ({reason}): name files with text")
    return _without_boilerplate(corpus, lines.lines(), prose, notes), notes


def _leave_out(source: Source, error: Broken, records: int, notes: Notes) -> None:
    """Note a broken file, of which some records were read before the break. Raises UserError if the user named it."""
    if source.named:
        raise UserError(f"{source.name} in data.paths: {error}") from None
    if isinstance(error, Empty):
        notes.empty += 1
    else:
        notes.skipped.file(source.name, f"{error}" + f" (the {records} records before that are kept)" * (records > 0))


def _is_prose(source: Source) -> bool:
    """A text file that is not code: `import numpy as np` on top of every file is no boilerplate."""
    return source.form == "text" and source.suffix not in sources.CODE


def _entry(source: Source, licence: str) -> dict[str, Any]:
    """The manifest's line of a source."""
    import hashlib

    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(source.modified / 1e9))
    known = source.licence == sources.STDLIB_LICENCE  # whatever data.licence says of the user's own files
    entry: dict[str, Any] = {"path": source.name, "bytes": source.bytes, "modified": modified, "sha256": None,
                             "licence": source.licence if known else licence, "documents": 0}
    if source.licence and not known:
        entry["licence_file"] = source.licence
    try:
        with source.path.open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        pass  # it is skipped, or an error, when it is read
    return entry


def _documents(source: Source, notes: Notes, tick: Tick) -> Iterator[Piece]:
    """The cleaned documents of a source. Raises Broken."""
    if source.form == "text":
        sources.check(source)
    pieces = _cleaned(source, notes, tick)
    if source.form != "text" or notes.settings.document == "file":
        return pieces
    return {"line": by_line, "paragraph": by_paragraph}[notes.settings.document](pieces)


def _cleaned(source: Source, notes: Notes, tick: Tick) -> Iterator[Piece]:
    for piece in sources.read(source, notes.settings.field, notes.skipped, tick):
        text = piece.text
        if notes.settings.clean:
            text = cleaning.clean(text, notes.cleaned)
        scan(text, source.name, piece.line, source.form != "text", notes.secrets, notes.emails)
        yield Piece(piece.first, text, piece.line)


def by_line(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Every line that is not blank as a document. Pieces end at line ends."""
    for _, text, start in pieces:
        for number, line in enumerate(text.split("\n"), start):
            if line and not line.isspace():
                yield Piece(True, line, number)


def by_paragraph(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Every run of lines between blank lines as a document."""
    held, start = "", 1
    for _, text, line in pieces:
        start = start if held else line
        held += text
        at = 0
        for blank in _BLANK.finditer(held):
            yield Piece(True, held[at:blank.start()], start)
            start += held.count("\n", at, blank.end())
            at = blank.end()
        held = held[at:]
        if len(held) > _LONGEST:
            yield Piece(True, held, start)
            held = ""
    yield Piece(True, held, start)


def _add(spool: Spool, piece: Piece, source: int, notes: Notes) -> None:
    """Put a piece in the corpus, unless it begins a document that is too short."""
    try:
        data = piece.text.encode()
    except UnicodeEncodeError as error:  # an escape in JSON can hold half a character
        notes.skipped.record(notes.manifest[-1]["path"], piece.line,
                             f"character {error.start} is half a surrogate pair: set data.clean = true")
        return
    if not piece.first and spool.sources and spool.sources[-1] == source:
        spool.extend(data)
    elif len(piece.text) < notes.settings.shortest or piece.text.isspace():
        notes.empty += 1
    else:
        spool.add(data, source, piece.line)


def _without_boilerplate(corpus: Corpus, lines: dict[str, int], prose: npt.NDArray[np.bool_], notes: Notes) -> Corpus:
    """The corpus without the boilerplate lines in the documents of the `prose` sources."""
    if not lines:
        return corpus
    notes.boilerplate["top"] = [{"line": line, "documents": n} for line, n in list(lines.items())[:_TOP]]
    touched = prose[corpus.sources] & (corpus.sizes <= PIECE)
    with Spool(corpus.path.with_name("corpus-2")) as spool:
        for batch in corpus.batches():
            for document, data in zip(batch.documents.tolist(), batch.chunks(), strict=True):
                if touched[document]:
                    text, count = cleaning.without(data.decode(), lines)
                    notes.boilerplate["lines"] += count
                    data = text.encode()
                if batch.continued:
                    spool.extend(data)
                elif data.strip():
                    spool.add(data, int(corpus.sources[document]), int(corpus.lines[document]))
                else:
                    notes.empty += 1
    corpus.path.unlink()
    return spool.corpus()
