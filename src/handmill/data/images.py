"""Prepared images on disk: arrays of one size, read through a memory map.

    data.json                       format, fingerprint, shape, classes, what each split holds
    {train,validation,test}.npy     uint8 (N, H, W, C)
    {train,...}.labels.npy          int64 (N,), the number of the class, -1: none
    {train,...}.json                names and captions
    manifest.json  report.json      the sources, and what was found in them
    contact.png                     some of the images, class by class
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data.corpus import Ints
from handmill.data.decoding import Pixels
from handmill.data.prepared import Prepared, read_array, read_json, write_json
from handmill.data.splits import NAMES
from handmill.errors import UserError

FORMAT = "handmill-images/1"
_BLOCK = 1 << 24  # bytes copied at once


class Images(Prepared):
    """Prepared images. Opening them reads data.json and nothing else."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        super().__init__(folder, about)
        self.shape: tuple[int, int, int] = tuple(about["shape"])  # H, W, C
        self.classes: tuple[str, ...] = tuple(about["classes"])

    @classmethod
    def open(cls, folder: Path | str) -> "Images":
        """Open a prepared folder. A split's files may be missing until they are asked for. Raises UserError."""
        folder = Path(folder)
        about = read_json(folder / "data.json")
        if about.get("format") != FORMAT:
            raise UserError(f"{folder / 'data.json'} is not of the format {FORMAT}: prepare the data again")
        if not _is_whole(about):
            raise UserError(f"{folder / 'data.json'} does not say what each split holds: prepare the data again")
        return cls(folder, about)

    def count(self, split: str) -> int:
        """How many images a split has."""
        return int(self.about["splits"][split]["images"])

    def images(self, split: str) -> Pixels:
        """The images of "train", "validation" or "test", memory-mapped: (N, H, W, C) uint8.

        Raises UserError when they are missing or damaged.
        """
        return self._array(f"{split}.npy", (self.count(split), *self.shape), np.dtype(np.uint8))

    def labels(self, split: str) -> Ints:
        """The number of each image's class, -1 where it has none: (N,) int64. Raises UserError as `images`."""
        return self._array(f"{split}.labels.npy", (self.count(split),), np.dtype(np.int64))

    def captions(self, split: str) -> list[str]:
        """The caption of each image, "" where it has none. Raises UserError as `images`."""
        return self._texts(split, "captions")

    def names(self, split: str) -> list[str]:
        """Where each image came from. Raises UserError as `images`."""
        return self._texts(split, "names")

    def held_out_files(self) -> list[str]:
        """What a model folder keeps of these data, relative to the folder: all but the training images."""
        splits = [file for name in NAMES[1:] if self.count(name) for file in split_files(name)]
        return ["data.json", "manifest.json", "report.json", "contact.png", *splits]

    def complete(self) -> bool:
        """Whether every file is there in its size."""
        try:
            whole = all(len(self.images(name)) == len(self.labels(name)) == len(self.names(name)) for name in NAMES)
            return whole and bool(self.report and self.manifest) and (self.folder / "contact.png").is_file()
        except UserError:
            return False

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        if not shape[0]:
            return np.zeros(shape, dtype)
        file = self.folder / name
        array = read_array(file)
        if array.shape != shape or array.dtype != dtype:
            raise UserError(f"{file} holds {array.dtype} {array.shape} where {dtype} {shape} was written: prepare the "
                            "data again")
        return array

    def _texts(self, split: str, key: str) -> list[str]:
        if not self.count(split):
            return []
        file = self.folder / f"{split}.json"
        texts = read_json(file).get(key)
        if not isinstance(texts, list) or len(texts) != self.count(split):
            raise UserError(f"{file} does not hold {self.count(split):,} {key}: prepare the data again")
        return texts


def split_files(name: str) -> list[str]:
    """The files of one split."""
    return [f"{name}.npy", f"{name}.labels.npy", f"{name}.json"]


def write_split(folder: Path, name: str, pixels: Pixels, chosen: Ints, labels: Ints, texts: dict[str, list[str]],
                ) -> Iterator[Pixels]:
    """Write the files of a split, image numbers `chosen` of `pixels` (M, H, W, C), and yield its images in blocks."""
    assert len(chosen) == len(labels) == len(texts["names"]) == len(texts["captions"])
    block = max(1, _BLOCK // int(np.prod(pixels.shape[1:])))
    with (folder / f"{name}.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *pixels.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(chosen), block):
            part = pixels[chosen[start:start + block]]
            file.write(part.data)  # np.save's own writing hides why it failed
            yield part
    np.save(folder / f"{name}.labels.npy", labels.astype(np.int64))
    write_json(folder / f"{name}.json", texts)



def _is_whole(about: dict[str, Any]) -> bool:
    splits, shape, classes = about.get("splits"), about.get("shape"), about.get("classes")
    counted = isinstance(splits, dict) and all(
        isinstance(splits.get(name), dict) and type(splits[name].get("images")) is int for name in NAMES)
    shaped = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int for side in shape)
    return counted and shaped and isinstance(classes, list) and isinstance(about.get("fingerprint"), str)
