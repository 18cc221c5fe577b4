"""Copies planted among images of noise and of digits: all found, none where there are none."""

from pathlib import Path

import numpy as np
import pytest

from handmill.checks import neighbours
from handmill.checks.neighbours import copies, nearest, pixels

DIGITS = Path(__file__).parents[1].parent / "shared" / "data" / "images"


def smooth(seed, n, side=24):
    """Images of random blobs: sums of a few low waves, so that some lie near others."""
    generator = np.random.default_rng(seed)
    waves = generator.normal(size=(n, 5, 5))
    place = np.cos(np.pi * np.outer(np.arange(5), (np.arange(side) + 0.5) / side))  # (5, side)
    x = np.einsum("nij,ih,jw->nhw", waves, place, place)
    return np.clip(128 + 25 * x, 0, 255).astype(np.uint8)[..., None]


def near(images, seed=0):
    noise = np.random.default_rng(seed).normal(0, 10, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def check_planted(training, held_out, clean, copied):
    """None among `clean`; every one of `copied`, which training's first images were copied to."""
    found = copies(pixels(clean), pixels(held_out), pixels(training))
    assert found["excess"]["low"] < 0 < found["excess"]["high"]
    assert found["median_ratio"]["value"] == pytest.approx(1, abs=0.03)
    mixed = np.concatenate((clean, copied))
    found = copies(pixels(mixed), pixels(held_out), pixels(training), pairs=len(copied))
    assert {pair[0] for pair in found["pairs"]} == set(range(len(clean), len(mixed)))
    assert all(place == sample - len(clean) for sample, place, _ in found["pairs"])
    assert found["pairs"][-1][2] < found["limit"]
    assert found["share_closer_than_real_1pct"]["value"] >= len(copied) / len(mixed)
    assert found["excess"]["low"] > 0
    return found


def test_exact_copies_are_found_at_distance_zero():
    training = smooth(0, 1500)
    found = check_planted(training, smooth(1, 1000), smooth(2, 1000), training[:60])
    assert all(distance == 0 for _, _, distance in found["pairs"])


def test_near_copies_are_found():
    training = smooth(0, 1500)
    check_planted(training, smooth(1, 1000), smooth(2, 1000), near(training[:60]))


def test_a_generator_that_blurs_towards_the_mean_is_nearer_but_copies_nothing_exactly():
    training, held_out = smooth(0, 1500), smooth(1, 1000)
    dull = (128 + (smooth(2, 1000).astype(float) - 128) / 2).astype(np.uint8)
    found = copies(pixels(dull), pixels(held_out), pixels(training))
    assert found["median_ratio"]["high"] < 1
    assert found["excess"]["low"] <= 0


def test_nearest_agrees_with_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "_DISTANCES", 500)  # several pieces
    generator = np.random.default_rng(0)
    x, y = (generator.normal(3, 1, (n, 7)).astype(np.float32) for n in (40, 90))
    found = nearest(x, y, 5)
    distances = np.sqrt(np.square(x[:, None].astype(float) - y).mean(-1))  # (40, 90)
    ordered = np.sort(distances, 1)
    assert (found.place == distances.argmin(1)).all()
    assert found.distance == pytest.approx(ordered[:, 0], rel=1e-5)
    assert found.relative == pytest.approx(ordered[:, 0] / ordered[:, :5].mean(1), rel=1e-4)


def test_pixels_are_means_over_areas():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    means = images.reshape(3, 14, 2, 14, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    assert pixels(images) == pytest.approx(means.reshape(3, -1), abs=1e-6)
    assert pixels(images[:, :12, :16]).shape == (3, 12 * 16 * 3)  # small enough as it is
    assert pixels(np.zeros((2, 64, 256, 1), np.uint8)).shape == (2, 4 * 16)


def test_training_data_that_repeat_an_image_are_no_fault():
    training = np.repeat(smooth(0, 200)[:1], 100, axis=0)
    found = nearest(pixels(training[:2]), pixels(training))
    assert (found.distance == 0).all()
    assert (found.relative == 0).all()
    result = copies(pixels(training[:50]), pixels(training[:50]), pixels(training))
    assert result["excess"]["value"] == 0
    assert result["median_ratio"]["value"] == 1


@pytest.mark.slow
def test_copies_among_digits():
    if not DIGITS.is_dir():
        pytest.skip(f"{DIGITS} with the MNIST digits is absent")
    train, test = (np.load(DIGITS / f"mnist-{part}10k.npz")["x"][..., None] for part in ("train", "test"))
    order = np.random.default_rng(0).permutation(10_000)
    train, test = train[order], test[order]
    check_planted(train, test[:5000], test[5000:], train[:100])
    check_planted(train, test[:5000], test[5000:], near(train[:100]))
