"""The pictures of a check, in the model folder's samples/. N images, H height, W width, C channels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmill.families import variational
from handmill.media import pictures
from handmill.media.pictures import to_uint8

SHOWN = 100  # samples
PAIRS = 12  # samples beside the training images nearest to them
ROW = 12  # images in a row of reconstructions


def draw(ground: Any, made: NDArray[np.uint8], asked: NDArray[np.int64], copying: Mapping[str, Any]) -> dict[str, str]:
    """Write what can be drawn of this model; {what: file, from the model folder on}."""
    found: dict[str, NDArray[np.uint8]] = {}
    if len(made):
        chosen = _some_of_each(asked)
        rows = len(np.unique(asked[chosen]))
        found["samples"] = pictures.grid(made[chosen], columns=len(chosen) // rows if rows > 1 else 0)
        found["held out"] = pictures.grid(ground.real[np.linspace(0, len(ground.real) - 1, SHOWN).astype(int)])
    if "by" in copying:
        found["nearest training images"] = nearest(ground, made, copying["by"]["pixels"]["pairs"])
    if ground.model.recipe.family == "variational":
        found |= _latent(ground)
    folder: Path = ground.model.path / "samples"
    folder.mkdir(exist_ok=True)
    files = {what: f"samples/{what.replace(' ', '-')}.png" for what in found}
    for what, image in found.items():
        pictures.save_png(ground.model.path / files[what], image, {"model": ground.model.recipe.name, "shows": what})
    return files


def nearest(ground: Any, made: NDArray[np.uint8], pairs: list[Any]) -> NDArray[np.uint8]:
    """The most suspicious samples above the training images nearest to them."""
    samples = [int(pair[0]) for pair in pairs[:PAIRS]]
    train = ground.training.images("train")
    beside = np.stack([np.asarray(train[int(pair[1])]) for pair in pairs[:PAIRS]])
    return pictures.labelled_rows([("samples", made[samples]), ("nearest training images", beside)])


def _some_of_each(asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """About SHOWN samples: the first of each class, equally many, in rows; of one class all in about a square."""
    each = [np.flatnonzero(asked == number) for number in np.unique(asked)]
    if len(each) == 1:
        return each[0][:SHOWN]
    count = min(max(1, SHOWN // len(each)), min(map(len, each)))
    return np.concatenate([places[:count] for places in each])


@torch.inference_mode()
def _latent(ground: Any) -> dict[str, NDArray[np.uint8]]:
    """Reconstructions, paths between images, and what the units of the latent do."""
    model, batch = ground.model, ground.items().first(4 * ROW)
    x = batch["x"].to(model.device)
    condition = {"label": batch["label"].to(model.device)} if model.codec.classes else {}
    network, objective = model.network, model.recipe.objective
    again = variational.reconstruct(network, objective, x, condition)
    found = {"reconstructions": pictures.labelled_rows([
        ("held-out images", to_uint8(x[:ROW])), ("reconstructions", to_uint8(again[:ROW]))])}
    if pairs := min(4, len(x) // 2):
        paths = variational.interpolate(network, objective, x[:pairs], x[pairs:2 * pairs], ROW)  # (steps, B, C, H, W)
        found["interpolation"] = pictures.grid(to_uint8(paths.transpose(0, 1).flatten(0, 1)), columns=ROW)
    if network.quantiser is None:
        rows = variational.latent_map(network, objective, ROW, x)  # (rows, n, C, H, W)
        found["latent map"] = pictures.grid(to_uint8(rows.flatten(0, 1)), columns=rows.shape[1])
    return found
