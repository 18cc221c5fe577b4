"""Samplers: pure functions from noise to data, given a denoiser.

The probability-flow equation is dx / d sigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, equation 1). The
variance-preserving and flow forms of each solver are these same steps after x is scaled (Song et al. 2021,
section 4.3), so one form serves every parameterisation. With lambda = -ln sigma its solution from s to t is
x(t) / sigma(t) = x(s) / sigma(s) + integral of exp(lambda) D d lambda, where the multistep solvers put a polynomial
through the D of several steps.

    denoise(x, sigma) -> D     x (B, C, *S) in the dtype to solve in, sigma a float
    sigmas (N + 1,)            descending, the last usually 0
    noise(i) -> (B, C, *S)     standard normal, fresh for step i

Ho et al. 2020 (ddpm); Song, Meng & Ermon 2021 (ddim); Karras et al. 2022 (heun); Lu et al. 2022 (dpmpp_2m);
Zhao et al. 2023 (unipc).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None, eta: float = 0.0) -> Tensor:
    """DDIM (Song, Meng & Ermon 2021, equations 12 and 16). eta 0: deterministic, Euler's method; 1: DDPM's ancestral.

    Raises AssertionError where eta > 0 comes without `noise`.
    """
    assert not eta or noise is not None, "eta above 0 needs noise"
    for i, (sigma, after) in enumerate(_steps(sigmas)):
        data = denoise(x, sigma)
        fresh = eta * after * math.sqrt(1 - (after / sigma) ** 2)  # deviation of the noise that replaces old noise
        x = data + (math.sqrt(after**2 - fresh**2) / sigma) * (x - data)
        if fresh:
            assert noise is not None
            x = x + fresh * noise(i).to(x)
    return x


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2 and equation 7)."""
    return ddim(denoise, x, sigmas, noise, eta=1.0)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Euler's method on the probability-flow equation; order 1."""
    for sigma, after in _steps(sigmas):
        x = x + (after - sigma) * _slope(denoise, x, sigma)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Heun's method, Euler's in a step to 0 (Karras et al. 2022, algorithm 1 without churn); order 2."""
    for sigma, after in _steps(sigmas):
        slope = _slope(denoise, x, sigma)
        ahead = x + (after - sigma) * slope
        if after:
            ahead = x + (after - sigma) * (slope + _slope(denoise, ahead, after)) / 2
        x = ahead
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): D linear in lambda through two steps; order 2.

    Order 1 in the first step and in a step to 0, which is infinitely long in lambda.
    """
    last, before = None, 0.0
    for sigma, after in _steps(sigmas):
        data = denoise(x, sigma)
        x = _forward(x, data, last, before, sigma, after)
        last, before = data, sigma
    return x


def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1, data prediction (Zhao et al. 2023, algorithms 1 and 2).

    Each evaluation also corrects the step that led to it; orders 1 in the first and the last step.
    """
    steps = list(_steps(sigmas))
    last, before = None, 0.0  # D and sigma of the step before
    start, early, earlier = x, None, 0.0  # what the corrector of the coming step starts from
    for i, (sigma, after) in enumerate(steps):
        data = denoise(x, sigma)
        if last is not None:
            x = _corrected(start, last, data, early, before, sigma, earlier)
        start, early, earlier = x, last, before
        x = _forward(x, data, last if i + 1 < len(steps) else None, before, sigma, after)
        last, before = data, sigma
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc}


def evaluations(name: str, steps: int) -> int:
    """Calls of the denoiser for `steps` steps that end at 0."""
    assert name in SAMPLERS, name
    return 2 * steps - 1 if name == "heun" else steps


def _steps(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    assert sigmas.ndim == 1, sigmas.shape
    assert len(sigmas) > 1, "a grid holds two sigmas or more"
    values = sigmas.double().tolist()
    assert all(a > b >= 0 for a, b in pairwise(values)), "sigmas must descend and not be negative"
    return pairwise(values)


def _slope(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return (x - denoise(x, sigma)) / sigma


def _forward(x: Tensor, data: Tensor, last: Tensor | None, before: float, sigma: float, after: float) -> Tensor:
    """x at `after` from x and D at sigma, and D `last` at the sigma `before` it (None: order 1)."""
    if last is not None and after > 0:
        h, r = math.log(sigma / after), math.log(before / sigma)
        data = data + h / (2 * r) * (data - last)
    return data + (after / sigma) * (x - data)


def _corrected(x: Tensor, data: Tensor, ahead: Tensor, last: Tensor | None, sigma: float, after: float,
               before: float) -> Tensor:
    """x at `after` again, now that D `ahead` is known there: UniC of order 1 without `last`, else of order 2.

    Order 2 integrates exp(lambda) D exactly for the parabola through D at before, sigma and after.
    """
    h = math.log(sigma / after)
    shrunk = -math.expm1(-h)  # the integral of exp(tau - h) over tau in [0, h]
    x = data + (after / sigma) * (x - data)
    if last is None:
        return x + shrunk / 2 * (ahead - data)
    r = math.log(before / sigma) / h
    first = 1 - shrunk / h  # the same integral of tau / h
    second = 1 - 2 * first / h  # and of (tau / h)^2
    bend = (ahead - data + (last - data) / r) / (1 + r)  # D = data + slope tau / h + bend (tau / h)^2
    slope = ahead - data - bend
    return x + first * slope + second * bend
