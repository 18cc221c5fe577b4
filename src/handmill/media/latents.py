"""The codes of a trained autoencoder: its model folder, named in a recipe, is the codec of another model.

So latent diffusion (Rombach et al. 2022) is a diffusion recipe whose codec is a variational model. The codes are
shifted and scaled channel by channel to mean 0 and deviation 1 over the training images.

B batch, C channels of an image, L channels of its code, S space.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from handmill.disk import write_text
from handmill.errors import UserError
from handmill.media import pixels

FORMAT = "handmill-latents/1"


@dataclass(frozen=True)
class Settings:
    """The [codec] table of a network that models what an autoencoder makes of the data."""

    kind: Literal["model"] = "model"
    path: str = ""  # the autoencoder's model folder; a copy of it goes into this model's folder

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError('path is missing: name the model folder of a trained autoencoder, as in path = "runs/vae"')


class Latents:
    """Images as codes of one `shape` (L, *S); `model` is the loaded folder of a variational model."""

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
        pixels.save(folder, {"format": FORMAT, "shape": [*self.model.codec.shape], "classes": list(self.classes),
                             "mean": self.mean.flatten().tolist(), "scale": self.scale.flatten().tolist()})
        receipt = self.model.receipt
        files = {name: facts for name, facts in receipt["files"].items() if not name.startswith("data/")}
        for name in files:
            (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.model.path / name, folder / "model" / name)
        write_text(folder / "model" / "receipt.json", json.dumps(receipt | {"files": files}, indent=1) + "\n")

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
        content = pixels.load(folder, FORMAT)
        values = [content.get(key) for key in ("mean", "scale")]
        if any(not isinstance(v, list) or len(v) != model.network.latent_shape[0] for v in values):
            raise UserError(f"{folder / 'codec.json'} does not fit the autoencoder beside it: copy the folder again")
        return cls(model, tuple(content["classes"]), *(torch.tensor(v) for v in values))
