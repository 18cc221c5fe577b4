"""SF2 files made here by the specification's tables, and what is heard of them against closed forms."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.media import soundfont
from handmill.media.notes import DRUMS, Note, frequency
from handmill.media.sound import Samples
from handmill.media.soundfont import from_bytes, render

RATE = 22_050
PERIOD = 100  # frames of the sample, at 44,100 Hz: 441 Hz
LENGTH = 1000
SINE = np.round(20_000 * np.sin(2 * np.pi * np.arange(LENGTH) / PERIOD)).astype(np.int16)
LOOP = {54: 1}
HIGH_A = Note(0, 1, 69, 127)

Generators = dict[int, int]
Zones = list[tuple[Generators, int]]  # generators, and the instrument or sample they end in (-1: a global zone)


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def bags(zones: list[Zones], last: int) -> tuple[list[int], bytes, bytes]:
    """First bag of each list of zones, the bags, the generators; each with its terminal record."""
    first, bag, generators = [], b"", b""
    for group in zones:
        first.append(len(bag) // 4)
        for amounts, target in group:
            bag += struct.pack("<HH", len(generators) // 4, 0)
            everything = [*amounts.items(), *([(last, target)] if target >= 0 else [])]
            generators += b"".join(struct.pack("<HH", what, amount & 0xFFFF) for what, amount in everything)
    return [*first, len(bag) // 4], bag + struct.pack("<HH", len(generators) // 4, 0), generators + bytes(4)


def font(presets: dict[tuple[int, int], Zones], instruments: list[Zones], samples: np.ndarray[Any, Any] = SINE,
         rate: int = 44_100, key: int = 69, correction: int = 0, loop: tuple[int, int] = (200, 700),
         end: int = 0, kind: int = 1) -> bytes:
    """The bytes of a soundfont with one sample."""
    of, pbag, pgen = bags(list(presets.values()), 41)
    heads = [*presets, (0, 0)]
    phdr = b"".join(struct.pack("<20sHHH3I", b"preset", program, bank, bag, 0, 0, 0)
                    for (bank, program), bag in zip(heads, of, strict=True))
    of, ibag, igen = bags(instruments, 53)
    inst = b"".join(struct.pack("<20sH", b"instrument", bag) for bag in of)
    shdr = struct.pack("<20s5IBbHH", b"sine", 0, end or len(samples), *loop, rate, key, correction, 0, kind) + bytes(46)
    tables = [(b"phdr", phdr), (b"pbag", pbag), (b"pmod", bytes(10)), (b"pgen", pgen), (b"inst", inst),
              (b"ibag", ibag), (b"imod", bytes(10)), (b"igen", igen), (b"shdr", shdr)]
    sound = chunk(b"smpl", samples.astype("<i2").tobytes() + bytes(92))
    return chunk(b"RIFF", b"sfbk" + chunk(b"LIST", b"INFO" + chunk(b"ifil", struct.pack("<HH", 2, 1)))
                 + chunk(b"LIST", b"sdta" + sound)
                 + chunk(b"LIST", b"pdta" + b"".join(chunk(*table) for table in tables)))


def simple(generators: Generators = LOOP, **more: Any) -> bytes:
    return font({(0, 0): [({}, 0)]}, [[(generators, 0)]], **more)


def peak(x: Samples, rate: int = RATE) -> float:
    """Hz of the highest peak, between bins by a parabola of the logarithms."""
    level = np.log(np.abs(np.fft.rfft(x * np.hanning(len(x)))) + 1e-12)
    i = int(level.argmax())
    a, b, c = level[i - 1:i + 2]
    return float((i + (a - c) / (2 * (a - 2 * b + c))) * rate / len(x))


def played(data: bytes, note: Note = HIGH_A, rate: int = RATE) -> Samples:
    return render([note], from_bytes(data), rate, stereo=False)


@pytest.mark.parametrize("pitch", [45, 57, 69, 74, 93])
@pytest.mark.parametrize("rate", [22_050, 48_000])
def test_keys_sound_at_their_pitch(pitch: int, rate: int) -> None:
    x = played(simple(correction=-4), Note(0, 1, pitch, 127), rate)[rate // 10:rate]
    expected = frequency(pitch) * 441 / 440 * 2 ** (-4 / 1200)
    assert abs(peak(x, rate) / expected - 1) < 2e-4


@pytest.mark.parametrize(("generators", "semitones"), [
    ({51: -12}, -12), ({52: 50}, 0.5), ({58: 57}, 12), ({56: 50}, 0), ({56: 0, 58: 60}, 0), ({46: 64}, -5)])
def test_tuning(generators: Generators, semitones: float) -> None:
    x = played(simple(LOOP | generators))[2000:RATE]
    assert abs(12 * np.log2(peak(x) / 441) - semitones) < 0.005


def test_tuning_stays_within_ten_octaves() -> None:
    assert from_bytes(simple(LOOP | {51: 32767, 52: -32767}, correction=-4)).regions(0)[0].tuned == 120 - 1.04
    assert np.isfinite(played(simple(LOOP | {51: 32767, 56: 32767}), Note(0, 1, 127, 127))).all()


def test_the_scale_is_of_cents_to_a_key() -> None:
    x = played(simple(LOOP | {56: 50}), Note(0, 1, 81, 127))[2000:RATE]
    assert abs(12 * np.log2(peak(x) / 441) - 6) < 0.005


@pytest.mark.parametrize("pitch", [60, 69, 76])
def test_the_loop_goes_on_without_a_seam(pitch: int) -> None:
    x = played(simple(), Note(0, 2, pitch, 127))
    n = np.arange(1000, 2 * RATE)
    sine = 0.7 * 20_000 / 2**15 * np.sin(2 * np.pi * 441 * 2 ** ((pitch - 69) / 12) / RATE * n)
    np.testing.assert_allclose(x[1000:2 * RATE], sine, atol=2e-5)  # 88 rounds of the loop later still in phase


def test_a_loop_that_does_not_fit_is_read_within_itself() -> None:
    saw = (np.arange(LENGTH) % 37 * 500).astype(np.int16)  # its loop of 500 frames has a jump
    x = played(simple(samples=saw), rate=44_100)
    one = saw[200:700].astype(np.float32) / 2**15 * 0.7
    np.testing.assert_allclose(x[1000:1000 + 5000], np.tile(np.roll(one, -(1000 - 200) % 500), 10), atol=1e-6)
    short = played(simple(samples=saw, loop=(200, 201)), rate=44_100)
    assert np.ptp(short[300:40_000]) < 1e-6  # one frame over and over


def test_without_a_loop_the_sample_ends() -> None:
    x = played(simple({54: 0}), rate=44_100)
    assert len(x) == LENGTH
    np.testing.assert_allclose(x[90:], 0.7 * SINE[90:] / 2**15, atol=1e-6)  # after delay and attack, 1 ms each
    assert len(played(simple({54: 0}), Note(0, 1, 81, 127), 44_100)) == LENGTH // 2
    assert len(played(simple({54: 1}, loop=(700, 700)), rate=44_100)) == LENGTH  # an empty loop is none


def test_a_loop_until_the_key_is_let_go_plays_on_to_the_end() -> None:
    steps = np.concatenate([np.full(700, 8000), np.full(300, -8000)]).astype(np.int16)
    x = played(simple({54: 3, 38: 0}, samples=steps), Note(0, 0.5, 69, 127), 44_100)
    assert (x[100:22_049] > 0.09).all()
    assert (x[22_060 + 500:] <= 0).all()
    assert 22_050 + 300 <= len(x) <= 22_050 + 802


def timecents(seconds: float) -> int:
    return round(1200 * np.log2(seconds))


def test_the_envelope_is_the_closed_form() -> None:
    generators = {33: timecents(0.1), 34: timecents(0.2), 35: timecents(0.1), 36: timecents(1.0), 37: 120,
                  38: timecents(0.5)}
    region = from_bytes(simple(LOOP | generators)).regions(0)[0]
    t = np.array([0.05, 0.1, 0.2, 0.3, 0.39, 0.45, 0.52, 0.9, 1.0, 1.1, 1.2])
    level = soundfont.envelope(region, 60, 1.0, t)
    falling = [-5, -12, -12, -12, -32, -52]  # dB: 100 a second down to 12, then 100 in half a second
    expected = [0, 0, 0.5, 1, 1, *(10 ** (d / 20) for d in falling)]
    np.testing.assert_allclose(level, expected, rtol=0.03, atol=1e-6)
    hold, decay = (from_bytes(simple(LOOP | {35: 0, 36: 0, 37: 1000, what: 100})).regions(0)[0] for what in (39, 40))
    dark, bright = (soundfont.envelope(hold, key, 9.0, np.array([1.5])) for key in (48, 72))
    assert dark[0] == 1
    assert bright[0] < 1e-4  # an octave up holds for half as long
    assert soundfont.envelope(decay, 72, 9.0, np.array([1.252]))[0] == pytest.approx(10 ** -2.5, rel=0.05)


def test_release_falls_a_hundred_decibels_in_its_time() -> None:
    x = played(simple(LOOP | {38: timecents(1.0)}))
    assert len(x) == pytest.approx(2 * RATE, abs=20)
    halves = [np.sqrt((x[a:a + 500] ** 2).mean()) for a in (RATE, RATE + RATE // 5)]
    assert 20 * np.log10(halves[1] / halves[0]) == pytest.approx(-20, abs=0.3)


def test_level_velocity_and_pan() -> None:
    full = np.abs(played(simple())).max()
    assert full == pytest.approx(0.7 * 20_000 / 2**15, rel=3e-3)
    assert np.abs(played(simple(), Note(0, 1, 69, 64))).max() == pytest.approx(full * (64 / 127) ** 2, rel=1e-3)
    assert np.abs(played(simple(LOOP | {48: 60}))).max() == pytest.approx(full * 10 ** (-6 / 20), rel=1e-3)
    assert np.abs(played(simple(LOOP | {47: 64}))).max() == pytest.approx(full * (64 / 127) ** 2, rel=1e-3)
    left = render([Note(0, 0.2, 69, 127)], from_bytes(simple(LOOP | {17: -500})), RATE)
    assert np.abs(left[:, 1]).max() < 1e-6
    assert np.abs(left[:, 0]).max() == pytest.approx(full, rel=1e-3)
    middle = render([Note(0, 0.2, 69, 127)], from_bytes(simple()), RATE)
    assert np.abs(middle).max(0).tolist() == pytest.approx([full / np.sqrt(2)] * 2, rel=1e-3)


def spans(low: int, high: int) -> int:
    return low | high << 8


def test_zones_are_chosen_by_key_and_velocity_and_add_up() -> None:
    instrument: Zones = [({48: 100}, -1), (LOOP | {43: spans(0, 59)}, 0), (LOOP | {43: spans(60, 127), 48: 20}, 0)]
    data = font({(0, 0): [({51: 1, 48: 10}, -1), ({44: spans(1, 99)}, 0), ({44: spans(100, 127), 51: 2}, 0)]},
                [instrument])
    regions = from_bytes(data).regions(0)
    assert [(r.keys, r.velocities, r.tuned, r.attenuation) for r in regions] == [
        ((0, 59), (1, 99), 1, 11), ((60, 127), (1, 99), 1, 3),
        ((0, 59), (100, 127), 2, 11), ((60, 127), (100, 127), 2, 3)]
    one = render([Note(0, 0.2, 69, 99)], from_bytes(data), RATE, False)
    assert peak(one[:4000]) == pytest.approx(441 * 2 ** (1 / 12), rel=3e-3)
    nothing = font({(0, 0): [({43: spans(0, 10)}, 0)]}, [[({43: spans(20, 127)}, 0)]])
    assert from_bytes(nothing).regions(0) == []
    assert not render([Note(0, 0.2, 69)], from_bytes(nothing), RATE, False).any()


def test_programs_that_lack_are_played_by_the_nearest_below() -> None:
    zones: Zones = [({}, 0)]
    presets = {(0, 8): zones, (0, 40): [({51: 7}, 0)], (128, 0): [({51: 3}, 0)], (1, 60): zones}
    some = from_bytes(font(presets, [[(LOOP, 0)]]))
    assert set(some.presets) == set(presets)
    assert [some.regions(p)[0].tuned for p in (0, 8, 39, 40, 127, DRUMS)] == [0, 0, 0, 7, 7, 3]
    with pytest.raises(UserError, match="has no drums"):
        played(simple(), Note(0, 1, 36, program=DRUMS))


@pytest.mark.parametrize("stereo", [False, True])
def test_blocks_are_the_whole_and_silence_is_silent(stereo: bool) -> None:
    some = from_bytes(simple())
    notes = [Note(0.1 * i, 0.1 * i + 0.15, 60 + i, 90) for i in range(9)]
    whole = render(notes, some, RATE, stereo)
    np.testing.assert_array_equal(np.concatenate(list(soundfont.blocks(notes, some, RATE, stereo, 999))), whole)
    assert whole.dtype == np.float32
    assert not render([], some, RATE, stereo).any()
    assert len(render([], some, RATE, stereo)) == RATE // 2


def without(data: bytes, kind: bytes) -> bytes:
    return data.replace(kind, b"none", 1)


def overwritten(data: bytes, kind: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(kind) + 8 + offset
    return data[:at] + value + data[at + len(value):]


WHOLE = simple()


@pytest.mark.parametrize(("data", "says"), [
    (b"", "not RIFF"), (b"MThd" + bytes(40), "not RIFF"), (chunk(b"RIFF", b"WAVE" + bytes(8)), "of type 'WAVE'"),
    (WHOLE[:-1], "cut short"), (WHOLE[:300], "cut short"), (without(WHOLE, b"pdta"), "without its list 'pdta'"),
    (without(WHOLE, b"sdta"), "without its list 'sdta'"), (without(WHOLE, b"smpl"), "without samples"),
    *((without(WHOLE, kind), f"'{kind.decode()}' is missing") for kind in soundfont._TABLES),
    (overwritten(WHOLE, b"smpl", 0, b"OggS"), "SF3"),
    (overwritten(WHOLE, b"phdr", 38 + 24, b"\xff\xff"), "'phdr' points"),
    (overwritten(WHOLE, b"ibag", 0, b"\xff\xff"), "'ibag' points"),
    (overwritten(WHOLE, b"pgen", 2, b"\x07\0"), "instrument 7"),
    (overwritten(WHOLE, b"igen", 6, b"\x09\0"), "sample 9"),
    (simple(end=5000), "frames 0 to 5,000"), (simple(kind=0x8001), "cannot be played"),
    (simple(rate=0), "cannot be played"), (simple(rate=2**31), "cannot be played"),
    (simple(LOOP | {0: 2000}), "frames 2,000 to"), (font({}, []), "has no instruments"),
    (font({(0, 0): [({}, 0)] * 200}, [[(LOOP, 0)] * 200]), "more than 8,192 zones"),
    (font({(0, 0): [({}, 0)] * 10}, [[(LOOP, 0)] * 10]), "plays 100 samples"),
])
def test_what_is_no_soundfont_is_named(data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        render([Note(0, 0.1, 69)], from_bytes(data, "a.sf2"), RATE)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.sf2").write_bytes(WHOLE)
    assert soundfont.read(tmp_path / "a.sf2").presets == {(0, 0): "preset"}
    with pytest.raises(UserError, match="cannot be read"):
        soundfont.read(tmp_path / "b.sf2")
    with pytest.raises(UserError, match="choose 44100"):
        render([], from_bytes(WHOLE), 7)


PLENTY = font({(0, 0): [({51: 1}, -1), ({44: spans(1, 99)}, 0), ({17: 20}, 1)], (128, 0): [({}, 1)]},
              [[(LOOP | {38: 100, 36: -500, 37: 300}, 0)], [({54: 3, 58: 60, 0: 4, 45: 0}, 0), ({54: 0}, 0)]])


TABLES = PLENTY.index(b"phdr")


def survives(changes: list[tuple[int, int]], end: int) -> None:
    """Parse and play a damaged file."""
    data = bytearray(PLENTY)
    for at, value in changes:
        data[at] = value
    notes = [Note(0, 0.02, 60, 90), Note(0.01, 0.03, 127, 127), Note(0, 0.02, 36, 90, DRUMS)]
    try:
        x = render(notes, from_bytes(bytes(data[:end])), 2000)
    except UserError:
        return
    assert np.isfinite(x).all()
    assert np.abs(x).max() <= 1


@settings(max_examples=200, deadline=2000)
@given(st.lists(st.tuples(st.integers(0, len(PLENTY) - 1), st.integers(0, 255)), max_size=12),
       st.integers(0, len(PLENTY)))
def test_damaged_files_raise_nothing_but_a_sentence(changes: list[tuple[int, int]], end: int) -> None:
    survives(changes, end)


@settings(max_examples=400, deadline=2000)
@given(st.lists(st.tuples(st.integers(TABLES, len(PLENTY) - 1), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_tables_raise_nothing_but_a_sentence(changes: list[tuple[int, int]]) -> None:
    survives(changes, len(PLENTY))
