"""The codes of a trained autoencoder: its model folder, named in a recipe, is the codec of another model.

So latent diffusion (Rombach et al. 2022) is a diffusion recipe whose codec is a variational model, and a prior over a
VQ-VAE's codes (van den Oord et al. 2017) an autoregressive one.

B batch, C channels of an image, L channels of its code, S space, T codes of an image (product of S).
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from handmill.disk import sealed, write_text
from handmill.errors import UserError
from handmill.media import pixels

LATENTS, CODES = "handmill-latents/1", "handmill-codes/1"


@dataclass(frozen=True)
class Settings:
    """The [codec] table of a network that models what an autoencoder makes of the data."""

    kind: Literal["model"] = "model"
    path: str = ""  # the autoencoder's model folder; a copy of it goes into this model's folder

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError('path is missing: name the model folder of a trained autoencoder, as in path = "runs/vae"')


class Latents:
    """Images as numbers of one `shape` (L, *S), for diffusion; `model` is the loaded folder of a variational model.

    Every channel is shifted and scaled to mean 0 and deviation 1 over the training images.
    """

    deviation = 1.0

    def __init__(self, model: Any, classes: tuple[str, ...], mean: Tensor, scale: Tensor) -> None:
        self.model, self.classes = model, classes
        self.shape: tuple[int, ...] = model.network.latent_shape
        self.mean, self.scale = (v.float().view(-1, *[1] * (len(self.shape) - 1)) for v in (mean, scale))  # (L, 1..)
        assert self.mean.shape[0] == self.shape[0], (mean.shape, self.shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes (B, L, *S) of images (B, C, H, W) in [-1, 1], fp32, on the images' device."""
        codes = self.model.network.mean(images.to(self.model.device)).float()
        return ((codes - self.mean.to(codes)) / self.scale.to(codes)).to(images.device)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of codes (B, L, *S)."""
        raw = (codes.float() * self.scale.to(codes.device) + self.mean.to(codes.device)).to(self.model.device)
        images: Tensor = self.model.network.images(raw, self.model.recipe.objective.likelihood).to(codes.device)
        return self.model.codec.decode(images)

    def save(self, folder: Path) -> None:
        """Write `folder`/codec.json, and beside it what the autoencoder's receipt vouches for."""
        pixels.save(folder, {"format": LATENTS, "shape": [*self.model.codec.shape], "classes": list(self.classes),
                             "mean": self.mean.flatten().tolist(), "scale": self.scale.flatten().tolist()})
        _save_model(self.model, folder / "model")

    @classmethod
    def fit(cls, model: Any, classes: tuple[str, ...], images: Tensor) -> "Latents":
        """The codec that brings the codes of `images` (N, C, H, W) to mean 0 and deviation 1."""
        length = model.network.latent_shape[0]
        plain = cls(model, classes, torch.zeros(length), torch.ones(length))
        codes = torch.cat([plain.encode(part) for part in images.split(256)]).transpose(0, 1).flatten(1)  # (L, N*S)
        return cls(model, classes, codes.mean(1), codes.std(1).clamp(min=1e-4))

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Latents":
        """What `save` wrote; `model` is the loaded folder inside. Raises UserError."""
        content = pixels.load(folder, LATENTS)
        values = [content.get(key) for key in ("mean", "scale")]
        if any(not isinstance(v, list) or len(v) != model.network.latent_shape[0] for v in values):
            raise UserError(f"{folder / 'codec.json'} does not fit the autoencoder beside it: copy the folder again")
        return cls(model, tuple(content["classes"]), *(torch.tensor(v) for v in values))


class Codes:
    """Images as T whole numbers in turn, for an autoregressive model: tokens 0..K-1 are the quantiser's codes.

    Token K + i stands first in an image of class i; K + classes, in one whose class is not told.
    """

    def __init__(self, model: Any, classes: tuple[str, ...]) -> None:
        self.model, self.classes = model, classes
        self.codes = int(model.network.vocabulary)  # K
        self.size = self.codes + len(classes) + 1
        self.shape: tuple[int, ...] = tuple(model.network.latent_shape[1:])  # S
        self.length = math.prod(self.shape)  # T
        self.end = self.size - 1

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes (B, T) int64 of images (B, C, H, W) in [-1, 1], on the images' device."""
        network = self.model.network
        codes: Tensor = network.quantise(network.encode(images.to(self.model.device), {})).codes
        return codes.flatten(1).to(images.device)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of codes (B, T) int64."""
        network, likelihood = self.model.network, self.model.recipe.objective.likelihood
        vectors = network.lookup(codes.to(self.model.device).view(-1, *self.shape))
        images: Tensor = network.images(vectors, likelihood).to(codes.device)
        return self.model.codec.decode(images)

    def tokens(self, codes: Tensor, labels: Tensor) -> Tensor:
        """What the network reads (B, T + 1): the class of each image, then its codes (B, T)."""
        return torch.cat((self.codes + labels[:, None], codes), 1)

    def save(self, folder: Path) -> None:
        """Write `folder`/codec.json, and beside it what the autoencoder's receipt vouches for."""
        pixels.save(folder, {"format": CODES, "shape": [*self.model.codec.shape], "classes": list(self.classes)})
        _save_model(self.model, folder / "model")

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Codes":
        """What `save` wrote; `model` is the loaded folder inside. Raises UserError."""
        return cls(model, tuple(pixels.load(folder, CODES)["classes"]))


def _save_model(model: Any, folder: Path) -> None:
    """A copy of a model folder with all that is needed to use it, and nothing of its data."""
    files = {name: facts for name, facts in model.receipt["files"].items() if not name.startswith("data/")}
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path / name, folder / name)
    write_text(folder / "receipt.json", sealed(model.receipt | {"files": files}))
