"""Intervals: how far a figure could be off, from the spread of the units it was measured on.

Bootstrap: Efron 1979; of blocks of dependent units: Kuensch 1989; shares: Wilson 1927; the difference of two
shares from their own intervals: Newcombe 1998 (method 10), Zou and Donner 2008.

N units (documents, windows or samples), R resamples.
"""

import math
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95  # of every interval in a receipt
RESAMPLES = 2000  # the percentiles of 2000 resamples move by about 1 % of the interval's width
FEW = 20  # fewer documents or samples than this do not show their spread well enough to be drawn from
FEWEST = 8  # fewer units than this show no spread at all: no interval


@dataclass(frozen=True)
class Figure:
    """A measured number, its interval (None: too little to tell), its number of units, and the method."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str

    def plain(self) -> dict[str, Any]:
        """As JSON stores it."""
        return asdict(self)

    def scaled(self, factor: float) -> "Figure":
        """The same figure in another unit."""
        assert factor > 0
        return self._mapped(lambda x: x * factor)

    def exponential(self) -> "Figure":
        """exp of the figure: nats a token to perplexity. Percentiles go through any rising function."""
        return self._mapped(math.exp)

    def _mapped(self, function: Any) -> "Figure":
        low, high = (None if x is None else function(x) for x in (self.low, self.high))
        return replace(self, value=function(self.value), low=low, high=high)


def ratio(numerator: ArrayLike, denominator: ArrayLike, seed: int, level: float = LEVEL,
          unit: str = "documents") -> Figure:
    """sum(numerator) / sum(denominator) over independent units, both (N,), with Efron's percentile interval.

    The same seed draws the same units, so that two calls over the same units are paired.
    """
    top, bottom = _pair(numerator, denominator)
    value, n = _share(top, bottom), len(top)
    if n < FEWEST:
        return Figure(value, None, None, n, f"no interval: only {n} {unit}")
    low, high = _percentiles(top, bottom, n, seed, level)
    return Figure(value, low, high, n, f"bootstrap over {unit} (Efron 1979)")


def block_ratio(numerator: ArrayLike, denominator: ArrayLike, seed: int, level: float = LEVEL,
                unit: str = "windows") -> Figure:
    """The same for units in a row that resemble their neighbours: blocks of them are drawn (Kuensch 1989).

    A block is ceil(N^(1/3)) units long (Hall, Horowitz and Jing 1995).
    """
    top, bottom = _pair(numerator, denominator)
    value, n = _share(top, bottom), len(top)
    if n < FEWEST:
        return Figure(value, None, None, n, f"no interval: only {n} {unit}")
    block = math.ceil(n ** (1 / 3))
    tops, bottoms = _moving_sum(top, block), _moving_sum(bottom, block)
    low, high = _percentiles(tops, bottoms, math.ceil(n / block), seed, level)
    return Figure(value, low, high, n, f"bootstrap over blocks of {block} {unit} in a row (Kuensch 1989)")


def share(hits: ArrayLike, tries: ArrayLike, seed: int, level: float = LEVEL,
          unit: str = "samples") -> Figure:
    """sum(hits) / sum(tries), the tries of one unit being dependent.

    Where all units agree (none hit, or all), or are few, resampling shows no spread, and Wilson's interval
    for N independent tries stands instead.
    """
    top, bottom = _pair(hits, tries)
    assert (top <= bottom).all()
    assert (top >= 0).all()
    value, n = _share(top, bottom), len(top)
    if n < FEW or value in (0.0, 1.0):
        return Figure(value, *wilson(value * n, n, level), n, f"Wilson 1927 for {unit}")
    return ratio(top, bottom, seed, level, unit)


def wilson(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of successes / n."""
    assert 0 <= successes <= n, (successes, n)
    assert n > 0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def difference(a: Figure, b: Figure) -> Figure:
    """a - b of two independent figures from their own intervals."""
    assert a.low is not None
    assert a.high is not None
    assert b.low is not None
    assert b.high is not None
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Figure(value, low, high, min(a.n, b.n), "from both intervals (Newcombe 1998, method 10)")


def _percentiles(top: NDArray[np.float64], bottom: NDArray[np.float64], draws: int, seed: int,
                 level: float) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    batch = max(1, (1 << 22) // draws)  # resamples at once: 32 MiB of indices
    found = []
    for done in range(0, RESAMPLES, batch):
        index = generator.integers(len(top), size=(min(batch, RESAMPLES - done), draws))  # (R, draws)
        below = bottom[index].sum(1)  # (R,)
        found.append(top[index].sum(1)[below > 0] / below[below > 0])
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pair(numerator: ArrayLike, denominator: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    assert top.ndim == 1
    assert top.shape == bottom.shape, (top.shape, bottom.shape)
    assert (bottom >= 0).all()
    assert bottom.sum() > 0, "nothing to divide by"
    return top, bottom


def _share(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> float:
    return float(top.sum() / bottom.sum())


def _moving_sum(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    total = np.concatenate(([0.0], np.cumsum(values)))
    moved: NDArray[np.float64] = total[block:] - total[:-block]
    return moved
