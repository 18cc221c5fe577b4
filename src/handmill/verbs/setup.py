"""What `plan` and `train` share: the recipe and its folder, and the network with its task for the loop."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handmill import recipe as recipes
from handmill.data.order import draw
from handmill.families import next_token
from handmill.networks import build
from handmill.recipe import Recipe
from handmill.training.loop import Task
from handmill.training.precision import cached_kernels, keep_freed_memory


def begin(recipe: Recipe | Path | str, out: Path | str | None, overrides: Iterable[str]) -> tuple[Recipe, Path]:
    """The recipe read, its folder (default: runs/NAME), and this process made ready to compute."""
    if not isinstance(recipe, Recipe):
        recipe = recipes.read(recipe, overrides)
    keep_freed_memory()
    cached_kernels()
    return recipe, Path(out) if out is not None else Path("runs") / recipe.name


def assemble(recipe: Recipe, packed: Any, device: torch.device) -> tuple[nn.Module, Task]:
    """The network, its weights a pure function of the recipe's seed, and what the loop needs to train it."""
    codec = packed.codec()
    torch.manual_seed(draw(recipe.seed, "weights"))
    network = build(recipe.network, codec.size).to(device)
    return network, next_token.task(network, codec, packed, recipe)
