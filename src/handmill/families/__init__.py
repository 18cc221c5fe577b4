"""One file, or small folder, a family. What the verbs ask of every family goes through here."""

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from handmill.recipe import Recipe

LEARNING = {"autoregressive": "next_token", "variational": "evidence", "adversarial": "competing",
            "diffusion": "denoising"}


def task(network: nn.Module, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Any:
    """What the training loop needs to teach `network` the prepared data; previews go into the folder `out`."""
    module = importlib.import_module(f"handmill.families.{LEARNING[recipe.family]}")
    return module.task(network, codec, prepared, recipe, out)


def witness(network: nn.Module, codec: Any, prepared: Any, recipe: Recipe) -> dict[str, Any]:
    """What the receipt keeps of the trained network's answers, for `faithful` to compare with."""
    kept: dict[str, Any] = _making(recipe).witness(network, codec, prepared, recipe)
    return kept


def faithful(network: Any, recipe: Recipe, kept: dict[str, Any]) -> bool:
    """Whether a network answers as the witness in a receipt says the trained one did."""
    try:
        return bool(_making(recipe).faithful(network, recipe, kept))
    except (LookupError, TypeError, ValueError, RuntimeError):  # a receipt from elsewhere may hold any numbers
        return False


def _making(recipe: Recipe) -> Any:
    return importlib.import_module(f"handmill.families.{'tensors' if recipe.medium == 'image' else 'autoregressive'}")
