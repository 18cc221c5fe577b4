"""Figures of notes: which pitch classes, how well one scale holds them, in what key, and how new the chords are.

Krumhansl and Kessler 1982 (profiles; the key by correlation is Krumhansl and Schmuckler's, Krumhansl 1990); Mogren
2016 (scale consistency). Keys are numbered as in media/scores.py.

N notes, S steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handmill.media.scores import DRUMS, Grid, Score

# how well each semitone above the tonic was judged to fit
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_SCALE = np.isin(np.arange(12), (0, 2, 4, 5, 7, 9, 11))  # major; natural minor has the tones of its relative major
_KEYS = np.stack([np.roll(profile, tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])  # (24, 12)
_SCALES = np.stack([np.roll(_SCALE, tonic) for tonic in range(12)])  # (12, 12)


class Key(NamedTuple):
    """The key that fits best, and how well."""

    key: int  # 0..23; -1 where all pitch classes are alike or there is none
    correlation: float  # of the histogram with the key's profile


def pitch_classes(pitches: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """The share (12,) of each pitch class in MIDI pitches (N,), weighted by (N,) where given; zeros for no notes."""
    classes = np.asarray(pitches, np.int64) % 12
    counts = np.bincount(classes, None if weights is None else np.asarray(weights, np.float64), 12).astype(np.float64)
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1e-300)
    return shares


def scale_consistency(pitches: ArrayLike) -> float:
    """The largest share of pitches (N,) in one of the 24 scales; nan for no notes. Even chance is 7/12 or more.

    Minor is natural minor, so that the 24 scales are 12 sets of tones. Mogren 2016, section 4.2.
    """
    shares = pitch_classes(pitches)
    return float((_SCALES @ shares).max()) if shares.any() else float("nan")


def key(pitches: ArrayLike, durations: ArrayLike | None = None) -> Key:
    """The key whose profile correlates best with how long each pitch class of (N,) sounds (Krumhansl-Schmuckler)."""
    shares = pitch_classes(pitches, durations)
    if np.ptp(shares) < 1e-12:
        return Key(-1, 0.0)
    correlations = np.corrcoef(shares, _KEYS)[0, 1:]  # (24,)
    return Key(int(correlations.argmax()), float(correlations.max()))


def key_of_score(score: Score) -> Key:
    """The key of a score by the ticks that its notes last; drums have none."""
    notes = score.array[score.array[:, 4] != DRUMS]  # (N, 6)
    return key(notes[:, 2], notes[:, 1] - notes[:, 0])


def key_of_grid(grid: Grid) -> Key:
    """The key of chords (S steps); rests count for nothing."""
    return key([pitch for step in grid for pitch in step if pitch >= 0])


class Novelty:
    """The n-grams of chords in a training set, and how many of a piece's are not among them."""

    def __init__(self, training: Iterable[Grid], n: int = 4) -> None:
        assert n >= 1, n
        self.n = n
        self.known = {gram for grid in training for gram in _grams(grid, n)}

    def share(self, grids: Iterable[Grid]) -> float:
        """The share of the n-grams of pieces, each as often as it stands there, that the training set lacks.

        nan where no piece has n steps. 0 is a copy, or what a model of n steps would make; compare with what
        held-out pieces of the composer have.
        """
        new = [gram not in self.known for grid in grids for gram in _grams(grid, self.n)]
        return float(np.mean(new)) if new else float("nan")


def _grams(grid: Grid, n: int) -> Iterator[tuple[Sequence[int], ...]]:
    return (grid[i:i + n] for i in range(len(grid) - n + 1))
