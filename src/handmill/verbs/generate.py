"""`handmill generate`: texts, images or music from a model folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handmill.errors import UserError
from handmill.families import autoregressive
from handmill.families.autoregressive import Piece, Sampling
from handmill.folder import Model
from handmill.verbs import compose
from handmill.verbs.making import AT_ONCE, about, checked, network_of, sampling

MADE = {"text": "text", "image": "images", "music": "music"}  # medium -> what it is called


def generate(model: Model, prompts: Sequence[str], runtime: str = "torch", seed: int | None = None,
             **overrides: Any) -> list[Any]:
    """A text for each prompt, without the prompt ("": a new document); or an image (H, W, C) uint8 of each class; or a
    media.scores.Score of what each prompt asks for, such as "key=G".

    `overrides` replace values of the recipe's [sampling] table, such as temperature and max_tokens, or steps and
    guidance; of music also melody, beginning and steps, as in verbs/compose.py. The same seed gives the same samples,
    on either `runtime` ("torch", or "onnx" once exported); without a seed every call differs. Raises UserError.
    """
    if model.recipe.medium == "image":
        return list(images(model, prompts, runtime, seed, **overrides))
    if model.recipe.medium == "music":
        return music(model, prompts, runtime, seed, **overrides)
    texts = [""] * len(prompts)
    for piece in pieces(model, prompts, runtime, seed, **overrides):
        texts[piece.row] += piece.text
    return texts


def stream(model: Model, prompt: str = "", runtime: str = "torch", seed: int | None = None,
           **overrides: Any) -> Iterator[str]:
    """The same text as `generate` makes of one prompt, in parts as soon as they are certain."""
    return (piece.text for piece in pieces(model, [prompt], runtime, seed, **overrides) if piece.text)


def pieces(model: Model, prompts: Sequence[str], runtime: str = "torch", seed: int | None = None,
           **overrides: Any) -> Iterator[Piece]:
    """The pieces of every sample as they are made. Raises UserError before the first."""
    if model.recipe.medium != "text":
        raise UserError(f"{model.path} makes {MADE[model.recipe.medium]}, not text: use `handmill generate`")
    settings, seed = sampling(model, **overrides), checked(seed)
    network = network_of(model, runtime)
    for prompt in prompts:
        autoregressive.encode(model.codec, prompt)  # refuses what it cannot read before anything is made
    return _in_turns(model, network, list(prompts), settings, seed)


def images(model: Model, prompts: Sequence[str], runtime: str = "torch", seed: int | None = None, first: int = 0,
           **overrides: Any) -> NDArray[np.uint8]:
    """Images (N, H, W, C) uint8, one for each class that a prompt names ("": any). Raises UserError as `generate`.

    Sample i depends on (seed, first + i) alone.
    """
    from handmill.families import tensors

    settings = sampling(model, **overrides)
    labels = [tensors.label_of(model.recipe, model.codec, prompt) for prompt in prompts]
    return tensors.make(network_of(model, runtime), model.codec, model.recipe, labels, settings, checked(seed), first)


def music(model: Model, prompts: Sequence[str], runtime: str = "torch", seed: int | None = None, melody: Any = None,
          beginning: Any = None, steps: int | None = None, **overrides: Any) -> list[Any]:
    """A score of what each prompt asks for, all with that melody and beginning. Raises UserError."""
    wishes = [compose.wish(model, prompt, melody, beginning, steps) for prompt in prompts]
    return list(compose.compose(model, wishes, runtime, seed, **overrides))


def save_images(model: Model, prompts: Sequence[str], out: Path, seed: int, runtime: str = "torch",
                **overrides: Any) -> list[Path]:
    """Write `images` as PNG files that know how they were made, and all of them as grid.png, last in the list."""
    from handmill.media import pictures

    made = images(model, prompts, runtime, seed, **overrides)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (image, prompt) in enumerate(zip(made, prompts, strict=True)):
        paths.append(out / f"{seed}-{i:03d}{'-' + plain(prompt) if prompt else ''}.png")
        pictures.save_png(paths[-1], image, about(model, prompt, seed, i, overrides))
    pictures.save_png(out / "grid.png", pictures.grid(made), about(model, "", seed, 0, overrides))
    return [*paths, out / "grid.png"]


def plain(name: str) -> str:
    """A class's name as part of a file's."""
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


def _in_turns(model: Model, network: Any, prompts: list[str], settings: Sampling,
              seed: int) -> Iterator[Piece]:
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first:first + AT_ONCE]
        for piece in autoregressive.generate(network, model.codec, some, settings, seed, first=first):
            yield piece._replace(row=first + piece.row)
