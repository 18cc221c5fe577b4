"""One file a medium: its [data] table, and its codecs."""

from pathlib import Path
from typing import Any

from handmill.recipe import Recipe


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
