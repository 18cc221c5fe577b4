"""Pixels as they are: the codec of networks that model images directly.

B batch, C channels, H height, W width. Values from -1 (black) to 1 (white).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from handmill.disk import parsed, write_text
from handmill.errors import UserError

FORMAT = "handmill-pixels/1"


@dataclass(frozen=True)
class Settings:
    """The [codec] table of a network that models pixels."""

    kind: Literal["pixels"] = "pixels"


class Pixels:
    """Images of one `shape` (C, H, W); `classes` are the names that can be asked for."""

    def __init__(self, shape: tuple[int, ...], classes: tuple[str, ...], deviation: float) -> None:
        assert len(shape) == 3, shape
        self.shape, self.classes = shape, classes
        self.deviation = deviation  # of the training pixels, whatever their mean

    def encode(self, images: Tensor) -> Tensor:
        """What the network models of images (B, C, H, W): themselves."""
        return images

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1]."""
        return codes.clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Write `folder`/codec.json."""
        save(folder, {"format": FORMAT, "shape": list(self.shape), "classes": list(self.classes),
                      "deviation": self.deviation})

    @classmethod
    def load(cls, folder: Path) -> "Pixels":
        """What `save` wrote. Raises UserError when it is missing or broken."""
        content = load(folder, FORMAT)
        return cls(tuple(content["shape"]), tuple(content["classes"]), float(content["deviation"]))


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write a codec's description."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "codec.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path, form: str) -> dict[str, Any]:
    """The description of a codec over images, its shape and classes checked. Raises UserError."""
    file = folder / "codec.json"
    try:
        content = parsed(file.read_text(encoding="utf-8"))
        sound = content["format"] == form and all(type(n) is int and 0 < n < 1 << 16 for n in content["shape"])
        sound = sound and len(content["shape"]) == 3 and all(isinstance(name, str) for name in content["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{file} is not of the format {form}: copy the folder again from where it was made")
    return dict(content)
