"""Making samples: the [sampling] table, and the way from noise to data.

N samples made at once, *shape channels and space.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from handmill.errors import UserError
from handmill.families.diffusion import noise_levels
from handmill.families.diffusion.denoiser import Denoiser, Denoising, clipped, guided
from handmill.families.diffusion.noise_levels import Objective
from handmill.families.diffusion.samplers import SAMPLERS, ddim
from handmill.recipe import not_negative, within


@dataclass(frozen=True)
class Sampling:
    """The [sampling] table: how noise is made into a sample."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc"] = "dpmpp_2m"
    steps: int = 10  # of the sampler; each evaluates the network once, with heun twice; more gained nothing measurable
    grid: Literal["auto", "karras", "ddpm", "flow", "logsnr"] = "auto"  # where the steps lie; auto: by the schedule
    eta: float = 0.0  # fresh noise of ddim, as a share of DDPM's
    guidance: float = 1.0  # classifier-free; 1: none, and half the work
    guidance_interval: tuple[float, float] = (0.0, 0.0)  # sigmas above the first up to the second; 0: no limit
    clip: float = 0.0  # denoised values are kept within plus and minus this; 0: left alone; 1 suits pixels

    def __post_init__(self) -> None:
        within(self, 1, 100_000, "steps")
        within(self, 0.0, 1.0, "eta")
        within(self, 0.0, 1000.0, "guidance")
        not_negative(self, "clip")
        low, high = self.guidance_interval
        if low < 0 or (high and not low < high < math.inf):
            raise UserError(f"guidance_interval = [{low:g}, {high:g}] must hold two sigmas in ascending order, "
                            "the second 0 for no limit")
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta = {self.eta:g} belongs to sampler = \"ddim\", not to {self.sampler!r}: leave it out")

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self.guidance_interval
        return low, high or math.inf


def grid(objective: Objective, sampling: Sampling) -> Tensor:
    """The sigmas (steps + 1,) float64 that the sampler visits, descending to 0.

    Raises UserError for the grid "ddpm" where the schedule has no discrete steps, or fewer than are asked for.
    """
    n, (low, high) = sampling.steps, noise_levels.ends(objective)
    match _usual(objective) if sampling.grid == "auto" else sampling.grid:
        case "karras":
            return noise_levels.karras_grid(n, low, high)
        case "logsnr":
            return noise_levels.logsnr_grid(n, low, high)
        case "flow":
            return noise_levels.flow_grid(n, high)
    if objective.schedule not in ("linear", "cosine"):
        raise UserError("grid = \"ddpm\" needs the discrete steps of schedule = \"linear\" or \"cosine\", "
                        f"not {objective.schedule!r}: choose \"auto\"")
    table = noise_levels.ddpm_sigmas(noise_levels.alphas_bar(objective.schedule, objective.steps))  # (T,)
    return noise_levels.ddpm_grid(n, table[(low <= table) & (table <= high)])


def denoising(network: nn.Module | Denoising, objective: Objective, sampling: Sampling, sigma_data: float,
              null_label: int) -> Denoising:
    """The denoiser as `sampling` asks for it: guided, then clipped. `network` may be the denoiser itself."""
    denoiser = Denoiser(network, objective, sigma_data) if isinstance(network, nn.Module) else network
    denoiser = guided(denoiser, sampling.guidance, null_label, sampling.interval)
    return clipped(denoiser, -sampling.clip, sampling.clip) if sampling.clip else denoiser


@torch.inference_mode()
def sample(network: nn.Module | Denoising, objective: Objective, sampling: Sampling, shape: tuple[int, ...],
           conditions: Mapping[str, Tensor], noise: Callable[[int], Tensor], sigma_data: float, null_label: int,
           device: torch.device | str) -> Tensor:
    """Samples (N, *shape) float32 of `network`, which must be in evaluation mode, or is the denoiser itself.

    `noise(i)` gives the i-th draw, (N, *shape) standard normal; draw 0 is the start, draw i + 1 belongs to step i.
    `conditions` hold N rows each, such as "label" (N,). Equal arguments give equal samples.
    Raises UserError as `grid` does.
    """
    assert not isinstance(network, nn.Module) or not network.training, "call network.eval(): dropout disturbs samples"
    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sigmas = grid(objective, sampling)
    start = noise(0).to(device, dtype)  # (N, *shape)
    assert start.shape[1:] == shape, (start.shape, shape)
    assert all(len(value) == len(start) for value in conditions.values()), "one row of each condition a sample"
    denoiser = denoising(network, objective, sampling, sigma_data, null_label)
    where = {key: value.to(device) for key, value in conditions.items()}
    x = math.hypot(sigmas[0].item(), sigma_data) * start  # the deviation that noised data has
    sampler = partial(ddim, eta=sampling.eta) if sampling.sampler == "ddim" else SAMPLERS[sampling.sampler]
    return sampler(lambda x, sigma: denoiser(x, sigma, where), x, sigmas, lambda i: noise(i + 1)).float()


def _usual(objective: Objective) -> str:
    """The grid that suits a schedule: even steps of its own time."""
    return {"edm": "karras", "flow": "flow"}.get(objective.schedule, "ddpm")
