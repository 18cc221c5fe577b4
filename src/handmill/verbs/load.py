"""`handmill.load`: a model folder in Python, with what a user asks of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handmill import folder
from handmill.folder import Model
from handmill.verbs.generate import generate


@dataclass
class Loaded(Model):
    """A model that makes samples: `handmill.load("runs/mine").generate("Once")`."""

    def generate(self, prompt: str = "", **settings: Any) -> Any:
        """One sample: a text, an image (H, W, C) uint8, or a media.scores.Score; `prompt` is its beginning, the name of
        its class, or what a piece of music is to be ("key=G").

        Keywords override the recipe's [sampling] table (temperature=0.8, seed=1, ...).
        """
        return generate(self, [prompt], **settings)[0]


def load(path: Path | str, device: str | torch.device = "cpu") -> Loaded:
    """Verify a model folder and load its network and codec. Raises UserError naming the file that is not as written."""
    model = folder.load(path, device)
    return Loaded(model.path, model.recipe, model.network, model.codec, model.receipt)
