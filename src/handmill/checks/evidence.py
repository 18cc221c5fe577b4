"""Likelihood of held-out images: bounds in nats an image and bits a dimension, each with what it is made of.

B images, K importance samples or noise levels, D dimensions (pixels times channels), L the latent's shape.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from handmill.checks.intervals import ratio
from handmill.data.noise import normal, uniform
from handmill.data.order import draw
from handmill.families import variational
from handmill.families.diffusion.bound import bits_per_dimension, bound
from handmill.families.diffusion.denoiser import Denoiser
from handmill.folder import Model

AT_ONCE = 64  # images
STRATA = 32  # noise levels of the diffusion bound
EIGHT_BIT = math.log(127.5)  # nats a dimension from densities on [-1, 1] to values from 0 to 255

Batch = dict[str, Tensor]


def likelihood(model: Model, held_out: Batch, importance: int, seed: int, progress: bool = False) -> dict[str, Any]:
    """The bound that the model's family has, over the images "x" (N, C, H, W) in [-1, 1]; {"missing"} where none is."""
    if model.recipe.family == "variational":
        return _variational(model, held_out, importance, seed, progress)
    if model.recipe.family == "diffusion" and model.recipe.codec.kind == "pixels":
        return _diffusion(model, held_out, seed, progress)
    return {"missing": "not defined: the model describes codes, not pixels" if model.recipe.codec.kind == "model" else
            "not defined for this family"}


@torch.inference_mode()
def _variational(model: Model, held_out: Batch, importance: int, seed: int, progress: bool) -> dict[str, Any]:
    network: Any = model.network
    objective, shape = model.recipe.objective, tuple(network.latent_shape)
    sums: dict[str, list[Tensor]] = {}
    for batch in _batches(model, held_out, AT_ONCE, progress):
        x, places = batch["x"], batch["place"]
        condition = {"label": batch["label"]} if model.codec.classes else {}
        noise = normal(draw(seed, "check", "posterior"), places, shape)
        parts = variational.loss_parts(network, x, noise, condition, objective)
        if "kl" in parts:
            parts["elbo"] = parts["reconstruction"] + parts["kl"]
            more = normal(draw(seed, "check", "importance"), places, (importance, *shape)).transpose(0, 1)  # (K, B, *L)
            parts["importance"] = -variational.importance_bound(network, x, more, condition, objective)
        again = variational.reconstruct(network, objective, x, condition)
        parts["squared_error"] = (again - x).square().flatten(1).mean(1)
        for name, each in parts.items():
            sums.setdefault(name, []).append(each.double().cpu())
    found = {name: torch.cat(parts).numpy() for name, parts in sums.items()}
    bernoulli, greys = objective.likelihood == "bernoulli", model.recipe.data.binarise == "no"
    if "importance" not in found or (bernoulli and greys):
        names: tuple[str, ...] = ("reconstruction", "kl", "commitment", "squared_error")
        kind, counted = "no likelihood", ("cross-entropy of greys as probabilities" if bernoulli else "log density")
    else:
        names = ("reconstruction", "kl", "elbo", "importance", "squared_error")
        kind = f"importance-weighted bound, {importance} samples"
        counted = "log likelihood of black and white pixels" if bernoulli else "log density"
    figures = {name: figure(found[name], seed) for name in names if name in found}
    if "importance" in figures:
        dimensions = math.prod(model.codec.shape)
        nats = found["importance"] + (0.0 if bernoulli else EIGHT_BIT * dimensions)
        figures["bits_per_dimension"] = figure(nats / (dimensions * math.log(2)), seed)
    return {"kind": kind, "counted": f"{counted}, nats per image", "images": len(found["loss"]), **figures}


@torch.inference_mode()
def _diffusion(model: Model, held_out: Batch, seed: int, progress: bool) -> dict[str, Any]:
    recipe = model.recipe
    sigma_data = recipe.objective.sigma_data or model.codec.deviation
    denoiser = Denoiser(model.network, recipe.objective, sigma_data)
    parts: dict[str, list[Tensor]] = {"prior": [], "diffusion": [], "reconstruction": []}
    for batch in _batches(model, held_out, AT_ONCE, progress):
        y, places = batch["x"], batch["place"]
        condition = {"label": batch["label"]} if model.codec.classes else {}
        where = uniform(draw(seed, "check", "levels"), places, STRATA).T  # (K, B)
        found = bound(lambda x, sigma, c=condition: denoiser(x, sigma, c), y, where,  # type: ignore[misc]
                      _noise(seed, places, tuple(y.shape[1:])), sigma_data)
        for name, each in zip(parts, found, strict=True):
            parts[name].append(each.double().cpu())
    whole = {name: torch.cat(values) for name, values in parts.items()}
    total = whole["prior"] + whole["diffusion"] + whole["reconstruction"]
    bits = bits_per_dimension(total, math.prod(model.codec.shape))
    return {"kind": f"variational bound in continuous time, {STRATA} noise levels an image",
            "counted": "log likelihood of 8-bit values, nats per image", "images": len(total),
            **{name: figure(values.numpy(), seed) for name, values in whole.items()},
            "elbo": figure(total.numpy(), seed), "bits_per_dimension": figure(bits.numpy(), seed)}


def figure(values: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """The mean over images with its bootstrap interval."""
    return ratio(values, np.ones(len(values)), seed, unit="images").plain()


def _noise(seed: int, places: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda k: normal(draw(seed, "check", "noise", k), places, shape)


def _batches(model: Model, held_out: Batch, size: int, progress: bool) -> Iterator[Batch]:
    count = len(held_out["label"])
    for start in tqdm(range(0, count, size), desc="likelihood", disable=not progress):
        yield {name: value[start:start + size].to(model.device) for name, value in held_out.items()}
