"""From the user's files to prepared folders. What the verbs ask of preparing any medium goes through here."""

import importlib
from pathlib import Path
from typing import Any

from handmill.recipe import Recipe


def prepare(recipe: Recipe, cache: Path, progress: bool = True) -> Any:
    """The recipe's data, prepared in `cache`/<fingerprint>, made there first where they are not whole.

    Raises UserError for paths, files, columns and shares that cannot be used, and for a cache that cannot be written.
    """
    return importlib.import_module(f"handmill.data.{recipe.medium}_prepare").prepare(recipe, Path(cache), progress)


def report_lines(recipe: Recipe, prepared: Any) -> list[str]:
    """What the preparation found, for the screen."""
    module = importlib.import_module(f"handmill.data.{recipe.medium}_report")
    lines: list[str] = module.report_lines(prepared.report)
    return lines
