"""Figures of notes against closed forms."""

import math

import numpy as np
import pytest

from handmill.checks import music_figures as figures
from handmill.media.scores import DRUMS, KEYS, Note, Score

C_MAJOR = [60, 62, 64, 65, 67, 69, 71]


def test_shares_of_pitch_classes_are_of_notes_or_of_weights() -> None:
    np.testing.assert_allclose(figures.pitch_classes([60, 72, 64])[[0, 4]], [2 / 3, 1 / 3])
    np.testing.assert_allclose(figures.pitch_classes([60, 72, 64], [1, 1, 6])[[0, 4]], [1 / 4, 3 / 4])
    assert not figures.pitch_classes([]).any()


def test_scale_consistency_of_a_scale_of_all_tones_and_of_nothing() -> None:
    for tonic in range(12):
        assert figures.scale_consistency([pitch + tonic for pitch in C_MAJOR]) == pytest.approx(1)
    assert figures.scale_consistency(range(12)) == pytest.approx(7 / 12)  # every scale has seven of the twelve
    assert figures.scale_consistency([60, 61, 62]) == pytest.approx(2 / 3)  # no scale has two semitones in a row
    assert math.isnan(figures.scale_consistency([]))


@pytest.mark.parametrize("wanted", range(24))
def test_a_profile_itself_is_in_its_key(wanted: int) -> None:
    profile = figures.MINOR if wanted >= 12 else figures.MAJOR
    found = figures.key([60 + wanted % 12 + i for i in range(12)], profile)
    assert KEYS[found.key] == KEYS[wanted]
    assert found.correlation == pytest.approx(1)


def test_the_correlation_is_that_of_the_formula() -> None:
    found = figures.key([60, 64, 67])  # Pearson's r of the triad's histogram with C major's profile
    x = np.isin(np.arange(12), (0, 4, 7)) / 3
    y = np.array(figures.MAJOR)
    r = ((x - x.mean()) * (y - y.mean())).sum() / (12 * x.std() * y.std())
    assert found == (0, pytest.approx(r))


def test_no_notes_and_all_pitch_classes_alike_have_no_key() -> None:
    assert figures.key([]).key == figures.key(range(12)).key == -1


def test_a_score_is_weighed_by_duration_without_its_drums() -> None:
    a_minor = [Note(0, 960, 57), Note(0, 960, 60), Note(0, 960, 64), Note(0, 10, 61)]
    drums = [Note(0, 90_000, 61, program=DRUMS)]
    assert KEYS[figures.key_of_score(Score(tuple(a_minor + drums))).key] == "Am"
    assert KEYS[figures.key_of_grid(((57, 60, 64), (-1,), (57, 69))).key] == "Am"


def test_novelty_counts_the_grams_that_training_lacks() -> None:
    a, b, c = (60,), (62,), (64, 67)
    novelty = figures.Novelty([(a, b, c)], n=2)
    assert novelty.share([(a, b, c)]) == 0
    assert novelty.share([(c, b, a)]) == 1
    assert novelty.share([(a, b, a), (b, c)]) == pytest.approx(1 / 3)  # ab, ba and bc: ba is new
    assert math.isnan(novelty.share([(a,)]))
