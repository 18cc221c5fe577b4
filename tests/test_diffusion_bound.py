"""The variational bound against the likelihood of a gridded Gaussian, in closed form."""

import math

import pytest
import torch
from torch import Tensor

from handmill.families.diffusion.bound import (
    LEVELS,
    STEP,
    bits_per_dimension,
    bound,
    diffusion,
    gaussian_kl,
    prior,
    reconstruction,
)

DEVIATION = 0.25


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gridded(*shape: int) -> Tensor:
    """N(0, DEVIATION^2) rounded to the grid."""
    return ((DEVIATION * draws(*shape, seed=99) + 1) / STEP).round().clamp(0, LEVELS - 1) * STEP - 1


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    return x * (DEVIATION**2 / (DEVIATION**2 + sigma**2)).view(-1, *[1] * (x.ndim - 1))


def uniforms(strata: int, items: int) -> Tensor:
    return torch.rand(strata, items, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def bits(denoise, y: Tensor, low: float, strata: int = 32) -> tuple[float, float]:
    """The mean bound in bits a dimension, and its standard error."""
    nats = bound(denoise, y, uniforms(strata, len(y)), lambda k: draws(*y.shape, seed=k), DEVIATION, low).total
    each = bits_per_dimension(nats, y[0].numel())
    return each.mean().item(), each.std().item() / math.sqrt(len(y))


def truth(y: Tensor) -> Tensor:
    """(B,) nats: -ln of the Gaussian's mass between the borders of y's cell."""
    upper, lower = (torch.special.ndtr((y + d) / DEVIATION) for d in (STEP / 2, -STEP / 2))
    return -(upper - lower).log().flatten(1).sum(1)


@pytest.mark.parametrize("low", [0.75 * STEP, STEP, 2 * STEP])
def test_the_exact_denoiser_reaches_the_likelihood(low):
    y = gridded(1500, 1, 4, 4)
    wanted = bits_per_dimension(truth(y), 16).mean().item()
    measured, error = bits(exact, y, low)
    assert error < 0.02
    assert measured == pytest.approx(wanted, abs=3 * error + 0.01)


def test_it_is_an_upper_bound():
    """For worse denoisers, and for a `low` where the exact one pays for ignoring the grid: 0.01 bits at half a step."""
    y = gridded(1500, 1, 4, 4)
    wanted = bits_per_dimension(truth(y), 16).mean().item()
    half, error = bits(exact, y, STEP / 2)
    assert wanted - 3 * error < half < wanted + 0.03
    assert bits(exact, y, STEP / 8)[0] > wanted + 0.8
    assert bits(lambda x, sigma: 0.9 * exact(x, sigma), y, STEP)[0] > wanted + 0.5
    assert bits(lambda x, sigma: exact(x, 1.3 * sigma), y, STEP)[0] > wanted + 0.05


def test_diffusion_part_in_closed_form():
    """The exact denoiser's integral over ln sigma of s^2 / (s^2 + sigma^2): 1/2 ln of a ratio, an element."""
    low, high, s = 0.01, 80.0, DEVIATION
    y = s * draws(2000, 8, seed=99)
    measured = diffusion(exact, y, uniforms(64, 2000), lambda k: draws(2000, 8, seed=k), low, high)
    wanted = 8 * 0.5 * math.log(high**2 * (s**2 + low**2) / (low**2 * (s**2 + high**2)))
    assert measured.mean().item() == pytest.approx(wanted, abs=4 * measured.std().item() / math.sqrt(2000))


def test_kl_between_gaussians():
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)
    p, q = torch.distributions.Normal(y, 0.7), torch.distributions.Normal(0.2, torch.tensor(1.3, dtype=torch.float64))
    torch.testing.assert_close(gaussian_kl(y, 0.7, 0.2, 1.3), torch.distributions.kl_divergence(p, q))
    assert gaussian_kl(torch.zeros(1), 2.0, 0.0, 2.0).item() == 0
    assert prior(torch.ones(2, 3, 4, 4), 80.0, 1.0)[0].item() == pytest.approx(48 * (1 + 1 / 2) / 80**2 / 2, rel=0.4)


def test_reconstruction_is_the_softmax_over_all_values():
    """The window of near values leaves out nothing that counts, at the ends of the grid too."""
    values = torch.arange(LEVELS, dtype=torch.float64) * STEP - 1
    y, noise = values.view(1, 1, 16, 16), draws(1, 1, 16, 16)
    for low in (STEP / 4, STEP / 2, 3 * STEP, 60 * STEP):
        logits = -((y + low * noise).unsqueeze(-1) - values) ** 2 / (2 * low**2)
        wanted = torch.nn.functional.cross_entropy(logits.view(-1, LEVELS), torch.arange(LEVELS), reduction="sum")
        torch.testing.assert_close(reconstruction(y, noise, low), wanted.view(1), rtol=1e-9, atol=1e-9)


def test_pixels_in_float32_lie_on_the_grid_and_others_are_refused():
    pixels = torch.arange(LEVELS, dtype=torch.uint8).view(1, 1, -1)
    y = pixels.float() / 127.5 - 1
    assert reconstruction(y, torch.zeros_like(y), STEP / 8).item() < 1e-9
    with pytest.raises(AssertionError, match="grid"):
        reconstruction(y + STEP / 3, torch.zeros_like(y), STEP / 2)


def test_the_bound_is_a_function_of_its_arguments_and_unbiased_over_strata():
    y, before = gridded(300, 6), torch.get_rng_state()
    few, many = (bits(exact, y, STEP, strata) for strata in (2, 40))
    assert few == bits(exact, y, STEP, 2)
    assert few[0] == pytest.approx(many[0], abs=4 * math.hypot(few[1], many[1]))
    assert torch.equal(before, torch.get_rng_state())


def test_bits_per_dimension():
    assert bits_per_dimension(torch.tensor(3072 * math.log(2) * 8), 3072).item() == pytest.approx(8)
