"""Discs, squares and crosses: small images of three classes that a tiny network learns in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from handmill import folder as folders
from handmill import recipe as recipes
from handmill.data import prepare
from handmill.networks import build
from handmill.recipe import Recipe
from handmill.verbs.setup import fit
from handmill.verbs.train import train

CLASSES = ("cross", "disc", "square")
SIDE = 16


def shape(kind: int, seed: int) -> np.ndarray[Any, Any]:
    """One image (SIDE, SIDE) uint8, white on black."""
    generator = np.random.default_rng(seed)
    (x, y), r = generator.uniform(6, 10, 2), generator.uniform(3, 5)
    image = Image.new("L", (4 * SIDE, 4 * SIDE))
    draw, box = ImageDraw.Draw(image), [4 * v for v in (x - r, y - r, x + r, y + r)]
    if kind == 0:
        draw.line([box[0], 4 * y, box[2], 4 * y], 255, 8)
        draw.line([4 * x, box[1], 4 * x, box[3]], 255, 8)
    else:
        (draw.ellipse if kind == 1 else draw.rectangle)(box, 255)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def folder(path: Path, each: int = 40) -> Path:
    """A folder of PNG files with a sub-folder for every class."""
    for kind, name in enumerate(CLASSES):
        (path / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(shape(kind, 1000 * kind + i)).save(path / name / f"{i:03}.png")
    return path


NETWORKS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "autoencoder", "width": 16, "latent": 4},
    "map": {"kind": "autoencoder", "width": 16, "latent": 2, "flat": False},
    "vq": {"kind": "autoencoder", "width": 16, "latent": 4, "flat": False, "bottleneck": "vq", "codes": 32},
    "fsq": {"kind": "autoencoder", "width": 16, "flat": False, "bottleneck": "fsq", "fsq_levels": [4, 4]},
    "unet": {"kind": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "head_width": 16, "groups": 4},
    "dit": {"kind": "dit", "width": 32, "layers": 2, "heads": 2, "patch": 2},
    "prior": {"kind": "decoder", "layers": 1, "width": 32, "heads": 2, "context": 16},
    "dcgan": {"kind": "dcgan", "latent": 8, "width": 8, "most": 16},
    "cgan": {"kind": "dcgan", "latent": 8, "width": 8, "most": 16, "conditional": True, "discriminator_norm": "none"},
    "stylegan2": {"kind": "stylegan2", "latent": 8, "style": 8, "mapping": 2, "width": 8, "most": 8,
                  "discriminator_width": 8, "conditional": True, "style_average": 0.9},
}
NETWORKS["coded"] = NETWORKS["cgan"] | {"first": 2}
FAMILIES = {"unet": "diffusion", "dit": "diffusion", "prior": "autoregressive", "dcgan": "adversarial",
            "cgan": "adversarial", "stylegan2": "adversarial", "coded": "adversarial"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cgan": {"loss": "hinge", "r1": 1.0, "r1_every": 4},
    "stylegan2": {"r1": 1.0, "r1_every": 4, "path_length": 2.0, "path_every": 4, "mixing": 0.9, "augment": ["flip"]},
}


def table(network: str, images: Path, codec: Path | None = None, **training: Any) -> dict[str, Any]:
    """The recipe of a tiny model as plain values."""
    settings = {"steps": 20, "batch": 16, "evaluate_every": 10, "save_every": 10, "sample_every": 0.0,
                "precision": "fp32", "compile": "no", "warmup": 5, "optimizer": "adamw"} | training
    data = {"paths": [str(images)], "size": [SIDE, SIDE], "colour": "grey", "near_duplicates": 0,
            "validation": 0.1, "test": 0.2}
    return {"name": network, "medium": "image", "family": FAMILIES.get(network, "variational"), "data": data,
            "codec": {"kind": "model", "path": str(codec)} if codec else {"kind": "pixels"},
            "network": NETWORKS[network], "training": settings,
            "objective": OBJECTIVES.get(network, {}) if network in FAMILIES else {"likelihood": "gaussian"},
            "check": {"samples": 24, "images": 12, "importance": 4},
            "sampling": {"steps": 4} if FAMILIES.get(network) == "diffusion" else {}}


def recipe_of(network: str, images: Path, codec: Path | None = None, **training: Any) -> Recipe:
    return recipes.parse(table(network, images, codec, **training))


def trained(runs: Path, network: str, images: Path, codec: Path | None = None, **training: Any) -> Path:
    """The model folder of a run of some steps."""
    return train(recipe_of(network, images, codec, **training), runs / network, quiet=True)


def written(path: Path, network: str, images: Path, codec: Path | None = None) -> Path:
    """A model folder of random weights, without training."""
    recipe = recipe_of(network, images, codec)
    prepared = prepare(recipe, path.parent / ".prepared", progress=False)
    made = fit(recipe, prepared, torch.device("cpu"))
    torch.manual_seed(recipe.seed)
    weights = folders.weights_of(build(recipe.network, made))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    parts = {f"data/{name}": prepared.folder / name for name in prepared.held_out_files()}
    folders.write(path, recipe, weights, made, parts, {"seed": recipe.seed, "fingerprint": prepared.fingerprint})
    return path
