"""Noise levels: where training draws them, what each parameterisation makes of them, where sampling stops.

A noised item is x = y + sigma n in every formula here (Karras et al. 2022). DDPM's x_t is x / sqrt(1 + sigma^2),
flow matching's is x / (1 + sigma), so schedules and parameterisations differ by functions of sigma alone.
Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (cosine); Salimans & Ho 2022 (velocity); Lipman et al. 2023 and
Esser et al. 2024 (flow matching); Hang et al. 2023 (min-SNR).

B items, N sampling steps, T steps of DDPM's discrete schedule.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from handmill.errors import UserError
from handmill.recipe import not_negative, positive, within

Spacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True)
class Objective:
    """The [objective] table of the diffusion family."""

    parameterisation: Literal["noise", "velocity", "data", "edm", "flow"] = "edm"  # what the network puts out
    schedule: Literal["linear", "cosine", "edm", "flow"] = "edm"  # training's sigmas: DDPM, iDDPM, ln sigma normal, t
    steps: int = 1000  # T of the linear and cosine schedules
    p_mean: float = -1.2  # of ln sigma in the schedule "edm"; 0 with p_std = 1 is flow matching's logit-normal
    p_std: float = 1.2
    sigma_data: float = 0.0  # deviation of the data's values; 0: measured from the data
    sigma_min: float = 0.0  # least sigma trained and sampled; 0: the schedule's own
    sigma_max: float = 0.0  # largest sigma trained and sampled; 0: the schedule's own
    weighting: Literal["plain", "min-snr", "edm"] = "plain"  # plain: squared error of what the network puts out
    snr_limit: float = 5.0  # gamma of min-snr
    label_dropout: float = 0.1  # share of items whose label is hidden, for guidance

    def __post_init__(self) -> None:
        positive(self, "p_std", "snr_limit")
        not_negative(self, "sigma_data", "sigma_min", "sigma_max")
        within(self, 2, 100_000, "steps")
        within(self, -20.0, 20.0, "p_mean")
        within(self, 0.0, 1.0, "label_dropout")
        low, high = ends(self)
        if low >= high:
            raise UserError(f"sigma_min = {low:g} must be below sigma_max = {high:g}")


def alphas_bar(schedule: str, steps: int) -> Tensor:
    """(T,) float64: the signal's share of the variance at each step of DDPM's linear schedule (Ho et al. 2020,
    section 4, betas scaled by 1000 / T) or of the cosine one (Nichol & Dhariwal 2021, equation 17)."""
    assert schedule in ("linear", "cosine"), schedule
    if schedule == "linear":
        scale = 1000 / steps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
    else:
        f = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = 1 - f[1:] / f[:-1]
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def ddpm_sigmas(alphas: Tensor) -> Tensor:
    """(T,) ascending: sigma_t = sqrt((1 - a) / a) of cumulative alphas (T,)."""
    return ((1 - alphas) / alphas).sqrt()


def ddpm_sigma(t: Tensor, table: Tensor) -> Tensor:
    """Sigma at the time t in [0, T - 1], between steps log-linear; `table` (T,) from `ddpm_sigmas`. Shape of t."""
    return _interpolate(t, torch.arange(len(table), dtype=t.dtype, device=t.device), table.to(t).log()).exp()


def ddpm_time(sigma: Tensor, table: Tensor) -> Tensor:
    """The inverse of `ddpm_sigma`; beyond the table its ends."""
    return _interpolate(sigma.log(), table.to(sigma).log(), torch.arange(len(table)).to(sigma))


def flow_sigma(t: Tensor) -> Tensor:
    """sigma = t / (1 - t) for flow matching's x_t = (1 - t) y + t n."""
    return t / (1 - t)


def flow_time(sigma: Tensor) -> Tensor:
    """t = sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def ends(objective: Objective) -> tuple[float, float]:
    """The least and largest sigma that are trained and sampled: the settings, else the schedule's own ends.

    edm: 0.002 and 80 (Karras et al. 2022, table 1); flow: t = 0.001 and 0.999.
    """
    o = objective
    if o.schedule in ("linear", "cosine"):
        table = ddpm_sigmas(alphas_bar(o.schedule, o.steps))
        low, high = table[0].item(), table[-1].item()
    else:
        low, high = (0.002, 80.0) if o.schedule == "edm" else (0.001 / 0.999, 999.0)
    return o.sigma_min or low, o.sigma_max or high


def sigmas_for_training(objective: Objective, u: Tensor) -> Tensor:
    """Sigmas (B,) at the quantiles u (B,) in [0, 1) of the schedule's distribution, kept within `ends`."""
    assert u.ndim == 1, u.shape
    o = objective
    if o.schedule in ("linear", "cosine"):
        sigma = ddpm_sigma(u * (o.steps - 1), ddpm_sigmas(alphas_bar(o.schedule, o.steps)))
    elif o.schedule == "edm":
        sigma = (o.p_mean + o.p_std * torch.special.ndtri(u)).exp()
    else:
        sigma = flow_sigma(u)
    return sigma.clamp(*ends(o))  # (B,)


class Coefficients(NamedTuple):
    """D(x) = skip x + out F(in x, noise) for the network F (Karras et al. 2022, equation 7); each (B,)."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def coefficients(parameterisation: str, sigma: Tensor, sigma_data: float) -> Coefficients:
    """c_skip, c_out, c_in and c_noise at sigma (B,).

    noise: F estimates n. velocity: (n - sigma y) / sqrt(1 + sigma^2). data: y. flow: n - y.
    edm: what makes input and target of unit variance for data of deviation `sigma_data` (table 1).
    c_noise is ln(sigma) / 4 for all, so that a network is told the same of a noise level whatever it estimates.
    """
    noise = sigma.log() / 4
    vp = (1 + sigma**2).rsqrt()
    one = torch.ones_like(sigma)
    match parameterisation:
        case "noise":
            return Coefficients(one, -sigma, vp, noise)
        case "velocity":
            return Coefficients(vp**2, -sigma * vp, vp, noise)
        case "data":
            return Coefficients(0 * one, one, vp, noise)
        case "flow":
            return Coefficients(1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), noise)
    assert parameterisation == "edm", parameterisation
    assert sigma_data > 0, sigma_data
    scale = (sigma_data**2 + sigma**2).rsqrt()
    return Coefficients((sigma_data * scale) ** 2, sigma * sigma_data * scale, scale, noise)


def weights(objective: Objective, sigma: Tensor, sigma_data: float) -> Tensor:
    """The weight (B,) of ||D - y||^2 at sigma (B,).

    plain: 1 / c_out^2, the squared error of the network's own output: DDPM's simple loss, flow matching's, and EDM's
    for edm. min-snr: min(1 / sigma^2, gamma) (Hang et al. 2023). edm: EDM's lambda for any parameterisation.
    """
    if objective.weighting == "min-snr":
        return (sigma**-2).clamp(max=objective.snr_limit)
    kind = objective.parameterisation if objective.weighting == "plain" else "edm"
    return coefficients(kind, sigma, sigma_data).out ** -2


def karras_grid(n: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """(N + 1,) float64: sigma^(1 / rho) in even steps from high to low, then 0 (Karras et al. 2022, equation 5)."""
    _check(n, low, high)
    return _ending(torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64) ** rho)


def logsnr_grid(n: int, low: float, high: float) -> Tensor:
    """(N + 1,) float64: ln sigma in even steps from high to low, then 0 (Lu et al. 2022)."""
    _check(n, low, high)
    return _ending(torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64).exp())


def flow_grid(n: int, high: float) -> Tensor:
    """(N + 1,) float64: flow matching's t in even steps from that of sigma = high to 0."""
    _check(n, 0.0, high)
    return flow_sigma(torch.linspace(high / (1 + high), 0.0, n + 1, dtype=torch.float64))


def ddpm_grid(n: int, table: Tensor, spacing: Spacing = "trailing") -> Tensor:
    """(N + 1,) float64: N of the discrete schedule's sigmas (T,), then 0 (spacings: Lin et al. 2024, table 2).

    Raises UserError for more steps than the schedule has.
    """
    total = len(table)
    if not 0 < n <= total:
        raise UserError(f"steps = {n} must lie between 1 and the schedule's {total}")
    return _ending(table.double()[ddpm_times(n, total, spacing)])


def ddpm_times(n: int, total: int, spacing: Spacing) -> Tensor:
    """(N,) int64 descending: the steps of a discrete schedule of `total` that a sampler of n steps visits."""
    assert 0 < n <= total, (n, total)
    i = torch.arange(n, dtype=torch.float64)
    if spacing == "leading":
        return (i * (total // n)).long().flip(0)
    if spacing == "linspace":
        return torch.linspace(0, total - 1, n, dtype=torch.float64).round().long().flip(0)
    return (total - i * total / n).round().long() - 1


def _ending(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def _check(n: int, low: float, high: float) -> None:
    assert n > 0, n
    assert 0 <= low <= high, (low, high)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs ascending, constant beyond the ends."""
    at = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    share = ((x - xs[at - 1]) / (xs[at] - xs[at - 1])).clamp(0, 1)
    return ys[at - 1] + share * (ys[at] - ys[at - 1])
