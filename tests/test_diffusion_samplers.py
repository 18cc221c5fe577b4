"""The samplers against closed forms: a Gaussian, whose flow is known, and a mixture of Gaussians."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from handmill.families.diffusion.noise_levels import karras_grid, logsnr_grid
from handmill.families.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler, evaluations, heun, unipc

MEAN, DEVIATION = 0.3, 0.5


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """E[y | x] for y ~ N(MEAN, DEVIATION^2)."""
    share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    return MEAN + share * (x - MEAN)


def flowed(x: Tensor, sigma: float, after: float) -> Tensor:
    """Where the probability flow of `gaussian` takes x from sigma: the standardised place stays."""
    return MEAN + (x - MEAN) * math.hypot(DEVIATION, after) / math.hypot(DEVIATION, sigma)


WEIGHTS = torch.tensor([0.7, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-0.6, 0.8], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.1, 0.2], dtype=torch.float64)


def mixture(x: Tensor, sigma: float) -> Tensor:
    """E[y | x] for y of the mixture above: each part's estimate, weighed by how likely the part is given x."""
    variances = DEVIATIONS**2 + sigma**2
    away = x.unsqueeze(-1) - MEANS  # (..., 2)
    share = (WEIGHTS.log() - variances.log() / 2 - away**2 / (2 * variances)).softmax(-1)
    return (share * (MEANS + DEVIATIONS**2 / variances * away)).sum(-1)


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 2)])
@pytest.mark.parametrize(("denoise", "exact"), [(gaussian, True), (mixture, False)])
def test_order_of_convergence(sampler, order, denoise, exact):
    """Halving the steps in ln sigma divides the error by 2^order."""
    high, low, x = 10.0, 0.1, 10 * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    finest = heun(denoise, x, logsnr_grid(8000, low, high)[:-1])
    if exact:
        torch.testing.assert_close(finest, flowed(x, high, low), atol=1e-7, rtol=0)
    errors = [(sampler(denoise, x, logsnr_grid(n + 1, low, high)[:-1]) - finest).abs().max().item()
              for n in (80, 160, 320)]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(measured) > order - 0.15, (errors, measured)
    assert errors[-1] < (0.02 if order == 1 else 4e-4)


@pytest.mark.parametrize(("name", "times"), [("heun", 1.3), ("dpmpp_2m", 4), ("unipc", 4)])
def test_second_order_beats_euler_at_equal_cost(name, times):
    x = 10 * draws(200)
    truth = flowed(x, 10.0, 0.0)

    def error(sampler: str) -> float:
        steps = 21
        grid = karras_grid((steps + 1) // 2 if sampler == "heun" else steps, 0.01, 10.0)
        assert evaluations(sampler, len(grid) - 1) == steps
        return (SAMPLERS[sampler](gaussian, x, grid) - truth).abs().mean().item()

    assert error(name) < error("euler") / times


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_moments_of_a_gaussian(name):
    n, steps = 20_000, 400
    start = math.hypot(80.0, DEVIATION) * draws(n) + MEAN
    x = SAMPLERS[name](gaussian, start, logsnr_grid(steps, 0.002, 80.0), lambda i: draws(n, i + 1))
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * DEVIATION / math.sqrt(n))
    assert x.std().item() == pytest.approx(DEVIATION, rel=0.03 if name in ("euler", "ddim") else 0.02)


@pytest.mark.parametrize(("name", "eta"), [(name, 0.0) for name in SAMPLERS] + [("ddim", 0.5), ("ddim", 1.0)])
def test_moments_of_a_mixture(name, eta):
    n = 10_000
    more = {"eta": eta} if eta else {}
    x = SAMPLERS[name](mixture, 80 * draws(n), logsnr_grid(150, 0.002, 80.0), lambda i: draws(n, i + 1), **more)
    for part, where in enumerate((x < 0.1, x > 0.1)):
        weight = WEIGHTS[part].item()
        assert where.double().mean().item() == pytest.approx(weight, abs=4 * math.sqrt(0.21 / n))
        assert x[where].mean().item() == pytest.approx(MEANS[part].item(), abs=0.02)
        assert x[where].std().item() == pytest.approx(DEVIATIONS[part].item(), rel=0.06)


def test_a_point_is_reached_from_anywhere():
    for name, sampler in SAMPLERS.items():
        x = sampler(lambda x, sigma: torch.full_like(x, 0.25), 80 * draws(5), karras_grid(6, 0.002, 80.0),
                    lambda i: draws(5, i))
        torch.testing.assert_close(x, torch.full_like(x, 0.25), msg=name)


def test_ddim_without_noise_is_euler():
    x, grid = 80 * draws(50), karras_grid(9, 0.002, 80.0)
    torch.testing.assert_close(ddim(mixture, x, grid), euler(mixture, x, grid), rtol=1e-12, atol=1e-12)


def test_ancestral_step_is_the_posterior():
    """One step from 2 to 0.5 for a known y has the mean and variance of q(x_s | x_t, y) (Ho et al. 2020, eq. 7)."""
    t, s, y, n = 2.0, 0.5, 0.3, 50_000
    x = torch.full((n,), 1.7, dtype=torch.float64)
    after = ddpm(lambda x, sigma: torch.full_like(x, y), x, torch.tensor([t, s]), lambda i: draws(n))
    variance = s**2 * (t**2 - s**2) / t**2
    assert after.mean().item() == pytest.approx(y + (s / t) ** 2 * (1.7 - y), abs=4 * math.sqrt(variance / n))
    assert after.var().item() == pytest.approx(variance, rel=0.03)


def test_the_corrector_is_exact_for_a_parabola():
    """With D = a + b l + c l^2, l = ln sigma, dx / dl = x - D has a closed form, which UniC of order 2 must follow.

    A run's last step is of order 1, x = D + (after / sigma) (corrected - D), which gives what was corrected before it.
    """
    a, b, c = 0.2, 0.7, -0.3
    grid = torch.logspace(1, -1, 30, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = math.log(sigma)
        return torch.full_like(x, a + b * level + c * level**2)

    def particular(sigma: float) -> float:
        level = math.log(sigma)
        return a + b * level + c * level**2 + b + 2 * c * level + 2 * c

    def corrected(i: int) -> float:
        one = torch.ones(1, dtype=torch.float64)
        sigma, after = grid[i].item(), grid[i + 1].item()
        data = denoise(one, sigma)
        return (data + (unipc(denoise, one, grid[:i + 2]) - data) * sigma / after).item()

    s, t = grid[1].item(), grid[20].item()
    exact = particular(t) + (corrected(1) - particular(s)) * t / s
    assert corrected(20) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_stateless_and_counted(name):
    """Equal arguments give equal results, whatever ran between; torch's own generator is left alone."""
    calls = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return mixture(x, sigma)

    x, grid = 80 * draws(16), karras_grid(7, 0.002, 80.0)
    kept, before = x.clone(), torch.get_rng_state()
    first = SAMPLERS[name](denoise, x, grid, lambda i: draws(16, i))
    assert calls == evaluations(name, 7)
    SAMPLERS[name](denoise, 2 * x, grid[2:], lambda i: draws(16, i + 5))
    assert torch.equal(first, SAMPLERS[name](denoise, x, grid, lambda i: draws(16, i)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x, kept), "the start was written over"
    rows = SAMPLERS[name](denoise, x[3:5], grid, lambda i: draws(16, i)[3:5])
    torch.testing.assert_close(rows, first[3:5], rtol=1e-13, atol=1e-13)


def test_wrong_grids_are_refused():
    x = draws(2)
    for grid in ([1.0], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, -0.5]):
        with pytest.raises(AssertionError):
            euler(gaussian, x, torch.tensor(grid))
    with pytest.raises(AssertionError, match="eta"):
        ddim(gaussian, x, torch.tensor([1.0, 0.0]), eta=0.5)
