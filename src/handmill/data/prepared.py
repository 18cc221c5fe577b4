"""What prepared data of every medium have: a folder, its tables in JSON, and where training left it."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from handmill.disk import fingerprint, parsed
from handmill.errors import UserError

TABLES = ("data.json", "report.json", "manifest.json")  # of a prepared folder; they tell of times
HASHES = "hashes.json"  # sizes and checksums of all files that were prepared


class Prepared:
    """A prepared folder: data.json (given as `about`), report.json, manifest.json, and files for each split."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.fingerprint: str = about["fingerprint"]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a prepared folder. Raises UserError."""
        raise NotImplementedError(cls.__name__)

    def complete(self) -> bool:
        """Whether every file is there in its size."""
        raise NotImplementedError(type(self).__name__)

    @cached_property
    def report(self) -> dict[str, Any]:
        return read_json(self.folder / "report.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / "manifest.json")

    @cached_property
    def content(self) -> str:
        """A fingerprint of the prepared items alone: the same where their files were only copied or touched."""
        if not (self.folder / HASHES).exists():
            return self.fingerprint
        hashes = read_json(self.folder / HASHES)
        items = json.dumps([(name, hashes[name]) for name in sorted(hashes) if name not in TABLES])
        return hashlib.sha256(items.encode()).hexdigest()[:16]

    @classmethod
    def whole(cls, folder: Path) -> bool:
        """Whether the folder holds prepared data, complete."""
        try:
            return cls.open(folder).complete()
        except UserError:
            return False

    @classmethod
    def sound(cls, folder: Path) -> bool:
        """Whether the folder holds prepared data, complete and as they were written."""
        return cls.whole(folder) and not damaged(folder)

    @classmethod
    def beside(cls, path: Path, fingerprint: Any) -> Self | None:
        """The data of that fingerprint that training kept beside the model folder `path`; None where they are gone."""
        if not isinstance(fingerprint, str) or not fingerprint.isalnum():
            return None
        folder = path.resolve().parent / ".prepared" / fingerprint
        found = cls.open(folder) if cls.whole(folder) else None  # a copy cut short is as good as none
        return found if found is not None and found.fingerprint == fingerprint else None


def damaged(folder: Path) -> str:
    """The name of a file that changed since it was prepared; "": none did."""
    try:
        hashes = read_json(folder / HASHES)
        return next((name for name, kept in hashes.items() if fingerprint(folder / name) != kept), "")
    except UserError:
        return HASHES
    except OSError as error:
        return Path(error.filename).name


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A table in JSON. Raises UserError when it is missing or none."""
    try:
        value = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name a whole folder of prepared data") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the data again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a table: prepare the data again")
    return value


def read_array(file: Path, mapped: bool = True) -> Any:
    """The array in a .npy file, memory-mapped or read. Raises UserError when it is missing or none."""
    try:
        return np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: prepare the data again, or copy the whole folder") from None
    except Exception as error:  # a broken header is read as Python, and raises all that Python's own parser does
        raise UserError(f"{file} is damaged ({error}): prepare the data again") from None
