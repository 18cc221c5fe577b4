"""`plan`: what a run would take, without running it."""

from collections.abc import Iterable
from pathlib import Path

from handmill import data
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training import plan as plans
from handmill.verbs.setup import assemble, begin


def plan(recipe: Recipe | Path | str, out: Path | str | None = None, overrides: Iterable[str] = ()) -> plans.Plan:
    """The plan of training `recipe` into `out` (default: runs/NAME). Leaves nothing behind but the prepared data.

    A run that does not fit is no error here: it is in the plan's `fault`. Raises UserError for what a user can mend.
    """
    recipe, out = begin(recipe, out, overrides)
    with distributed.session() as device:
        prepared = data.prepare(recipe, out.parent / ".prepared")
        network, _, task = assemble(recipe, prepared, device, out)
        return plans.make(recipe, network, task, device, out, careful=True)
