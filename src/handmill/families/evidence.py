"""The variational family in training: the evidence lower bound (Kingma & Welling 2014), or VQ's three terms."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from handmill.data.items import Batch
from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.families import teaching, variational
from handmill.recipe import Recipe
from handmill.training.loop import Task


def task(network: Any, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train an autoencoder. The posterior's noise is a function of an item's place."""
    shape = tuple(network.latent_shape)

    def parts(module: nn.Module, batch: Batch, training: bool) -> dict[str, Tensor]:
        noise = normal(draw(recipe.seed, "posterior", training), batch["place"], shape)
        condition = {"label": batch["label"]} if codec.classes else {}
        return variational.loss_parts(module, batch["x"], noise, condition, recipe.objective)

    return teaching.task(network, codec, prepared, recipe, out, parts,
                         variational.optimizers(network, recipe.training), "nats per image")
