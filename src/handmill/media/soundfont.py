"""SoundFonts: notes to sound with the sampled instruments of an SF2 file.

Read from the SoundFont Technical Specification 2.01 (E-mu Systems 1996); sections are of it. A preset's zones choose
instruments by key and velocity, their zones choose samples; generators of an instrument hold, those of a preset add
to them (section 9.4). Honoured: ranges, tuning, loops, attenuation, pan, the volume envelope, and velocity by its
standard modulator (section 8.4.1). Left out: the filter, low frequency oscillators, the modulation envelope, effects,
exclusive classes, and modulators of the file. A tone raised far above its sample's pitch keeps its aliases.

n frames of a note, S of a sample.
"""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handmill.errors import UserError
from handmill.media.notes import DRUMS, Note, ordered
from handmill.media.sound import RATES, Samples, chunks, limited, overlap_add, read_bytes, riff
from handmill.media.synthesis import LONGEST, LONGEST_NOTE, panned

_DRUM_BANK = 128
_LAYERS = 64  # regions that sound at one note, at most
_REGIONS = 8192  # of one preset, at most: a damaged file would name billions
_LEVEL = 0.7  # of full scale, that a sample at full scale and the highest velocity plays at
_QUIETEST = 100.0  # dB under full level, where the envelope ends (section 8.1.2)
_SLOWEST = 400  # Hz of a sample (section 7.10)
_ROM = 0x8000  # bit of a sample's type: it lies in a chip

# generators (section 8.1.2)
_START, _END, _LOOP_START, _LOOP_END, _START_COARSE = range(5)
_END_COARSE, _LOOP_START_COARSE, _LOOP_END_COARSE = 12, 45, 50  # in 32768 frames
_PAN, _DELAY, _ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE, _KEY_HOLD, _KEY_DECAY = 17, 33, 34, 35, 36, 37, 38, 39, 40
_INSTRUMENT, _KEYS, _VELOCITIES, _FIXED_KEY, _FIXED_VELOCITY, _ATTENUATION = 41, 43, 44, 46, 47, 48
_COARSE, _FINE, _SAMPLE, _MODES, _SCALE, _ROOT = 51, 52, 53, 54, 56, 58
_OF_INSTRUMENTS = {_START, _END, _LOOP_START, _LOOP_END, _START_COARSE, _END_COARSE, _LOOP_START_COARSE,
                   _LOOP_END_COARSE, _FIXED_KEY, _FIXED_VELOCITY, _MODES, _ROOT}  # nothing in a preset
_RANGES = (_KEYS, _VELOCITIES)

# records of the chunks of `pdta` (section 7)
_TABLES: dict[bytes, npt.DTypeLike] = {
    b"phdr": [("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("unused", "<u4", 3)],
    b"pbag": [("generator", "<u2"), ("modulator", "<u2")],
    b"pgen": [("what", "<u2"), ("amount", "<i2")],
    b"inst": [("name", "S20"), ("bag", "<u2")],
    b"ibag": [("generator", "<u2"), ("modulator", "<u2")],
    b"igen": [("what", "<u2"), ("amount", "<i2")],
    b"shdr": [("name", "S20"), ("start", "<u4"), ("end", "<u4"), ("loop_start", "<u4"), ("loop_end", "<u4"),
              ("rate", "<u4"), ("key", "u1"), ("correction", "i1"), ("link", "<u2"), ("type", "<u2")]}

Table = npt.NDArray[np.void]
Zone = dict[int, int]  # generator -> amount; of ranges the low key in the low byte, the high one above it


class Region(NamedTuple):
    """A sample and how it is played over a range of keys and velocities."""

    keys: tuple[int, int]  # the lowest and the highest
    velocities: tuple[int, int]
    start: int  # frames of the font's samples
    end: int
    loop: tuple[int, int]  # frames: first, and one past the last; equal: no loop
    lasting: bool  # whether the loop goes on after the key is let go
    rate: float  # Hz
    root: int  # the key at which it sounds as recorded
    tuned: float  # semitones above that
    scale: float  # semitones from key to key
    key: int  # the key it always plays, -1: the note's
    velocity: int  # the velocity it always has, -1: the note's
    attenuation: float  # dB
    pan: float  # -1 left to 1 right
    delay: float  # seconds
    attack: float  # seconds
    hold: float  # seconds, of key 60
    decay: float  # seconds for 100 dB, of key 60
    sustain: float  # dB under full level
    release: float  # seconds for 100 dB
    key_hold: float  # octaves by which hold shortens from one key to the next
    key_decay: float


class Font:
    """The instruments of an SF2 file. `read` makes it."""

    def __init__(self, name: str, samples: npt.NDArray[np.int16], tables: dict[bytes, Table]) -> None:
        self.name = name
        self.samples = samples  # (S,) of all instruments, one after the other
        self._tables = tables
        self._regions: dict[int, list[Region]] = {}  # of the presets asked for
        self._instruments: dict[int, list[Zone]] = {}  # of the instruments they use

    @cached_property
    def presets(self) -> dict[tuple[int, int], str]:
        """(bank, program) -> the preset's name; drums are in bank 128."""
        return {(int(row["bank"]), int(row["program"])): row["name"].split(b"\0")[0].decode("latin-1")
                for row in self._tables[b"phdr"][-2::-1]}  # of two alike, the first counts

    def regions(self, program: int) -> list[Region]:
        """The regions of a General MIDI program, or of DRUMS.

        Where bank 0 (128 for drums) lacks the program, the nearest below stands for it, else the lowest. Raises
        UserError for a font without such a bank, and for a preset that points at what is not there.
        """
        bank, wanted = (_DRUM_BANK, 0) if program == DRUMS else (0, program)
        there = sorted(p for b, p in self.presets if b == bank)
        if not there:
            raise UserError(f"{self.name} has no {'drums' if program == DRUMS else 'instruments'} (bank {bank}): "
                            "choose a soundfont of General MIDI")
        chosen = max([p for p in there if p <= wanted], default=there[0])
        headers = self._tables[b"phdr"][:-1]
        index = int(np.flatnonzero((headers["bank"] == bank) & (headers["program"] == chosen))[0])
        if index not in self._regions:
            self._regions[index] = list(self._resolved(index))
        return self._regions[index]

    def _resolved(self, preset: int) -> Iterator[Region]:
        """What the zones of a preset and of its instruments make together (section 9.4)."""
        count = 0
        for outer in self._zones(b"phdr", b"pbag", b"pgen", preset, _INSTRUMENT):
            instrument = outer[_INSTRUMENT] & 0xFFFF
            if instrument >= len(self._tables[b"inst"]) - 1:
                raise UserError(f"{self._preset(preset)} uses instrument {instrument}, which is not in it: "
                                "the file is damaged")
            if instrument not in self._instruments:
                self._instruments[instrument] = list(self._zones(b"inst", b"ibag", b"igen", instrument, _SAMPLE))
            for inner in self._instruments[instrument]:
                count += 1
                if count > _REGIONS:
                    raise UserError(f"{self._preset(preset)} has more than {_REGIONS:,} zones: the file is damaged")
                zone = _added(inner, outer)
                if all(low <= high for low, high in map(_range, (zone[_KEYS], zone[_VELOCITIES]))):
                    yield self._region(zone, preset)

    def _zones(self, headers: bytes, bags: bytes, generators: bytes, index: int, last: int) -> Iterator[Zone]:
        """The zones of a preset or instrument that end in the generator `last`, each with what its global one says."""
        common: Zone = {}
        of = self._tables[headers]["bag"]
        for bag in range(int(of[index]), int(of[index + 1])):
            first, end = (int(g) for g in self._tables[bags]["generator"][bag:bag + 2])
            zone: Zone = {int(what): int(amount) for what, amount in self._tables[generators][first:end]}
            if last in zone:
                yield common | zone
            elif bag == of[index]:
                common = zone

    def _region(self, zone: Zone, preset: int) -> Region:
        index = zone[_SAMPLE] & 0xFFFF
        if index >= len(self._tables[b"shdr"]) - 1:
            raise UserError(f"{self._preset(preset)} uses sample {index}, which is not in it: the file is damaged")
        header = self._tables[b"shdr"][index]
        rate, root = float(header["rate"]), zone.get(_ROOT, -1)
        root = root if 0 <= root <= 127 else int(header["key"]) if header["key"] <= 127 else 60
        if header["type"] & _ROM or not _SLOWEST <= rate <= RATES[1]:
            raise UserError(f"{self._preset(preset)} uses sample {index}, which cannot be played (type "
                            f"{header['type']:#x}, {rate:,.0f} Hz): choose another soundfont")
        start, end, loop = self._span(header, zone)
        if not 0 <= start < end <= len(self.samples):
            raise UserError(f"{self._preset(preset)} uses sample {index}, frames {start:,} to {end:,} of "
                            f"{len(self.samples):,}: the file is damaged")
        modes = zone.get(_MODES, 0) & 3
        looped = modes in (1, 3) and start <= loop[0] < loop[1] <= end
        return _played(zone, start=start, end=end, loop=loop if looped else (end, end), lasting=modes == 1, rate=rate,
                       root=root, correction=int(header["correction"]))

    def _span(self, header: Any, zone: Zone) -> tuple[int, int, tuple[int, int]]:
        """Start, end and loop of a sample, moved as the zone says."""
        def moved(name: str, fine: int, coarse: int) -> int:
            return int(header[name]) + zone.get(fine, 0) + 32768 * zone.get(coarse, 0)

        return (moved("start", _START, _START_COARSE), moved("end", _END, _END_COARSE),
                (moved("loop_start", _LOOP_START, _LOOP_START_COARSE), moved("loop_end", _LOOP_END, _LOOP_END_COARSE)))

    def _preset(self, index: int) -> str:
        return f"{self.name}: preset {self._tables[b'phdr'][index]['name'].split(bytes(1))[0].decode('latin-1')!r}"


def read(path: Path | str) -> Font:
    """The font of an SF2 file. Raises UserError for a file that is none, or is damaged."""
    return from_bytes(read_bytes(Path(path)), str(path))


def from_bytes(data: bytes, name: str = "the soundfont") -> Font:
    """The font in the bytes of an SF2 file. Raises UserError, which calls it `name`, naming what is wrong."""
    lists: dict[bytes, memoryview] = {}
    for kind, content in chunks(riff(data, b"sfbk", name), name):
        if kind == b"LIST" and len(content) >= 4:
            lists[bytes(content[:4])] = content[4:]
    for wanted in (b"sdta", b"pdta"):
        if wanted not in lists:
            raise UserError(f"{name} is a soundfont without its list {wanted.decode()!r}: copy it again")
    sound = dict(chunks(lists[b"sdta"], name)).get(b"smpl")
    if sound is None or len(sound) < 2:
        raise UserError(f"{name} is a soundfont without samples: choose another")
    if bytes(sound[:4]) == b"OggS":
        raise UserError(f"{name} holds compressed samples (SF3): convert it to SF2")
    samples = np.frombuffer(sound[:len(sound) // 2 * 2], "<i2")
    return Font(name, samples, _parsed(dict(chunks(lists[b"pdta"], name)), name))


def _parsed(found: dict[bytes, memoryview], name: str) -> dict[bytes, Table]:
    """The tables of `pdta`, whose indices rise and stay within (section 7)."""
    tables = {}
    for kind, layout in _TABLES.items():
        record, content = np.dtype(layout), found.get(kind)
        if content is None or not len(content) or len(content) % record.itemsize:
            said = "is missing" if content is None else f"has {len(content):,} bytes, not records of {record.itemsize}"
            raise UserError(f"{name} is no whole soundfont: its chunk {kind.decode()!r} {said}; copy it again")
        tables[kind] = np.frombuffer(content, record)
    for kind, column, into in ((b"phdr", "bag", b"pbag"), (b"pbag", "generator", b"pgen"),
                               (b"inst", "bag", b"ibag"), (b"ibag", "generator", b"igen")):
        index = tables[kind][column].astype(np.int64)
        # the last record of every table is the end of the one before
        if (np.diff(index) < 0).any() or index[-1] >= len(tables[into]):
            raise UserError(f"{name} is a damaged soundfont: its chunk {kind.decode()!r} points at what is not in "
                            f"{into.decode()!r}; copy it again")
    return tables


def _range(amount: int) -> tuple[int, int]:
    return amount & 0xFF, amount >> 8 & 0xFF


def _added(inner: Zone, outer: Zone) -> Zone:
    """An instrument's zone with a preset's on top: ranges meet, amounts add up."""
    zone = dict(inner)
    for what, amount in outer.items():
        if what not in _OF_INSTRUMENTS and what not in (_INSTRUMENT, _SAMPLE, *_RANGES):
            zone[what] = inner.get(what, _DEFAULTS.get(what, 0)) + amount
    for what in _RANGES:
        (a, b), (c, d) = (_range(z.get(what, 127 << 8)) for z in (inner, outer))
        zone[what] = max(a, c) | min(b, d) << 8
    return zone


_DEFAULTS = {_DELAY: -12000, _ATTACK: -12000, _HOLD: -12000, _DECAY: -12000, _RELEASE: -12000, _SCALE: 100}
_LONGEST_PHASE = {_DELAY: 5000, _ATTACK: 8000, _HOLD: 5000, _DECAY: 8000, _RELEASE: 8000}  # timecents


def _played(zone: Zone, *, start: int, end: int, loop: tuple[int, int], lasting: bool, rate: float, root: int,
            correction: int) -> Region:
    """The zone's generators in units, kept within what section 8.1.3 allows."""
    def amount(what: int, low: int, high: int) -> int:
        return min(max(zone.get(what, _DEFAULTS.get(what, 0)), low), high)

    def seconds(what: int) -> float:
        return float(2 ** (amount(what, -12000, _LONGEST_PHASE[what]) / 1200))

    return Region(
        keys=_range(zone[_KEYS]), velocities=_range(zone[_VELOCITIES]), start=start, end=end, loop=loop,
        lasting=lasting, rate=rate, root=root, scale=amount(_SCALE, 0, 1200) / 100,
        tuned=amount(_COARSE, -120, 120) + (amount(_FINE, -100, 100) + correction) / 100,
        key=amount(_FIXED_KEY, 0, 127) if _FIXED_KEY in zone else -1,
        velocity=amount(_FIXED_VELOCITY, 1, 127) if _FIXED_VELOCITY in zone else -1,
        attenuation=amount(_ATTENUATION, 0, 1440) / 10, pan=amount(_PAN, -500, 500) / 500,
        delay=seconds(_DELAY), attack=seconds(_ATTACK), hold=seconds(_HOLD), decay=seconds(_DECAY),
        sustain=amount(_SUSTAIN, 0, 1000) / 10, release=seconds(_RELEASE),
        key_hold=amount(_KEY_HOLD, -1200, 1200) / 1200, key_decay=amount(_KEY_DECAY, -1200, 1200) / 1200)


def render(notes: Iterable[Note], font: Font, rate: int = 44_100, stereo: bool = True) -> Samples:
    """The sound of a piece played with a font, (N, 2) left and right or without `stereo` (N,), in [-1, 1].

    A sample at full scale plays at 0.7 (velocity/127)**2 of it; what rises above 0.75 is bent by `sound.limited`. A
    piece without notes is half a second of silence. Raises UserError for a note out of range, a piece of more than
    two hours, a rate that cannot be, and a font without what the notes ask for.
    """
    return np.concatenate(list(blocks(notes, font, rate, stereo)))


def blocks(notes: Iterable[Note], font: Font, rate: int = 44_100, stereo: bool = True, block: int = 2**17,
           ) -> Iterator[Samples]:
    """The same sound in pieces of at most `block` frames, so that no more than the notes now sounding is held."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"a rate of {rate:,} frames a second lies outside {RATES[0]:,} to {RATES[1]:,}: choose 44100")
    silent = True
    for mixed in overlap_add(_voices(ordered(notes, LONGEST), font, rate, stereo), 2 if stereo else 1, block):
        silent = False
        yield limited(mixed.T if stereo else mixed[0])
    if silent:
        yield np.zeros((rate // 2, 2) if stereo else rate // 2, np.float32)


def _voices(notes: list[Note], font: Font, rate: int, stereo: bool) -> Iterator[tuple[int, Samples, Samples]]:
    for note in notes:
        sounding = [region for region in font.regions(note.program)
                    if region.keys[0] <= note.pitch <= region.keys[1]
                    and region.velocities[0] <= note.velocity <= region.velocities[1]]
        if len(sounding) > _LAYERS:
            raise UserError(f"{font.name} plays {len(sounding)} samples at one note, more than {_LAYERS}: "
                            "choose another soundfont")
        for region in sounding:
            sides = panned(region.pan)
            gains = sides if stereo else sides.mean(keepdims=True) * np.float32(math.sqrt(2))
            yield round(note.start * rate), voice(note, region, font.samples, rate), gains


def voice(note: Note, region: Region, samples: npt.NDArray[np.int16], rate: int) -> Samples:
    """One region's sound of a note, to the end of its release or of its sample: (n,)."""
    key = region.key if region.key >= 0 else note.pitch
    velocity = region.velocity if region.velocity >= 0 else note.velocity
    held = min(note.end - note.start, LONGEST_NOTE)
    step = region.rate / rate * 2 ** (((key - region.root) * region.scale + region.tuned) / 12)
    wave = _resampled(region, samples, step, math.ceil(held * rate), math.ceil((held + region.release) * rate))
    t = np.arange(len(wave)) / rate  # (n,) seconds
    level = _LEVEL * (velocity / 127) ** 2 * 10 ** (-region.attenuation / 20)
    return (level * wave * envelope(region, key, held, t)).astype(np.float32)


def _resampled(region: Region, samples: npt.NDArray[np.int16], step: float, held: int, count: int) -> Samples:
    """`count` frames of the sample, `step` of its frames to one, the loop as long as it goes on; (n,), n <= count."""
    first, past = region.loop[0] - region.start, region.loop[1] - region.start
    plain = np.concatenate([samples[region.start:region.end], np.zeros(4, np.int16)])
    if first == past:
        return _cubic(plain, _until(region.end - region.start, step, count))
    length = past - first
    # the loop goes on behind its end, and a place is wrapped one frame late, so all four points are of the loop
    around = np.concatenate([plain[:past], plain[first + np.arange(4) % length]])
    straight = np.arange(count if region.lasting else held + 1) * step
    places = np.where(straight < past + 1, straight, first + 1 + (straight - first - 1) % length)
    if region.lasting:
        return _cubic(around, places)
    assert held < count, (held, count)  # a release is a millisecond or more
    ending = places[-1] + _until(region.end - region.start - places[-1], step, count - held)
    return np.concatenate([_cubic(around, places[:-1]), _cubic(plain, ending)])


def _until(end: float, step: float, count: int) -> npt.NDArray[np.float64]:
    """Places 0, `step`, 2 `step`, ... before `end`, at most `count` of them."""
    return step * np.arange(count if count * step <= end else math.ceil(end / step), dtype=np.float64)


def _cubic(points: npt.NDArray[np.int16], places: npt.NDArray[np.float64]) -> Samples:
    """The value of (S,) points at places (n,) in [0, S - 3], by cubics through four of them (Catmull and Rom 1974)."""
    at = places.astype(np.intp)
    f = (places - at).astype(np.float32)
    a, b, c, d = (points[np.maximum(at + k, 0)].astype(np.float32) for k in (-1, 0, 1, 2))
    curve: Samples = b + f / 2 * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))
    return curve / np.float32(2**15)


def envelope(region: Region, key: int, held: float, t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The level (n,) at times t, s, of a note held for `held` seconds: a straight attack, then straight in dB.

    Delay, attack, hold, decay to the sustained level and, once the key is let go, release (section 8.1.2); decay and
    release are the seconds for 100 dB.
    """
    hold = region.hold * 2 ** ((60 - key) * region.key_hold)
    decay = region.decay * 2 ** ((60 - key) * region.key_decay)
    down = np.minimum(t, held) - region.delay
    rising = np.clip(down / region.attack, 0, 1)
    fallen = np.clip((down - region.attack - hold) / decay * _QUIETEST, 0, region.sustain)  # dB
    released = np.maximum(t - held, 0) / region.release * _QUIETEST
    level: npt.NDArray[np.float64] = rising * 10 ** (-(fallen + released) / 20)
    return level
