"""One file a medium. What the verbs ask of every medium goes through here."""

import importlib
from pathlib import Path
from typing import Any

from handmill.recipe import Recipe


def prepare(recipe: Recipe, cache: Path, progress: bool = True) -> Any:
    """The recipe's data, prepared in `cache`/<fingerprint>. Raises UserError for what the user can mend."""
    return importlib.import_module(f"handmill.media.{recipe.medium}").prepare(recipe, cache, progress)


def report_lines(recipe: Recipe, prepared: Any) -> list[str]:
    """What the preparation found, for the screen."""
    module = "handmill.data.report" if recipe.medium == "text" else f"handmill.data.{recipe.medium}_report"
    lines: list[str] = importlib.import_module(module).report_lines(prepared.report)
    return lines


def codec(recipe: Recipe, folder: Path, trained: Any = None) -> Any:
    """The codec of a recipe, from its folder; `trained` is the model in it where there is one."""
    if recipe.codec.kind == "pixels":
        from handmill.media.pixels import Pixels

        return Pixels.load(folder)
    if recipe.codec.kind == "model":
        from handmill.media.latents import Codes, Latents

        return (Codes if recipe.family == "autoregressive" else Latents).load(folder, trained)
    if recipe.medium == "music":
        from handmill.media import music_tokens

        return music_tokens.load(None, folder)
    from handmill.media import tokenizers

    return tokenizers.load(recipe.codec, folder)
