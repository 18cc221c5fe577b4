"""How like the data the samples are, and how much of the data they cover: figures on features of both.

Fréchet distance: Heusel et al. 2017, extrapolated to infinitely many samples: Chong and Forsyth 2020; precision
and recall: Kynkäänniemi et al. 2019; density and coverage: Naeem et al. 2020. Precision and density are blind to a
generator that repeats a few good images, and a Fréchet distance without its floor does not tell; recall and coverage
see it.

N samples, M real samples, D features, G groups of samples, K classes.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from handmill.checks.intervals import FEWEST, LEVEL, Figure, ratio, share, wilson

Features = NDArray[Any]  # (N, D) float
NEIGHBOURS = 5  # k of the manifolds, as Naeem et al. 2020
GROUPS = 20  # of samples left out in turn by the jackknife
FID_SAMPLES = 50_000  # a Fréchet distance on the standard Inception network is named FID at this many alone
_BLOCKS = (1, 2, 3, 4, 5)  # the extrapolation measures all samples at once, and in this many parts
_DISTANCES = 1 << 20  # in one piece: 8 MiB in float64, which the cache holds
_SLACK = 1e-10  # of the largest squared norm: equal samples lie at distance 0 whatever the rounding


class Moments(NamedTuple):
    """Number, sum and sum of outer products of the samples of each group: (G,), (G, D), (G, D, D)."""

    size: NDArray[np.float64]
    total: NDArray[np.float64]
    outer: NDArray[np.float64]

    def chosen(self, groups: ArrayLike) -> "Moments":
        """Those of some of the groups."""
        where = np.asarray(groups)
        return Moments(self.size[where], self.total[where], self.outer[where])

    def gaussian(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (D,) and unbiased covariance (D, D) over all groups."""
        n, mean = self.size.sum(), self.total.sum(0) / self.size.sum()
        return mean, (self.outer.sum(0) - n * np.outer(mean, mean)) / (n - 1)


class Manifolds(NamedTuple):
    """Indicators that precision, recall, density and coverage are the means of."""

    precise: NDArray[np.bool_]  # (N,) the generated sample lies in the ball of some real one
    recalled: NDArray[np.bool_]  # (M,) the real sample lies in the ball of some generated one
    dense: NDArray[np.float64]  # (N,) how many real balls the generated sample lies in, over k
    covered: NDArray[np.bool_]  # (M,) some generated sample lies in the real one's ball


def frechet_gaussians(mean_a: Features, covariance_a: Features, mean_b: Features, covariance_b: Features) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6; Dowson and Landau 1982).

    S_a S_b has the eigenvalues of the symmetric R S_b R with R = S_a^(1/2), which rounding cannot make complex.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(0))  # (D, D); root root^T = S_a
    shared = np.sqrt(np.linalg.eigvalsh(root.T @ covariance_b @ root).clip(0)).sum()
    apart = np.square(mean_a - mean_b).sum()
    return max(0.0, float(apart + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared))


def frechet(a: Features, b: Features, seed: int = 0) -> Figure:
    """Fréchet distance of two samples (N, D) and (M, D), in squared units of the features.

    It is biased upwards by about a constant over the number of samples: compare at equal numbers only. The interval
    is for the expectation at these numbers, from the jackknife over groups of samples (Efron and Stein 1981).
    """
    return _jackknife(a, b, seed, _distance, "")


def frechet_infinity(a: Features, b: Features, seed: int = 0) -> Figure:
    """The Fréchet distance that infinitely many samples would give: the distance of all samples and of 2 to 5
    disjoint parts of them, fitted by a line over 1 / n, read at 0 (Chong and Forsyth 2020, section 4.1).

    At equal distributions it falls below zero as often as above. Each part must hold more samples than features.
    """
    assert min(len(a), len(b)) > 2 * max(_BLOCKS) * a.shape[1], "too few samples for a line over 1 / n"
    return _jackknife(a, b, seed, _extrapolated, ", extrapolated to infinitely many samples")


def frechet_name(network: str, samples: int) -> str:
    """"fid" for the standard Inception network at 50,000 samples, or else fd_<network>@<samples>."""
    standard = network == "inception" and samples == FID_SAMPLES
    return "fid" if standard else f"fd_{network}@{samples}"


def manifolds(real: Features, fake: Features, k: int = NEIGHBOURS) -> Manifolds:
    """Balls around every sample that reach to its k-th nearest neighbour among its own, and who lies in them.

    Real (M, D), generated (N, D); distances in pieces, so memory grows with N + M.
    """
    assert 0 < k < min(len(real), len(fake)), (k, len(real), len(fake))
    x, y = _centred(real, fake)  # (M, D), (N, D)
    slack = _SLACK * float(torch.cat((x, y)).square().sum(1).max())
    real_ball, fake_ball = _radii(x, k) + slack, _radii(y, k) + slack  # (M,), (N,)
    recalled, covered, balls = [], [], torch.zeros(len(y), dtype=torch.int64)
    for rows in _pieces(len(x), len(y)):
        squared = _squared(x[rows], y)  # (piece, N)
        inside = squared <= real_ball[rows, None]
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((squared <= fake_ball).any(1))
    return Manifolds((balls > 0).numpy(), torch.cat(recalled).numpy(), balls.double().numpy() / k,
                     torch.cat(covered).numpy())


def precision_recall(real: Features, fake: Features, k: int = NEIGHBOURS, seed: int = 0) -> tuple[Figure, Figure]:
    """Shares of generated samples in the real manifold and of real ones in the generated (Kynkäänniemi et al. 2019,
    eq. 1 and 2), with bootstrap intervals over the samples counted."""
    found = manifolds(real, fake, k)
    return _share(found.precise, seed), _share(found.recalled, seed)


def density_coverage(real: Features, fake: Features, k: int = NEIGHBOURS, seed: int = 0) -> tuple[Figure, Figure]:
    """Mean number of real balls around a generated sample over k, and the share of real balls that hold one (Naeem
    et al. 2020, eq. 3 and 4), with bootstrap intervals. Equal distributions: 1 and 1 - 2^-k."""
    found = manifolds(real, fake, k)
    return _mean(found.dense, seed), _share(found.covered, seed)


def report(real: Features, fake: Features, other: Features, network: str, seed: int = 0,
           k: int = NEIGHBOURS) -> dict[str, Any]:
    """All figures of generated against real features, and of other real features against the same: the floor.

    real (M, D), generated (N, D) and other (L, D) features share no image; n = min(M, N, L) of each are drawn, so
    that both columns are biased alike. Figures are plain; "n" and "k" say what they hold for.
    """
    n = min(len(real), len(fake), len(other))
    generator = np.random.default_rng(seed)
    real, fake, other = (x[np.sort(generator.permutation(len(x))[:n])] for x in (real, fake, other))
    return {"network": network, "n": n, "k": k, "generated": _figures(real, fake, network, seed, k),
            "floor": _figures(real, other, network, seed, k)}


def mode_counts(probabilities: Features, data_counts: ArrayLike) -> dict[str, Any]:
    """How many samples fall in each class by their likeliest one, probabilities (N, K); data_counts (K,) of the data.

    "kl" is sum q log(q / p) in nats of the samples' shares q from the data's p, a class without data counting as
    half an image; "kl_by_chance" what as many samples of the data would give on average, (modes - 1) / 2N.
    """
    data = np.asarray(data_counts, np.float64)
    assert data.shape == (probabilities.shape[1],), data.shape
    counts = np.bincount(probabilities.argmax(1), minlength=len(data))  # (K,)
    p, q = np.maximum(data, 0.5) / data.sum(), counts / counts.sum()
    seen = counts > 0
    return {"counts": counts.tolist(), "modes": int(seen.sum()), "modes_in_data": int((data > 0).sum()),
            "kl": float((q[seen] * np.log(q[seen] / p[seen])).sum()),
            "kl_by_chance": (int((data > 0).sum()) - 1) / (2 * len(probabilities))}


def label_agreement(probabilities: Features, labels: ArrayLike) -> Figure:
    """The share of samples, probabilities (N, K), whose likeliest class is the label asked for (N,).

    Its ceiling is the same share on real images: the classifier's own accuracy.
    """
    asked = np.asarray(labels)
    assert asked.shape == (len(probabilities),), (asked.shape, probabilities.shape)
    hits, n = int((probabilities.argmax(1) == asked).sum()), len(asked)
    return Figure(hits / n, *wilson(hits, n), n, "Wilson 1927 for images")


def _figures(real: Features, fake: Features, network: str, seed: int, k: int) -> dict[str, Any]:
    found, n = manifolds(real, fake, k), len(fake)
    figures = {frechet_name(network, n): frechet(real, fake, seed), "precision": _share(found.precise, seed),
               "recall": _share(found.recalled, seed), "density": _mean(found.dense, seed),
               "coverage": _share(found.covered, seed)}
    if n > 2 * max(_BLOCKS) * real.shape[1]:
        figures[f"fd_{network}@infinity"] = frechet_infinity(real, fake, seed)
    return {name: figure.plain() for name, figure in figures.items()}


def _share(hits: NDArray[np.bool_], seed: int) -> Figure:
    return share(hits, np.ones(len(hits)), seed)


def _mean(values: NDArray[np.float64], seed: int) -> Figure:
    return ratio(values, np.ones(len(values)), seed, unit="samples")


def _moments(x: Features, groups: int, seed: int) -> Moments:
    """The samples (N, D) are dealt out at random: those in a row may resemble each other."""
    parts = np.array_split(np.random.default_rng(seed).permutation(len(x)), groups)
    rows = [np.asarray(x[part], np.float64) for part in parts]
    return Moments(np.array([float(len(r)) for r in rows]), np.stack([r.sum(0) for r in rows]),
                   np.stack([r.T @ r for r in rows]))


def _distance(a: Moments, b: Moments) -> float:
    return frechet_gaussians(*a.gaussian(), *b.gaussian())


def _extrapolated(a: Moments, b: Moments) -> float:
    inverse, distances = [], []
    for blocks in _BLOCKS:
        size = len(a.size) // blocks
        parts = [np.arange(i * size, (i + 1) * size) for i in range(blocks)]
        distances.append(np.mean([_distance(a.chosen(part), b.chosen(part)) for part in parts]))
        inverse.append(blocks / a.size[:blocks * size].sum() + blocks / b.size[:blocks * size].sum())
    return float(np.polyfit(inverse, distances, 1)[1])


def _jackknife(a: Features, b: Features, seed: int, function: Callable[[Moments, Moments], float],
               what: str) -> Figure:
    """The function of all groups, and Student's interval from its values with one group of each left out."""
    assert a.ndim == b.ndim == 2, (a.shape, b.shape)
    assert a.shape[1] == b.shape[1], (a.shape, b.shape)
    n = min(len(a), len(b))
    assert n > 1, "no covariance"
    groups = min(GROUPS, n // 2)
    centre = np.asarray(a, np.float64).mean(0)  # near zero, sums of squares keep their digits
    first, second = _moments(a - centre, groups, seed), _moments(b - centre, groups, seed + 1)
    value = function(first, second)
    if groups < FEWEST:
        return Figure(value, None, None, n, f"no interval: only {n} samples")
    rest = [np.delete(np.arange(groups), g) for g in range(groups)]
    variance = (groups - 1) * float(np.var([function(first.chosen(r), second.chosen(r)) for r in rest]))
    half = _student(groups - 1) * variance**0.5
    return Figure(value, value - half, value + half, n, f"jackknife over {groups} groups (Efron and Stein 1981){what}")


def _student(freedom: int) -> float:
    """Student's quantile for an interval of LEVEL (Abramowitz and Stegun 1964, 26.7.5, to second order)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _centred(real: Features, fake: Features) -> tuple[Tensor, Tensor]:
    """Both in float64 about the real mean, where products lose the fewest digits."""
    x, y = (torch.from_numpy(np.asarray(z, np.float64)) for z in (real, fake))
    assert x.shape[1] == y.shape[1], (x.shape, y.shape)
    return x - x.mean(0), y - x.mean(0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each sample (N, D) to its k-th nearest other one, (N,)."""
    nearest = [_squared(x[rows], x).topk(k + 1, largest=False).values[:, -1] for rows in _pieces(len(x), len(x))]
    return torch.cat(nearest)  # itself is the first of the k + 1


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, D), (M, D) -> (N, M)."""
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1)[:, None]).clamp_(min=0)


def _pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, _DISTANCES // columns)
    return [slice(i, i + step) for i in range(0, rows, step)]
