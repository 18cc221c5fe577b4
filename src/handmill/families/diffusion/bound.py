"""The variational bound on the likelihood of gridded data under a denoiser, in continuous time.

Kingma et al. 2021 (variational diffusion models), sections 3.3, 3.5 and 5.1, with SNR = 1 / sigma^2.

B items, K strata of ln sigma, C channels, *S space, V = 256 values of the grid.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 256  # V
STEP = 2 / (LEVELS - 1)  # between neighbouring values of the grid on [-1, 1]


class Bound(NamedTuple):
    """The parts of the bound, each (B,) in nats an item."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.diffusion + self.reconstruction


def bound(denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, uniforms: Tensor, noise: Callable[[int], Tensor],
          deviation: float, low: float = STEP / 2, high: float = 80.0) -> Bound:
    """An upper bound on -ln p(y), unbiased over the draws, of y (B, C, *S) on the grid of 256 values in [-1, 1].

    `denoise(x, sigma (B,))` is D, `deviation` that of the data. `uniforms` (K, B) in [0, 1) place one evaluation in
    each of K equal strata of ln sigma from `low` to `high`; `noise(k)` (B, C, *S) is standard normal, k = 0 to K.
    Below half a grid step the grid alone tells the value, so a lower `low` charges a denoiser that ignores the grid.
    """
    assert uniforms.ndim == 2, uniforms.shape
    assert uniforms.shape[1] == len(y), (uniforms.shape, y.shape)
    return Bound(prior(y, high, deviation), diffusion(denoise, y, uniforms, noise, low, high),
                 reconstruction(y, noise(len(uniforms)), low))


def diffusion(denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, uniforms: Tensor,
              noise: Callable[[int], Tensor], low: float, high: float) -> Tensor:
    """(B,) nats: 1/2 E||y - D||^2 integrated over SNR, which is E||y - D||^2 / sigma^2 over ln sigma (section 5.1)."""
    strata, width = len(uniforms), math.log(high / low)
    total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for k in range(strata):
        sigma = low * ((k + uniforms[k].to(y)) * (width / strata)).exp()  # (B,)
        x = y + sigma.view(-1, *[1] * (y.ndim - 1)) * noise(k).to(y)  # (B, C, *S)
        error = (denoise(x, sigma) - y).square().flatten(1).sum(1)  # (B,)
        total += error / sigma**2
    return total * (width / strata)


def prior(y: Tensor, high: float, deviation: float) -> Tensor:
    """(B,) nats: KL from N(y, high^2) to N(0, high^2 + deviation^2), where sampling starts."""
    return gaussian_kl(y, high, 0.0, math.hypot(high, deviation)).flatten(1).sum(1)


def reconstruction(y: Tensor, noise: Tensor, low: float) -> Tensor:
    """(B,) nats: -ln p(y | x = y + low noise), p over the 256 values in proportion to N(x; value, low^2) (3.3)."""
    index = ((y.double() + 1) / STEP).round()
    assert torch.allclose(index * STEP - 1, y.double(), atol=1e-5), "y must lie on the grid of 256 values in [-1, 1]"
    x = (y.double() + low * noise.to(y.device)).unsqueeze(-1)  # (B, C, *S, 1)
    # values further than 10 low from y weigh nothing
    reach = min(LEVELS, math.ceil(10 * low / STEP) + 1)
    near = index.unsqueeze(-1) + torch.arange(-reach, reach + 1, device=y.device)  # (B, C, *S, window)
    logits = -((x - (near * STEP - 1)) / low) ** 2 / 2
    logits = logits.masked_fill((near < 0) | (near >= LEVELS), -torch.inf)
    return (logits.logsumexp(-1) - logits[..., reach]).flatten(1).sum(1)


def gaussian_kl(mean: Tensor, deviation: float, other_mean: float, other_deviation: float) -> Tensor:
    """KL(N(mean, deviation^2) || N(other_mean, other_deviation^2)) of each element, in nats."""
    ratio = deviation / other_deviation
    return ((mean - other_mean) / other_deviation).double() ** 2 / 2 + (ratio**2 - 1) / 2 - math.log(ratio)


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """Nats an item as bits a dimension, `dimensions` = C times the space."""
    assert dimensions > 0, dimensions
    return nats / (dimensions * math.log(2))
