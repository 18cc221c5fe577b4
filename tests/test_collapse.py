"""Collapse and divergence: on real digits what a repeating generator passes, and the rules on made-up histories."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.checks import collapse, features, fidelity
from handmill.checks.collapse import GONE, LEARNT, LOST, PATIENCE, Watch, collapsed, judge, never
from handmill.errors import UserError


def entry(step=0, coverage=0.8, recall=0.6, precision=0.7, frechet=1.2, density=0.6, **more):
    return {"frechet": frechet, "precision": precision, "recall": recall, "density": density, "coverage": coverage,
            "step": step, **more}


def course(*coverages, **more):
    """Evaluations 200 steps apart whose recall follows the coverage."""
    return [entry(200 * i, coverage=c, recall=0.75 * c, **more) for i, c in enumerate(coverages)]


HEALTHY = course(0.02, 0.18, 0.42, 0.66, 0.78)


# real pictures


@pytest.fixture(scope="module")
def digits():
    """1,797 digits enlarged to 16 x 16 in random order: images (N, 16, 16, 1) and labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (np.kron(data.images, np.ones((1, 2, 2))) * 15.9).astype(np.uint8)[..., None]
    return images[order], data.target[order].astype(np.int64)


@pytest.fixture(scope="module")
def classifier(digits):
    images, labels = (part[:700] for part in digits)
    return features.train(images, labels, 10, 0, features.Settings(images=10_000, batch=64))


@pytest.fixture(scope="module")
def watch(digits, classifier):
    return Watch(digits[0][700:1200], classifier)


@pytest.fixture(scope="module")
def unseen(digits):
    """500 further real images, as a perfect generator would make them."""
    return digits[0][1200:1700]


@pytest.fixture(scope="module")
def thirty(unseen):
    """A generator that repeats 30 real images."""
    return unseen[np.arange(500) % 30]


def noisy(images, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def test_thirty_repeated_images_pass_all_but_coverage_and_recall(watch, unseen, thirty, classifier):
    perfect, repeated, full = watch.watch(unseen), watch.watch(thirty), watch.watch(noisy(unseen, 60))
    assert repeated["precision"] > perfect["precision"] - 0.1
    assert repeated["density"] > perfect["density"] - 0.4
    assert repeated["frechet"] < full["frechet"]  # than that of 500 images, all different, behind some noise
    assert fidelity.mode_counts(classifier.probabilities(thirty), np.full(10, 50))["modes"] == 10
    assert repeated["recall"] == 0.0 < 0.8 < perfect["recall"]
    assert repeated["coverage"] < 30 * fidelity.NEIGHBOURS / 500 + 0.03 < 0.9 < perfect["coverage"]


def test_the_figures_are_those_of_the_check(watch, unseen, classifier):
    found, features_of = watch.watch(unseen), classifier.features(unseen)
    precision, recall = fidelity.precision_recall(watch.real, features_of)
    density, coverage = fidelity.density_coverage(watch.real, features_of)
    assert found["frechet"] == pytest.approx(fidelity.frechet(watch.real, features_of).value, rel=1e-9)
    assert [found[name] for name in ("precision", "recall", "density", "coverage")] == pytest.approx(
        [precision.value, recall.value, density.value, coverage.value])


def test_the_judge_sees_it_happen_to_pictures(watch, unseen, thirty):
    one, static = unseen[np.zeros(500, int)], np.random.default_rng(0).integers(0, 256, unseen.shape, dtype=np.uint8)
    start, good = watch.watch(static) | {"step": 0}, watch.watch(unseen) | {"step": 100}
    assert judge([start]) == judge([start, good]) == judge([start, good, watch.watch(noisy(unseen, 20))]) == ""
    worse = watch.watch(thirty)
    assert judge([start, good, worse, worse]).startswith("collapsed: coverage fell from 0.9")
    assert "(step 100) to 0.00 and recall" in judge([start, good, watch.watch(one) | {"step": 200}])
    assert judge([start, good, watch.watch(static)]).startswith("diverged: Fréchet distance went from")


def test_the_check_sees_it_too(digits, unseen, thirty, classifier):
    real, other = (classifier.features(digits[0][part]) for part in (slice(700, 1200), slice(1297, 1797)))
    table = fidelity.report(real, classifier.features(thirty), other, "cnn")
    assert collapsed(table).startswith("variety is lost: coverage is 0.")
    assert "and recall is 0.000 against 0." in collapsed(table)
    assert collapsed(fidelity.report(real, classifier.features(unseen), other, "cnn")) == ""
    assert collapsed(fidelity.report(real, classifier.features(noisy(unseen, 90)), other, "cnn")) == ""


def test_the_floor_says_for_how_many_it_holds(watch):
    assert (watch.n, watch.floor()["n"]) == (500, 250)
    assert watch.floor()["coverage"] > 0.9
    assert watch.floor().keys() == watch.watch(np.zeros((6, 16, 16, 1), np.uint8)).keys() | {"n"}


def test_too_few_held_out_images_are_refused(digits, classifier):
    with pytest.raises(UserError, match=r"needs 32 held-out images, not 31: raise data\.validation"):
        Watch(digits[0][:31], classifier)


def test_many_held_out_images_are_drawn_from(digits, classifier, monkeypatch):
    monkeypatch.setattr(collapse, "MOST", 100)
    assert Watch(digits[0], classifier).n == 100


# histories


@pytest.mark.parametrize("later", [(), (0.5,), (0.78 * 0.6, 0.78 * 0.6), (0.3, 0.7), (0.3, 0.45, 0.3), (0.82,)])
def test_learning_and_its_dips_are_left_in_peace(later):
    history = HEALTHY + course(*later)
    assert not any(judge(history[:i]) for i in range(len(history) + 1))


@pytest.mark.parametrize("coverages", [(0.0, 0.0), (0.09, 0.01, 0.0), (0.05, 0.09, 0.02, 0.02)])
def test_what_was_never_good_has_not_collapsed(coverages):
    assert judge(course(*coverages)) == ""


def test_an_extreme_fall_counts_at_once_and_a_deep_one_the_second_time():
    assert judge(HEALTHY + course(0.07)) == ("collapsed: coverage fell from 0.78 (step 800) to 0.07 and recall from "
                                             "0.58 to 0.05 while precision is 0.70")
    assert judge(HEALTHY + course(0.3)) == ""
    assert judge(HEALTHY + course(0.3, 0.35)).startswith("collapsed: coverage fell from 0.78 (step 800) to 0.35")
    assert judge(HEALTHY + course(0.3, 0.35, 0.6)) == ""


def test_recall_alone_counts_the_second_time():
    lost = entry(recall=0.02, coverage=0.6)
    assert judge([*HEALTHY, lost]) == ""
    assert "and recall from 0.58 to 0.02" in judge([*HEALTHY, lost, lost])


def test_divergence_says_what_the_discriminator_knew():
    before = [entry(400, gradient_norm=375.0, certainty=0.7)]
    after = entry(600, coverage=0.0, recall=0.0, precision=0.0, frechet=38.0, gradient_norm=3e4, certainty=1.0)
    assert judge([*before, after]) == (
        "diverged: Fréchet distance went from 1.2 (step 400) to 38, coverage from 0.80 to 0.00, precision from 0.70 to "
        "0.00; the discriminator is right about 100%; gradient norm 3e+04, 80 times the best step's")


def test_figures_that_are_not_finite_are_divergence_even_at_first():
    assert judge([entry(5, frechet=math.nan)]) == "diverged: frechet is not finite (step 5)"
    said = judge([*HEALTHY, entry(1000, gradient_norm=math.inf, coverage=math.nan)])
    assert said == "diverged: coverage and gradient_norm are not finite (step 1000)"
    assert judge([entry(coverage=math.nan), entry()]) == ""


def test_a_run_that_goes_nowhere_is_told_after_a_while():
    nowhere = course(*[0.01, 0.03] * PATIENCE, frechet=55.5)
    assert never(nowhere[:PATIENCE - 1]) == ""
    assert never(nowhere[:PATIENCE]) == ("never covered the data: coverage was 0.03 at best (step 200) in 10 "
                                         "evaluations, with precision 0.70 and Fréchet distance 55.5")
    assert never(nowhere + course(LEARNT)) == ""
    assert "no figure of 10 evaluations is finite" in never([entry(coverage=math.nan)] * PATIENCE)


SHARE = st.floats(0, 1)
ENTRIES = st.builds(entry, st.integers(0, 10**6), SHARE, SHARE, SHARE, st.floats(0, 1e300), st.floats(0, 1e3))
ANY = st.builds(entry, coverage=st.floats(), recall=st.floats(), precision=st.floats(), frechet=st.floats(),
                certainty=st.floats(), gradient_norm=st.floats())


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY, max_size=15))
def test_the_judge_never_raises(history):
    assert isinstance(judge(history), str)
    assert isinstance(never(history), str)
    if history and not all(map(math.isfinite, history[-1].values())):
        assert judge(history).startswith("diverged")


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=8), SHARE, SHARE)
def test_what_is_wrong_stays_wrong_with_less_variety(history, coverage, recall):
    now = history[-1]
    less = now | {"coverage": coverage * now["coverage"], "recall": recall * now["recall"]}
    assert not judge([*history, now]) or judge([*history, less])


@settings(max_examples=200, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=8))
def test_the_best_evaluation_so_far_is_never_wrong(history):
    best = max(e["coverage"] for e in history)
    assert judge([*history, entry(coverage=best)]) == ""
    assert not judge(history) or best >= LEARNT


@settings(max_examples=200, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=8), SHARE, st.floats(0, 1e300))
def test_certainty_and_gradients_are_told_but_do_not_decide(history, certainty, norm):
    told = [e | {"certainty": certainty, "gradient_norm": norm} for e in history]
    assert bool(judge(told)) == bool(judge(history))


def test_constants_leave_room_for_oscillation():
    assert 0 < GONE < LOST <= 0.6


# the verdict of a check


def table(**made):
    def figure(value):
        return {"value": value, "low": max(0.0, value - 0.02), "high": value + 0.02, "n": 2000, "method": "m"}

    floor = {"precision": 0.95, "recall": 0.92, "density": 0.97, "coverage": 0.96}
    return {"generated": {name: figure(value) for name, value in (floor | made).items()},
            "floor": {name: figure(value) for name, value in floor.items()}}


def test_variety_is_lost_only_where_samples_look_real():
    assert collapsed({"missing": "not measured"}) == collapsed(table()) == ""
    assert collapsed(table(recall=0.05)) == ("variety is lost: recall is 0.050 against 0.920 of real images, although "
                                             "precision is 0.950")
    assert collapsed(table(coverage=0.2)).startswith("variety is lost: coverage is 0.200 against 0.960")
    assert collapsed(table(coverage=0.2, recall=0.05, precision=0.3)) == ""
    assert collapsed(table(coverage=0.45, density=0.4, precision=0.75)) == ""  # a blurred model of full recall


def test_the_interval_decides():
    assert collapsed(table(recall=0.46 - 0.03))
    assert not collapsed(table(recall=0.46 - 0.01))
    none = table(recall=0.43)
    none["generated"]["recall"] |= {"low": None, "high": None}
    assert collapsed(none)


def test_samples_that_hardly_differ_are_told_at_the_end() -> None:
    """Figures of a StyleGAN2 whose discriminator was penalised too little."""
    history = [{"step": 50.0 * i, "frechet": 6.0, "precision": p, "recall": r, "density": 1.0, "coverage": 0.58}
               for i, (p, r) in enumerate([(0.5, 0.6), (0.93, 0.1), (0.94, 0.12), (0.95, 0.08)])]
    assert "recall was 0.12 at most, precision 0.93 at least; coverage is 0.58" in collapse.lacking(history)
    assert collapse.lacking(history[:3]) == ""
    assert collapse.lacking(history[:2]) == ""
    assert collapse.lacking([*history, history[-1] | {"recall": 0.5}]) == ""
    assert collapse.lacking([*history, history[-1] | {"precision": float("nan")}]) == ""
