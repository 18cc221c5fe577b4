"""Where images come from: files in folders, patterns, zip archives, npz arrays, and the tables of their captions.

What is broken in a folder or an archive is skipped, counted and named; a broken file that the user named is an
error. Nothing is unpacked to the disk, no pickle is read, and every size is checked before memory is taken for it.
"""

import csv
import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handmill.data import sources
from handmill.data.decoding import Payload, Refused, byte_limit, check_size, too_large
from handmill.data.sources import Broken, Skipped, Source, printable
from handmill.disk import parsed
from handmill.errors import UserError, optional
from handmill.media.image import Data

DIGITS = "scikit-learn:digits"
TABLES = ("captions.csv", "metadata.jsonl", "metadata.csv")
IMAGES = frozenset((".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"))
FOREIGN = frozenset((".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".pgm",
                     ".ppm", ".pnm", ".exr", ".dng"))

_TABLE = 1 << 28  # bytes, the largest table of captions
_ROWS = 1 << 20  # bytes of an array's images that are read at once
_LABELS = 1 << 28  # bytes of an array's labels
_HEADER = 1 << 16  # bytes of an array's header; numpy itself reads 10,000
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that are unpacked little by little, whatever they hold


@dataclass(frozen=True)
class Given:
    """One of data.paths or data.test_paths, and the files found there."""

    text: str
    top: Path | None  # the folder, where it is one
    sources: tuple[Source, ...]
    test: bool


class Item(NamedTuple):
    """Images to decode: one of a file, or some rows of an array."""

    source: Source
    payload: Payload
    inside: str  # of an archive or array: which entry; "": the file itself
    names: list[str]
    labels: list[str]  # "": none
    captions: list[str]  # "": none


@dataclass
class Notes:
    """What was met on the way, for the report."""

    skipped: Skipped = field(default_factory=Skipped)
    kinds: Counter[str] = field(default_factory=Counter)  # of what was skipped
    other: int = 0  # files that are no images
    captionless: int = 0  # images that a table does not name

    def leave_out(self, source: Source, error: Broken, inside: str = "") -> None:
        """Note a broken file, or what is `inside` an archive. Raises UserError for a file that the user named."""
        if source.named and not inside:
            raise UserError(f"{source.name} in data.paths: {error}")
        self.kinds[error.kind if isinstance(error, Refused) else "damaged"] += 1
        self.skipped.file(f"{source.name}/{inside}" if inside else source.name, str(error))


class Row(NamedTuple):
    """What a table says of an image."""

    line: int
    label: str
    caption: str


@dataclass
class Table:
    """Labels and captions by path in the folder of the table."""

    name: str
    rows: dict[str, Row]
    used: set[str] = field(default_factory=set)

    def __call__(self, path: str) -> Row | None:
        if path in self.rows:
            self.used.add(path)
        return self.rows.get(path)

    def close(self, notes: Notes) -> None:
        """Note the rows whose image was not there. Raises UserError where that is all of them."""
        if self.rows and not self.used:
            first = next(iter(self.rows))
            raise UserError(f"none of the {len(self.rows):,} images that {self.name} names is there, such as {first}: "
                            "write their paths as they are from the folder of the table")
        for path, row in self.rows.items():
            if path not in self.used:
                notes.skipped.record(self.name, row.line, f"{path} is not there: mend the path or remove the line")


def find(data: Data, cache: Path) -> list[Given]:
    """The files under data.test_paths and data.paths, those of the test first, each file once.

    Raises UserError for a path that does not exist and a folder or pattern without files.
    """
    if not data.paths:
        raise UserError('data.paths is empty: name folders, images, .zip or .npz files, as in data.paths = ["photos/"]')
    found, seen = [], set[tuple[int, int]]()
    for key in ("test_paths", "paths"):
        for text in getattr(data, key):
            given = tuple(s for s in _sources(text, key, cache) if s.identity not in seen)
            seen.update(source.identity for source in given)
            folder = Path(text).expanduser()
            found.append(Given(text, folder if folder.is_dir() else None, given, key == "test_paths"))
    _no_column_without_table(data, found)
    return found


def _sources(text: str, key: str, cache: Path) -> list[Source]:
    if text == DIGITS:
        return [Source(Path(text), text, True, 0, 0, (-1, -1))]
    try:
        return sources.find((text,), cache)
    except UserError as error:
        said = str(error).replace("in data.paths", f"in data.{key}").replace("holds text", "holds images")
        raise UserError(said) from None


def _no_column_without_table(data: Data, found: list[Given]) -> None:
    archived = any(source.path.suffix.lower() == ".zip" for given in found for source in given.sources)
    if archived or any(_table_file(given) for given in found):
        return
    for key, plain in (("label", ("auto", "none")), ("caption", ("auto",))):
        if getattr(data, key) not in plain:
            raise UserError(f'data.{key} = "{getattr(data, key)}" names a column, but no folder in data.paths has a '
                            f"{TABLES[0]} or {TABLES[1]} at its top: add one or remove the setting")


def items(given: Given, data: Data, notes: Notes) -> Iterator[Item]:
    """The images of one given path, not decoded yet.

    Raises UserError for a broken file that the user named and a table that cannot be used.
    """
    if given.text == DIGITS:
        yield _digits(given.sources[0], data)
        return
    table = _folder_table(given, data, notes)
    for source in given.sources:
        suffix = source.path.suffix.lower()
        try:
            if suffix == ".npz":
                yield from _npz(source, data)
            elif suffix == ".zip":
                yield from _zip(source, data, notes)
            elif suffix in IMAGES or (source.named and suffix not in FOREIGN):
                yield _item(source, source.path, "", _below(source, given), data, table, notes)
            elif suffix in FOREIGN:
                raise Refused("not an image", f"{suffix} is not read: convert it to PNG or leave it out")
            elif source.path.is_dir():
                raise Refused("unreadable", "this folder cannot be read: make it readable or leave it out")
            else:
                notes.other += source.path.name not in TABLES
        except Broken as error:
            notes.leave_out(source, error)
    if table:
        table.close(notes)


def _below(source: Source, given: Given) -> str:
    """The path below the given folder; only the name where no folder was given."""
    return source.path.relative_to(given.top).as_posix() if given.top else source.path.name


def _item(source: Source, payload: Payload, inside: str, below: str, data: Data, table: Table | None,
          notes: Notes) -> Item:
    """One image, `below` the top of its folder or archive."""
    row = table(below) if table else None
    if table and row is None:
        notes.captionless += 1
    label = row.label if row else ""
    if data.label == "auto" and "/" in below:
        label = printable(below.partition("/")[0])
    return Item(source, payload, inside, [printable(below)], [label], [row.caption if row else ""])


def _table_file(given: Given) -> Source | None:
    tables = [s for s in given.sources if given.top and s.path.parent == given.top and s.path.name in TABLES]
    return min(tables, key=lambda source: TABLES.index(source.path.name), default=None)


def _folder_table(given: Given, data: Data, notes: Notes) -> Table | None:
    source = _table_file(given)
    if source is None:
        return None
    try:
        with source.path.open("rb") as file:
            return _table(source.name, file, data, notes)
    except OSError as error:
        raise UserError(f"{source.name} cannot be read ({error.strerror or error}): make it readable") from None


def _table(name: str, file: IO[bytes], data: Data, notes: Notes) -> Table:
    """The table of a folder or archive. Raises UserError for one that cannot be used."""
    content = file.read(_TABLE + 1)
    if len(content) > _TABLE:
        raise UserError(f"{name} is above {_TABLE:,} bytes: cut it down to the columns that are needed")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, byte {error.start}: it is not UTF-8: convert it (iconv -t utf-8)") from None
    columns, records = (_jsonl if name.endswith(".jsonl") else _csv)(name, text, notes)
    file_column = _column(name, columns, "", ("file", "file_name"))
    label = _column(name, columns, data.label, ()) if data.label not in ("auto", "none") else ""
    caption = _column(name, columns, data.caption if data.caption != "auto" else "", ("caption", "text"), needed=False)
    rows: dict[str, Row] = {}
    for line, record in records:
        path = PurePosixPath(_cell(record, file_column).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or not path.name:
            notes.skipped.record(name, line, f"{str(path)!r} is no path below its folder: mend it or remove the line")
        elif path.as_posix() in rows:
            notes.skipped.record(name, line, f"{path} has its line already: leave one line for an image")
        else:
            rows[path.as_posix()] = Row(line, _cell(record, label), _cell(record, caption))
    return Table(name, rows)


def _cell(record: dict[str, Any], column: str) -> str:
    value = record.get(column) if column else None
    return "" if value is None else str(value).strip().encode("utf-8", "backslashreplace").decode()


def _column(name: str, columns: list[str], wanted: str, usual: tuple[str, ...], needed: bool = True) -> str:
    """The wanted column, or else the first of the usual ones that is there. Raises UserError for a missing one."""
    there = [column for column in ((wanted,) if wanted else usual) if column in columns]
    if there:
        return there[0]
    if wanted or needed:
        shown = ", ".join(columns[:8]) or "none"
        raise UserError(f"{name} has no column {wanted or ' or '.join(usual)!r} but {shown}: mend its first line, or "
                        "label and caption in the recipe's [data]")
    return ""


Records = list[tuple[int, dict[str, Any]]]  # each with its line


def _csv(name: str, text: str, notes: Notes) -> tuple[list[str], Records]:
    """The columns and the records of a csv file. Raises UserError where its quotes are broken."""
    reader, records = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        columns = list(reader.fieldnames or ())
        for record in reader:
            if None in record or None in record.values():
                notes.skipped.record(name, reader.line_num, f"it has not the {len(columns)} columns of the first "
                                     "line: mend its commas and quotes")
            else:
                records.append((reader.line_num, record))
    except csv.Error as error:
        raise UserError(f"{name}, after line {reader.line_num}: it is not csv ({error}): mend its quotes") from None
    return columns, records


def _jsonl(name: str, text: str, notes: Notes) -> tuple[list[str], Records]:
    """All the keys and the records of a file of JSON objects, one a line."""
    records: Records = []
    for line, record in enumerate(text.split("\n"), 1):
        try:
            value = parsed(record) if record.strip() else None
        except ValueError:
            value = record
        if isinstance(value, dict):
            records.append((line, value))
        elif value is not None:
            notes.skipped.record(name, line, "it is no JSON object: mend it or remove the line")
    return list(dict.fromkeys(key for _, record in records for key in record)), records


def _zip(source: Source, data: Data, notes: Notes) -> Iterator[Item]:
    """The images of an archive, read where they lie. Raises Broken."""
    with opened(source) as archive:
        entries = entries_of(archive, source, notes)
        top = _common_folder(list(entries))
        table = None
        for name in TABLES:
            if f"{top}{name}" in entries and table is None:
                content = unpacked(archive, entries[f"{top}{name}"], _TABLE)
                table = _table(f"{source.name}/{top}{name}", io.BytesIO(content), data, notes)
        for path, entry in entries.items():
            suffix = PurePosixPath(path).suffix.lower()
            try:
                if suffix in IMAGES:
                    content = unpacked(archive, entry, byte_limit(data))
                    yield _item(source, content, path, path.removeprefix(top), data, table, notes)
                elif suffix in FOREIGN:
                    raise Refused("not an image", f"{suffix} is not read: convert it to PNG or leave it out")
                else:
                    notes.other += PurePosixPath(path).name not in TABLES
            except Broken as error:
                notes.leave_out(source, error, path)
        if table:
            table.close(notes)


def opened(source: Source) -> zipfile.ZipFile:
    """The archive. Raises Refused for one that is damaged, or whose entries overlap so that it unpacks to no end."""
    try:
        archive = zipfile.ZipFile(source.path)
    except Exception as error:  # whatever foreign bytes do to zipfile
        raise Refused("damaged", f"it cannot be opened as a zip archive ({error}): copy or write it again") from None
    if sum(entry.compress_size for entry in archive.infolist()) > source.path.stat().st_size:
        archive.close()
        raise Refused("damaged", "its entries take more room than it has, as those of a zip bomb: leave it out")
    return archive


def entries_of(archive: zipfile.ZipFile, source: Source, notes: Notes) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive that are not hidden, by name.

    Left out and noted: what another has the name of, and a name that is no place below the archive.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        parts = entry.filename.split("/")
        hidden = any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in parts)
        if hidden or entry.filename.endswith("/"):  # a name may be empty, which ZipInfo.is_dir breaks on
            continue
        if parts[0] == "" or ".." in parts:
            notes.leave_out(source, Refused("damaged", "its name leads out of the archive: leave it out"),
                            entry.filename)
        elif entry.filename in entries:
            notes.leave_out(source, Refused("damaged", "another has its name: rename or remove one"), entry.filename)
        else:
            entries[entry.filename] = entry
    return entries


def _common_folder(names: list[str]) -> str:
    """ "photos/" where everything lies in that one folder, or "" """
    tops = {name.partition("/")[0] for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in names) else ""


def unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of an entry, never more than its header says.

    Raises Refused above the limit, by that header, and for an entry that is damaged or otherwise packed.
    """
    if entry.file_size > limit:
        raise too_large(f"{entry.file_size:,} bytes unpacked")
    try:
        _known(entry)
        with archive.open(entry) as file:
            content = file.read(entry.file_size)  # read() would unpack to the end first and cut then
    except Exception as error:  # damaged, encrypted, or of a packing that is not known
        raise Refused("damaged", f"it cannot be unpacked ({error}): pack it again or leave it out") from None
    if len(content) != entry.file_size:
        raise Refused("damaged", "it ends too soon: pack it again or leave it out")
    return content


def _known(entry: zipfile.ZipInfo) -> None:
    """Raise ValueError for bzip2 and LZMA, of which a few bytes unpack to gigabytes at once."""
    if entry.compress_type not in _PACKINGS:
        raise ValueError("its packing is not deflate")


def _npz(source: Source, data: Data) -> Iterator[Item]:
    """The images `x` and labels `y` of an npz file, some rows at a time. Raises Broken."""
    with opened(source) as archive:
        names = archive.namelist()
        if "x.npy" not in names:
            there = ", ".join(name.removesuffix(".npy") for name in names[:8]) or "nothing"
            raise Refused("not an image", f"it has no array x but {there}: save the images as x and labels as y")
        with _array(archive, "x") as (file, shape, dtype):
            _check_images(shape, dtype, data)
            labels = _labels(archive, shape[0]) if data.label == "auto" and "y.npy" in names else None
            each = int(np.prod(shape[1:], dtype=np.int64))
            step = max(1, _ROWS // each)
            for start in range(0, shape[0], step):
                count = min(step, shape[0] - start)
                content = _exactly(file, count * each)
                rows = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
                names = [f"{source.path.stem}[{row}]" for row in range(start, start + count)]
                told = [""] * count if labels is None else [
                    _cell({"y": label}, "y") for label in labels[start:start + count].tolist()]
                yield Item(source, rows, names[0], names, told, [""] * count)


def _array(archive: zipfile.ZipFile, name: str) -> "_Array":
    entry = archive.getinfo(f"{name}.npy")
    try:
        _known(entry)
        return _Array(archive.open(entry), entry.file_size, name)
    except Refused:
        raise
    except Exception as error:  # whatever foreign bytes do to zipfile and numpy
        raise Refused("damaged", f"its array {name} cannot be read ({error}): save it again with numpy.savez"
                      ) from None


class _Array:
    """An array in an archive whose header has been read and agrees with its size; no element has."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        head = file.read(4 if version == (2, 0) else 2)
        length = int.from_bytes(head, "little")
        if length > _HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        parsed = header[version](io.BytesIO(head + file.read(length)))
        self.file, (self.shape, fortran, self.dtype) = file, parsed
        if self.dtype.hasobject:
            raise Refused("not an image", f"its array {name} holds Python objects, which are not read: save plain "
                          "numbers of one shape")
        if fortran and len(self.shape) > 1:
            raise Refused("not an image", f"its array {name} is in column order: save numpy.ascontiguousarray({name})")
        claimed = math.prod(map(int, self.shape)) * self.dtype.itemsize
        if min(self.shape, default=0) < 0 or claimed != size - file.tell():
            raise Refused("damaged", f"its array {name} of shape {self.shape} does not agree with its {size:,} bytes: "
                          "save it again with numpy.savez")

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        return self.file, self.shape, self.dtype

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _exactly(file: IO[bytes], count: int) -> bytes:
    try:
        content = file.read(count)
    except Exception as error:  # whatever a damaged packing raises
        raise Refused("damaged", f"its packing is damaged ({error}): copy or save it again") from None
    if len(content) != count:
        raise Refused("damaged", "it ends too soon: copy or save it again")
    return content


def _check_images(shape: tuple[int, ...], dtype: np.dtype[Any], data: Data) -> None:
    if dtype != np.uint8:
        raise Refused("not an image", f"its array x is {dtype}: save whole numbers from 0 to 255, as in "
                      "(255 * x).round().astype('uint8') for values from 0 to 1")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
        raise Refused("not an image", f"its array x has the shape {shape}: (images, height, width) or (images, height, "
                      "width, channels) with 1, 3 or 4 channels is read")
    if not shape[0]:
        raise Refused("not an image", "its array x holds no images: leave it out")
    check_size(shape[1], shape[2], data)


def _labels(archive: zipfile.ZipFile, count: int) -> npt.NDArray[Any]:
    """A whole number or text for each image: (N,). Raises Refused."""
    with _array(archive, "y") as (file, shape, dtype):
        if shape not in ((count,), (count, 1)) or dtype.kind not in "iuU":
            raise Refused("not an image", f"its array y is {dtype} of shape {shape}: one whole number or text for each "
                          f"of the {count:,} images is read")
        if count * dtype.itemsize > _LABELS:
            raise too_large(f"{count * dtype.itemsize:,} bytes of labels")
        return np.frombuffer(_exactly(file, count * dtype.itemsize), dtype)


def _digits(source: Source, data: Data) -> Item:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""
    bunch = optional("sklearn.datasets", "digits").load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    count = len(pixels)
    labels = [str(label) for label in bunch.target.tolist()] if data.label == "auto" else [""] * count
    return Item(source, pixels, "digits", [f"digits[{row}]" for row in range(count)], labels, [""] * count)
