"""What the two networks play for: losses of scores, and penalties on gradients.

Goodfellow et al. 2014 (non-saturating); Lim & Ye 2017 (hinge); Arjovsky et al. 2017 and Gulrajani et al. 2017
(Wasserstein with gradient penalty); Mescheder et al. 2018 (R1); Karras et al. 2020 (path length, lazily);
Heusel et al. 2017 (two time-scale rates).

B items, C channels, *S space, L styles an image, W width of a style. Scores (B,) above 0 take an item for real.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.families.adversarial.augmenting import OPERATIONS
from handmill.recipe import not_negative, positive, within


@dataclass(frozen=True)
class Objective:
    """The [objective] table of the adversarial family."""

    loss: Literal["nonsaturating", "hinge", "wasserstein"] = "nonsaturating"
    gradient_penalty: float = 0.0  # of Wasserstein, lambda; the paper's is 10
    r1: float = 0.0  # gamma; 0: none
    r1_every: int = 16  # steps
    path_length: float = 0.0  # weight; 0: none; the paper's is 2
    path_every: int = 4  # steps
    path_items: int = 2  # one of so many images of a batch has its path length taken
    discriminator_rate: float = 1.0  # learning rates of the discriminator, in the generator's
    discriminator_steps: int = 1  # of the discriminator for each of the generator
    mixing: float = 0.0  # share of images in training with the styles of two latents
    augment: tuple[str, ...] = ()  # operations on what the discriminator sees, as far as it overfits
    augment_target: float = 0.6  # mean sign of the scores of real images that is aimed at
    augment_images: int = 500_000  # that the strength takes from 0 to 1
    judged: int = 1000  # images made at an evaluation, beside as many held-out ones at most

    def __post_init__(self) -> None:
        not_negative(self, "gradient_penalty", "r1", "path_length")
        positive(self, "r1_every", "path_every", "path_items", "discriminator_steps", "augment_images")
        positive(self, "discriminator_rate")
        within(self, 0.0, 1.0, "mixing", "augment_target")
        within(self, 100, 100_000, "judged")
        unknown = [name for name in self.augment if name not in OPERATIONS]
        if unknown:
            raise UserError(f"augment names {unknown[0]!r}, which is none of {', '.join(OPERATIONS)}")
        if (self.loss == "wasserstein") != (self.gradient_penalty > 0):
            raise UserError(f"loss = {self.loss!r} with gradient_penalty = {self.gradient_penalty:g}: the Wasserstein "
                            "loss needs a penalty, such as 10, and no other loss takes one")


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """(B,): what the generator minimises, of the scores of what it made."""
    return F.softplus(-fake) if kind == "nonsaturating" else -fake


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """(B,): what the discriminator minimises, of the scores of as many real and made items."""
    if kind == "nonsaturating":
        return F.softplus(-real) + F.softplus(fake)
    if kind == "hinge":
        return F.relu(1 - real) + F.relu(1 + fake)
    return fake - real


def certainty(real: Tensor, fake: Tensor) -> Tensor:
    """(B,): 1 where a real item scores above the made one beside it, 1/2 at equal scores: the mean is 1/2 by chance."""
    return ((real > fake).float() + (real >= fake).float()) / 2


def squared_slope(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|d score / d x|^2 of each item, (B,): R1 is gamma / 2 times its mean over real ones (Mescheder 2018, 9)."""
    x = x.detach().requires_grad_()
    seen = x.view_as(x)  # the memory tracker's hooks cannot stand on a leaf
    (slope,) = torch.autograd.grad(score(seen).sum(), x, create_graph=True)
    return _exact(slope).flatten(1).square().sum(1)


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """(|d score / d x| - 1)^2, (B,), at x = share real + (1 - share) fake (Gulrajani et al. 2017, eq. 3)."""
    share = share[(..., *[None] * (real.ndim - 1))]  # (B, 1, ...)
    return ((squared_slope(score, share * real + (1 - share) * fake) + 1e-12).sqrt() - 1).square()


def path_lengths(images: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """|J^T y|, (B,): how far an image moves for a step of its style (Karras et al. 2020, eq. 4).

    J = d images (B, C, *S) / d styles (B, L, W); y is `noise` (B, C, *S), standard normal, over the root of the places.
    The mean over the styles of the layers keeps it the same for any number of layers.
    """
    y = noise / images[0, 0].numel() ** 0.5
    (product,) = torch.autograd.grad((images * y).sum(), styles, create_graph=True)  # (B, L, W)
    return (_exact(product).square().sum(2).mean(1) + 1e-12).sqrt()


def _exact(x: Tensor) -> Tensor:
    """x in fp32 at least: squares are not summed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
