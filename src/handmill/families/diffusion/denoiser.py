"""The denoiser D(x, sigma, condition): what every objective trains and every sampler calls.

Karras et al. 2022, section 5 (preconditioning); Ho & Salimans 2022 (classifier-free guidance);
Kynkäänniemi et al. 2024 (guidance in an interval).

B items, C channels, *S one to three space dimensions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handmill.families.diffusion.noise_levels import Objective, coefficients, sigmas_for_training, weights

Condition = Mapping[str, Tensor]
Denoising = Callable[[Tensor, Tensor | float, Condition], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) for the network F (Karras et al. 2022, equation 7)."""

    network: nn.Module  # (x (B, C, *S), noise (B,), condition) -> (B, C, *S)
    objective: Objective
    sigma_data: float  # deviation of the data's values

    def __call__(self, x: Tensor, sigma: Tensor | float, condition: Condition) -> Tensor:
        """The estimate of y in x = y + sigma n: (B, C, *S) in the dtype of x; sigma (B,) or one for all.

        The network runs in the dtype of its weights, its noise level in float32 at least, all else in that of x.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[0])  # (B,)
        c = coefficients(self.objective.parameterisation, sigma, self.sigma_data)
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        skip, out, into = (_beside(v, x) for v in (c.skip, c.out, c.into))
        noise = c.noise.to(torch.promote_types(dtype, torch.float32))
        estimate = self.network((into * x).to(dtype), noise, condition).to(x.dtype)
        assert estimate.shape == x.shape, (estimate.shape, x.shape)
        return skip * x + out * estimate


def loss(denoiser: Denoiser, y: Tensor, noise: Tensor, u: Tensor, condition: Condition) -> Tensor:
    """Weighted squared error of each item (B,), the mean over its elements, at the noise level of its u in [0, 1).

    `y` and standard normal `noise` are (B, C, *S), `u` is (B,).
    """
    assert y.shape == noise.shape, (y.shape, noise.shape)
    assert u.shape == y.shape[:1], (u.shape, y.shape)
    sigma = sigmas_for_training(denoiser.objective, u).to(y.dtype)  # (B,)
    estimate = denoiser(y + _beside(sigma, y) * noise, sigma, condition)
    error = (estimate - y).square().flatten(1).mean(1)  # (B,)
    return weights(denoiser.objective, sigma, denoiser.sigma_data) * error


def guided(denoiser: Denoising, scale: float, null_label: int,
           interval: tuple[float, float] = (0.0, math.inf)) -> Denoising:
    """Classifier-free guidance: D = D_null + scale (D_label - D_null), both from one doubled batch.

    Outside the `interval` (low, high] of sigma, and everywhere at scale 1, the network runs once (Kynkäänniemi et
    al. 2024). Without a label there is nothing to guide to. All items must have the same sigma.
    """
    if scale == 1:
        return denoiser

    def guide(x: Tensor, sigma: Tensor | float, condition: Condition) -> Tensor:
        assert not isinstance(sigma, Tensor) or sigma.numel() == 1, "guidance takes one sigma for all items"
        if "label" not in condition or not interval[0] < float(sigma) <= interval[1]:
            return denoiser(x, sigma, condition)
        both = {key: torch.cat((value, value)) for key, value in condition.items()}  # (2 B, ...)
        both["label"] = torch.cat((condition["label"], torch.full_like(condition["label"], null_label)))
        labelled, null = denoiser(torch.cat((x, x)), float(sigma), both).chunk(2)
        return null + scale * (labelled - null)

    return guide


def clipped(denoiser: Denoising, low: float, high: float) -> Denoising:
    """Static thresholding: D kept within [low, high], where the data are known to lie (Ho et al. 2020)."""
    assert low < high, (low, high)
    return lambda x, sigma, condition: denoiser(x, sigma, condition).clamp(low, high)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to multiply x (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))
