"""Stateless noise: a function of key and place alone, uniform and normal as they say."""

import math

import numpy as np
import pytest
import torch

from handmill.data.noise import bits, normal, spread, uniform
from handmill.data.order import draw, items_at

PLACES = torch.arange(4000)


def reference(seed: int, n: int) -> list[int]:
    """SplitMix64 as published, in Python's own integers."""
    mask, words = (1 << 64) - 1, []
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


def test_the_words_are_splitmix64s() -> None:
    """The published generator's first outputs for seed 1234567, and an item's stream from its mixed seed."""
    assert reference(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    mask = (1 << 64) - 1
    key, place = draw("key"), 77
    z = (place * 0x9E3779B97F4A7C15 + key) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    expected = reference(z ^ (z >> 31), 5)
    found = [int(word) & mask for word in bits(key, torch.tensor([place]), 5)[0]]
    assert found == expected


def test_the_cut_of_a_batch_changes_nothing() -> None:
    whole = normal(draw(1, "noise"), PLACES, (3, 5))
    parts = torch.cat([normal(draw(1, "noise"), part, (3, 5)) for part in PLACES.split(7)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, normal(draw(2, "noise"), PLACES, (3, 5)))


def test_normal_numbers_have_the_moments_of_normal_numbers() -> None:
    x = normal(draw(1, "moments"), PLACES, (9, 9)).double()
    n = x.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - expected) < 5 * math.sqrt(variance / n), power
    rows, columns = x.flatten(1).T.corrcoef(), x.flatten(1)[:80].corrcoef()
    for matrix, count in ((rows, 4000), (columns, 81)):
        assert (matrix - torch.eye(len(matrix))).abs().max() < 6 / math.sqrt(count)


def test_uniform_numbers_fill_the_range() -> None:
    u = uniform(draw(1, "uniform"), PLACES, 16).flatten()
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 3200) ** 2 / 3200).sum() < 45  # chi-squared of 19 degrees, p = 7e-4


@pytest.mark.parametrize("size", [8, 50, 333])
def test_any_run_of_places_spreads_evenly(size: int) -> None:
    """The star discrepancy of multiples of the golden ratio, far below that of random numbers."""
    u = spread(draw(3, "levels"), torch.arange(10_000, 10_000 + size)).sort().values
    assert (u - (torch.arange(size, dtype=torch.float64) + 0.5) / size).abs().max() < 3 / size


def test_every_item_is_seen_once_an_epoch() -> None:
    seen = items_at(np.arange(300), 100, 5)
    for epoch in np.split(seen, 3):
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(seen[:100], seen[100:200])
    assert np.array_equal(items_at(np.arange(150, 170), 100, 5), seen[150:170])
