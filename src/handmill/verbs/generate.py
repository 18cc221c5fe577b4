"""`handmill generate`: texts, images or music from a model folder."""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from handmill import __version__, folder
from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families import autoregressive
from handmill.families.autoregressive import SEEDS, Piece, Sampling
from handmill.folder import Model

AT_ONCE = 64  # samples; more are made in turns, with the same texts
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
    from handmill.verbs import compose

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


def about(model: Model, prompt: str, seed: int, index: int, overrides: dict[str, Any]) -> dict[str, str]:
    """What a sample's file says of itself: enough to make it again."""
    recipe = model.recipe.table() | {"sampling": model.recipe.table()["sampling"] | overrides}
    recipe["data"] = {k: v for k, v in recipe["data"].items() if "paths" not in k}  # names of the user's own files
    recipe["codec"] = {"kind": recipe["codec"]["kind"]}
    return {"Software": f"handmill {__version__}", "model": model.recipe.name, "class": prompt, "seed": str(seed),
            "index": str(index), "weights": model.receipt["files"]["weights.safetensors"]["sha256"],
            "recipe": tomli_w.dumps(recipe), "Source": "made by a generative model"}


def plain(name: str) -> str:
    """A class's name as part of a file's."""
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


def checked(seed: int | None) -> int:
    """The seed, or a new one. Raises UserError for what is none."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UserError(f"seed = {seed!r} must be a whole number from 0 to {SEEDS - 1}")
    return seed


def sampling(model: Model, **overrides: Any) -> Any:
    """The recipe's [sampling] table with some values replaced. Raises UserError naming a wrong one."""
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = [overrides["stop"]]
    return recipes.build(type(model.recipe.sampling), model.recipe.table()["sampling"] | overrides, "sampling")


def network_of(model: Model, runtime: str) -> Any:
    """The model's own network, or its ONNX export. Raises UserError when that is not as recorded."""
    if runtime == "torch":
        return model.network
    if runtime != "onnx":
        raise UserError(f"runtime = {runtime!r} is not known: choose torch or onnx")
    from handmill.serving import onnxruntime

    made = folder.read_receipt(model.path).get("exports", {}).get("onnx")
    if made is None:
        raise UserError(f"{model.path} has no ONNX export: `handmill export {model.path} --to onnx` makes it")
    target = model.path / "exports" / "onnx"
    for name, expected in made["files"].items():
        file = target / name
        if not file.is_file() or folder.fingerprint(file) != expected:
            raise UserError(f"{file} is not as exported: run `handmill export {model.path} --to onnx` again")
    return onnxruntime.load(target)


def _in_turns(model: Model, network: Any, prompts: list[str], settings: Sampling,
              seed: int) -> Iterator[Piece]:
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first:first + AT_ONCE]
        for piece in autoregressive.generate(network, model.codec, some, settings, seed, first=first):
            yield piece._replace(row=first + piece.row)
