"""Sound in and out: wav files, and the mixing of what sounds together.

A wav file is a RIFF form WAVE with chunks `fmt ` and `data` (IBM and Microsoft, "Multimedia Programming Interface and
Data Specifications 1.0", 1991; WAVE_FORMAT_EXTENSIBLE, 2001). Read are PCM of 8, 16, 24 and 32 bits and floats of 32
and 64; written is PCM of 16.

N frames, C channels (1 or 2).
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handmill.errors import UserError

Samples = npt.NDArray[np.float32]

RATES = (1_000, 384_000)  # Hz, the lowest and the highest that is read or made
_LARGEST = 2**32 - 2**16  # bytes of a RIFF file
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_KNEE = 0.75  # of full scale, where the limiter begins


class Sound(NamedTuple):
    """Samples and how many frames of them are a second."""

    samples: Samples  # (N,) mono or (N, 2) left and right, in [-1, 1]
    rate: int  # Hz

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate


class _Layout(NamedTuple):
    """What the chunk `fmt ` says."""

    tag: int  # _PCM or _FLOAT
    channels: int
    rate: int  # Hz
    bits: int  # of a sample, as it is stored


def wav_bytes(sound: Sound, about: Mapping[str, str] | None = None) -> bytes:
    """A wav file of 16-bit PCM; `about` stands as JSON in its comment (LIST INFO ICMT).

    Reading it back differs by at most 2**-16, and by 2**-15 at +1. Raises UserError for more than 4 GiB.
    """
    samples, rate = sound
    assert samples.ndim == 1 or samples.shape[1:] == (2,), samples.shape
    assert RATES[0] <= rate <= RATES[1], rate
    assert np.isfinite(samples).all()
    if samples.size * 2 + 4096 > _LARGEST:
        raise UserError(f"{sound.seconds:,.0f} s of sound do not fit in a wav file of 4 GiB: make it shorter")
    channels = 1 if samples.ndim == 1 else 2
    body = np.clip(np.rint(samples * 2.0**15), -2**15, 2**15 - 1).astype("<i2").tobytes()
    layout = struct.pack("<HHIIHH", _PCM, channels, rate, rate * channels * 2, channels * 2, 16)
    said = b"INFO" + _chunk(b"ISFT", b"Handmill\0") + _chunk(b"ICMT", json.dumps(dict(about or {})).encode() + b"\0")
    form = b"WAVE" + _chunk(b"fmt ", layout) + _chunk(b"LIST", said) + _chunk(b"data", body)
    return _chunk(b"RIFF", form)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def save_wav(path: Path | str, sound: Sound, about: Mapping[str, str] | None = None) -> None:
    """Write a wav file of 16-bit PCM, all or nothing. Raises UserError where it cannot be written."""
    path, data = Path(path), wav_bytes(sound, about)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None


def read_wav(path: Path | str) -> Sound:
    """The sound of a wav file. Raises UserError for one that cannot be read, or whose header does not fit it."""
    return from_bytes(read_bytes(Path(path)), str(path))


def read_bytes(path: Path) -> bytes:
    """A file of at most 4 GiB. Raises UserError."""
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has more than 4 GiB: cut it into shorter files")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): name a file that is there") from None


def from_bytes(data: bytes, name: str = "the sound") -> Sound:
    """The sound in the bytes of a wav file; beyond [-1, 1], where floats may lie, it is cut off.

    Raises UserError, which calls it `name`, for bytes that are no wav file or not what their header says.
    """
    layout = None
    for kind, content in chunks(riff(data, b"WAVE", name), name):
        if kind == b"fmt ":
            layout = _layout(content, name)
        elif kind == b"data" and layout:
            return Sound(_decoded(content, layout, name), layout.rate)
    missing = "samples" if layout else "description of its samples before them (the chunk 'fmt ')"
    raise UserError(f"{name} is a wav file without {missing}: save it again")


def riff(data: bytes | memoryview, form: bytes, name: str) -> memoryview:
    """The chunks of a RIFF file of type `form`. Raises UserError for anything else."""
    start, wanted = bytes(data[:12]), form.decode()
    if len(start) < 12 or start[:4] != b"RIFF":
        what = {b"RIFX": "RIFX, of big-endian numbers", b"RF64": "RF64, of more than 4 GiB"}.get(start[:4], "not RIFF")
        raise UserError(f"{name} is no {wanted} file (it is {what}): convert it, or name another")
    if start[8:] != form:
        raise UserError(f"{name} is no {wanted} file (it is RIFF of type {start[8:].decode('latin-1')!r}): "
                        "name another")
    end = 8 + struct.unpack_from("<I", start, 4)[0]
    return memoryview(data)[12:end if 12 <= end <= len(data) else len(data)]  # a program that streamed left no size


def chunks(data: memoryview, name: str) -> Iterator[tuple[bytes, memoryview]]:
    """Identifier and content of one RIFF chunk after the other. Raises UserError for one that is cut short."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if at + size > len(data):
            raise UserError(f"{name} is cut short: its chunk {kind.decode('latin-1')!r} promises {size:,} bytes and "
                            f"{len(data) - at:,} are there: copy it again")
        yield kind, data[at:at + size]
        at += size + size % 2


def _layout(content: memoryview, name: str) -> _Layout:
    if len(content) < 16:
        raise UserError(f"{name} has a description of {len(content)} bytes, 16 are the least: save it again")
    tag, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", content)
    if tag == _EXTENSIBLE and len(content) >= 26:
        tag = struct.unpack_from("<H", content, 24)[0]  # the first two bytes of the sub-format
    if (tag, bits) not in [(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)]:
        raise UserError(f"{name} is in format {tag} of {bits} bits: save it as PCM of 16 bits")
    if channels not in (1, 2):
        raise UserError(f"{name} has {channels} channels: mix it down to one or two")
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{name} claims {rate:,} frames a second, which lies outside {RATES[0]:,} to {RATES[1]:,}: "
                        "its header is wrong, save it again")
    if frame != channels * bits // 8:
        raise UserError(f"{name} claims frames of {frame} bytes where {channels} x {bits} bits are "
                        f"{channels * bits // 8}: its header is wrong, save it again")
    return _Layout(tag, channels, rate, bits)


def _decoded(content: memoryview, layout: _Layout, name: str) -> Samples:
    """(N,) or (N, 2) in [-1, 1]."""
    frame = layout.channels * layout.bits // 8
    if len(content) < frame:
        raise UserError(f"{name} has no samples: save it again, or leave it out")
    if len(content) % frame:
        raise UserError(f"{name} ends in the middle of a sample: copy it again")
    integers = layout.tag == _PCM
    samples = _integers(content, layout.bits) if integers else _floats(content, layout.bits)
    if not np.isfinite(samples).all():
        raise UserError(f"{name} holds samples that are no numbers: save it again")
    np.clip(samples, -1, 1, out=samples)
    return samples if layout.channels == 1 else samples.reshape(-1, 2)


def _floats(content: memoryview, bits: int) -> Samples:
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite, and refused as such
        samples: Samples = np.frombuffer(content, np.float32 if bits == 32 else np.float64).astype(np.float32)
    return samples


def _integers(content: memoryview, bits: int) -> Samples:
    if bits == 8:  # the one depth without a sign
        return (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / np.float32(2**7)
    if bits == 24:
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)  # the high bytes of 32 bits
        content, bits = memoryview(wide.tobytes()), 32
    samples: Samples = np.frombuffer(content, f"<i{bits // 8}").astype(np.float32) / np.float32(2 ** (bits - 1))
    return samples


def overlap_add(voices: Iterable[tuple[int, Samples, Samples]], channels: int, block: int = 2**17) -> Iterator[Samples]:
    """The sum of voices in blocks of (channels, at most `block`).

    A voice is its first frame, its samples (n,) and their gain in each channel (channels,). Voices come by rising
    first frame and are asked for as they are needed; however long the blocks, the sum is the same to the bit.
    """
    at, buffer = 0, np.zeros((channels, 0), np.float32)
    for first, wave, gains in voices:
        assert first >= at, (first, at)
        while first - at >= block:
            yield _widened(buffer[:, :block], block)
            at, buffer = at + block, buffer[:, block:]
        end = first - at + len(wave)
        buffer = _widened(buffer, end)
        buffer[:, first - at:end] += gains[:, None] * wave
    for start in range(0, buffer.shape[1], block):
        yield buffer[:, start:start + block]


def _widened(buffer: Samples, frames: int) -> Samples:  # (C, n) -> (C, frames or more), silent at the end
    missing = frames - buffer.shape[1]
    return np.pad(buffer, ((0, 0), (0, missing))) if missing > 0 else buffer


def limited(samples: Samples) -> Samples:
    """Within [-1, 1]: to 0.75 as it is, above it x becomes 0.75 + 0.25 tanh((x - 0.75) / 0.25), without a corner.

    It looks at one sample at a time, so blocks limited apart are the whole limited.
    """
    level = np.abs(samples)
    if level.max(initial=0) <= _KNEE:
        return samples
    soft = _KNEE + (1 - _KNEE) * np.tanh((level - _KNEE) / (1 - _KNEE))
    return np.copysign(np.where(level > _KNEE, soft, level), samples)
