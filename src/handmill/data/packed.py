"""A prepared corpus on disk: tokens packed one document after another, read through a memory map.

    data.json                      format, fingerprint, type of the tokens, what each split holds
    codec/tokenizer.json           the tokenizer
    {train,validation,test}.tokens uint16 or uint32, little-endian; every document is `end` and its tokens
    {train,...}.starts.npy         int64, the place of each document's leading `end`
    manifest.json  report.json     the sources, and what was found in them
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from handmill.data.corpus import Ints
from handmill.data.prepared import Prepared, read_array, read_json
from handmill.data.splits import NAMES
from handmill.errors import UserError
from handmill.media.tokenizers import Tokenizer, Tokens, load

FORMAT = "handmill-data/1"


class Packed(Prepared):
    """A prepared corpus. Opening it reads data.json and nothing else."""

    form = FORMAT

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a prepared folder. A split's file may be missing until it is asked for. Raises UserError."""
        folder = Path(folder)
        about = read_json(folder / "data.json")
        if about.get("format") != cls.form or about.get("dtype") not in ("uint16", "uint32"):
            raise UserError(f"{folder / 'data.json'} is not of the format {cls.form}: prepare the data again")
        splits = about.get("splits")
        if not isinstance(splits, dict) or not all(_counted(splits.get(name)) for name in NAMES):
            raise UserError(f"{folder / 'data.json'} does not say what each split holds: prepare the data again")
        return cls(folder, about)

    def count(self, split: str) -> int:
        """How many tokens a split has."""
        return int(self.about["splits"][split]["tokens"])

    def documents(self, split: str) -> int:
        """How many documents a split has."""
        return int(self.about["splits"][split]["documents"])

    def tokens(self, split: str) -> Tokens:
        """The tokens of "train", "validation" or "test", memory-mapped: (tokens,), uint16 or uint32.

        Raises UserError when they are missing or damaged.
        """
        dtype = np.dtype(self.about["dtype"]).newbyteorder("<")
        if not self.count(split):
            return np.zeros(0, dtype)
        file = self._whole(f"{split}.tokens", self.count(split) * dtype.itemsize)
        return np.memmap(file, dtype, "r")

    def starts(self, split: str) -> Ints:
        """The place of each document's leading `end`: (documents,) int64. Raises UserError as `tokens`."""
        starts: Ints = read_array(self.folder / f"{split}.starts.npy", mapped=self.documents(split) > 0)
        return starts

    def codec(self) -> Tokenizer:
        """The tokenizer, here or beside this folder as in a model folder. Raises UserError."""
        return load(None, self._codec_folder())

    def held_out_files(self) -> list[str]:
        """What a model folder keeps, to be checked anywhere: all but the tokenizer and the training split."""
        names = ["manifest.json", "report.json", "data.json"]
        names += [f"{split}.{part}" for split in NAMES if split != "train" for part in ("tokens", "starts.npy")]
        return [name for name in names if (self.folder / name).exists()]

    def complete(self) -> bool:
        """Whether every file is there in its size."""
        try:
            for split in NAMES:
                self.tokens(split)
                if len(self.starts(split)) != self.documents(split):
                    return False
            return bool(self.report and self.manifest and self.codec())
        except UserError:
            return False

    def _codec_folder(self) -> Path:
        inside = self.folder / "codec"
        return inside if inside.is_dir() else self.folder.parent / "codec"

    def _whole(self, name: str, size: int) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: prepare the data again, or copy the whole folder")
        if file.stat().st_size != size:
            raise UserError(f"{file} is not {size} bytes long as it was written: prepare the data again")
        return file


def _counted(split: Any) -> bool:
    return isinstance(split, dict) and all(type(split.get(key)) is int for key in ("documents", "tokens"))


def write_split(folder: Path, split: str, codec: Tokenizer,
                texts: Iterable[tuple[list[str], bool]]) -> dict[str, int]:
    """Write a split's tokens and starts; returns what data.json says of it.

    `texts` are whole documents, or one piece of a long one and True where it goes on from the one before.
    """
    about = {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0, "unknown": 0}
    starts = [np.zeros(0, np.int64)]
    with (folder / f"{split}.tokens").open("wb") as file:
        for documents, continued in texts:
            assert about["tokens"] or not continued, "a split begins with a document"
            tokens = codec.encode(documents[0]) if continued else codec.pack(documents)
            starts.append(np.flatnonzero(tokens == codec.end) + about["tokens"])
            file.write(tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).data)
            about["tokens"] += len(tokens)
            about["documents"] += len(starts[-1])
            about["characters"] += sum(map(len, documents))
            if codec.unknown is not None:
                about["unknown"] += int((tokens == codec.unknown).sum())
    with (folder / f"{split}.starts.npy").open("wb") as file:
        places = np.concatenate(starts)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(places))
        file.write(places.data)  # np.save's own writing hides why it failed
    return about
