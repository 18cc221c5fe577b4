"""Fréchet distance against closed forms; manifolds against brute force; the trap of a generator that repeats."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.checks import fidelity
from handmill.checks.fidelity import (
    density_coverage,
    frechet,
    frechet_gaussians,
    frechet_infinity,
    frechet_name,
    label_agreement,
    manifolds,
    mode_counts,
    precision_recall,
    report,
)
from handmill.checks.intervals import wilson


def normal(seed, n, d, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def covariance(seed, d):
    x = normal(seed, 2 * d, d)
    return x.T @ x / d


def brute(real, fake, k):
    """The four figures from the papers' definitions, one pair at a time."""
    def ball(x, i):
        return sorted(math.dist(x[i], y) for j, y in enumerate(x) if j != i)[k - 1]

    real_ball, fake_ball = ([ball(x, i) for i in range(len(x))] for x in (real, fake))
    inside = [[math.dist(x, y) <= r for y in fake] for x, r in zip(real, real_ball, strict=True)]
    precision = sum(any(row[j] for row in inside) for j in range(len(fake))) / len(fake)
    recall = sum(any(math.dist(x, y) <= r for y, r in zip(fake, fake_ball, strict=True)) for x in real) / len(real)
    return precision, recall, sum(map(sum, inside)) / (k * len(fake)), sum(map(any, inside)) / len(real)


# Fréchet distance


def test_frechet_of_diagonal_gaussians_is_the_sum_over_coordinates():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 4.0, 1.0])
    apart = np.array([1.0, -2.0, 0.5])
    expected = (apart**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_gaussians(np.zeros(3), np.diag(a), apart, np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_full_covariances_agrees_with_the_roots_of_the_product():
    a, b = covariance(0, 12), covariance(1, 12)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()  # the product is not symmetric
    expected = np.trace(a) + np.trace(b) - 2 * root
    zero = np.zeros(12)
    assert frechet_gaussians(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_gaussians(zero, b, zero, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_gaussians(zero, a, zero, a) == pytest.approx(0, abs=1e-12)


def test_frechet_bears_covariances_without_full_rank():
    thin = np.outer(np.arange(4.0), np.arange(4.0))  # rank 1, variance 14 along its direction
    assert frechet_gaussians(np.zeros(4), thin, np.zeros(4), 4 * thin) == pytest.approx(14, rel=1e-6)


def test_frechet_of_samples_is_that_of_their_moments():
    a, b = normal(0, 300, 5), normal(1, 200, 5, 0.5, 2.0)
    expected = frechet_gaussians(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    figure = frechet(a, b)
    assert figure.value == pytest.approx(expected, rel=1e-9)
    assert figure.n == 200
    assert frechet(a, a).value == pytest.approx(0, abs=1e-9)
    assert frechet(a + 1e4, b + 1e4).value == pytest.approx(expected, rel=1e-6)


def test_frechet_intervals_hold_the_expectation():
    figures = [frechet(normal(2 * t, 200, 4), normal(2 * t + 1, 200, 4, 0.3, 1.3), t) for t in range(200)]
    expectation = np.mean([figure.value for figure in figures])
    assert 0.92 <= np.mean([figure.low <= expectation <= figure.high for figure in figures]) <= 1


def test_interval_is_students_and_none_for_too_few():
    assert fidelity._student(19) == pytest.approx(2.0930, abs=5e-4)
    assert fidelity._student(7) == pytest.approx(2.3646, abs=1e-2)
    assert frechet(normal(0, 12, 2), normal(1, 12, 2)).low is None


def test_extrapolation_takes_the_bias_away():
    at_n = [frechet(normal(2 * t, 400, 6), normal(2 * t + 1, 400, 6)).value for t in range(40)]
    figures = [frechet_infinity(normal(2 * t, 400, 6), normal(2 * t + 1, 400, 6)) for t in range(40)]
    values = np.array([figure.value for figure in figures])
    assert min(at_n) > 0.03
    assert abs(values.mean()) < 3 * values.std() / 40**0.5 + 0.002
    shifted = [frechet_infinity(normal(2 * t, 400, 6), normal(2 * t + 1, 400, 6, 0.5)).value for t in range(40)]
    assert np.mean(shifted) == pytest.approx(1.5, abs=0.1)  # 6 * 0.5^2
    assert np.mean([figure.low <= 0 <= figure.high for figure in figures]) > 0.9


def test_only_the_standard_network_at_50000_samples_is_named_fid():
    assert frechet_name("inception", 50_000) == "fid"
    assert frechet_name("inception", 10_000) == "fd_inception@10000"
    assert frechet_name("cnn64-0123abcd", 50_000) == "fd_cnn64-0123abcd@50000"


# manifolds


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifolds_agree_with_brute_force(k, monkeypatch):
    monkeypatch.setattr(fidelity, "_DISTANCES", 200)  # several pieces
    real, fake = normal(0, 60, 3), normal(1, 45, 3, 0.4, 0.8)
    precision, recall = precision_recall(real, fake, k)
    density, coverage = density_coverage(real, fake, k)
    assert (precision.value, recall.value, density.value, coverage.value) == pytest.approx(brute(real, fake, k))
    assert (precision.n, recall.n) == (45, 60)
    assert recall.low < recall.value < recall.high


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=12),
       st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=12))
def test_manifolds_agree_with_brute_force_where_samples_coincide(real, fake):
    real, fake = np.array(real, float), np.array(fake, float)
    found = manifolds(real, fake, 2)
    assert [column.mean() for column in found] == pytest.approx(brute(real, fake, 2))


def test_equal_distributions_reach_the_expected_figures():
    real, fake = normal(0, 4000, 2), normal(1, 4000, 2)
    density, coverage = density_coverage(real, fake, 5)
    assert density.value == pytest.approx(1, abs=0.03)
    assert coverage.value == pytest.approx(1 - 2**-5, abs=0.01)  # 1 - C(2n-1-k, n) / C(2n-1, n), Naeem et al. eq. 9
    precision, recall = precision_recall(real, real.copy(), 5)
    assert precision.value == recall.value == 1


def test_repeating_thirty_real_images_is_seen_by_recall_and_coverage_alone():
    """The trap: around 30 real images of each region, a generator's samples look perfect one by one."""
    real, other = normal(0, 1500, 16), normal(1, 1500, 16)
    repeated = other[:30][np.arange(1500) % 30]
    result = report(real, repeated, other, "toy")
    made, floor = result["generated"], result["floor"]
    assert made["precision"]["value"] > floor["precision"]["value"] - 0.15
    assert made["density"]["value"] > floor["density"]["value"] - 0.3
    assert made["recall"]["high"] < 0.1 < 0.5 < floor["recall"]["low"]
    assert made["coverage"]["high"] < 0.2 < 0.9 < floor["coverage"]["low"]


def test_report_draws_equal_numbers_and_is_repeatable():
    real, fake, other = normal(0, 900, 4), normal(1, 700, 4), normal(2, 800, 4)
    result = report(real, fake, other, "toy", seed=3)
    assert result == report(real, fake, other, "toy", seed=3)
    assert result["n"] == 700
    for side in ("generated", "floor"):
        assert result[side].keys() == {"fd_toy@700", "fd_toy@infinity", "precision", "recall", "density", "coverage"}
        assert all(figure["n"] == 700 and figure["low"] <= figure["value"] <= figure["high"]
                   for figure in result[side].values())
        assert result[side]["fd_toy@infinity"]["value"] < result[side]["fd_toy@700"]["value"]


# classes


def test_mode_counts_count_and_compare():
    probabilities = np.eye(4)[[0, 0, 0, 1]]
    found = mode_counts(probabilities, [50, 25, 25, 0])
    assert found["counts"] == [3, 1, 0, 0]
    assert (found["modes"], found["modes_in_data"]) == (2, 3)
    assert found["kl"] == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25))
    assert mode_counts(np.eye(2)[[0, 1]], [7, 7])["kl"] == 0


def test_kl_by_chance_is_what_samples_of_the_data_give():
    generator, shares = np.random.default_rng(0), np.full(10, 0.1)
    found = [mode_counts(np.eye(10)[generator.choice(10, 500, p=shares)], shares * 1e6) for _ in range(200)]
    assert np.mean([f["kl"] for f in found]) == pytest.approx(found[0]["kl_by_chance"], rel=0.15)


def test_label_agreement_is_a_share_with_wilsons_interval():
    figure = label_agreement(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), [0, 1, 1])
    assert (figure.value, figure.n) == (2 / 3, 3)
    assert (figure.low, figure.high) == wilson(2, 3)
