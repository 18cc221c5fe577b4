"""Music as notes: what MIDI files, chorales and tokens are turned into, and out of again.

A tick is 1 / resolution of a quarter note. A key is its tonic's pitch class (C = 0), plus 12 where it is minor.
A grid is music as steps of equal length, each the pitches that sound in it: of a piece of separated voices one pitch
a voice, REST where it is silent.

N notes, S steps, V voices.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handmill.errors import UserError

Step = tuple[int, ...]
Grid = tuple[Step, ...]

PITCHES = 128
DRUMS = 128  # in the place of a program: the pitch then names a drum, and which kit plays it is not kept
REST = -1
KEYS = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B",
        "Cm", "C#m", "Dm", "Ebm", "Em", "Fm", "F#m", "Gm", "G#m", "Am", "Bbm", "Bm")
MODERATE = 500_000  # microseconds a quarter note, which MIDI takes where a file names no tempo
LONGEST = (1 << 28) - 1  # ticks: the longest time that a MIDI file can write
MOST_STEPS = 1 << 18


class Note(NamedTuple):
    """One note; notes sort by when they begin."""

    start: int  # ticks
    end: int  # ticks, after start
    pitch: int  # 0..127, 60 is middle C
    velocity: int = 80  # 1..127
    program: int = 0  # 0..127 of General MIDI, or DRUMS
    voice: int = 0  # counted from the top


@dataclass(frozen=True)
class Score:
    """A piece. Changes of tempo, key and metre stand in order of their ticks, no two of a kind at one tick."""

    notes: tuple[Note, ...]
    resolution: int = 480  # ticks a quarter note
    tempos: tuple[tuple[int, int], ...] = ((0, MODERATE),)  # tick, microseconds a quarter note; the first at tick 0
    keys: tuple[tuple[int, int], ...] = ()  # tick, key
    metres: tuple[tuple[int, int, int], ...] = ()  # tick, beats in a bar, 4 for quarters
    title: str = ""
    length: int = 0  # ticks, where silence follows the last note

    def __post_init__(self) -> None:
        start, end, pitch, velocity, program, voice = self.array.T
        assert ((start >= 0) & (end > start) & (end <= LONGEST)).all(), "a note must end after it begins"
        assert ((pitch >= 0) & (pitch < PITCHES) & (velocity >= 1) & (velocity <= 127)).all()
        assert ((program >= 0) & (program <= DRUMS) & (voice >= 0)).all()
        assert 1 <= self.resolution < 1 << 15, self.resolution
        assert self.tempos, "a score has a tempo"
        assert self.tempos[0][0] == 0, "the first tempo is that of tick 0"
        assert all(1 <= microseconds < 1 << 24 for _, microseconds in self.tempos), self.tempos
        assert all(0 <= key < len(KEYS) for _, key in self.keys), self.keys
        assert all(1 <= beats <= 255 and of in (1, 2, 4, 8, 16, 32, 64) for _, beats, of in self.metres), self.metres
        for changes in (self.tempos, self.keys, self.metres):
            ticks = [change[0] for change in changes]
            assert ticks == sorted(set(ticks)), ticks
            assert not ticks or 0 <= ticks[0] <= ticks[-1] <= LONGEST, ticks
        assert 0 <= self.length <= LONGEST, self.length

    @property
    def array(self) -> NDArray[np.int64]:
        """The notes as integers (N, 6), columns as in Note."""
        return np.array(self.notes, np.int64).reshape(-1, len(Note._fields))

    @property
    def end(self) -> int:
        """Ticks until the last note has ended, and the silence after it."""
        return max(self.length, max((note.end for note in self.notes), default=0))

    @property
    def tempo(self) -> float:
        """Quarter notes a minute at the beginning."""
        return 60e6 / self.tempos[0][1]

    def seconds(self, ticks: ArrayLike) -> NDArray[np.float64]:
        """When ticks (...) are, by the tempos."""
        changes, pace, before = self._tempo_map()
        ticks = np.asarray(ticks)
        part = np.searchsorted(changes, ticks, "right") - 1
        found: NDArray[np.float64] = before[part] + (ticks - changes[part]) * pace[part]
        return found

    def ticks(self, seconds: ArrayLike) -> NDArray[np.int64]:
        """The ticks nearest to seconds (...); the inverse of `seconds`."""
        changes, pace, before = self._tempo_map()
        seconds = np.asarray(seconds, np.float64)
        part = np.searchsorted(before, seconds, "right") - 1
        return np.rint(changes[part] + (seconds - before[part]) / pace[part]).astype(np.int64)

    def transposed(self, semitones: int) -> "Score | None":
        """The score in another key, drums as they are; None where a pitch would leave 0..127."""
        notes = [note if note.program == DRUMS else note._replace(pitch=note.pitch + semitones) for note in self.notes]
        if not all(0 <= note.pitch < PITCHES for note in notes):
            return None
        return replace(self, notes=tuple(notes),
                       keys=tuple((tick, transposed_key(key, semitones)) for tick, key in self.keys))

    def tidy(self) -> "Score":
        """The same music in one form: notes in order, voices counted without gaps, none striking a key that is down.

        A note ends where its voice strikes the pitch again, and of two struck at once the longer stays: this is all
        that a MIDI file can say. `length` is where the last of it ends.
        """
        changes = [change[0] for change in (*self.tempos, *self.keys, *self.metres)]
        notes = disjoint(self.notes, _channel)
        parts = {part: i for i, part in enumerate(sorted({_part(note) for note in notes}))}
        return replace(self, notes=tuple(sorted(note._replace(voice=parts[_part(note)]) for note in notes)),
                       length=max(self.end, *changes))

    def _tempo_map(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """The ticks of the changes, seconds a tick from each on, and the seconds before it."""
        changes, microseconds = np.array(self.tempos, np.int64).T
        pace = microseconds / 1e6 / self.resolution
        before = np.concatenate([[0.0], np.cumsum(np.diff(changes) * pace[:-1])])
        return changes, pace, before


def transposed_key(key: int, semitones: int) -> int:
    """The key that many semitones higher; major stays major."""
    return key // 12 * 12 + (key + semitones) % 12


def disjoint(notes: Iterable[Note], string: Callable[[Note], Hashable]) -> list[Note]:
    """The notes in order, each ending where the next on the same `string` begins; of two at once the longer stays."""
    kept: list[Note | None] = []
    last: dict[Hashable, int] = {}
    for note in sorted(notes):
        before = last.get(string(note))
        last[string(note)] = len(kept)
        kept.append(note)
        if before is not None and (earlier := kept[before]) and earlier.end > note.start:
            kept[before] = earlier._replace(end=note.start) if earlier.start < note.start else None
    return [note for note in kept if note is not None]


def _part(note: Note) -> tuple[int, bool]:
    return note.voice, note.program == DRUMS


def _channel(note: Note) -> Hashable:
    return _part(note), note.pitch


def from_grid(grid: Sequence[Sequence[int]], per_quarter: int, separated: bool = False, held: bool = True,
              tempo: float = 100.0, program: int = 0) -> Score:
    """The score of a grid with `per_quarter` steps a quarter note, at `tempo` quarter notes a minute.

    A grid does not tell a note that is held from one that is struck again: a pitch that goes on in the next step (of
    the same voice where they are `separated`) is one held note, or with `held` false a new note every step.
    """
    assert 4 <= tempo <= 60e6, tempo
    grain = math.lcm(480, per_quarter) // per_quarter  # ticks a step
    begun: dict[tuple[int, int], int] = {}  # voice and pitch of what sounds -> the step it began in
    notes: list[Note] = []
    for number, step in enumerate([*grid, ()]):
        sounding = {(voice if separated else 0, pitch) for voice, pitch in enumerate(step) if pitch != REST}
        for voice, pitch in [*begun]:
            if not held or (voice, pitch) not in sounding:
                start = begun.pop((voice, pitch))
                notes.append(Note(start * grain, number * grain, pitch, program=program, voice=voice))
        for one in sounding:
            begun.setdefault(one, number)
    return Score(tuple(sorted(notes)), grain * per_quarter, ((0, round(60e6 / tempo)),), length=len(grid) * grain)


def in_voices(grid: Sequence[Sequence[int]], voices: int) -> Grid:
    """The same steps with a pitch or REST for each of `voices`, from the highest down: (S, V).

    Where a step has fewer pitches than voices, those rest that let the others move least.
    """
    made: list[Step] = []
    last = [60] * voices
    for step in grid:
        chord = sorted(set(step) - {REST}, reverse=True)
        assert len(chord) <= voices, (chord, voices)
        places = min(combinations(range(voices), len(chord)),
                     key=lambda some: sum(abs(last[voice] - pitch) for voice, pitch in zip(some, chord, strict=True)))
        sung = dict(zip(places, chord, strict=True))
        made.append(tuple(sung.get(voice, REST) for voice in range(voices)))
        last = [sung.get(voice, last[voice]) for voice in range(voices)]
    return tuple(made)


def to_grid(score: Score, per_quarter: int, voices: int = 0) -> Grid:
    """The grid of a score: ascending pitches a step, or with `voices` one pitch or REST a voice, the highest.

    Notes begin and end at the nearest step and last one at least; drums are left out. Raises UserError where there
    are more than MOST_STEPS steps or a note of a further voice.
    """
    notes = score.array[score.array[:, 4] != DRUMS]
    start, end = ((2 * notes[:, :2] * per_quarter + score.resolution) // (2 * score.resolution)).T
    end = np.maximum(end, start + 1)
    steps = max(int(end.max(initial=0)), (2 * score.end * per_quarter + score.resolution) // (2 * score.resolution))
    if steps > MOST_STEPS:
        raise UserError(f"the piece {score.title!r} takes {steps} steps and at most {MOST_STEPS} fit: cut it, or take "
                        "fewer steps a quarter note")
    if voices:
        return _voices(start, end, notes[:, 2], notes[:, 5], steps, voices)
    return _chords(start, end, notes[:, 2], steps)


def _chords(start: NDArray[Any], end: NDArray[Any], pitch: NDArray[Any], steps: int) -> Grid:
    change = np.zeros((steps + 1, PITCHES), np.int32)
    np.add.at(change, (start, pitch), 1)
    np.add.at(change, (end, pitch), -1)
    sounding = np.cumsum(change, 0)[:steps] > 0  # (S, 128)
    pitches = np.nonzero(sounding)[1].tolist()
    ends = np.cumsum(sounding.sum(1)).tolist()
    return tuple(tuple(pitches[a:b]) for a, b in zip([0, *ends], ends, strict=False))


def _voices(start: NDArray[Any], end: NDArray[Any], pitch: NDArray[Any], voice: NDArray[Any], steps: int,
            voices: int) -> Grid:
    if voice.max(initial=0) >= voices:
        raise UserError(f"the piece has {voice.max() + 1} voices and the grid {voices}: raise voices")
    grid = np.full((steps, voices), REST)
    for i in np.argsort(pitch, kind="stable"):  # the highest are written last
        grid[start[i]:end[i], voice[i]] = pitch[i]
    return tuple(map(tuple, grid.tolist()))
