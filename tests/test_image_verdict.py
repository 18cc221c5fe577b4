"""What the words of an image check rest on."""

from typing import Any

from handmill.checks.image_verdict import verdict


def figure(value: float, low: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02 if low is None else low, "high": value + 0.02, "n": 1000, "method": "m"}


def judged(copied: float = 0.0, agreement: float = 0.98, **generated: float) -> dict[str, Any]:
    floor = {name: figure(0.95) for name in ("precision", "recall", "density", "coverage")}
    made = floor | {name: figure(value) for name, value in generated.items()}
    share = {"share_closer_than_real_1pct": figure(copied + 0.01), "share_of_real": figure(0.01),
             "excess": figure(copied, copied - 0.005)}
    return {"samples": {"what": "samples"}, "fidelity": {"generated": made, "floor": floor},
            "copying": {"by": {"pixels": share}},
            "labels": {"agreement": figure(agreement), "ceiling": figure(0.99)}}


def test_a_model_like_real_images_is_good() -> None:
    found = verdict(judged(precision=0.9, recall=0.85, density=0.8, coverage=0.9))
    assert found["good"] is True
    assert "not shown to copy" in found["text"]


def test_a_generator_that_repeats_itself_is_not() -> None:
    """Thirty images over and over: precision and density are perfect, coverage and recall are not."""
    found = verdict(judged(precision=1.0, density=1.05, coverage=0.09, recall=0.0))
    assert found["good"] is False
    assert "samples fall short of real images in recall, coverage (worst: recall 0.000 against 0.950)" in found["text"]


def test_thirty_images_over_and_over_lack_variety() -> None:
    """Coverage 0.089 and recall 0, as measured of such a generator: the verdict says what is wrong."""
    found = verdict(judged(precision=0.97, density=0.98, coverage=0.089, recall=0.0))
    assert (found["good"], found["varied"]) == (False, False)
    assert ("variety is lost: coverage is 0.089 against 0.950 of real images and recall is 0.000 against 0.950 of real "
            "images, although precision is 0.970") in found["text"]
    fine = verdict(judged())
    assert (fine["good"], fine["varied"]) == (True, True)
    assert "variety" not in fine["text"]


def test_the_interval_counts_not_the_figure() -> None:
    assert verdict(judged(coverage=0.75 * 0.95 + 0.01))["good"] is False
    assert verdict(judged(coverage=0.75 * 0.95 + 0.03))["good"] is True


def test_copying_and_disobedience_are_not_good() -> None:
    copies = verdict(judged(copied=0.2))
    assert (copies["good"], copies["copies"]) == (False, True)
    assert "copies: 21.0% of samples stand out" in copies["text"]
    assert verdict(judged(agreement=0.3))["good"] is False


def test_what_was_not_measured_is_not_called_good() -> None:
    missing = {"missing": "not measured: check.samples is 0"}
    found = verdict({"samples": {"what": "samples"}, "fidelity": missing, "copying": missing,
                     "labels": {"missing": ""}})
    assert (found["good"], found["like_real"], found["varied"], found["copies"]) == (False, None, None, None)
