"""Random numbers without a state: a pure function of (key, place of the item), on any device.

SplitMix64 (Steele, Lea & Flood 2014) seeded by each item's own place, so that the noise of an item does not depend
on how a batch is cut or on how many processes share it.

B items, n numbers an item.
"""

import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
GOLDEN = (5**0.5 - 1) / 2


def bits(key: int, places: Tensor, n: int) -> Tensor:
    """n 64-bit words (B, n) int64 for each of `places` (B,) int64; `key` is any 63-bit number."""
    assert places.dtype == torch.int64, places.dtype
    assert places.ndim == 1, places.shape
    seeds = _mixed(places * _GAMMA + key)[:, None]  # (B, 1)
    return _mixed(seeds + _GAMMA * torch.arange(1, n + 1, device=places.device))  # (B, n)


def uniform(key: int, places: Tensor, n: int) -> Tensor:
    """n numbers (B, n) in [0, 1) for each of `places` (B,), fp32."""
    return ((bits(key, places, n) >> 40) & 0xFFFFFF).float() * 2**-24


def normal(key: int, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape) for each of `places` (B,), fp32 (Box & Muller 1958)."""
    n = math.prod(shape)
    words = bits(key, places, (n + 1) // 2)
    radius = (((words >> 40) & 0xFFFFFF).float() + 0.5).mul_(2**-24).log_().mul_(-2).sqrt_()
    angle = ((words >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * 2**-24)
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)  # (B, n or n + 1)
    return pairs[:, :n].reshape(places.shape[0], *shape)


def spread(key: int, places: Tensor) -> Tensor:
    """One number (B,) in [0, 1) for each of `places`, fp64, neighbours as far apart as can be.

    Multiples of the golden ratio (Roberts 2018): any run of places covers the range evenly, so that a batch sees
    every noise level and its loss varies less (the idea of Kingma et al. 2021, appendix I.1).
    """
    return (places.double() * GOLDEN + key * 2.0**-63) % 1.0


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """The words moved right with zeros coming in, which int64 alone does not do."""
    return (x >> by) & ((1 << (64 - by)) - 1)
