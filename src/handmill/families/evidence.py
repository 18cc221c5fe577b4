"""The variational family in training: the evidence lower bound (Kingma & Welling 2014), or VQ's three terms."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.data.items import Batch, Items
from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.families import previews, teaching, variational
from handmill.media.pictures import to_uint8
from handmill.recipe import Recipe
from handmill.training.loop import Task


def task(network: Any, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train an autoencoder. The posterior's noise is a function of an item's place."""
    shape = tuple(network.latent_shape)

    def parts(module: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
        noise = normal(draw(recipe.seed, "posterior", training), batch["place"], shape)
        condition = {"label": batch["label"]} if codec.classes else {}
        return variational.loss_parts(module, batch["x"], noise, condition, recipe.objective)

    shown = previews.samples(codec, recipe, out) if network.quantiser is None else reconstructions(
        codec, prepared, recipe, out)
    return teaching.task(network, codec, prepared, recipe, parts, variational.optimizers(network, recipe.training),
                         "nats per image", shown)


def reconstructions(codec: Any, prepared: Any, recipe: Recipe, out: Path) -> previews.Preview:
    """Held-out images, each followed by what the network makes of it: codes have no prior to sample from."""
    some = Items(prepared, "validation", codec, recipe.data, recipe.seed).first(previews.SHOWN // 2)
    condition = {"label": some["label"]} if codec.classes else {}

    def images(network: nn.Module) -> Any:
        device = next(network.parameters()).device
        told = {name: value.to(device) for name, value in condition.items()}
        again = variational.reconstruct(network, recipe.objective, some["x"].to(device), told).cpu()
        return to_uint8(torch.stack((some["x"], again), 1).flatten(0, 1))

    return previews.drawn(images, out)
