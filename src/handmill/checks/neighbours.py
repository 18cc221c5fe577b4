"""Copies of training images among samples: how near each sample lies to the training image next to it.

The yardstick is real images that were not trained on. A distance alone would call every plain image a copy, so it
is divided by the mean distance of the nearest training images (Carlini et al. 2023, section 5.1): a copy has
one neighbour much nearer than the rest. Pixels are compared after reduction by area, which forgives small shifts and
noise; features of a trained network forgive more.

N samples, M training images, L held-out images, D numbers of an image, K nearest training images.
"""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from handmill.checks.features import Images
from handmill.checks.intervals import LEVEL, Figure, difference, wilson

Vectors = NDArray[np.float32]  # (N, D)
NEAREST = 50  # K
SUSPICIOUS = 0.01  # the share of held-out images that counts as closer than usual
SIDE = 16  # pixels of the reduced images, at most
PAIRS = 20  # named
_ZERO = 1e-12  # distances below this are none: their logarithm must exist
_BATCH = 1000  # images reduced at once
_DISTANCES = 1 << 22  # in one piece: 16 MiB in float32


class Nearest(NamedTuple):
    """The nearest training image of each sample, all (N,)."""

    place: NDArray[np.int64]  # among the training images
    distance: NDArray[np.float64]  # root of the mean square over D, in units of the vectors
    relative: NDArray[np.float64]  # distance over the mean distance of the K nearest; 0: an exact copy


def pixels(images: Images, side: int = SIDE) -> Vectors:
    """uint8 (N, H, W, C) to numbers in [0, 1] (N, D), reduced by the least whole factor to at most `side` pixels."""
    assert images.dtype == np.uint8, images.dtype
    size = tuple(-(-s // -(-max(images.shape[1:3]) // side)) for s in images.shape[1:3])
    pieces = [F.interpolate(torch.from_numpy(np.ascontiguousarray(images[i:i + _BATCH])).permute(0, 3, 1, 2).float(),
                            size, mode="area").flatten(1) / 255 for i in range(0, len(images), _BATCH)]
    return torch.cat(pieces).numpy()


def nearest(samples: Vectors, training: Vectors, k: int = NEAREST) -> Nearest:
    """The nearest training vectors (M, D) of samples (N, D), by distances in pieces: memory grows with N + M.

    Products of rows find the neighbours; the distance to the first is then taken from the difference, so an
    exact copy has distance 0.
    """
    assert samples.shape[1:] == training.shape[1:], (samples.shape, training.shape)
    assert len(training) > 1, "one training image has no neighbours"
    centre = training.mean(0)
    x, y = (torch.from_numpy(np.ascontiguousarray(z - centre, np.float32)) for z in (samples, training))
    squares, step = y.square().sum(1), max(1, _DISTANCES // len(y))
    found = [_nearest(x[i:i + step], y, squares, min(k, len(y))) for i in range(0, len(x), step)]
    index, distance, typical = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return Nearest(index, distance, distance / np.maximum(typical, _ZERO))


def copies(samples: Vectors, held_out: Vectors, training: Vectors, pairs: int = PAIRS) -> dict[str, Any]:
    """Whether samples (N, D) lie nearer to training vectors (M, D) than held-out real ones (L, D) do.

    "share_closer_than_real_1pct": samples whose relative distance is at most that of the closest 1 % of held-out
    images; "share_of_real": held-out images of which this is true, the limit having been drawn from them; "excess":
    the first less the second, 0 where nothing is copied. "median_ratio": the samples' median distance over the
    held-out images', 1 where nothing is copied. "pairs": (sample, training image, relative distance) of the most
    suspicious, the worst first. Figures are plain.
    """
    made, real = nearest(samples, training), nearest(held_out, training)
    limit = float(np.quantile(real.relative, SUSPICIOUS, method="inverted_cdf"))
    share, usual = _share(made.relative <= limit, "samples"), _share(real.relative <= limit, "held-out images")
    worst = np.argsort(made.relative, kind="stable")[:pairs]
    return {"share_closer_than_real_1pct": share.plain(), "share_of_real": usual.plain(),
            "excess": difference(share, usual).plain(),
            "median_ratio": _median_ratio(made.distance, real.distance).plain(), "limit": limit,
            "pairs": [(int(i), int(made.place[i]), float(made.relative[i])) for i in worst]}


def report(samples: Images, held_out: Images, training: Images, network: Any) -> dict[str, Any]:
    """`copies` of uint8 images (N, H, W, C) by their pixels and by the features of `network`."""
    return {name: copies(space(samples), space(held_out), space(training))
            for name, space in (("pixels", pixels), (network.name, network.features))}


def _nearest(x: Tensor, training: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index and distance of the nearest, and the mean distance of the k nearest, of a piece (B, D); (B,) each."""
    scores = torch.addmm(squares, x, training.T, alpha=-2)  # (B, M), squared distances less |x|^2
    near, index = scores.topk(k, largest=False)  # (B, k)
    others = (near + x.square().sum(1, keepdim=True)).clamp(min=0).double().sqrt()  # (B, k)
    first = (x - training[index[:, 0]]).double().square().sum(1).sqrt()  # (B,)
    others[:, 0] = first
    width = x.shape[1] ** 0.5
    return index[:, 0], first / width, others.mean(1) / width


def _share(close: NDArray[np.bool_], unit: str) -> Figure:
    hits, n = int(close.sum()), len(close)
    return Figure(hits / n, *wilson(hits, n), n, f"Wilson 1927 for {unit}")


def _median_ratio(made: NDArray[np.float64], real: NDArray[np.float64]) -> Figure:
    figure = difference(_log_median(made), _log_median(real)).exponential()
    return replace(figure, method="order statistics of both, combined on logarithms (Newcombe 1998, method 10)")


def _log_median(values: NDArray[np.float64]) -> Figure:
    """The logarithm of the median, between the order statistics that lie z sqrt(n) / 2 places off the middle."""
    n = len(values)
    ordered, middle = np.log(np.maximum(np.sort(values), _ZERO)), (n - 1) / 2
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * n**0.5 / 2
    low, high = ordered[max(0, math.floor(middle - half))], ordered[min(n - 1, math.ceil(middle + half))]
    return Figure(float(np.median(ordered)), float(low), float(high), n, "order statistics")
