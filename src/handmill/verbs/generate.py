"""`handmill generate`: text from a model folder."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from handmill import folder
from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families import autoregressive
from handmill.families.autoregressive import SEEDS, Piece, Sampling
from handmill.folder import Model

AT_ONCE = 64  # samples; more are made in turns, with the same texts


def generate(model: Model, prompts: Sequence[str], runtime: str = "torch", seed: int | None = None,
             **overrides: Any) -> list[str]:
    """One text for each prompt, without the prompt; "" starts a new document.

    `overrides` replace values of the recipe's [sampling] table: temperature, top_k, top_p, min_p,
    repetition_penalty, max_tokens, stop. The same seed gives the same texts, on either `runtime` ("torch", or
    "onnx" once exported); without a seed every call differs. Raises UserError.
    """
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
    settings = sampling(model, **overrides)
    seed = secrets.randbelow(2**32) if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise UserError(f"seed = {seed!r} must be a whole number from 0 to {SEEDS - 1}")
    network = network_of(model, runtime)
    for prompt in prompts:
        autoregressive.encode(model.codec, prompt)  # refuses what it cannot read before anything is made
    return _in_turns(model, network, list(prompts), settings, seed)


def sampling(model: Model, **overrides: Any) -> Sampling:
    """The recipe's [sampling] table with some values replaced. Raises UserError naming a wrong one."""
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = [overrides["stop"]]
    settings: Sampling = recipes.build(Sampling, model.recipe.table()["sampling"] | overrides, "sampling")
    return settings


def network_of(model: Model, runtime: str) -> Any:
    """The model's own network, or its ONNX export. Raises UserError when that is not as recorded."""
    if runtime == "torch":
        return model.network
    if runtime != "onnx":
        raise UserError(f"runtime = {runtime!r} is not known: choose torch or onnx")
    from handmill.serving.onnxruntime import Runtime

    made = folder.read_receipt(model.path).get("exports", {}).get("onnx")
    if made is None:
        raise UserError(f"{model.path} has no ONNX export: `handmill export {model.path} --to onnx` makes it")
    target = model.path / "exports" / "onnx"
    for name, expected in made["files"].items():
        file = target / name
        if not file.is_file() or folder.fingerprint(file) != expected:
            raise UserError(f"{file} is not as exported: run `handmill export {model.path} --to onnx` again")
    return Runtime(target)


def _in_turns(model: Model, network: Any, prompts: list[str], settings: Sampling,
              seed: int) -> Iterator[Piece]:
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first:first + AT_ONCE]
        for piece in autoregressive.generate(network, model.codec, some, settings, seed, first=first):
            yield piece._replace(row=first + piece.row)
