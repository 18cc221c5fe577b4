"""Samples of a generator: the [sampling] table, and the way from noise to images.

N samples, Z width of the latent, P numbers of noise an image, L styles of width W, *shape channels and space.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handmill.recipe import within


@dataclass(frozen=True)
class Sampling:
    """The [sampling] table of the adversarial family."""

    truncation: float = 1.0  # psi: 1 as trained; towards 0 nearer to the centre of the styles; above 1 farther

    def __post_init__(self) -> None:
        within(self, 0.0, 2.0, "truncation")


@torch.inference_mode()
def sample(network: Any, sampling: Sampling, conditions: Mapping[str, Tensor],
           noise: Callable[[int, tuple[int, ...]], Tensor]) -> Tensor:
    """Samples (N, *shape) float32 of a generator, which must be in evaluation mode, or is a function of the same.

    `noise(i, shape)` gives the i-th draw, (N, *shape) standard normal: 0 is the latent, 1 the noise of the layers.
    `conditions` hold N rows each. Truncation: Karras et al. 2019, appendix B.
    """
    assert not isinstance(network, nn.Module) or not network.training, "call network.eval(): samples hang together else"
    z, layers = noise(0, network.latent_shape), noise(1, network.noise_shape)
    if not isinstance(network, nn.Module):
        made: Tensor = network(z, layers, sampling.truncation, conditions)
        return made
    w = network.map(z, dict(conditions))  # type: ignore[operator]  # (N, L, W)
    if sampling.truncation != 1.0:
        w = network.truncated(w, dict(conditions), sampling.truncation)  # type: ignore[operator]
    return network.render(w, layers).float()  # type: ignore[operator,no-any-return]
