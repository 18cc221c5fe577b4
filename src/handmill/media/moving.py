"""Moving pictures: frames as a GIF that any program shows, or as an MP4 that browsers play.

N frames, H height, W width, C channels (1 or 3).
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from handmill.errors import UserError, optional

Frames = npt.NDArray[np.uint8]  # (N, H, W, C)

FASTEST = 50.0  # frames a second: browsers show a GIF's frames of less than 2/100 s far too slowly
_SIDE = 256  # pixels that the longer side of small frames is enlarged to, or a little more
_CHOOSING = 64  # pixels a side, about, that a frame's palette is chosen by: more cost time and gain little
# encoders, the best first, with what keeps the edges of enlarged pixels sharp
_ENCODERS = {"libx264": {"crf": "14"}, "libopenh264": {"b": "8M"}, "mpeg4": {"qmin": "1", "qmax": "3", "b": "8M"}}
_BT709 = 1  # of ITU-T H.273: how colours were made brightness and difference, which players else guess


def save(path: Path | str, frames: Frames, frames_per_second: float = 25.0,
         about: Mapping[str, str] | None = None) -> None:
    """Write frames as .gif or .mp4, by the suffix; small ones are enlarged.

    Raises UserError for another suffix, where it cannot be written, and without the package that .mp4 needs.
    """
    check(path)
    writer = save_gif if Path(path).suffix.lower() == ".gif" else save_mp4
    writer(path, frames, frames_per_second, about)


def check(path: Path | str) -> None:
    """Raises UserError where `save` would for the name alone, before any frame is made."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise UserError(f"{path} is no name of a moving picture: end it in .gif or .mp4")
    if suffix == ".mp4":
        optional("av", "video")


def save_gif(path: Path | str, frames: Frames, frames_per_second: float = 25.0,
             about: Mapping[str, str] | None = None) -> None:
    """Write a GIF that repeats for ever, with `about` as JSON in its comment; at most FASTEST frames a second.

    Greys stay as they are; of colours, the 256 that suit a frame best remain of it.
    Raises UserError where it cannot be written.
    """
    assert 0 < frames_per_second <= FASTEST, frames_per_second
    first, *others = _paletted(frames, enlargement(*frames.shape[1:3]))
    ends = np.round(np.arange(len(frames) + 1) * 100 / frames_per_second)  # 1/100 s, the unit of the format
    with _whole(Path(path)) as file:
        first.save(file, "GIF", save_all=True, append_images=others, loop=0, optimize=False,
                   duration=[int(10 * t) for t in np.diff(ends)], comment=json.dumps(dict(about or {})).encode())


def save_mp4(path: Path | str, frames: Frames, frames_per_second: float = 25.0,
             about: Mapping[str, str] | None = None) -> None:
    """Write an MP4 in H.264 (MPEG-4 part 2 where no encoder for it is there), with `about` as JSON in its comment.

    Raises UserError where it cannot be written and when the package `av` is not installed.
    """
    assert frames_per_second > 0, frames_per_second
    av: Any = optional("av", "video")
    scale = even(enlargement(*frames.shape[1:3]), *frames.shape[1:3])
    encoder = next(name for name in _ENCODERS if name in av.codecs_available)
    with _whole(Path(path)) as file, av.open(str(file), "w", "mp4", {"movflags": "+faststart"}) as container:
        container.metadata["comment"] = json.dumps(dict(about or {}))
        rate = Fraction(frames_per_second).limit_denominator(1000)
        stream = container.add_stream(encoder, rate=rate, options=_ENCODERS[encoder])
        stream.pix_fmt = "yuv420p"  # the one format of pixels that every browser plays
        stream.height, stream.width = (side * scale for side in frames.shape[1:3])
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(_rgb(_enlarged(pixels, scale)), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=_BT709)))
        container.mux(stream.encode())


def enlargement(height: int, width: int) -> int:
    """How often each pixel is repeated so that the longer side has 256 or more."""
    return max(1, -(-_SIDE // max(height, width)))


def even(scale: int, height: int, width: int) -> int:
    """`scale`, or the next one that makes both sides even, as yuv420p needs them."""
    return scale + 1 if scale % 2 and (height % 2 or width % 2) else scale


def _enlarged(pixels: Frames, scale: int) -> Frames:  # (H, W, ...) -> (H * scale, W * scale, ...)
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _rgb(pixels: Frames) -> Frames:  # (H, W, C) -> (H, W, 3)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _paletted(frames: Frames, scale: int) -> Iterator[Any]:
    """Pillow's images of the frames, enlarged: grey ones, or each of a palette of its own."""
    from PIL import Image

    assert frames.dtype == np.uint8, frames.dtype
    assert frames.shape[3:] in ((1,), (3,)), frames.shape
    for pixels in frames:
        if pixels.shape[2] == 1:
            yield Image.fromarray(_enlarged(pixels[..., 0], scale))
            continue
        step = -(-max(pixels.shape) // _CHOOSING)
        some = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step]))
        palette = some.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
        chosen = Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
        yield chosen.resize((chosen.width * scale, chosen.height * scale), Image.Resampling.NEAREST)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to; what was written there is at `path` once all of it is. Raises UserError."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None
    finally:
        beside.unlink(missing_ok=True)
