"""The picture that shows how training gets on: one file that is drawn anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from handmill.families import tensors
from handmill.media import pictures
from handmill.recipe import Recipe

SHOWN = 64  # samples, the classes in turn

Preview = tuple[Callable[[nn.Module], str], Path]


def samples(codec: Any, recipe: Recipe, out: Path) -> Preview:
    """A grid of a network's samples, always from the same noise."""
    labels = tensors.every_class(recipe, codec, SHOWN)
    return drawn(lambda network: tensors.make(network, codec, recipe, labels, recipe.sampling, recipe.seed), out)


def drawn(images: Callable[[nn.Module], tensors.Images], out: Path) -> Preview:
    """What draws the images (N, H, W, C) that a network makes, and the file in the folder `out` that it draws into."""
    picture = out / "samples" / "training.png"

    def draw(network: nn.Module) -> str:
        picture.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_png(picture, pictures.grid(images(network)))
        return str(picture)

    return draw, picture
