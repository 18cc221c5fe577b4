"""The pictures of a check, in the model folder's samples/.

N images, H height, W width, C channels; of a generator L styles of width D an image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmill.data.noise import normal
from handmill.data.order import draw as number
from handmill.families import tensors, variational
from handmill.families.adversarial import exploring
from handmill.families.adversarial.making import Sampling
from handmill.media import pictures
from handmill.media.pictures import to_uint8

SHOWN = 100  # samples
PAIRS = 12  # samples beside the training images nearest to them
ROW = 12  # images in a row of reconstructions, of a walk, or of one truncation
WALKS = 6
TRUNCATIONS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.3)


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
    if ground.model.recipe.family == "adversarial":
        found["truncation"] = truncations(ground.model, ground.seed)
        found["interpolation"] = walks(ground.model, ground.seed)
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


def truncations(model: Any, seed: int) -> NDArray[np.uint8]:
    """The same samples, the classes in turn, at every one of TRUNCATIONS."""
    labels = tensors.every_class(model.recipe, model.codec, ROW)
    return pictures.labelled_rows([
        (f"truncation {psi:g}", tensors.make(model.network, model.codec, model.recipe, labels, Sampling(psi), seed))
        for psi in TRUNCATIONS])


@torch.inference_mode()
def walks(model: Any, seed: int) -> NDArray[np.uint8]:
    """WALKS ways from one sample to another of the same class, the classes in turn; the noise of a way stays.

    Through the styles where an image has many, else through the latent on a sphere.
    """
    network, keys = model.network, torch.arange(2 * WALKS, device=model.device).view(WALKS, 2)
    key, rows = number(seed, "walks"), []
    for way, label in zip(keys, tensors.every_class(model.recipe, model.codec, WALKS), strict=True):
        condition = {"label": torch.full_like(way, label)} if network.classes else {}
        z, layers = (normal(key + i, way, shape) for i, shape in enumerate((network.latent_shape, network.noise_shape)))
        w = exploring.travel(network, z, condition, ROW - 1, closed=False)  # (ROW, L, D)
        rows.append(to_uint8(model.codec.decode(exploring.rendered(network, w, layers[:1]))))
    return pictures.grid(np.concatenate(rows), columns=ROW)
