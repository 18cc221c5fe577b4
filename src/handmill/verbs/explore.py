"""`handmill generate --mixing, --walk, --project`: what the latent space of an adversarial model holds.

R rows, Q columns, N samples, F frames, Z latent, P noise, L styles of width D an image; images are (H, W, C).
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from handmill.data import decoding
from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.data.sources import Broken
from handmill.errors import UserError
from handmill.families import tensors
from handmill.families.adversarial import exploring
from handmill.folder import Model
from handmill.media import moving, pictures
from handmill.media.pictures import Pixels, to_uint8
from handmill.verbs.generate import plain
from handmill.verbs.making import about, checked, sampling

FRAMES_PER_SECOND = 25.0


class Projected(NamedTuple):
    """The files that `project` wrote, and how near it came."""

    picture: Path  # target | projection
    weights: Path  # safetensors: w (L, D)
    error: float  # root mean square difference of the pixels, in levels of 0..255


def mixing(model: Model, out: Path, rows: int = 6, columns: int = 6, seed: int | None = None,
           cut: int | str = "middle", prompts: Sequence[str] = (), **overrides: Any) -> Path:
    """Write `out`/mixing.png: each row's image with some of its styles taken from each column's image.

    `cut` is the first layer whose style the column gives, or "coarse", "middle" or "fine": that third of the layers.
    The images along the edges are the first R + Q samples of the seed, of the classes of `prompts` in turn (none: of
    all). Raises UserError for a model with one style an image, another cut, class or sampling setting.
    """
    generator, seed = _generator(model, "mixes styles"), checked(seed)
    cut = int(cut) if isinstance(cut, str) and cut.isdecimal() else cut
    if not (0 < rows <= 64 and 0 < columns <= 64):
        raise UserError(f"mixing = {rows}x{columns} is rows and columns of images: choose 1x1 to 64x64")
    exploring.taken(cut, generator.layers)  # refused before anything is made
    z, condition, noise = _samples(model, prompts, rows + columns, seed)
    w = exploring.styles(generator, z, condition, sampling(model, **overrides).truncation)  # (R + Q, L, D)
    edges = _pixels(model, exploring.rendered(generator, w, noise))  # (R + Q, H, W, C)
    mixed = exploring.mixed(generator, w[:rows], w[rows:], cut, noise[:rows])  # (R, Q, C, H, W)
    inner = _pixels(model, mixed.flatten(0, 1)).reshape(rows, columns, *edges.shape[1:])
    body = np.concatenate((edges[:rows, None], inner), 1)  # (R, 1 + Q, H, W, C)
    top = np.concatenate((np.full_like(edges[:1], 255), edges[rows:]))  # (1 + Q, H, W, C)
    sheet = pictures.grid(np.concatenate((top[None], body)).reshape(-1, *edges.shape[1:]), columns + 1)
    notes = {"shows": f"styles mixed: columns give {cut if isinstance(cut, str) else f'layers from {cut} on'}"}
    return _saved(out / "mixing.png", sheet, about(model, ", ".join(prompts), seed, 0, overrides) | notes)


def walk(model: Model, out: Path, prompts: Sequence[str] = (), stops: int = 8, seconds: float = 8.0,
         seed: int | None = None, **overrides: Any) -> Path:
    """Write `out`, a .gif or .mp4: a closed way through the first `stops` samples of the seed and back to the first.

    The samples are of the classes of `prompts` in turn (none: of all), and the way leads from class to class. Raises
    UserError for another suffix, class or sampling setting, and for .mp4 without its package.
    """
    generator, seed = _generator(model, "has a space to walk in"), checked(seed)
    if not (2 <= stops <= 256 and 0 < seconds <= 120):
        raise UserError(f"a walk of {stops} stops in {seconds:g} seconds cannot be made: choose 2 to 256 stops and up "
                        "to 120 seconds")
    moving.check(out)
    z, condition, noise = _samples(model, prompts, stops, seed)
    between = max(1, round(seconds * FRAMES_PER_SECOND / stops))
    w = exploring.travel(generator, z, condition, between, sampling(model, **overrides).truncation)
    frames = np.concatenate([_pixels(model, exploring.rendered(generator, part, noise[:1]))
                             for part in w.split(exploring.AT_ONCE)])  # (F, H, W, C)
    notes = about(model, ", ".join(prompts), seed, 0, overrides) | {"shows": f"a walk through {stops} samples"}
    out.parent.mkdir(parents=True, exist_ok=True)
    moving.save(out, frames, FRAMES_PER_SECOND, notes)
    return out


def project(model: Model, out: Path, picture: Path, prompt: str = "", steps: int = 500, seed: int | None = None,
            fit: bool = False, each: bool = False, progress: bool = False) -> Projected:
    """Look for `picture` among what the model can make; write target | projection and the styles into `out`.

    `fit` brings a picture of another size or colour to the model's, as its training images were; `each` gives every
    layer a style of its own. Raises UserError for a picture that is not of the model's size and colour otherwise, and
    for one that cannot be read.
    """
    generator, seed = _generator(model, "can be searched for an image"), checked(seed)
    if not 1 <= steps <= 100_000:
        raise UserError(f"steps = {steps} of the search for an image: choose 1 to 100000")
    target = _target(model, picture, fit)  # (1, H, W, C)
    label = tensors.label_of(model.recipe, model.codec, prompt)
    condition = {"label": torch.tensor([label], device=model.device)} if prompt else {}
    found = exploring.project(generator, pictures.from_uint8(target)[0].to(model.device), condition, steps, seed,
                              _features(model), each, progress)
    shown = np.concatenate((target, to_uint8(found.image[None])))  # (2, H, W, C)
    notes = about(model, prompt, seed, 0, {}) | {
        "shows": "target | projection", "error": f"{found.error:.3f}", "steps": str(steps)}
    name = f"projection-{plain(picture.stem)}"
    image = _saved(out / f"{name}.png", pictures.grid(shown, 2), notes)
    from safetensors.torch import save_file

    save_file({"w": found.w.cpu().contiguous()}, out / f"{name}.safetensors", notes)
    return Projected(image, out / f"{name}.safetensors", found.error)


def matrix(text: str) -> tuple[int, int]:
    """Rows and columns of "6x6". Raises UserError."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise UserError(f"mixing = {text!r} is not rows x columns: write for example 6x6")
    return int(rows), int(columns)


def _generator(model: Model, ability: str) -> Any:
    if model.recipe.family != "adversarial":
        raise UserError(f"{model.path} is of the {model.recipe.family} family, and only an adversarial model "
                        f"{ability}: train one, for example from `handmill new dcgan`")
    return model.network


def _samples(model: Model, prompts: Sequence[str], count: int, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """z (N, Z), condition and noise (N, P) of the first `count` samples of a seed, as `generate` draws them."""
    network: Any = model.network
    if prompts:
        asked = [tensors.label_of(model.recipe, model.codec, prompt) for prompt in prompts]
        labels = [asked[i % len(asked)] for i in range(count)]
    else:
        labels = tensors.every_class(model.recipe, model.codec, count)
    places = torch.arange(count, device=model.device)
    condition = {"label": torch.tensor(labels, device=model.device)} if model.codec.classes else {}
    z, noise = (normal(draw(seed, "sample", i), places, shape)
                for i, shape in enumerate((network.latent_shape, network.noise_shape)))
    return z, tensors.chosen(condition, model.codec, seed, places), noise


def _pixels(model: Model, codes: Tensor) -> Pixels:
    return to_uint8(model.codec.decode(codes.float()))


def _saved(path: Path, image: Pixels, notes: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(path, image, notes)
    return path


def _target(model: Model, picture: Path, fit: bool) -> Pixels:
    """The picture as (1, H, W, C) of the model's size and colour. Raises UserError."""
    data = model.recipe.data
    loose = dataclasses.replace(data, smallest=1)
    try:
        read = decoding.decode(picture, loose)
        coloured = decoding.decode(picture, dataclasses.replace(loose, colour="rgb")).pixels
    except Broken as error:
        raise UserError(f"{picture} cannot be projected: {error}") from None
    height, width = data.size
    if not fit and (read.height, read.width) != data.size:
        raise UserError(f"{picture} is {read.width} x {read.height} pixels and the model makes {width} x {height}: "
                        "resize it, or let --fit do it as it was done with the training images")
    if not fit and data.colour == "grey" and (coloured != coloured[..., :1]).any():
        raise UserError(f"{picture} has 3 channels of colour and the model makes 1 of grey: make it grey, or let --fit "
                        "do it")
    return read.pixels


def _features(model: Model) -> Callable[[Tensor], Tensor] | None:
    """The features that the check compares images in, (B, C, H, W) -> (B, D), where the model folder has them."""
    from handmill.checks import features

    kept = model.path / features.FEATURES
    if not kept.is_dir():
        return None
    classifier = features.load(kept)
    network = copy.deepcopy(classifier.network).to(model.device).requires_grad_(False)
    size = features.reduced(classifier.shape[:2], classifier.settings.side)

    def seen(x: Tensor) -> Tensor:
        x = x if x.shape[2:] == size else F.interpolate(x, size, mode="area")
        return network(x)[0]

    return seen
