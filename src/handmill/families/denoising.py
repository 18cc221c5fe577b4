"""Diffusion in training: at a noise level drawn for each item, recover it (Ho et al. 2020, Karras et al. 2022)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.data.items import Batch
from handmill.data.noise import normal, spread, uniform
from handmill.data.order import draw
from handmill.families import previews, teaching
from handmill.families.diffusion.denoiser import Denoiser, loss
from handmill.recipe import Recipe
from handmill.training.loop import Task
from handmill.training.optimizers import optimizers


def task(network: Any, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train the denoiser `network`. Noise and noise level are functions of an item's place."""
    objective, null = recipe.objective, len(codec.classes)
    sigma_data = objective.sigma_data or codec.deviation

    def parts(module: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
        x, label, places = batch["x"], batch["label"], batch["place"]
        noise_key, level_key, hide_key = (draw(recipe.seed, "diffusion", what, training) for what in range(3))
        if training:
            hidden = uniform(hide_key, places, 1)[:, 0] < objective.label_dropout
            label = torch.where(hidden, null, label)
        condition = {"label": label} if null else {}
        each = loss(Denoiser(module, objective, sigma_data), x, normal(noise_key, places, tuple(x.shape[1:])),
                    spread(level_key, places), condition)
        return {"loss": each}

    return teaching.task(network, codec, prepared, recipe, parts, optimizers(network, recipe.training),
                         "weighted squared error", previews.samples(codec, recipe, out))
