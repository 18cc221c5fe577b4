"""Wav files against the standard library's reader, headers that lie, and the mixing of voices."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.media import sound
from handmill.media.sound import Samples, Sound, from_bytes, limited, overlap_add, wav_bytes


def samples(frames: int = 500, channels: int = 1) -> Samples:
    x = np.random.default_rng(1).uniform(-1, 1, (frames, channels)).astype(np.float32)
    return x[:, 0] if channels == 1 else x


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def wav(body: bytes, tag: int = 1, channels: int = 1, rate: int = 8000, bits: int = 16, frame: int = 0,
        more: bytes = b"") -> bytes:
    layout = struct.pack("<HHIIHH", tag, channels, rate, 0, frame or channels * bits // 8, bits) + more
    return chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", layout) + chunk(b"data", body))


@pytest.mark.parametrize("channels", [1, 2])
def test_the_standard_library_reads_what_is_written(tmp_path: Path, channels: int) -> None:
    x = samples(channels=channels)
    sound.save_wav(tmp_path / "a.wav", Sound(x, 22_050), {"seed": "7"})
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (channels, 22_050, 2)
        levels = np.frombuffer(file.readframes(1000), "<i2").reshape(x.shape)
    np.testing.assert_array_equal(levels, np.clip(np.rint(x * 32768), -32768, 32767))
    back = sound.read_wav(tmp_path / "a.wav")
    assert back.rate == 22_050
    np.testing.assert_allclose(back.samples, x, atol=2**-15)
    assert b'{"seed": "7"}' in (tmp_path / "a.wav").read_bytes()


def test_sixteen_bits_come_back_to_the_bit_and_extremes_are_kept() -> None:
    levels = np.arange(-32768, 32768, dtype=np.int16)
    x = from_bytes(wav(levels.tobytes())).samples
    assert x.min() == -1
    assert x.max() == np.float32(32767 / 32768)
    np.testing.assert_array_equal(from_bytes(wav_bytes(Sound(x, 8000))).samples, x)
    assert from_bytes(wav_bytes(Sound(np.array([1.0, -1.0, 2.0], np.float32), 8000))).samples.tolist() == \
        [x.max(), -1, x.max()]


def test_other_depths_are_read() -> None:
    assert from_bytes(wav(bytes([0, 128, 255]), bits=8)).samples.tolist() == [-1, 0, 127 / 128]
    wide = b"".join(value.to_bytes(3, "little", signed=True) for value in (-2**23, 1, 2**22))
    assert from_bytes(wav(wide, bits=24)).samples.tolist() == [-1, 2**-23, 0.5]
    assert from_bytes(wav(struct.pack("<2i", -2**31, 2**30), bits=32)).samples.tolist() == [-1, 0.5]
    assert from_bytes(wav(struct.pack("<3f", 0.25, -1, 1.5), tag=3, bits=32)).samples.tolist() == [0.25, -1, 1]
    assert from_bytes(wav(struct.pack("<2d", 0.25, -3), tag=3, bits=64)).samples.tolist() == [0.25, -1]


def test_the_extensible_format_and_unknown_chunks_are_read() -> None:
    more = struct.pack("<HHI", 22, 24, 0) + struct.pack("<H", 1) + bytes(14)
    stereo = from_bytes(wav(b"\0\0\x40" * 4, tag=0xFFFE, bits=24, channels=2, more=more))
    assert stereo.samples.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    file = wav(struct.pack("<h", 1 << 14))
    odd = file[:12] + chunk(b"junk", b"odd") + file[12:]
    assert from_bytes(odd[:4] + struct.pack("<I", 0) + odd[8:]).samples.tolist() == [0.5]  # streamed: no size


@pytest.mark.parametrize(("data", "says"), [
    (b"", "not RIFF"), (b"ID3\x04" + bytes(20), "not RIFF"), (b"RF64" + bytes(20), "RF64"),
    (chunk(b"RIFF", b"AVI " + bytes(8)), "AVI"), (chunk(b"RIFF", b"WAVE"), "without description"),
    (chunk(b"RIFF", b"WAVE" + chunk(b"data", b"1234")), "without description"),
    (chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", b"1234")), "4 bytes"),
    (wav(b""), "no samples"), (wav(b"123"), "middle of a sample"), (wav(bytes(8))[:-2], "cut short"),
    (wav(bytes(8), rate=0), "0 frames a second"), (wav(bytes(8), rate=2**31), "frames a second"),
    (wav(bytes(12), channels=6), "6 channels"), (wav(bytes(8), channels=0, frame=2), "0 channels"),
    (wav(bytes(8), tag=85), "format 85"), (wav(bytes(8), bits=12), "12 bits"), (wav(bytes(8), frame=3), "frames of 3"),
    (wav(struct.pack("<2f", 0, np.nan), tag=3, bits=32), "no numbers"),
    (wav(struct.pack("<d", 1e300), tag=3, bits=64), "no numbers"),
    (wav(bytes(8))[:40] + struct.pack("<I", 2**32 - 1) + bytes(8), "promises 4,294,967,295 bytes"),
])
def test_what_is_no_sound_is_named(data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_bytes(data, "a.wav")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.wav cannot be read"):
        sound.read_wav(tmp_path / "none.wav")
    with pytest.raises(UserError, match="cannot be written"):
        sound.save_wav(tmp_path / "no" / "a.wav", Sound(samples(), 8000))
    assert not list(tmp_path.iterdir())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_but_a_sentence(data: st.DataObject) -> None:
    file = bytearray(wav_bytes(Sound(samples(40, data.draw(st.sampled_from([1, 2]))), 8000)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=8)):
        file[at] = value
    try:
        x = from_bytes(bytes(file[:data.draw(st.integers(0, len(file)))])).samples
    except UserError:
        return
    assert np.abs(x).max() <= 1


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_a_sentence(data: bytes) -> None:
    with pytest.raises(UserError):
        from_bytes(b"RIFF" + data)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=12), st.integers(1, 90))
def test_voices_add_up_whatever_the_blocks(spans: list[tuple[int, int]], block: int) -> None:
    rng = np.random.default_rng(3)
    voices = [(first, rng.standard_normal(n).astype(np.float32), rng.random(2).astype(np.float32))
              for first, n in sorted(spans)]
    whole = np.zeros((2, max(first + n for first, n in spans)), np.float32)
    for first, x, gains in voices:
        whole[:, first:first + len(x)] += gains[:, None] * x
    parts = list(overlap_add(voices, 2, block))
    assert max(part.shape[1] for part in parts) <= block
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_the_limiter_leaves_the_quiet_and_bends_the_loud() -> None:
    quiet = np.linspace(-0.75, 0.75, 99, dtype=np.float32)
    np.testing.assert_array_equal(limited(quiet), quiet)
    x = np.linspace(-8, 8, 40_001, dtype=np.float32)
    y = limited(x)
    assert np.abs(y).max() <= 1
    assert (np.diff(y) >= 0).all()
    np.testing.assert_array_equal(y, -y[::-1])
    assert np.diff(y).max() <= 1.01 * (x[1] - x[0])  # nowhere steeper than 1: no corner, no jump
    assert abs(limited(np.array([1.0], np.float32))[0] - (0.75 + 0.25 * np.tanh(1))) < 1e-6


def test_a_wav_file_is_what_a_stream_gets() -> None:
    with wave.open(io.BytesIO(wav_bytes(Sound(samples(9, 2), 44_100)))) as file:
        assert file.getnframes() == 9
    assert Sound(samples(4410), 44_100).seconds == 0.1
