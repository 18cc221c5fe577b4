"""The built-in synthesiser against what its notes say: pitch, band, level, envelope, blocks."""

import time
from typing import Any

import numpy as np
import pytest

from handmill.errors import UserError
from handmill.media import synthesis
from handmill.media.notes import DRUMS, FAMILIES, Note, duration, family, frequency, pitch_name
from handmill.media.sound import Samples

RATE = 22_050
PIECE = [Note(0.25 * i, 0.25 * i + 0.4, 48 + 5 * (i % 6), 60 + 5 * i, (11 * i) % 128 if i % 4 else DRUMS, i % 3)
         for i in range(12)]


def spectrum(x: Samples, rate: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Hz and level of each bin, under a window whose side lobes fall below -90 dB (Blackman and Harris)."""
    n = np.arange(len(x)) * 2 * np.pi / len(x)
    window = 0.35875 - 0.48829 * np.cos(n) + 0.14128 * np.cos(2 * n) - 0.01168 * np.cos(3 * n)
    return np.fft.rfftfreq(len(x), 1 / rate), np.abs(np.fft.rfft(x * window))


@pytest.mark.parametrize("program", range(0, 128, 8))
@pytest.mark.parametrize("pitch", [33, 69, 96])
def test_a_note_sounds_at_its_pitch(program: int, pitch: int) -> None:
    x = synthesis.render([Note(0, 1.5, pitch, 100, program)], RATE)[:int(1.5 * RATE)]
    hertz, level = spectrum(x, RATE)
    f = frequency(pitch)
    near = (hertz > 0.9 * f) & (hertz < 1.1 * f)
    assert abs(hertz[near][level[near].argmax()] / f - 1) < 0.01
    assert level[hertz < 0.8 * f].max() < 0.02 * level.max()  # nothing below the fundamental


@pytest.mark.parametrize("program", [16, 80, 30])  # without vibrato
@pytest.mark.parametrize("pitch", [57, 93, 108])
def test_there_are_no_partials_but_its_own_below_half_the_rate(program: int, pitch: int) -> None:
    rate, f = 16_000, frequency(pitch)
    x = synthesis.tone(Note(0, 1.0, pitch, 127, program), rate)[1600:14_000]
    hertz, level = spectrum(x, rate)
    away = np.abs(hertz - f * np.maximum(1, np.round(hertz / f))) > 30
    assert 20 * np.log10(level[away].max() / level.max()) < -60  # an alias would lie between


def test_keys_above_half_the_rate_are_silent() -> None:
    assert not synthesis.render([Note(0, 0.5, 127, 100, 80)], 16_000).any()


@pytest.mark.parametrize("program", [0, 19, 40, 73, DRUMS])
def test_loudness_goes_with_the_velocity_squared_and_stays_below_the_level(program: int) -> None:
    peaks = [np.abs(synthesis.render([Note(0, 0.5, 60, velocity, program)], RATE)).max() for velocity in (127, 64)]
    assert 0.2 < peaks[0] <= 0.4
    assert peaks[1] <= 0.4 * (64 / 127) ** 2
    assert 0.15 < peaks[1] / peaks[0] < 0.4  # (64 / 127)**2 is 0.254; overtones depend on the velocity too


def test_overtones_of_a_string_die_first() -> None:
    x = synthesis.render([Note(0, 2.0, 57, 110)], RATE)
    f = frequency(57)

    def high(part: Samples) -> float:
        hertz, level = spectrum(part, RATE)
        return float((level[hertz > 3.5 * f] ** 2).sum() / (level**2).sum())

    assert high(x[:4096]) > 4 * high(x[RATE:RATE + 4096])


def test_the_envelope_is_the_closed_form() -> None:
    timbre = synthesis.Timbre((1.0,), 0.1, 0.3, 0.5, 0.2)
    t = np.linspace(0, 3, 3001, dtype=np.float32)
    level = synthesis.envelope(timbre, 1.0, t)
    for seconds, expected in ((0.05, 0.5), (0.1, 1.0), (0.4, 0.5 + 0.5 / np.e), (1.0, 0.5 + 0.5 * np.exp(-3))):
        assert abs(level[round(seconds * 1000)] - expected) < 2e-3
    np.testing.assert_allclose(level[1000:], level[1000] * np.exp(-(t[1000:] - 1) / 0.2), rtol=1e-4)
    early = synthesis.envelope(timbre, 0.05, t)  # let go while it rises
    assert abs(early.max() - 0.5) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_note_neither_starts_nor_ends_with_a_click(name: str) -> None:
    x = synthesis.tone(Note(0, 0.3, 60, 127, FAMILIES.index(name) * 8), 44_100)
    assert abs(x[0]) < 0.01
    assert x[-1] == 0
    assert np.abs(x[-441:]).max() < 1e-3  # the last 10 ms
    steps = np.abs(np.diff(x))
    assert steps[13_000:13_500].max() <= 1.05 * steps[:13_000].max()  # where it is let go


def test_a_key_lets_go_and_a_drum_does_not_care() -> None:
    short, long = (synthesis.render([Note(0, end, 60, 100, 16)], RATE) for end in (0.2, 1.0))
    assert len(long) - len(short) == pytest.approx(0.8 * RATE, abs=2)
    drums = [synthesis.render([Note(0, end, 38, 100, DRUMS)], RATE) for end in (0.0, 1.0)]
    np.testing.assert_array_equal(*drums)


def test_every_drum_sounds_and_kick_lies_below_hat() -> None:
    centre = {}
    for key in range(128):
        x = synthesis.tone(Note(0, 0.1, key, 100, DRUMS), 44_100)
        assert 0.1 < np.abs(x).max() <= 0.4
        hertz, level = spectrum(x, 44_100)
        centre[key] = (hertz * level**2).sum() / (level**2).sum()
    assert centre[36] < 150 < centre[38] < centre[42]
    assert centre[41] < centre[45] < centre[48]  # toms rise


@pytest.mark.parametrize("stereo", [False, True])
def test_blocks_are_the_whole_to_the_bit(stereo: bool) -> None:
    whole = synthesis.render(PIECE, RATE, stereo)
    parts = list(synthesis.blocks(PIECE, RATE, stereo, 1000))
    assert max(map(len, parts)) <= 1000
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(synthesis.render(PIECE[::-1], RATE, stereo), whole)
    assert whole.dtype == np.float32
    assert whole.shape[1:] == ((2,) if stereo else ())


def test_voices_stand_side_by_side() -> None:
    left, right = (synthesis.render([Note(0, 0.2, 60, voice=voice), Note(0, 0, 0, 1, voice=1 - voice)], RATE, True)
                   for voice in (0, 1))
    assert np.abs(left[:, 0]).sum() > 1.5 * np.abs(left[:, 1]).sum()
    np.testing.assert_allclose(left, right[:, ::-1], atol=1e-6)
    for place in np.linspace(-1, 1, 9):
        assert (synthesis.panned(place) ** 2).sum() == pytest.approx(1, abs=1e-6)
    alone = synthesis.render([Note(0, 0.2, 60, voice=7)], RATE, True)
    np.testing.assert_array_equal(alone[:, 0], alone[:, 1])


def test_a_crowd_does_not_clip() -> None:
    crowd = [Note(0, 0.5, pitch, 127, 80) for pitch in range(40, 100)]
    x = synthesis.render(crowd, RATE)
    assert 0.9 < np.abs(x).max() <= 1


def test_silence_and_rests() -> None:
    assert synthesis.render([], RATE).tolist() == [0.0] * (RATE // 2)
    assert synthesis.render([], RATE, True).shape == (RATE // 2, 2)
    x = synthesis.render([Note(3, 3.1, 60)], RATE)
    assert not x[:3 * RATE].any()
    assert x[3 * RATE:].any()
    assert len(synthesis.render([Note(0, 7000, 60, program=16)], 1000)) < 62_000  # a stuck key is let go


@pytest.mark.parametrize(("note", "says"), [
    (Note(2, 1, 60), "end after they start"), (Note(-1, 1, 60), "between 0 and"), (Note(0, 1e9, 60), "between 0 and"),
    (Note(0, float("nan"), 60), "between 0 and"), (Note(0, 1, 128), "no MIDI note"), (Note(0, 1, 60, 0), "velocity 1"),
    (Note(0, 1, 60, 1, 128), "no MIDI note"), (Note(0, 1, 60, 1, -2), "no MIDI note")])
def test_what_is_no_note_is_named(note: Note, says: str) -> None:
    with pytest.raises(UserError, match=says):
        synthesis.render([note])


def test_rates_that_cannot_be() -> None:
    with pytest.raises(UserError, match="choose 44100"):
        synthesis.render(PIECE, 0)


def test_names_of_notes() -> None:
    assert [pitch_name(p) for p in (0, 60, 61, 69, 70, 127)] == ["C-1", "C4", "C♯4", "A4", "B♭4", "G9"]
    assert frequency(69) == 440
    assert abs(frequency(60) - 261.6256) < 1e-4
    assert [family(p) for p in (DRUMS, 0, 7, 8, 127)] == ["drums", "piano", "piano", "chromatic percussion",
                                                          "sound effects"]
    assert duration(PIECE) == 0.25 * 11 + 0.4
    assert duration([]) == 0


@pytest.mark.slow
def test_a_minute_of_four_voices_takes_about_a_second() -> None:
    chorale = [Note(beat / 2, beat / 2 + 0.5, pitch + beat % 5, 80, 19, voice)
               for beat in range(120) for voice, pitch in enumerate((72, 65, 60, 48))]
    begun = time.process_time()
    synthesis.render(chorale)
    assert time.process_time() - begun < 3
