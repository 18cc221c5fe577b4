"""What `plan` and `train` share: the recipe and its folder, and the network with its task for the loop."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handmill import families, folder
from handmill import recipe as recipes
from handmill.data.items import Items
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.media.latents import Codes, Latents
from handmill.media.pixels import Pixels
from handmill.networks import build
from handmill.recipe import Recipe
from handmill.training.loop import Task
from handmill.training.precision import cached_kernels, keep_freed_memory

MEASURED = 2048  # images that the scale of pixels or codes is taken from


def begin(recipe: Recipe | Path | str, out: Path | str | None, overrides: Iterable[str]) -> tuple[Recipe, Path]:
    """The recipe read, its folder (default: runs/NAME), and this process made ready to compute."""
    if not isinstance(recipe, Recipe):
        recipe = recipes.read(recipe, overrides)
    keep_freed_memory()
    cached_kernels()
    return recipe, Path(out) if out is not None else Path("runs") / recipe.name


def assemble(recipe: Recipe, prepared: Any, device: torch.device, out: Path) -> tuple[nn.Module, Any, Task]:
    """The network, its weights a pure function of the recipe's seed, its codec, and its task for the loop."""
    codec = fit(recipe, prepared, device)
    torch.manual_seed(draw(recipe.seed, "weights"))
    network = build(recipe.network, codec).to(device)
    return network, codec, families.task(network, codec, prepared, recipe, out)


def fit(recipe: Recipe, prepared: Any, device: torch.device) -> Any:
    """The codec for prepared data: its tokenizer, its pixels, or the codes of the autoencoder that the recipe names.

    Raises UserError for an autoencoder of another medium, size or kind.
    """
    if recipe.medium != "image":
        return prepared.codec()
    height, width, channels = prepared.images("train").shape[1:]
    pixels = Pixels((channels, height, width), prepared.classes, 1.0)
    sample = Items(prepared, "train", pixels, recipe.data, recipe.seed).first(MEASURED)["x"]
    pixels.deviation = sample.std().item()
    if recipe.codec.kind == "pixels":
        return pixels
    model = trained(recipe, pixels, device)
    if recipe.family == "autoregressive":
        return Codes(model, pixels.classes)
    return Latents.fit(model, pixels.classes, sample)


def trained(recipe: Recipe, pixels: Pixels, device: torch.device) -> folder.Model:
    """The autoencoder that codec.path names, if its codes can stand for such images. Raises UserError."""
    model = folder.load(recipe.codec.path, device)
    where = f"codec.path = {recipe.codec.path!r}"
    if model.recipe.medium != recipe.medium or model.recipe.family != "variational":
        raise UserError(f"{where} is a model of {model.recipe.medium} by the {model.recipe.family} family: "
                        f"name the folder of a variational model of {recipe.medium}")
    if model.codec.shape != pixels.shape:
        sizes = [" x ".join(map(str, shape)) for shape in (model.codec.shape, pixels.shape)]
        raise UserError(f"{where} was trained on images of {sizes[0]} (channels, height, width) but the data are of "
                        f"{sizes[1]}: set data.size and data.colour to the autoencoder's")
    if model.recipe.network.flat:
        raise UserError(f"{where} makes one vector of an image: train it with network.flat = false for a map of codes")
    if recipe.family == "autoregressive" and model.recipe.network.bottleneck == "gaussian":
        raise UserError(f"{where} has no codes to predict: train it with network.bottleneck = \"vq\" or \"fsq\"")
    return model
