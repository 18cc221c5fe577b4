"""`plan`: what a run would take, without running it."""

from collections.abc import Iterable
from pathlib import Path

import torch

from handmill import recipe as recipes
from handmill.data.order import draw
from handmill.families import next_token
from handmill.media import text
from handmill.networks import build
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training import plan as plans
from handmill.training.precision import cached_kernels, keep_freed_memory


def plan(recipe: Recipe | Path | str, out: Path | str | None = None, overrides: Iterable[str] = ()) -> plans.Plan:
    """The plan of training `recipe` into `out` (default: runs/NAME). Leaves nothing behind but the prepared data.

    A run that does not fit is no error here: it is in the plan's `fault`. Raises UserError for what a user can mend.
    """
    if not isinstance(recipe, Recipe):
        recipe = recipes.read(recipe, overrides)
    out = Path(out) if out is not None else Path("runs") / recipe.name
    keep_freed_memory()
    cached_kernels()
    with distributed.session() as device:
        packed = text.prepare(recipe, out.parent / ".prepared")
        codec = packed.codec()
        torch.manual_seed(draw(recipe.seed, "weights"))
        network = build(recipe.network, codec.size).to(device)
        task = next_token.task(network, codec, packed, recipe)
        return plans.make(recipe, network, task, device, out, careful=True)
