"""One image file to pixels: PNG, JPEG, WebP, GIF (its first frame) and BMP by Pillow, within limits.

The size is read from the header and compared with the limits before a pixel is decoded. Whatever foreign bytes
do to the decoder, what comes out is pixels or `Refused`.

N images, H height, W width, C channels (1 or 3).
"""

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from handmill.data.sources import Broken
from handmill.media.image import Data

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

Pixels = npt.NDArray[np.uint8]
Payload = Path | bytes | Pixels  # a file, its bytes, or images already decoded: (N, H, W) or (N, H, W, C)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ORIENTATION = 0x0112  # the EXIF tag
_DEEPEST = 8  # bytes a pixel: 16 bits in four channels
_HEAD = 1 << 24  # bytes a file may hold beside its pixels
_DRAFT = 2  # a JPEG is decoded at no less than so many times the wanted size


class Refused(Broken):
    """An image that is left out; `kind` is what the report counts it under."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Decoded(NamedTuple):
    """Images of the wanted size, and what was met on the way."""

    pixels: Pixels  # (N, H, W, C)
    height: int  # of the source, upright
    width: int
    remarks: tuple[str, ...] = ()
    digest: str = ""  # sha256 of the file


def decode(payload: Payload, data: Data) -> Decoded:
    """The images of a payload, fitted to `data.size`. Raises Refused."""
    if isinstance(payload, np.ndarray):
        return _rows(payload, data)
    if isinstance(payload, Path):
        payload = read(payload, byte_limit(data))
    digest = hashlib.sha256(payload).hexdigest()
    try:
        return _decode(payload, data)._replace(digest=digest)
    except Refused:
        raise
    except Exception as error:  # a decoder may raise anything on foreign bytes
        raise _damaged(error) from None


def byte_limit(data: Data) -> int:
    """The most bytes that the file of one image may have: its largest size without compression."""
    return data.largest * _DEEPEST + _HEAD


def read(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises Refused above the limit and where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise Refused("unreadable", f"it cannot be read ({error.strerror or error}): make it readable or leave it "
                      "out") from None
    if len(content) > limit:
        raise too_large(f"above {limit:,} bytes")
    return content


def check_size(height: int, width: int, data: Data) -> None:
    """Raises Refused for a size outside the limits of the [data] table."""
    if height * width > data.largest:
        raise too_large(f"{width} x {height} pixels, above data.largest = {data.largest:,}")
    if min(height, width) < data.smallest:
        raise Refused("too small", f"it is {width} x {height} pixels, below data.smallest = {data.smallest} a side: "
                      "leave it out or lower that")


def too_large(what: str) -> Refused:
    return Refused("too large", f"it is {what}: make it smaller or leave it out")


def _damaged(error: Exception) -> Refused:
    said = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
    return Refused("damaged", f"it is damaged or cut short ({said}): copy it again or leave it out")


def _decode(content: bytes, data: Data) -> Decoded:
    image = _open(content)
    width, height = image.size
    check_size(height, width, data)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at that part of the cost.
    image.draft("RGB" if data.colour == "rgb" else "L", (_DRAFT * max(data.size), _DRAFT * max(data.size)))
    image.load()
    turn = _turn(image)
    remarks = ["first frame of an animation"] * _is_animated(image) + ["turned upright"] * (turn is not None)
    if turn is not None:
        image = image.transpose(turn)
        width, height = (width, height) if turn in (0, 1, 3) else (height, width)
    image, met = _plain(image, data)
    pixels = np.asarray(_fit(image, data)).reshape(1, *data.shape)
    if height < data.size[0] or width < data.size[1]:
        met.append("enlarged")
    return Decoded(pixels, height, width, (*remarks, *met))


def _open(content: bytes) -> "Image":
    """The image with its header read and no pixel decoded."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise Refused("damaged", "it is empty: copy it again or leave it out")
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise Refused("not an image", "it is no PNG, JPEG, WebP, GIF or BMP image that can be read: convert it, copy "
                      "it again or leave it out") from None
    except Image.DecompressionBombError:
        raise too_large("too many pixels") from None


def _is_animated(image: "Image") -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the frames that are not wanted may be damaged
        return True


def _turn(image: "Image") -> "Transpose | None":
    """What turns the image upright, by its EXIF orientation."""
    from PIL.Image import Transpose as T

    turns = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270,
             7: T.TRANSVERSE, 8: T.ROTATE_90}
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note is no damaged image
        return None


def _plain(image: "Image", data: Data) -> tuple["Image", list[str]]:
    """An image as opaque RGB or grey of 8 bits, and what was done to it."""
    remarks = []
    if image.mode.startswith("I"):
        image = _eight_bits(image)
        remarks.append("16 bits made 8")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = _composed(image, data.background)
            remarks.append("transparency on the background")
    if image.mode == "CMYK":
        remarks.append("CMYK made RGB")
    return image.convert("RGB" if data.colour == "rgb" else "L"), remarks


def _eight_bits(image: "Image") -> "Image":
    from PIL import Image

    values = np.asarray(image).astype(np.int64).clip(0, 65535)  # (H, W)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _composed(image: "Image", background: tuple[int, int, int]) -> "Image":
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)


def _fit(image: "Image", data: Data) -> "Image":
    """The image in `data.size`: resized by an antialiased bicubic filter and cropped, padded or stretched."""
    from PIL.Image import Resampling

    (height, width), (w, h) = data.size, image.size
    if (w, h) == (width, height):
        return image
    if data.fit == "pad":
        return _padded(image, data)
    box = (0.0, 0.0, float(w), float(h))
    if data.fit == "crop":
        scale = max(width / w, height / h)
        left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
        box = (left, top, w - left, h - top)
    return image.resize((width, height), Resampling.BICUBIC, box)


def _padded(image: "Image", data: Data) -> "Image":
    from PIL import Image

    height, width = data.size
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height), data.background).convert(image.mode)
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def _rows(rows: Pixels, data: Data) -> Decoded:
    """Images of an array, (N, H, W) or (N, H, W, C) with C of 1, 3 or 4."""
    from PIL import Image

    count, height, width = rows.shape[:3]
    check_size(height, width, data)
    rows = rows[..., 0] if rows.ndim == 4 and rows.shape[3] == 1 else rows
    channels = 1 if rows.ndim == 3 else rows.shape[3]
    if (height, width) == data.size and channels in (1, data.shape[2]):
        rows = rows.reshape(count, height, width, channels)
        return Decoded(np.broadcast_to(rows, (count, *data.shape)), height, width)
    fitted = [np.asarray(_fit(_plain(Image.fromarray(row), data)[0], data)) for row in rows]
    remarks = ("enlarged",) if height < data.size[0] or width < data.size[1] else ()
    return Decoded(np.stack(fitted).reshape(count, *data.shape), height, width, remarks)
