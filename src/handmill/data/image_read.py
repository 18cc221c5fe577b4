"""What was read of the user's images, before any of it is decided on."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from handmill.data.decoding import Pixels


@dataclass
class Read:
    """What was read of every image, in order; the pixels are in a file."""

    file: Path
    shape: tuple[int, int, int]  # H, W, C
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    given: list[int] = field(default_factory=list)  # number of the path
    tests: int = 0  # images of data.test_paths, which come first
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # height, width
    remarks: Counter[str] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)  # file -> sha256

    @property
    def pixels(self) -> Pixels:
        return np.memmap(self.file, np.uint8, "r", shape=(len(self.names), *self.shape))
