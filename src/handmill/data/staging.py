"""A folder that is there whole or not at all: filled beside its place, flushed to the disk, then one rename."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from handmill.data.prepared import HASHES, Prepared, damaged, write_json
from handmill.disk import fingerprint, flush
from handmill.errors import UserError

Kind = TypeVar("Kind", bound=Prepared)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def ready(kind: type[Kind], folder: Path, make: Callable[[Path], None], room: str) -> Kind:
    """The prepared data in `folder`, made there, by `make` in the folder it is given, unless they are sound.

    Raises UserError where the disk is full (`room` says how much it takes) or cannot be written.
    """
    if not kind.sound(folder):
        if folder.exists():
            print(f"warning: {folder / damaged(folder)} is not as it was written: the data are prepared again",
                  file=sys.stderr)
        with staged(folder, kind.sound, room) as work:
            make(work)
    return kind.open(folder)


@contextmanager
def staged(folder: Path, whole: Callable[[Path], bool], room: str) -> Iterator[Path]:
    """A folder beside the final one that is renamed to it when all went well, and removed when not.

    Where another process was faster and `whole(folder)` holds, its folder stays. Raises UserError where the disk
    is full (`room` says how much it takes) or cannot be written.
    """
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        work.mkdir()
        yield work
        files = sorted(file for file in work.rglob("*") if file.is_file())
        write_json(work / HASHES, {file.relative_to(work).as_posix(): fingerprint(file) for file in files})
        for path in [*work.rglob("*"), work]:
            flush(path)
        if not whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)
        flush(folder.parent)
    except OSError as error:
        raise _said(error, folder.parent, room) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what runs left that were killed."""
    import psutil

    for left in cache.glob("*.tmp-*"):
        process = left.name.rpartition("-")[2]
        if not process.isdecimal() or not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _said(error: OSError, cache: Path, room: str) -> UserError:
    if error.errno in _FULL:
        return UserError(f"the disk that holds {cache} is full: free {room} there, or train in a folder on another "
                         "disk")
    return UserError(f"prepared data cannot be written to {cache} ({error.strerror or error}): "
                     "make the folder writable or train in another one")
