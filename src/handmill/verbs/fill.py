"""`handmill generate --suffix`: what stands between two texts."""

from typing import Any

from handmill.data.middle import NAMES
from handmill.errors import UserError
from handmill.families import filling
from handmill.families.autoregressive import generate
from handmill.folder import Model
from handmill.verbs.making import checked, network_of, sampling


def fill(model: Model, before: str, after: str, seed: int | None = None, runtime: str = "torch",
         **overrides: Any) -> str:
    """The text between two, as a model that was taught to fill in the middle writes it.

    `overrides` replace values of the recipe's [sampling] table; without max_tokens it writes at most half of its
    context. Of long texts it reads what is nearest. The same seed gives the same text, on either `runtime`. Raises
    UserError for a model that was not taught to, and a max_tokens that leaves the texts no room.
    """
    if model.recipe.medium != "text" or not filling.taught(model.recipe, model.codec):
        raise UserError(f"{model.path} was not taught to fill in the middle: train a text model with codec.special = "
                        f"{list(NAMES)} and objective.middle = 0.5, as the recipe 'code' does")
    most = min(model.recipe.sampling.max_tokens, filling.longest(model.recipe))
    settings, seed = sampling(model, **({"max_tokens": most} | overrides)), checked(seed)
    prompt = filling.prompt(model.recipe, model.codec, before, after, settings.max_tokens)
    pieces = generate(network_of(model, runtime), model.codec, [prompt], settings, seed)
    return "".join(piece.text for piece in pieces)
