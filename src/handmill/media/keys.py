"""The key of music by how long each pitch class sounds.

Krumhansl and Kessler 1982 (profiles); Krumhansl 1990 (the key by correlation, Krumhansl and Schmuckler's). Keys are
numbered as in media/scores.py.

N notes, S steps.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handmill.media.scores import DRUMS, Grid, Score

# how well each semitone above the tonic was judged to fit
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_KEYS = np.stack([np.roll(profile, tonic) for profile in (MAJOR, MINOR) for tonic in range(12)])  # (24, 12)


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


def relative(key: int) -> int:
    """The key of the other mode with the same signature: A minor of C major, and C major of A minor."""
    return 12 + (key + 9) % 12 if key < 12 else (key + 3) % 12
