"""The built-in synthesiser: notes to sound by wavetables of partials, without samples of any instrument.

A tone is a sum of partials of its key's frequency, none at or above half the rate, read from a table of one period by
a phase of 32 bits (wavetable synthesis; Horner, Beauchamp and Haken 1993). The sum is kept as two tables: the body,
whose partials fall by 6 dB an octave more, and the overtones, which are the rest, sound with the velocity and die
away, because struck and plucked strings grow duller as they sound. Attack, decay, sustain and release shape it.
Timbres are of the sixteen families of General MIDI level 1; drums are tones that fall in pitch and noise that dies.

n frames of a note, N of a piece, C channels (1 or 2), P partials.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handmill.errors import UserError
from handmill.media.notes import DRUMS, Note, family, frequency, ordered
from handmill.media.sound import RATES, Samples, limited, overlap_add

LONGEST = 7200.0  # seconds of a piece
LONGEST_NOTE = 60.0  # seconds, after which a key is let go
_TABLE = 12  # bits: 4096 samples a period, so reading between them errs by less than -90 dB
_PARTIALS = 64
_LEVEL = 0.4  # of full scale, the peak of one note at the highest velocity
_SILENT = math.log(10 ** (80 / 20))  # time constants until -80 dB
_FADE = 0.004  # seconds, the last of every note, in which it reaches 0
_SPREAD = 0.6  # of the way from the middle to one side, where the outermost voices stand

Partials = tuple[float, ...]  # amplitude of each, the fundamental first


class Timbre(NamedTuple):
    """How the notes of a family sound."""

    partials: Partials
    attack: float  # seconds to full level
    decay: float  # seconds, the time constant of the fall to `sustain`, of middle C where that is 0
    sustain: float  # share of full level; 0: it dies away
    release: float  # seconds, the time constant after the key is let go
    mellow: float = math.inf  # seconds, the time constant at which overtones die away
    vibrato: float = 0.0  # cents, either way


class Drum(NamedTuple):
    """How a key of percussion sounds: a falling tone and noise."""

    tone: float  # share of the tone; the rest is noise
    hertz: float  # of the tone, in the end
    sweep: float  # octaves that the tone falls, most of it in the first 50 ms
    ring: float  # seconds, the time constant of the tone
    hiss: float  # seconds, the time constant of the noise
    bright: int  # how often the noise is differenced, each 6 dB an octave towards the top; below 0: smoothed


def _tilted(tilt: float, even: float = 1.0) -> Partials:
    """Falling as 1 / h**tilt, the even ones times `even` (a stopped pipe has 0)."""
    return tuple((even if h % 2 == 0 else 1.0) / h**tilt for h in range(1, _PARTIALS + 1))


def _plucked(place: float, tilt: float) -> Partials:
    """A string plucked at a share of its length: sin(pi h place) / h**tilt (Fletcher and Rossing 1998, section 2.8)."""
    return tuple(abs(math.sin(math.pi * h * place)) / h**tilt for h in range(1, _PARTIALS + 1))


def _drawn(*bars: tuple[int, float]) -> Partials:
    """Of an organ's drawbars: (partial, level) each."""
    level = dict(bars)
    return tuple(level.get(h, 0.0) for h in range(1, _PARTIALS + 1))


TIMBRES = {  # of the families of General MIDI
    "piano": Timbre(_plucked(1 / 8, 1.4), 0.003, 1.1, 0, 0.06, 0.35),
    "chromatic percussion": Timbre(_drawn((1, 1), (4, 0.35), (10, 0.15)), 0.001, 0.5, 0, 0.25, 0.08),
    "organ": Timbre(_drawn((1, 0.8), (2, 1), (3, 0.5), (4, 0.6), (6, 0.25), (8, 0.3)), 0.012, 0.1, 1, 0.03),
    "guitar": Timbre(_plucked(1 / 5, 1.3), 0.002, 0.6, 0, 0.05, 0.25),
    "bass": Timbre(_plucked(1 / 6, 1.6), 0.004, 0.5, 0, 0.04, 0.3),
    "strings": Timbre(_tilted(1.1), 0.07, 0.3, 0.85, 0.09, vibrato=9),
    "ensemble": Timbre(_tilted(1.4), 0.11, 0.3, 0.9, 0.14, vibrato=6),
    "brass": Timbre(_tilted(0.9), 0.04, 0.15, 0.8, 0.05, 1.5),
    "reed": Timbre(_tilted(1.0, 0.35), 0.03, 0.15, 0.85, 0.05, vibrato=4),
    "pipe": Timbre(_tilted(2.2), 0.05, 0.2, 0.9, 0.07, vibrato=7),
    "synth lead": Timbre(_tilted(1.0), 0.005, 0.1, 0.8, 0.04),
    "synth pad": Timbre(_tilted(1.7), 0.3, 0.5, 0.9, 0.3, vibrato=3),
    "synth effects": Timbre(_tilted(1.3, 0.5), 0.15, 0.8, 0.5, 0.3, 0.8),
    "ethnic": Timbre(_plucked(1 / 10, 1.1), 0.002, 0.45, 0, 0.05, 0.2),
    "percussive": Timbre(_drawn((1, 1), (3, 0.3), (5, 0.15)), 0.001, 0.25, 0, 0.1, 0.05),
    "sound effects": Timbre(_tilted(1.0, 0.0), 0.02, 0.4, 0.6, 0.1),
}

_DRUMS = {  # keys of the General MIDI percussion map -> how they sound
    (35, 36): Drum(0.95, 52, 1.6, 0.16, 0.006, 0),
    (38, 40): Drum(0.4, 185, 0.4, 0.08, 0.11, 1),
    (37, 56, 75, 76, 77): Drum(0.85, 800, 0.1, 0.035, 0.01, 1),
    (39,): Drum(0.0, 100, 0, 0.01, 0.08, 0),
    (41, 43): Drum(0.9, 85, 0.7, 0.2, 0.02, -1),
    (45, 47): Drum(0.9, 120, 0.7, 0.18, 0.02, -1),
    (48, 50): Drum(0.9, 165, 0.7, 0.15, 0.02, -1),
    (42, 44, 54, 69, 70, 82): Drum(0.0, 100, 0, 0.01, 0.035, 2),
    (46,): Drum(0.0, 100, 0, 0.01, 0.2, 2),
    (49, 52, 55, 57): Drum(0.0, 100, 0, 0.01, 0.6, 1),
    (51, 53, 59): Drum(0.15, 3200, 0, 0.3, 0.35, 2),
}
_OTHER = Drum(0.6, 320, 0.2, 0.07, 0.03, 0)
_OF_KEY = {key: drum for keys, drum in _DRUMS.items() for key in keys}


def render(notes: Iterable[Note], rate: int = 44_100, stereo: bool = False) -> Samples:
    """The sound of a piece, (N,) or with `stereo` (N, 2), in [-1, 1], `rate` frames a second.

    A note alone peaks at 0.4 (velocity/127)**2 of full scale or below; where many sound at once, `sound.limited` bends
    what rises above 0.75. A key is let go after a minute. The same notes give the same samples. A piece without notes
    is half a second of silence.
    Raises UserError for a note out of range, a piece of more than two hours, or a rate that cannot be.
    """
    return np.concatenate(list(blocks(notes, rate, stereo)))


def blocks(notes: Iterable[Note], rate: int = 44_100, stereo: bool = False, block: int = 2**17) -> Iterator[Samples]:
    """The same sound in pieces of at most `block` frames, so that no more than the notes now sounding is held."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"a rate of {rate:,} frames a second lies outside {RATES[0]:,} to {RATES[1]:,}: choose 44100")
    piece = ordered(notes, LONGEST)
    if not piece:
        yield np.zeros((rate // 2, 2) if stereo else rate // 2, np.float32)
        return
    sides = placed(piece) if stereo else {}
    centre = np.ones(1, np.float32)
    voices = ((round(note.start * rate), tone(note, rate), sides.get(note.voice, centre)) for note in piece)
    for mixed in overlap_add(voices, 2 if stereo else 1, block):
        yield limited(mixed.T if stereo else mixed[0])


def placed(notes: Sequence[Note]) -> dict[int, Samples]:
    """The gains (left, right) of each voice: side by side from left to right, of equal power."""
    voices = sorted({note.voice for note in notes})
    places = np.linspace(-_SPREAD, _SPREAD, len(voices)) if len(voices) > 1 else np.zeros(1)
    return {voice: panned(place) for voice, place in zip(voices, places, strict=True)}


def panned(place: float) -> Samples:
    """Gains (2,) of equal power, left and right, for a place from -1, left, to 1, right."""
    angle = (place + 1) * math.pi / 4
    return np.array([math.cos(angle), math.sin(angle)], np.float32)


def tone(note: Note, rate: int) -> Samples:
    """One note from its start to where it has died away: (n,)."""
    level = np.float32(_LEVEL * (note.velocity / 127) ** 2)
    if note.program == DRUMS:
        return level * _struck(note.pitch, rate)
    timbre = TIMBRES[family(note.program)]
    if not timbre.sustain:  # what dies away does so half as fast two octaves down
        timbre = timbre._replace(decay=timbre.decay * 2 ** ((60 - note.pitch) / 24))
    held = min(max(note.end - note.start, timbre.attack), LONGEST_NOTE)
    seconds = held + timbre.release * _SILENT
    if not timbre.sustain:
        seconds = min(seconds, timbre.attack + timbre.decay * _SILENT)
    t = np.arange(math.ceil(seconds * rate), dtype=np.float32) / np.float32(rate)  # (n,) seconds
    return _ended(level * _oscillated(note, timbre, t, rate) * envelope(timbre, held, t), rate)


def envelope(timbre: Timbre, held: float, t: Samples) -> Samples:
    """The level at rising times t (n,), s, of a note held for `held` seconds: attack, decay, sustain, release."""
    down = np.minimum(t, np.float32(held))
    fallen = np.exp(-np.maximum(down - timbre.attack, 0) / timbre.decay)
    level: Samples = np.float32(timbre.sustain) + np.float32(1 - timbre.sustain) * fallen
    rising, after = np.searchsorted(t, [timbre.attack, held])
    level[:rising] = down[:rising] / timbre.attack
    level[after:] = level[after:after + 1] * np.exp((held - t[after:]) / timbre.release)
    return level


def drum_of(key: int) -> Drum:
    """How a key of percussion sounds."""
    return _OF_KEY.get(key, _OTHER)


def _oscillated(note: Note, timbre: Timbre, t: Samples, rate: int) -> Samples:
    """The tone before its envelope: body and dying overtones, read by a running phase, (n,)."""
    hertz = frequency(note.pitch)
    audible = math.ceil(rate / 2 / (hertz * 2 ** (timbre.vibrato / 1200))) - 1  # partials below half the rate
    if audible < 1:
        return np.zeros_like(t)
    body, over = _tables(timbre.partials[:audible])
    phase = np.arange(len(t), dtype=np.uint32) * np.uint32(round(hertz / rate * 2**32))  # wraps at a period
    if timbre.vibrato:
        phase += _swayed(timbre.vibrato, hertz, t)
    loud = np.float32(note.velocity / 127)
    if timbre.mellow == math.inf:
        return _read(body + loud * over, phase)
    return _read(body, phase) + _read(over, phase) * (loud * np.exp(t / np.float32(-timbre.mellow)))


@functools.lru_cache(maxsize=512)
def _tables(partials: Partials) -> tuple[Samples, Samples]:
    """Body and overtones over one period and its first point again: (2**_TABLE + 1,) each, at most 1 together."""
    h = np.arange(1, len(partials) + 1)  # (P,)
    waves = np.sin(2 * np.pi / 2**_TABLE * (np.arange(2**_TABLE + 1)[:, None] * h % 2**_TABLE))  # (2**_TABLE + 1, P)
    body, whole = waves @ (np.array(partials) / h), waves @ np.array(partials)
    peak = max(np.abs(body).max(), np.abs(whole).max())  # of every mixture of the two
    return (body / peak).astype(np.float32), ((whole - body) / peak).astype(np.float32)


def _read(table: Samples, phase: npt.NDArray[np.uint32]) -> Samples:
    """The table at a phase (n,) of 2**32 to the period, linear between its points."""
    place = (phase >> np.uint32(32 - _TABLE)).astype(np.intp)
    between = (phase & np.uint32(2 ** (32 - _TABLE) - 1)).astype(np.float32) * np.float32(2.0 ** (_TABLE - 32))
    between *= np.diff(table)[place]
    return between + table[place]


def _swayed(cents: float, hertz: float, t: Samples) -> npt.NDArray[np.uint32]:
    """Vibrato of 5.5 Hz, as the phase that it adds: its frequency deviates by `cents` either way."""
    speed, deviation = 2 * math.pi * 5.5, hertz * (2 ** (cents / 1200) - 1)
    periods = deviation / speed * (1 - np.cos(speed * t))  # (n,) the integral of deviation * sin(speed * t) * 2 pi
    return (periods * 2.0**32).astype(np.int64).astype(np.uint32)


@functools.lru_cache(maxsize=256)
def _struck(key: int, rate: int) -> Samples:
    """A key of percussion at full level, (n,); how long it is held changes nothing."""
    drum = drum_of(key)
    t = np.arange(math.ceil(max(drum.ring, drum.hiss) * _SILENT * rate)) / rate  # (n,)
    falling = drum.hertz * 2 ** (drum.sweep * np.exp(-t / 0.02))  # (n,) Hz
    ringing = np.sin(2 * np.pi * np.cumsum(falling) / rate) * (falling < rate / 2) * np.exp(-t / drum.ring)
    wave = drum.tone * ringing + (1 - drum.tone) * _hissing(key, drum.bright, len(t)) * np.exp(-t / drum.hiss)
    return _ended((wave / np.abs(wave).max()).astype(np.float32), rate)


def _hissing(key: int, bright: int, count: int) -> npt.NDArray[np.float64]:
    """Noise (n,) of a key, peaking at 1, the same every time."""
    noise = np.random.default_rng(key).standard_normal(count + 32)
    noise = np.diff(noise, bright)[:count] if bright >= 0 else np.convolve(noise, np.ones(32), "valid")[:count]
    return noise / np.abs(noise).max()


def _ended(wave: Samples, rate: int) -> Samples:
    """The wave (n,) with its last milliseconds brought to 0, in place."""
    count = min(len(wave), math.ceil(_FADE * rate))
    wave[len(wave) - count:] *= np.linspace(1, 0, count, dtype=np.float32)
    return wave
