"""The corpus while it is prepared: documents one after another in one file on disk, and where each begins.

In memory there are only a few numbers a document; the text is read in batches of about a megabyte.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from handmill.data.pieces import PIECE, pieces

Ints = npt.NDArray[np.int64]
Tick = Callable[[int], None]  # told the number of bytes done since last told


@dataclass(frozen=True)
class Batch:
    """Some whole documents, or one piece of a long one: UTF-8 bytes, and where in them the documents are."""

    documents: Ints  # (D,) numbers of the documents
    data: bytes
    begins: Ints  # (D,) in `data`
    ends: Ints  # (D,)
    continued: bool = False  # the document began in an earlier batch

    def chunks(self) -> list[bytes]:
        return [self.data[b:e] for b, e in zip(self.begins.tolist(), self.ends.tolist(), strict=True)]

    def texts(self) -> list[str]:
        return [chunk.decode() for chunk in self.chunks()]


@dataclass(frozen=True)
class Corpus:
    """Documents as byte ranges of a file, in ascending order."""

    path: Path
    begins: Ints  # (D,) bytes
    ends: Ints  # (D,)
    sources: Ints  # (D,) number of the source file
    lines: Ints  # (D,) line of the source file where the document begins

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def sizes(self) -> Ints:
        """(D,) bytes of each document."""
        return self.ends - self.begins

    def batches(self, chosen: Ints | None = None, tick: Tick | None = None) -> Iterator[Batch]:
        """All documents, or the `chosen` ones (ascending). A document above a MiB comes in pieces."""
        chosen = np.arange(len(self)) if chosen is None else chosen
        assert (np.diff(chosen) > 0).all(), "documents are read in their order on disk"
        begins, ends = self.begins[chosen], self.ends[chosen]
        with self.path.open("rb") as file:
            at = 0
            while at < len(chosen):
                start = begins[at]
                stop = int(np.searchsorted(ends, start + PIECE, side="right"))
                if stop <= at:
                    yield from self._long(file, int(chosen[at]))
                    stop = at + 1
                else:
                    data = _read(file, int(start), int(ends[stop - 1]))
                    yield Batch(chosen[at:stop], data, begins[at:stop] - start, ends[at:stop] - start)
                if tick:
                    tick(int((ends[at:stop] - begins[at:stop]).sum()))
                at = stop

    def head(self, document: int) -> bytes:
        """The first piece of a document: all of it, unless it is long."""
        with self.path.open("rb") as file:
            begin, end = int(self.begins[document]), int(self.ends[document])
            if end - begin <= PIECE:
                return _read(file, begin, end)
            return next(self._long(file, document)).data

    def subset(self, chosen: Ints) -> "Corpus":
        """Only these documents, in this order."""
        return replace(self, begins=self.begins[chosen], ends=self.ends[chosen],
                       sources=self.sources[chosen], lines=self.lines[chosen])

    def _long(self, file: BinaryIO, document: int) -> Iterator[Batch]:
        begin, end = int(self.begins[document]), int(self.ends[document])
        blocks = (_read(file, at, min(at + PIECE, end)) for at in range(begin, end, PIECE))
        for number, data in enumerate(pieces(blocks)):
            yield Batch(np.array([document]), data, np.array([0]), np.array([len(data)]), number > 0)


class Spool:
    """Writes a corpus. Use as a context manager; `corpus()` afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb", buffering=PIECE)
        self.begins, self.ends = array("q"), array("q")
        self.sources, self.lines = array("q"), array("q")
        self.at = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, text: bytes, source: int, line: int) -> None:
        """Begin a document."""
        self.begins.append(self.at)
        self.sources.append(source)
        self.lines.append(line)
        self.ends.append(self.at)
        self.extend(text)

    def extend(self, text: bytes) -> None:
        """Go on with the last document."""
        assert self.ends, "no document has begun"
        if self.at > self.ends[-1]:  # back over the line feed that stands between documents
            self.at -= 1
            self.file.seek(self.at)
        self.file.write(text)
        self.file.write(b"\n")
        self.ends[-1] = self.at + len(text)
        self.at = self.ends[-1] + 1

    def corpus(self) -> Corpus:
        assert self.file.closed, "the last documents may not be on disk yet"
        columns = (self.begins, self.ends, self.sources, self.lines)
        return Corpus(self.path, *(np.array(column, np.int64) for column in columns))


def _read(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    data = file.read(end - begin)
    assert len(data) == end - begin, "the corpus on disk is shorter than its documents"
    return data
