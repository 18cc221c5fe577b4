"""The user's files, found, checked and read as documents: text, jsonl, csv, their gz and zst forms, parquet.

What is broken in a folder, and a broken record anywhere, is skipped, counted and named; a broken file that
the user named is an error.
"""

import codecs
import glob
import os
import re
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from handmill.data.corpus import Tick
from handmill.data.pieces import PIECE, lines, pieces
from handmill.disk import parsed
from handmill.errors import UserError, optional

STDLIB = "python:stdlib"  # in data.paths: the standard library of the Python that runs, but for its tests
STDLIB_LICENCE = "PSF-2.0"  # of all of it: SPDX's name of the licence at docs.python.org/3/license.html
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_IGNORED_FOLDERS = {"__pycache__", "node_modules"}
_LICENCES = ("licence", "license", "copying")
_SHOWN = 100  # skipped things named in the report
_RECORD = 1 << 28  # bytes, the longest jsonl line or csv field
_CODE = """
    .bash .c .cc .cjs .clj .cpp .cs .css .cu .cxx .dart .el .erl .ex .exs .f90 .fs .go .groovy .h .hpp
    .hs .ipynb .java .jl .js .json .jsx .kt .lisp .lua .m .mjs .ml .mm .nim .php .pl .pm .proto .ps1
    .py .pyi .r .rb .rs .scala .scm .sh .sql .svelte .swift .tcl .tf .toml .ts .tsx .vb .vhd .vue .xml
    .yaml .yml .zig"""
CODE = frozenset(_CODE.split())
# what moves or turns round what is shown, and halves of surrogate pairs but those that stand for bytes of a path
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
_UNPACKED_AT_ONCE = 1 << 10  # bytes of a zst file; a frame can grow 30,000-fold


class Broken(Exception):
    """A file that cannot be read; the text says why and what to do."""


class Empty(Broken):
    """A file without a byte: common in folders, and no fault there."""


class Piece(NamedTuple):
    """A part of a document as it stands in its source."""

    first: bool  # a document begins here
    text: str
    line: int  # line of the source, from 1, where the piece begins


@dataclass(frozen=True)
class Source:
    """A file of the corpus."""

    path: Path
    name: str  # as the user gave it
    named: bool  # by the user, not found in a folder or by a pattern
    bytes: int
    modified: int  # nanoseconds since 1970
    identity: tuple[int, int]  # device and inode: a file reached by two paths is one
    licence: str = ""  # the licence file at the top of its folder, or the licence's name

    @cached_property
    def suffixes(self) -> list[str]:
        return [s.lower() for s in self.path.suffixes]

    @cached_property
    def packing(self) -> str:
        """".gz", ".zst" or "" """
        last = self.suffixes[-1:]
        return last[0] if last in ([".gz"], [".zst"]) else ""

    @cached_property
    def suffix(self) -> str:
        """The ending inside the packing: ".md", ".jsonl", ..."""
        inner = self.suffixes[:-1] if self.packing else self.suffixes
        return inner[-1] if inner else ""

    @cached_property
    def form(self) -> str:
        """"jsonl", "csv", "parquet", or "text" for everything else."""
        forms = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
        return forms.get(self.suffix, "text")


@dataclass
class Skipped:
    """What was left out, and why."""

    files: int = 0
    records: int = 0
    first: list[str] = field(default_factory=list)

    def file(self, name: str, reason: str) -> None:
        self.files += 1
        self._name(f"{name}: {reason}")

    def record(self, name: str, line: int, reason: str) -> None:
        self.records += 1
        self._name(f"{name}, line {line}: {reason}")

    def summary(self) -> str:
        """"3 files and 1 record were left out (a.bin: ...)", or "" """
        kinds = ((self.files, "file"), (self.records, "record"))
        counts = [f"{number} {kind}{'s' * (number > 1)}" for number, kind in kinds if number]
        return f"left out {' and '.join(counts)}, first {self.first[0]}" if counts else ""

    def _name(self, sentence: str) -> None:
        if len(self.first) < _SHOWN:
            self.first.append(printable(sentence))


def find(paths: tuple[str, ...], cache: Path) -> list[Source]:
    """The files under `data.paths`, each once, in order of name; nothing hidden, nothing Handmill made.

    Raises UserError for a path that does not exist and a folder or pattern without files.
    """
    if not paths:
        raise UserError('data.paths is empty: name files, folders or patterns, as in data.paths = ["notes/"]')
    found: dict[tuple[int, int], Source] = {}
    for given in paths:
        try:
            sources = _expand(given, cache)
        except OSError as error:
            raise UserError(f"{error.filename or given} in data.paths cannot be read ({error.strerror}): "
                            "make it readable or leave it out") from None
        for source in sources:
            found.setdefault(source.identity, source)
    return list(found.values())


def _expand(given: str, cache: Path) -> list[Source]:
    if given == STDLIB:
        return _stdlib(cache)
    path = Path(given).expanduser()
    if path.is_dir():
        sources = list(_walk(path, cache))
        if not sources:
            raise UserError(f"the folder {given} in data.paths holds no files: name one that holds text")
        return sources
    if path.exists():
        if not path.is_file():
            raise UserError(f"{given} in data.paths is neither a file nor a folder: name one of these")
        return [_source(path, True)]
    if not glob.has_magic(given):
        raise UserError(f"{given} in data.paths does not exist: check the spelling and the folder you are in")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # none hidden
    ignored = _IGNORED_FOLDERS - {*path.parts}
    sources = [_source(match, False) for match in matches if match.is_file() and not ignored & {*match.parts}]
    if not sources:
        raise UserError(f"no file matches {given} in data.paths: check the pattern and the folder you are in")
    return sources


def _stdlib(cache: Path) -> list[Source]:
    """Every .py file, named from the library's folder on, so that no name depends on where Python is installed."""
    top = Path(sysconfig.get_path("stdlib"))
    found = _walk(top, cache, _NOT_STDLIB) if top.is_dir() else ()
    sources = [replace(source, name=f"{STDLIB}/{source.path.relative_to(top).as_posix()}", licence=STDLIB_LICENCE)
               for source in found if source.path.suffix == ".py"]
    if not sources:
        raise UserError(f"{STDLIB} in data.paths finds no source files in {top}: name a folder of texts instead")
    return sources


def _walk(top: Path, cache: Path, ignored: Collection[str] = ()) -> Iterator[Source]:
    licences = [p for p in sorted(top.iterdir()) if p.name.lower().startswith(_LICENCES) and p.is_file()]
    licence = _shown(licences[0]) if licences else ""
    unreadable: list[OSError] = []
    for folder, inner, files in os.walk(top, onerror=unreadable.append):
        here = Path(folder)
        inner[:] = sorted(name for name in inner if name not in ignored and not _ours(here / name, top, cache))
        for name in sorted(files):
            if not name.startswith(".") and os.path.isfile(here / name):
                yield _source(here / name, False, licence)
    for error in unreadable:  # its turn to be skipped and named comes when it is read
        yield _source(Path(error.filename), False)


def _ours(folder: Path, top: Path, cache: Path) -> bool:
    """Hidden, made by a tool, or written by Handmill: the cache, and the runs around it."""
    if folder.name.startswith(".") or folder.name in _IGNORED_FOLDERS or (folder / "pyvenv.cfg").exists():
        return True
    resolved = folder.resolve()
    return resolved in (cache.resolve(), cache.resolve().parent) and resolved != top.resolve()


def _source(path: Path, named: bool, licence: str = "") -> Source:
    state = path.stat()
    identity = (state.st_dev, state.st_ino)
    return Source(path, _shown(path), named, state.st_size, state.st_mtime_ns, identity, licence)


def _shown(path: Path) -> str:
    """The path relative to here or to the home folder where it lies within; bytes that are no text as \\x.."""
    name = path.as_posix()
    if path.is_absolute():
        for top, prefix in ((Path.home(), "~/"), (Path.cwd(), "")):
            if path.is_relative_to(top):
                name = prefix + path.relative_to(top).as_posix()
    return printable(name)


def printable(text: str) -> str:
    """The text in one line that changes nothing else on a screen: bytes that are no text, and controls, as \\x.."""
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check(source: Source) -> None:
    """Read a text file through once. Raises Empty, or Broken when it is binary, not UTF-8, or ends too soon."""
    offset, tail = 0, b""
    for number, block in enumerate(blocks(source)):
        if number == 0:
            _not_binary(block)
        data = tail + block
        try:
            used = codecs.utf_8_decode(data, "strict", False)[1]
        except UnicodeDecodeError as error:
            raise _not_utf8(data, offset + error.start, error.start) from None
        offset, tail = offset + used, data[used:]
    assert len(tail) < 4, "a character has at most four bytes"
    if tail:
        raise _not_utf8(tail, offset, 0)
    if not offset:
        raise Empty("it is empty: put text in it or leave it out")


def read(source: Source, column: str, skipped: Skipped, tick: Tick) -> Iterator[Piece]:
    """The documents of a file: one in all for a text, one a record for the others. Raises Broken."""
    if source.form == "text":
        line = 1
        for number, data in enumerate(pieces(blocks(source, tick))):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                raise UserError(f"{source.name} changed while it was read: run again when it rests") from None
            yield Piece(number == 0, text, line)
            line += text.count("\n")
    else:
        readers = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
        yield from readers[source.form](source, column, skipped, tick)


def blocks(source: Source, tick: Tick | None = None) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in blocks of at most a MiB. Raises Broken."""
    import zlib

    unpack = {".gz": _gunzip, ".zst": _unzst, "": _plain}[source.packing]
    try:
        with source.path.open("rb") as file:
            last = 0
            for block in unpack(file):
                yield block
                if tick:
                    tick(file.tell() - last)
                    last = file.tell()
    except (EOFError, zlib.error) as error:
        raise Broken(f"its {source.packing[1:]} packing is cut short or damaged ({error}): "
                     "copy or pack it again") from None
    except OSError as error:
        raise Broken(f"it cannot be read ({error.strerror or error}): mend it or leave it out") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(PIECE):
        yield block


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    import gzip

    try:
        with gzip.open(file) as unpacked:
            while block := unpacked.read(PIECE):
                yield block
    except gzip.BadGzipFile as error:
        raise EOFError(str(error)) from None


def _unzst(file: BinaryIO) -> Iterator[bytes]:
    """One frame after another. The package's own reader takes a truncated frame for the end of the file.

    What one call returns is of any size, so that little is given to each.
    """
    import zstandard

    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while data := file.read(_UNPACKED_AT_ONCE):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                unpacked, begun = frame.decompress(data), True
                data = frame.unused_data
                yield from (unpacked[at:at + PIECE] for at in range(0, len(unpacked), PIECE))
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if begun and not frame.eof:
        raise EOFError("the last frame does not end")


def _jsonl(source: Source, column: str, skipped: Skipped, tick: Tick) -> Iterator[Piece]:
    number = 0
    try:
        for number, line in enumerate(lines(blocks(source, tick), _RECORD), 1):
            if not line.strip():
                continue
            try:
                record = parsed(line)
                yield Piece(True, _text_of(record, column), number)
            except Broken as error:
                skipped.record(source.name, number, str(error))
            except ValueError as error:
                skipped.record(source.name, number, f"not JSON ({error})")
    except ValueError as error:
        raise Broken(f"after line {number} {error}: is it JSON lines, one record a line?") from None


def _text_of(record: object, column: str) -> str:
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else "no keys at all"
        raise Broken(f"no key {column!r} but {keys}: set data.field")
    if not isinstance(record[column], str):
        raise Broken(f"{column!r} is not a text")
    text: str = record[column]
    return text


def _csv(source: Source, column: str, skipped: Skipped, tick: Tick) -> Iterator[Piece]:
    import csv

    csv.field_size_limit(_RECORD)
    lines = _text_lines(source, tick)
    rows = _rows(csv.reader(lines, delimiter="\t" if source.suffix == ".tsv" else ",", strict=True), source, skipped)
    header = [name.removeprefix("\ufeff") for name in next(rows, (0, []))[1]]
    if column not in header:
        raise _no_column(column, header)
    place = header.index(column)
    for line, row in rows:
        if len(row) > place:
            yield Piece(True, row[place], line)
        elif row:
            skipped.record(source.name, line, f"has {len(row)} of {len(header)} columns")


def _rows(reader: Any, source: Source, skipped: Skipped) -> Iterator[tuple[int, list[str]]]:
    """Rows, each with its first line. After one with broken quotes reading goes on at the next line."""
    import csv

    row: list[str] | None = []
    while row is not None:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
            yield from [(line, row)] if row is not None else []
        except csv.Error as error:
            skipped.record(source.name, line, f"not csv ({error}): mend its quotes")


def _text_lines(source: Source, tick: Tick) -> Iterator[str]:
    import io

    unread = blocks(source, tick)
    first, offset = next(unread, b""), 0
    _not_binary(first)
    for data in pieces(chain([first], unread)):
        try:
            yield from io.StringIO(data.decode(), newline="")
        except UnicodeDecodeError as error:
            raise _not_utf8(data, offset + error.start, error.start) from None
        offset += len(data)


def _parquet(source: Source, column: str, skipped: Skipped, tick: Tick) -> Iterator[Piece]:
    parquet = optional("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(column, names)
            number, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if isinstance(value, str):
                        yield Piece(True, value, number)
                    else:
                        skipped.record(source.name, number, f"{column!r} is not a text")
                tick(source.bytes * len(batch) // rows)
    except Broken:
        raise
    except Exception as error:  # it raises a dozen kinds on foreign bytes, UnicodeDecodeError and KeyError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Broken(f"it is not a parquet file ({reason}): copy or write it again") from None


def _no_column(column: str, columns: list[str]) -> Broken:
    assert column not in columns
    there = ", ".join(map(repr, columns[:8])) or "no columns at all"
    return Broken(f"it has no column {column!r} but {there}: set data.field")


def _not_binary(block: bytes) -> None:
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Broken("it is UTF-16: convert it (iconv -f utf-16 -t utf-8)")
    if b"\0" in block[:8192]:
        raise Broken("it is binary: name text files only")


def _not_utf8(data: bytes, offset: int, at: int) -> Broken:
    return Broken(f"byte {offset} (0x{data[at]:02x}) is not UTF-8: "
                  "convert it (for example iconv -f latin1 -t utf-8) or leave it out")
