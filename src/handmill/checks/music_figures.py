"""Figures of notes: which pitch classes, how well one scale holds them, in what key, and how new the chords are.

Mogren 2016 (scale consistency). The key is that of media/keys.py.

N notes, S steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handmill.checks import memorisation
from handmill.checks.characters import END, Codes
from handmill.media.keys import MAJOR, MINOR, Key, key, key_of_grid, key_of_score, pitch_classes
from handmill.media.music_tokens import Events, Frames
from handmill.media.scores import MOST_STEPS, REST, Grid, Step, to_grid

__all__ = ["MAJOR", "MINOR", "Key", "Novelty", "Run", "key", "key_of_grid", "key_of_score", "longest_run",
           "pitch_classes", "scale_consistency", "sounding", "steps_of", "total_variation", "transposed"]

EVENT_STEP = 125  # ms: a sixteenth note at 120 quarter notes a minute
_FIRST = END + 2  # number of the first chord, above what stands between pieces
_CHUNK = 1 << 20  # steps

_SCALE = np.isin(np.arange(12), (0, 2, 4, 5, 7, 9, 11))  # major; natural minor has the tones of its relative major
_SCALES = np.stack([np.roll(_SCALE, tonic) for tonic in range(12)])  # (12, 12)


def scale_consistency(pitches: ArrayLike) -> float:
    """The largest share of pitches (N,) in one of the 24 scales; nan for no notes. Even chance is 7/12 or more.

    Minor is natural minor, so that the 24 scales are 12 sets of tones. Mogren 2016, section 4.2.
    """
    shares = pitch_classes(pitches)
    return float((_SCALES @ shares).max()) if shares.any() else float("nan")


class Novelty:
    """The n-grams of chords in a training set, and how many of a piece's are not among them.

    With `any_key` an n-gram counts as known where it stands there higher or lower. Kept are hashes of 64 bits, of
    which two of a million n-grams are the same with a chance below 1e-7.
    """

    def __init__(self, training: Iterable[Grid], n: int = 4, any_key: bool = False) -> None:
        assert n >= 1, n
        self.n, self.any_key = n, any_key
        pieces = [np.unique(_hashes(grid, n, any_key)) for grid in training]
        self.known = np.unique(np.concatenate([np.zeros(0, np.int64), *pieces]))

    def counts(self, grid: Grid) -> tuple[int, int]:
        """How many n-grams of a piece, each as often as it stands there, the training set lacks, and of how many."""
        grams = _hashes(grid, self.n, self.any_key)
        at = np.searchsorted(self.known, grams)
        found = np.append(self.known, 0)[at] == grams
        return int((~found | (at == len(self.known))).sum()), len(grams)

    def share(self, grids: Iterable[Grid]) -> float:
        """The share of the n-grams of pieces that the training set lacks; nan where no piece has n steps.

        0 is a copy, or what a model of n steps would make; compare with what held-out pieces of the composer have.
        """
        new, total = np.array([self.counts(grid) for grid in grids], np.int64).reshape(-1, 2).sum(0)
        return float(new / total) if total else float("nan")


class Run(NamedTuple):
    """Steps in a row that a piece shares with one of the training set."""

    steps: int
    piece: int  # which of those asked for
    source: int  # which of the training set


def longest_run(pieces: Sequence[Grid], training: Iterable[Grid], shifts: Sequence[int] = (0,)) -> Run | None:
    """The longest run of chords that stands in a training piece too, in any of the keys `shifts` semitones away.

    None where there is none. Training pieces stream past; memory grows with `pieces` alone.
    """
    moved = [transposed(grid, shift) for grid in pieces if grid for shift in shifts]
    owner = [i for i, grid in enumerate(pieces) if grid for _ in shifts]
    if not moved:
        return None
    number: dict[Step, int] = {}  # of each chord that is looked for
    texts = [np.array([number.setdefault(step, _FIRST + len(number)) for step in grid], np.int32) for grid in moved]
    _, found = memorisation.copied(texts, _numbered(training, number), (), len(texts))
    return None if found is None else Run(found.characters, owner[found.text], found.document)


def transposed(grid: Grid, semitones: int) -> Grid:
    """The grid that much higher, rests as they are."""
    return tuple(tuple(pitch if pitch == REST else pitch + semitones for pitch in step) for step in grid)


def total_variation(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Half the sum of the differences of the shares in counts (..., 12): 0 for equal shares, 1 for none in common."""
    p, q = (np.asarray(counts, np.float64) for counts in (a, b))
    p, q = (counts / np.maximum(counts.sum(-1, keepdims=True), 1e-300) for counts in (p, q))
    apart: NDArray[np.float64] = np.abs(p - q).sum(-1) / 2
    return apart


def steps_of(codec: Frames | Events, tokens: Iterable[int]) -> Grid:
    """The chords of the first piece of any tokens: its own steps, or of free MIDI steps of EVENT_STEP ms."""
    if isinstance(codec, Frames):
        return codec.decode(tokens)
    score = codec.decode(tokens)  # a tick is a millisecond
    last = (MOST_STEPS - 1) * EVENT_STEP
    notes = tuple(note._replace(end=min(note.end, last)) for note in score.notes if note.start < last)
    return to_grid(replace(score, notes=notes), score.resolution // EVENT_STEP)


def sounding(grid: Grid) -> list[int]:
    """The pitches of all steps, each as often as it sounds."""
    return [pitch for step in grid for pitch in step if pitch != REST]


def _numbered(training: Iterable[Grid], number: dict[Step, int]) -> Iterator[Codes]:
    """Pieces as numbers of chords, END before each, in arrays of about _CHUNK."""
    held: list[int] = []
    for grid in training:
        held += [END, *(number.get(step, 0) for step in grid)]
        if len(held) >= _CHUNK:
            yield np.array(held, np.int32)
            held = []
    yield np.array(held, np.int32)


def _hashes(grid: Grid, n: int, any_key: bool) -> NDArray[np.int64]:
    """A number for each n steps in a row, the same for the same chords; Python's hash of whole numbers has no salt."""
    grams = (_levelled(gram) if any_key else gram for gram in _grams(grid, n))
    return np.fromiter((hash(gram) for gram in grams), np.int64)


def _levelled(gram: Grid) -> Grid:
    """The same chords, moved so that the lowest pitch is 0."""
    return transposed(gram, -min(sounding(gram), default=0))


def _grams(grid: Grid, n: int) -> Iterator[Grid]:
    return (grid[i:i + n] for i in range(len(grid) - n + 1))
