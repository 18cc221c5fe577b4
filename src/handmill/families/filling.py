"""Prompts to a model that was taught to fill in the middle: the text around a gap, arranged as in data/middle.py."""

from typing import Any

from handmill.data.middle import NAMES, filled
from handmill.recipe import Recipe


def taught(recipe: Recipe, codec: Any) -> bool:
    """Whether a text model learnt from texts with their middle last."""
    return recipe.objective.middle > 0 and {*NAMES} <= {*codec.special}


def longest(recipe: Recipe) -> int:
    """New tokens that leave half of the context to the text around them."""
    return max(1, recipe.network.context // 2)


def suffix_first(recipe: Recipe) -> bool:
    """Which order was learnt more often; of two learnt alike this one, which Bavarian et al. 2022 find the better."""
    first: bool = recipe.objective.suffix_first >= 0.5
    return first


def prompt(recipe: Recipe, codec: Any, before: str, after: str, new: int) -> list[int]:
    """Tokens to go on from with at most `new` that stand between two texts. Raises UserError as data/middle.filled."""
    return filled(codec, before, after, recipe.network.context, new, suffix_first(recipe))
