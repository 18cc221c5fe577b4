"""Seeing a generator lose the data's variety, or training come apart, while it learns and once it has.

Fréchet distance: Heusel et al. 2017; precision and recall: Kynkäänniemi et al. 2019; density and coverage: Naeem et
al. 2020. A generator that repeats a few good images is told by coverage and recall alone, so coverage decides; the
precision of what is left tells mode collapse (Goodfellow 2016, section 5.1.1) from divergence.

N samples, M real images, H height, W width, C channels, D features.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handmill.checks.features import Classifier, Images
from handmill.checks.fidelity import NEIGHBOURS, Features, frechet_gaussians, manifolds
from handmill.errors import UserError

Figures = dict[str, float]

FEWEST = 32  # held-out images; halves of fewer have no five neighbours worth the name
MOST = 1000  # held-out images compared with: distances of so many take milliseconds
LEARNT = 0.1  # coverage before which there is nothing to lose: first steps swing below it
LOST = 0.5  # of the best coverage; five small GANs on digits never fell below 0.74 of it while learning
GONE = 0.2  # of the best evaluation's coverage: so deep a fall counts at once, a shallower one the second time in a row
PATIENCE = 10  # evaluations without LEARNT after which a run is said to go nowhere
LAST, ALIKE, NARROW = 3, 0.6, 0.2  # evaluations, precision from which and recall to which samples hardly differ
FINE = 0.75  # of the floor's precision and density: samples that look real one by one


class Watch:
    """Held-out images that samples are measured against, again and again; `n` says how many samples to make."""

    def __init__(self, held_out: Images, classifier: Classifier, seed: int = 0) -> None:
        """uint8 (M, H, W, C), new to the classifier; of more than MOST some are drawn. Raises UserError for few."""
        if len(held_out) < FEWEST:
            raise UserError(f"watching a generator for collapse needs {FEWEST} held-out images, not {len(held_out)}: "
                            "raise data.validation or add images")
        chosen = np.random.default_rng(seed).permutation(len(held_out))[:MOST]  # splits may be sorted by class
        self.classifier = classifier
        self.real = classifier.features(np.asarray(held_out)[chosen])  # (M, D)
        self.n = len(self.real)

    def watch(self, made: Images) -> Figures:
        """Figures of samples uint8 (N, H, W, C), without intervals; compare at equal numbers alone. N > 5."""
        return figures(self.real, self.classifier.features(made))

    def floor(self) -> Figures:
        """The same of one half of the held-out images against the other, with "n", the size of a half.

        The Fréchet distance of so few lies about as far above that of `n` as n is larger than a half.
        """
        half = self.n // 2
        return figures(self.real[:half], self.real[half:2 * half]) | {"n": half}


def figures(real: Features, fake: Features, k: int = NEIGHBOURS) -> Figures:
    """Fréchet distance, precision, recall, density and coverage of features (N, D) against real ones (M, D)."""
    found = manifolds(real, fake, k)
    means = dict(zip(("precision", "recall", "density", "coverage"), (float(column.mean()) for column in found),
                     strict=True))
    return {"frechet": frechet_gaussians(*_gaussian(real), *_gaussian(fake)), **means}


def judge(history: list[Figures]) -> str:
    """One sentence where the newest evaluation shows collapse or divergence beside the best so far, else "".

    Each entry holds what `Watch.watch` returns and may hold "step", "certainty" (share of images, real and made, that
    the discriminator is right about) and "gradient_norm". The best is that of highest coverage. Collapse: coverage or
    recall is lost and precision kept; divergence: precision is lost as well, or a figure is not finite.
    """
    if not history:
        return ""
    now, best = history[-1], _best(history)
    broken = [name for name, value in now.items() if not math.isfinite(value)]
    if broken:
        return f"diverged: {' and '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite{_at(now)}"
    if best["coverage"] < LEARNT or not _lost(now, best):
        return ""
    if now["coverage"] >= GONE * best["coverage"] and not _lost(history[-2], best):
        return ""
    return _collapse(now, best) if now["precision"] >= LOST * best["precision"] else _divergence(now, best)


def never(history: list[Figures]) -> str:
    """One sentence where PATIENCE evaluations or more never reached LEARNT, so that `judge` has nothing to compare
    with, else ""."""
    known = [entry for entry in history if _finite(entry)]
    if len(history) < PATIENCE or (known and _best(known)["coverage"] >= LEARNT):
        return ""
    if not known:
        return f"never covered the data: no figure of {len(history)} evaluations is finite"
    best = _best(known)
    return (f"never covered the data: coverage was {best['coverage']:.2f} at best{_at(best)} in {len(history)} "
            f"evaluations, with precision {best['precision']:.2f} and Fréchet distance {best['frechet']:.3g}")


def lacking(history: list[Figures]) -> str:
    """One sentence where the last LAST evaluations found samples that look real and hardly differ, else ""."""
    recent = history[-LAST:]
    if len(recent) < LAST or not all(_finite(entry) for entry in recent):
        return ""
    real, most = min(entry["precision"] for entry in recent), max(entry["recall"] for entry in recent)
    if real < ALIKE or most >= NARROW:
        return ""
    return (f"variety is missing: in the last {LAST} evaluations recall was {most:.2f} at most, precision {real:.2f} "
            f"at least; coverage is {recent[-1]['coverage']:.2f}{_at(recent[-1])}")


def collapsed(fidelity: dict[str, Any]) -> str:
    """One sentence where a check's "fidelity" table shows samples that look real but lack the data's variety, else "".

    Shown: the upper end of recall's or coverage's interval lies below LOST of the floor's. Coverage falls with
    quality as well, so it counts only where density is FINE; for recall, precision is enough.
    """
    if "missing" in fidelity:
        return ""
    made, floor = fidelity["generated"], fidelity["floor"]
    fine = {name: made[name]["value"] >= FINE * floor[name]["value"] for name in ("precision", "density")}
    short = {name: _high(made[name]) < LOST * floor[name]["value"] for name in ("coverage", "recall")}
    if not fine["precision"] or not (short["recall"] or (short["coverage"] and fine["density"])):
        return ""
    lost = " and ".join(f"{name} is {made[name]['value']:.3f} against {floor[name]['value']:.3f} of real images"
                        for name in short if short[name])
    return f"variety is lost: {lost}, although precision is {made['precision']['value']:.3f}"


def _gaussian(x: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    exact = np.asarray(x, np.float64)
    return exact.mean(0), np.cov(exact, rowvar=False)


def _finite(entry: Figures) -> bool:
    return all(math.isfinite(value) for value in entry.values())


def _best(history: list[Figures]) -> Figures:
    """The evaluation of highest coverage, the first of equals; one without finite figures only where all are so."""
    return max(history, key=lambda entry: entry["coverage"] if _finite(entry) else -1.0)


def _lost(entry: Figures, best: Figures) -> bool:
    """Whether coverage fell below LOST, or recall, which swings more, below GONE of the best evaluation's."""
    recall = best["recall"] >= LEARNT and entry["recall"] < GONE * best["recall"]
    return not _finite(entry) or recall or entry["coverage"] < LOST * best["coverage"]


def _collapse(now: Figures, best: Figures) -> str:
    return (f"collapsed: coverage fell from {best['coverage']:.2f}{_at(best)} to {now['coverage']:.2f} and recall from "
            f"{best['recall']:.2f} to {now['recall']:.2f} while precision is {now['precision']:.2f}")


def _divergence(now: Figures, best: Figures) -> str:
    parts = [f"diverged: Fréchet distance went from {best['frechet']:.3g}{_at(best)} to {now['frechet']:.3g}, coverage "
             f"from {best['coverage']:.2f} to {now['coverage']:.2f}, precision from {best['precision']:.2f} to "
             f"{now['precision']:.2f}"]
    if "certainty" in now:
        parts.append(f"the discriminator is right about {now['certainty']:.0%}")
    if "gradient_norm" in now:
        before = best.get("gradient_norm", 0.0)
        times = f", {now['gradient_norm'] / before:.3g} times the best step's" if before > 0 else ""
        parts.append(f"gradient norm {now['gradient_norm']:.2g}{times}")
    return "; ".join(parts)


def _at(entry: Figures) -> str:
    return f" (step {entry['step']:.0f})" if "step" in entry else ""


def _high(figure: dict[str, Any]) -> float:
    """The upper end of the interval, the value where there is none."""
    high: float = figure["value"] if figure["high"] is None else figure["high"]
    return high
