"""What reaches the disk: whole files, their fingerprints, and the certainty that they are there."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Return only when the file, or the names in the folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(file: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hexadecimal digest} of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def sealed(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of JSON values with the SHA-256 of all of them as its "seal", whatever stood there before."""
    rest = {key: value for key, value in table.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return rest | {"seal": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


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
