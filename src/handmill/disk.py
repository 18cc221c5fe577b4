"""What reaches the disk: whole files, their fingerprints, and the certainty that they are there."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Return only when the file, or the names in the folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no other process is in such a block with the folder, which holds it for this one.

    The system ends the hold with the process, however that ends. Where it knows no such holds (flock: Windows, some
    network disks) nobody is told apart.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        yield free
    finally:
        os.close(descriptor)


def fingerprint(file: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hexadecimal digest} of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or nested deeper than anything that we write."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sealed(table: Mapping[str, Any]) -> str:
    """The JSON text of a table, at its end the SHA-256 of all else in it: it shows damage, not who wrote it."""
    rest = {key: value for key, value in table.items() if key != "seal"}
    digest = hashlib.sha256(_text(rest).encode("utf-8", "surrogatepass")).hexdigest()
    return _text(rest | {"seal": digest})


def _text(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text so that a reader sees the old text or the new, never a part."""
    staged = path.with_name(path.name + ".tmp")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
    except OSError:  # a full disk
        staged.unlink(missing_ok=True)
        raise
