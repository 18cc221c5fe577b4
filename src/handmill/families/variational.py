"""The variational family: an autoencoder trained to describe data in few nats, with a Gaussian or a discrete latent.

Kingma & Welling 2014 (VAE); Higgins et al. 2017 (beta); Kingma et al. 2016 (free bits); Rybkin et al. 2021 (learned
scale, sigma-VAE); Burda et al. 2016 (importance-weighted bound, active units); van den Oord et al. 2017 (VQ-VAE).

Every function takes its noise as an argument. Pixels lie in [-1, 1]; likelihoods are in nats. Gaussian and Laplace
ones are densities on that scale: for 8-bit pixels, adding log(127.5) nats a pixel to minus the log density gives nats
on the scale of 0..255.

B batch, N samples, C channels, S space, L the latent's shape, s the space of a latent map, K codes or importance
samples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.recipe import Training, not_negative, positive
from handmill.training import optimizers as rules
from handmill.training.codebook import EMACodebook
from handmill.training.optimizers import Optimizer

AT_ONCE = 512  # items in one pass without gradients
ACTIVE = 0.01  # variance of the posterior mean above which a unit is active (Burda et al. 2016, section 5.2)

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The [objective] table of the variational family."""

    beta: float = 1.0  # weight of the KL term
    likelihood: Literal["bernoulli", "gaussian", "laplace"] = "bernoulli"  # of a pixel, given the decoder's output
    scale: float = 0.0  # sigma of "gaussian", b of "laplace", in pixels of [-1, 1]; 0: one scale, learned
    free_bits: float = 0.0  # nats of each latent unit of an item that cost nothing more than this
    commitment: float = 0.25  # weight of the encoder's squared distance to its codes (vq)

    def __post_init__(self) -> None:
        not_negative(self, "beta", "scale", "free_bits", "commitment")


@dataclass(frozen=True)
class Sampling:
    """The [sampling] table of the variational family."""

    temperature: float = 1.0  # scale of the prior's noise

    def __post_init__(self) -> None:
        positive(self, "temperature")


def kl_to_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats: (B, *L) to (B,) (Kingma & Welling 2014, appendix B)."""
    return _kl_of_units(mean, log_variance).flatten(1).sum(1)


def log_likelihood(x: Tensor, output: Tensor, objective: Objective, log_scale: Tensor | None = None) -> Tensor:
    """log p(x | z) in nats, (B,), of x (B, C, *S) in [-1, 1] under the decoder's output (B, C, *S).

    "bernoulli": output is the logit of a white pixel and greys count as probabilities, so that the result is a
    likelihood for black and white x only. "gaussian", "laplace": output is the mean, the density is continuous.
    `log_scale` (B,) is the learned one, read where objective.scale is 0.
    """
    x, output = x.flatten(1).float(), output.flatten(1).float()  # (B, C * S)
    if objective.likelihood == "bernoulli":
        return -F.binary_cross_entropy_with_logits(output, (x + 1) / 2, reduction="none").sum(1)
    if objective.scale:
        log_scale = torch.full((x.shape[0],), math.log(objective.scale), device=x.device)
    assert log_scale is not None, "a learned scale is part of what the network returns"
    log_scale = log_scale[:, None]
    error = (x - output) * (-log_scale).exp()
    if objective.likelihood == "gaussian":
        return (-0.5 * error.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(1)
    return (-error.abs() - log_scale - math.log(2)).sum(1)


def loss_parts(network: nn.Module, x: Tensor, noise: Tensor, condition: Condition,
               objective: Objective) -> dict[str, Tensor]:
    """The terms of the loss of x (B, C, *S) with noise (B, *L) standard normal, each (B,) in nats.

    "loss" is what is minimised; "reconstruction" is -log p(x | z); "kl" belongs to a Gaussian latent, "commitment"
    (the squared distance, unweighted) to a quantised one. With beta = 1, free_bits = 0 and a Gaussian latent, -"loss"
    is the evidence lower bound.
    """
    parts = network(x, noise, condition)
    reconstruction = -log_likelihood(x, parts["output"], objective, parts["log_scale"])  # (B,)
    told = {"reconstruction": reconstruction.detach()}
    loss = reconstruction + 0 * parts["log_scale"]  # DistributedDataParallel wants a gradient for every parameter
    if "mean" in parts:
        kl = _kl_of_units(parts["mean"], parts["log_variance"]).flatten(1)  # (B, units)
        told["kl"] = kl.detach().sum(1)
        return told | {"loss": loss + objective.beta * kl.clamp(min=objective.free_bits).sum(1)}
    told["commitment"] = parts["commitment"].detach()
    return told | {"loss": loss + objective.commitment * parts["commitment"] + parts["statistics"]}


@torch.no_grad()
def importance_bound(network: Any, x: Tensor, noise: Tensor, condition: Condition, objective: Objective) -> Tensor:
    """A lower bound of log p(x) in nats, (B,), tighter with every sample; noise (K, B, *L) standard normal.

    log 1/K sum_k p(x, z_k) / q(z_k | x) (Burda et al. 2016, eq. 8); K = 1 is the evidence lower bound.
    Memory grows with AT_ONCE items, not with K.
    """
    assert noise.shape[1] == x.shape[0], (noise.shape, x.shape)
    mean, log_variance = network.encode(x, condition).unbind(1)  # (B, *L)
    log_scale = network.log_scale.expand(x.shape[0])
    total = torch.full((x.shape[0],), -torch.inf, device=x.device)
    for part in noise.split(max(1, AT_ONCE // x.shape[0])):  # (k, B, *L)
        k = part.shape[0]
        z = mean + (log_variance / 2).exp() * part
        output = network.decode(z.flatten(0, 1), {n: c.repeat(k) for n, c in condition.items()})  # (k * B, C, *S)
        repeated = x.repeat(k, *[1] * (x.ndim - 1))
        weight = log_likelihood(repeated, output, objective, log_scale.repeat(k)).view(k, -1)
        weight = weight + (0.5 * (part.square() - z.square() + log_variance)).flatten(2).sum(2)  # log p(z) / q(z | x)
        total = torch.logaddexp(total, weight.logsumexp(0))
    return total - math.log(noise.shape[0])


@torch.no_grad()
def sample(network: Any, objective: Objective, sampling: Sampling, conditions: Condition, noise: Tensor) -> Tensor:
    """Mean images (N, C, *S) in [-1, 1] of z = temperature * noise, noise (N, *L) standard normal.

    Raises UserError for an autoencoder of codes, which has no prior to sample from.
    """
    _gaussian(network, "samples")
    return images(network, objective, sampling.temperature * noise, conditions)


@torch.no_grad()
def images(network: Any, objective: Objective, z: Tensor, condition: Condition) -> Tensor:
    """Mean images (N, C, *S) in [-1, 1] of latents z (N, *L)."""
    return torch.cat([network.images(z[rows], objective.likelihood, part) for rows, part in _parts(z, condition)])


@torch.no_grad()
def posterior(network: Any, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """Mean and log variance, each (B, *L), of q(z | x). Raises UserError for an autoencoder of codes."""
    _gaussian(network, "a posterior")
    both = torch.cat([network.encode(x[rows], part) for rows, part in _parts(x, condition)])
    mean, log_variance = both.unbind(1)
    return mean, log_variance


@torch.no_grad()
def latents(network: Any, x: Tensor, condition: Condition) -> Tensor:
    """The latent (B, *L) that x is reconstructed from: the posterior's mean, or the vectors of its codes."""
    return torch.cat([network.mean(x[rows], part) for rows, part in _parts(x, condition)])


def reconstruct(network: Any, objective: Objective, x: Tensor, condition: Condition) -> Tensor:
    """x (B, C, *S) through the bottleneck, without noise: mean images (B, C, *S) in [-1, 1]."""
    return images(network, objective, latents(network, x, condition), condition)


@torch.no_grad()
def codes(network: Any, x: Tensor, condition: Condition) -> Tensor:
    """The discrete codes (B, *s) int64 of x (B, C, *S), each below network.vocabulary.

    Raises UserError for a Gaussian bottleneck.
    """
    _discrete(network)
    parts = _parts(x, condition)
    return torch.cat([network.quantise(network.encode(x[rows], part)).codes for rows, part in parts])


def usage(codes: Tensor, vocabulary: int) -> Tensor:
    """How often each code stands in `codes` (any shape): (K,) int64, for networks.quantisers.perplexity."""
    return torch.bincount(codes.flatten(), minlength=vocabulary)


def from_codes(network: Any, objective: Objective, codes: Tensor, condition: Condition) -> Tensor:
    """Mean images (B, C, *S) in [-1, 1] of codes (B, *s) int64. Raises UserError for a Gaussian bottleneck."""
    _discrete(network)
    return images(network, objective, network.lookup(codes), condition)


def interpolate(network: Any, objective: Objective, a: Tensor, b: Tensor, steps: int,
                condition: Condition | None = None, path: Literal["spherical", "linear"] = "spherical") -> Tensor:
    """`steps` images (steps, B, C, *S) from a to b, each (B, C, *S), both ends included.

    On a sphere the latents between keep a plausible length under the prior (White 2016). Codes cannot be mixed:
    their vectors are, linearly.
    """
    assert steps > 1, steps
    condition = condition or {}
    start, end = (latents(network, x, condition) for x in (a, b))  # (B, *L)
    straight = path == "linear" or network.quantiser is not None
    z = torch.stack([(torch.lerp if straight else slerp)(start, end, i / (steps - 1)) for i in range(steps)])
    repeated = {n: c.repeat(steps) for n, c in condition.items()}
    return images(network, objective, z.flatten(0, 1), repeated).unflatten(0, (steps, -1))


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at `share` of the arc from a to b, each (B, *L) (Shoemake 1985); on a line where they are parallel."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = F.cosine_similarity(flat_a, flat_b, 1).clamp(-1, 1).acos()[:, None]  # (B, 1)
    sine = angle.sin()
    parallel = sine < 1e-4
    safe = torch.where(parallel, 1.0, sine)
    first = torch.where(parallel, 1 - share, ((1 - share) * angle).sin() / safe)
    second = torch.where(parallel, share, (share * angle).sin() / safe)
    return (first * flat_a + second * flat_b).view_as(a)


def latent_map(network: Any, objective: Objective, n: int, x: Tensor | None = None,
               condition: Condition | None = None) -> Tensor:
    """What the latent says, as a grid of images (rows, n, C, *S): columns are quantiles 0.5/n, 1.5/n, ... of the prior.

    Two units: rows are the same quantiles of the first unit. More: one row for each of the n units whose KL is largest
    over x (B, C, *S), the others at 0. `condition` is of one item, (1,), for the images; x is encoded without.
    Raises UserError for an autoencoder of codes.
    """
    _gaussian(network, "a map of its latent")
    units = math.prod(network.latent_shape)
    place = (torch.arange(n, device=network.log_scale.device) + 0.5) / n
    quantiles = torch.distributions.Normal(0.0, 1.0, validate_args=False).icdf(place)  # (n,)
    if units == 2:
        z = torch.cartesian_prod(quantiles, quantiles).view(n, n, 2)
    else:
        assert x is not None, "a latent of more than two units is mapped by data"
        chosen = unit_kl(network, x, {}).flatten().topk(min(n, units)).indices
        z = quantiles.new_zeros(len(chosen), n, units)
        z[torch.arange(len(chosen)), :, chosen] = quantiles
    flat = z.view(-1, *network.latent_shape)
    repeated = {name: c.repeat(len(flat)) for name, c in (condition or {}).items()}
    return images(network, objective, flat, repeated).unflatten(0, z.shape[:2])


def unit_kl(network: Any, x: Tensor, condition: Condition) -> Tensor:
    """The mean KL of each latent unit over x (B, C, *S), in nats: (*L)."""
    return _kl_of_units(*posterior(network, x, condition)).mean(0)


def active_units(network: Any, x: Tensor, condition: Condition) -> Tensor:
    """Which latent units tell items apart: (*L) bool, where the posterior mean's variance over x (B, C, *S) is above
    ACTIVE (Burda et al. 2016, section 5.2)."""
    assert x.shape[0] > 1, "a variance needs two items"
    return posterior(network, x, condition)[0].var(0) > ACTIVE


def optimizers(network: nn.Module, training: Training) -> list[Optimizer]:
    """The optimizers of the phase: the usual ones, and EMACodebook for a codebook."""
    codebook: Any = network.codebook
    if codebook is None:
        return rules.optimizers(network, training)
    codebook.requires_grad_(False)  # `rules.optimizers` leaves frozen parameters out
    result = rules.optimizers(network, training)
    codebook.requires_grad_(True)
    settings: Any = network.settings
    return [*result, EMACodebook(codebook.weight, codebook.counts, settings.decay, settings.revival)]


def _kl_of_units(mean: Tensor, log_variance: Tensor) -> Tensor:  # (B, *L)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def _parts(x: Tensor, condition: Condition) -> Iterator[tuple[slice, Condition]]:
    """Rows of x that make one pass, and the condition of just these."""
    for start in range(0, len(x), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        yield rows, {name: value[rows] for name, value in condition.items()}


def _gaussian(network: Any, wanted: str) -> None:
    if network.quantiser is not None:
        raise UserError(f"an autoencoder with bottleneck = {network.settings.bottleneck!r} has no prior, and so not "
                        f"{wanted}: train a model on its codes, or choose bottleneck = \"gaussian\"")


def _discrete(network: Any) -> None:
    if network.quantiser is None:
        raise UserError('an autoencoder with bottleneck = "gaussian" has no codes: choose "vq" or "fsq"')
