"""The counting of the 1000-mode benchmark, on digits whose every mode is known."""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

HOME = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def stacked():
    sys.path.insert(0, str(HOME))
    try:
        spec = importlib.util.spec_from_file_location("stacked", HOME / "stacked.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(HOME))
    return module


@pytest.fixture(scope="module")
def digits(stacked):
    """200 images, each filled with 20 times its digit, the digits in unequal shares."""
    y = np.repeat(np.arange(10), np.arange(11, 31, 2))  # 11, 13, ... of each
    return stacked.Data(np.broadcast_to((20 * y)[:, None, None], (len(y), 4, 4)).astype(np.uint8), y)


class Exact:
    """Reads the digit off its grey."""

    def probabilities(self, images):
        assert images.shape[1:] == (4, 4, 1)
        return np.eye(10)[images[:, 0, 0, 0] // 20]


def test_stacks_hold_the_digits_of_their_labels(stacked, digits):
    images, labels = stacked.stack(digits, 500, seed=3)
    assert images.shape == (500, 4, 4, 3)
    assert (images == 20 * labels[:, None, None]).all()
    assert (stacked.classified(images, Exact()) == labels).all()
    assert (stacked.stack(digits, 500, seed=3)[0] == images).all()
    assert (stacked.stack(digits, 500, seed=4)[0] != images).any()


def test_a_mode_is_the_number_that_its_digits_spell(stacked):
    assert stacked.modes_of(np.array([[0, 0, 0], [1, 2, 3], [9, 9, 9]])).tolist() == [0, 123, 999]
    with pytest.raises(AssertionError):
        stacked.modes_of(np.array([[0, 0, 10]]))


def test_shares_of_the_modes_are_products(stacked, digits):
    shares = stacked.triples(digits.y)
    assert shares.sum() == pytest.approx(1)
    one = np.bincount(digits.y) / len(digits.y)
    assert shares[409] == pytest.approx(one[4] * one[0] * one[9])


def test_modes_and_divergence_of_known_samples(stacked):
    even = np.full(1000, 1e-3)
    every = np.stack(np.unravel_index(np.arange(1000), (10, 10, 10)), 1)
    assert stacked.count_modes(every, even)["modes"] == 1000
    assert stacked.count_modes(every, even)["kl"] == pytest.approx(0, abs=1e-12)
    found = stacked.count_modes(np.repeat(every[:4], 5, 0), even)
    assert (found["modes"], found["samples"]) == (4, 20)
    assert found["kl"] == pytest.approx(math.log(1000 / 4))
    uneven = np.full(1000, 0.5 / 999)
    uneven[7] = 0.5
    assert stacked.count_modes(every[[7, 7, 7, 8]], uneven)["kl"] == pytest.approx(
        0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 * 999 / 0.5))


def test_as_many_stacks_of_the_data_diverge_by_chance_alone(stacked, digits):
    found = [stacked.count_modes(stacked.stack(digits, 25_600, seed)[1], stacked.triples(digits.y))
             for seed in range(3)]
    assert np.mean([f["kl"] for f in found]) == pytest.approx(found[0]["kl_by_chance"], rel=0.1)
    assert min(f["modes"] for f in found) > 990


def test_the_recipe_is_pointed_at_the_stacks(stacked, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(stacked, "HELD_OUT", 20)
    args = argparse.Namespace(out=tmp_path / "work", count=50, seed=1, steps=7, override=["training.batch=8"])
    told = stacked.overrides(args, digits, digits)
    assert "data.size=[4, 4]" in told
    assert told[-2:] == ["training.steps=7", "training.batch=8"]
    with np.load(tmp_path / "work" / "stacks.npz") as kept:
        assert kept.files == ["x"]
        assert kept["x"].shape == (50, 4, 4, 3)
