"""Pictures for people: grids of samples, rows with titles, PNG files that say what made them.

N images, H height, W width, C channels (1 or 3), B batch.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from handmill.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]

_WHITE = 255
_SMALL = 64  # pixels a side that small images are enlarged to
_WIDE = 1200  # pixels, about the most a picture is enlarged to
_FONT = 14  # pixels


def to_uint8(x: "Tensor") -> Pixels:
    """(B, C, H, W) in [-1, 1] to (B, H, W, C) in 0..255; what lies outside is cut off."""
    assert x.ndim == 4, x.shape
    levels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
    pixels: Pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def from_uint8(images: Pixels) -> "Tensor":
    """(B, H, W, C) in 0..255 to (B, C, H, W) in [-1, 1], the inverse of `to_uint8`."""
    import torch

    assert images.ndim == 4, images.shape
    assert images.dtype == np.uint8, images.dtype
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images: Pixels, columns: int = 0, gap: int = 2, scale: int = 0) -> Pixels:
    """(N, H, W, C) side by side, row by row, with `gap` white pixels between and around: (height, width, 3).

    `columns` 0 makes it about square; `scale` repeats every pixel, 0: small images are enlarged to be seen.
    """
    assert len(images)
    assert images.shape[3:] in ((1,), (3,)), images.shape
    count, height, width, _ = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    scale = scale or _enlargement(height, width, columns)
    rows = -(-count // columns)
    images = np.broadcast_to(images, (count, height, width, 3)).repeat(scale, 1).repeat(scale, 2)
    height, width = height * scale, width * scale
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), _WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top:top + height, left:left + width] = image
    return sheet


def _enlargement(height: int, width: int, columns: int) -> int:
    return max(1, min(-(-_SMALL // min(height, width)), _WIDE // (columns * width)))


def labelled_rows(rows: Sequence[tuple[str, Pixels]], gap: int = 2, scale: int = 0) -> Pixels:
    """Rows of images (N, H, W, C), each under its title: (height, width, 3). A row may be shorter than others."""
    assert rows
    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].shape[1:3]
    scale = scale or _enlargement(height, width, columns)
    strips = [strip for title, images in rows
              for strip in (_title(title), grid(images, len(images), gap, scale))]
    across = max(strip.shape[1] for strip in strips)
    return np.concatenate([np.pad(s, ((0, 0), (0, across - s.shape[1]), (0, 0)), constant_values=_WHITE)
                           for s in strips])


def _title(text: str) -> Pixels:
    """Black on white: (height, width, 3)."""
    from PIL import Image, ImageDraw

    text, font = " ".join(text.split())[:100] or " ", _font()
    _, _, right, bottom = font.getbbox(text)
    strip = Image.new("RGB", (int(right) + 8, max(int(bottom), _FONT) + 6), "white")
    ImageDraw.Draw(strip).text((4, 4), text, "black", font)
    return np.asarray(strip)


def _font() -> "FreeTypeFont":
    """The font that comes with matplotlib: it has Latin, Greek, Cyrillic and more."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _FONT)


def save_png(path: Path | str, image: Pixels, metadata: Mapping[str, str] | None = None) -> None:
    """Write (H, W, C) as PNG with `metadata` in its text chunks (keys of 1 to 79 Latin characters); all or nothing.

    Raises UserError where it cannot be written.
    """
    from PIL import Image, PngImagePlugin

    assert image.dtype == np.uint8, image.dtype
    assert image.shape[2:] in ((1,), (3,)), image.shape
    notes = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        assert 0 < len(key) < 80, key
        notes.add_text(key, value)  # tEXt, or iTXt beyond Latin-1
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG", pnginfo=notes)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None


def read_metadata(path: Path | str) -> dict[str, str]:
    """The text chunks of a PNG file. Raises UserError for a file that is no PNG."""
    from PIL import Image, PngImagePlugin

    try:
        with Image.open(path, formats=("PNG",)) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {key: str(value) for key, value in image.text.items()}
    except Exception as error:  # a decoder may raise anything on foreign bytes
        raise UserError(f"{path} cannot be read as PNG ({error}): name a picture that Handmill saved") from None
