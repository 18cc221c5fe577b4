"""What `generate` and `compose` share: settings and seeds that are checked, the runtime, what a file says of itself."""

import secrets
from typing import Any

import tomli_w

from handmill import __version__, folder
from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families.autoregressive import SEEDS
from handmill.folder import Model

AT_ONCE = 64  # samples; more are made in turns, and are the same


def about(model: Model, prompt: str, seed: int, index: int, overrides: dict[str, Any]) -> dict[str, str]:
    """What a sample's file says of itself: enough to make it again."""
    recipe = model.recipe.table() | {"sampling": model.recipe.table()["sampling"] | overrides}
    recipe["data"] = {k: v for k, v in recipe["data"].items() if "paths" not in k}  # names of the user's own files
    recipe["codec"] = {"kind": recipe["codec"]["kind"]}
    return {"Software": f"handmill {__version__}", "model": model.recipe.name, "class": prompt, "seed": str(seed),
            "index": str(index), "weights": model.receipt["files"]["weights.safetensors"]["sha256"],
            "recipe": tomli_w.dumps(recipe), "Source": "made by a generative model"}


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
