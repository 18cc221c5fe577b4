"""Model folders of images with a tiny random network of each family, for tests of what takes a model folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from handmill import folder, recipe
from handmill.data import prepare
from handmill.data.images import Images
from handmill.data.items import Items
from handmill.folder import Model
from handmill.media.latents import Codes, Latents
from handmill.media.pixels import Pixels
from handmill.networks import build
from handmill.recipe import Recipe

SIZE = 16  # pixels a side
CLASSES = ("bar", "dot", "ring")
AUTOENCODER: dict[str, Any] = {"kind": "autoencoder", "width": 8, "latent": 4}
MAP = AUTOENCODER | {"flat": False, "latent": 3}
UNET: dict[str, Any] = {"kind": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4, "head_width": 8}
DIT: dict[str, Any] = {"kind": "dit", "patch": 4, "layers": 2, "width": 16, "heads": 2}
DECODER: dict[str, Any] = {"kind": "decoder", "layers": 1, "width": 16, "heads": 2, "context": 20}
KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"network": AUTOENCODER},
    "asked": {"network": AUTOENCODER | {"conditional": True}, "objective": {"likelihood": "gaussian"}},
    "map": {"network": MAP},
    "vq": {"network": MAP | {"bottleneck": "vq", "codes": 32}},
    "fsq": {"network": MAP | {"bottleneck": "fsq", "fsq_levels": [5, 4, 3]}},
    "unet": {"network": UNET},
    "dit": {"network": DIT},
    "latents": {"network": DIT | {"patch": 1}, "codec": "map"},
    "prior": {"network": DECODER, "codec": "fsq"},
}
FAMILIES = {"autoencoder": "variational", "unet": "diffusion", "dit": "diffusion", "decoder": "autoregressive"}


def write(path: Path, kind: str, sampling: dict[str, Any] | None = None, objective: dict[str, Any] | None = None,
          classes: tuple[str, ...] = CLASSES, seed: int = 1) -> Path:
    """A model folder of `kind`, a key of KINDS, with random weights and drawn held-out images. "latents" is a diffusion
    on what the autoencoder "map" makes of them, "prior" a decoder of the codes of "fsq"; all they are made from lies
    beside `path`."""
    made = recipe_of(path.parent, kind, sampling or {}, objective or {}, classes, seed)
    prepared = prepare(made, path.parent / "cache", progress=False)
    codec = _codec(made, prepared)
    torch.manual_seed(seed)
    weights = folder.weights_of(build(made.network, codec))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    parts = {f"data/{name}": prepared.folder / name for name in prepared.held_out_files()}
    folder.write(path, made, weights, codec, parts, {"seed": seed})
    return path


def load(path: Path, kind: str, **settings: Any) -> Model:
    """The model of `write` with the same settings."""
    return folder.load(write(path, kind, **settings))


def recipe_of(home: Path, kind: str, sampling: dict[str, Any], objective: dict[str, Any], classes: tuple[str, ...],
              seed: int) -> Recipe:
    chosen, codec = KINDS[kind], {"kind": "pixels"}
    family = FAMILIES[chosen["network"]["kind"]]
    if "codec" in chosen:
        codec = {"kind": "model", "path": str(write(home / f"{kind}-codec", chosen["codec"], classes=classes))}
    return recipe.parse({
        "name": kind, "medium": "image", "family": family, "seed": seed,
        "data": {"paths": [str(album(home / f"images-{len(classes)}", classes))], "size": [SIZE, SIZE],
                 "colour": "grey", "near_duplicates": 0, "validation": 0.2, "test": 0.2},
        "codec": codec, "network": chosen["network"], "objective": chosen.get("objective", {}) | objective,
        "sampling": ({"steps": 4} if family == "diffusion" else {}) | sampling})


def album(home: Path, classes: tuple[str, ...], count: int = 30) -> Path:
    """`count` drawings, in a sub-folder for each class (without classes, all together)."""
    for i in range(count):
        file = home / (classes[i % len(classes)] if classes else "") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawing(i)).save(file)
    return home


def drawing(number: int) -> np.ndarray[Any, Any]:
    """In turn a bar, a dot and a ring, each of its own size, place and grey: (SIZE, SIZE) uint8."""
    at, size = np.random.default_rng(number).uniform((5, 5, 2), (10, 10, 5), 3)[:2], 2 + number % 3
    y, x = np.mgrid[:SIZE, :SIZE]
    far = np.hypot(y - at[0], x - at[1])
    shape = (np.abs(y - at[0]) < size / 2, far < size, np.abs(far - size - 1) < 1)[number % 3]
    return np.where(shape, 255 - 3 * number, number).astype(np.uint8)


def _codec(made: Recipe, prepared: Images) -> Any:
    height, width, channels = prepared.shape
    pixels = Pixels((channels, height, width), prepared.classes, 0.5)
    if made.codec.kind == "pixels":
        return pixels
    trained = folder.load(made.codec.path)
    if made.family == "autoregressive":
        return Codes(trained, pixels.classes)
    images = Items(prepared, "train", pixels, made.data, made.seed).first(0)["x"]
    return Latents.fit(trained, pixels.classes, images)
