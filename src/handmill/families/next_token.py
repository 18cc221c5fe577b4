"""The autoregressive family's objective: the negative log-likelihood of each token given those before it.

N sequences, T context. Losses are in nats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handmill.data.noise import uniform
from handmill.data.order import draw
from handmill.data.windows import Windows, in_turn
from handmill.errors import UserError
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training.loop import Phase, Task
from handmill.training.optimizers import optimizers

EVALUATED_AT_ONCE = 8192  # tokens

# batches by place, held-out sequences (N, T + 1), a sample of the network's, and the file that it is drawn into
Source = tuple[Callable[[NDArray[np.int64]], Tensor], Tensor, Callable[[nn.Module], str], Path | None]


def loss(network: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the loss over the tokens of `batch` (N, T + 1); nothing is told beside it."""
    total, _ = network(batch[:, :-1], targets=batch[:, 1:])
    return total, {}


def evaluate(network: nn.Module, windows: Tensor) -> dict[str, float]:
    """This process's share of `windows` (N, T + 1): the "loss" summed, in nats, over how many "items" (tokens)."""
    mine = windows[distributed.rank()::distributed.world()]
    device = next(network.parameters()).device
    nats, tokens = 0.0, 0
    for batch in mine.split(max(1, EVALUATED_AT_ONCE // windows.shape[1])):
        nats, tokens = nats + loss(network, batch.to(device))[0].item(), tokens + batch[:, 1:].numel()
    return {"loss": nats, "items": float(tokens)}


def task(network: nn.Module, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train `network` on the packed tokens, or the images' codes, of `prepared`."""
    training, text = recipe.training, recipe.medium == "text"
    batch, held_out, sample, picture = (of_text if text else of_codes)(codec, prepared, recipe, out)
    length = held_out.shape[1] - 1 if not text else recipe.network.context
    phase = Phase("network", network, loss, lambda batch: batch[:, 1:].numel(), optimizers(network, training))
    flops: float = network.flops_per_token()  # type: ignore[operator,assignment]
    return Task([phase], batch, lambda module: evaluate(module, held_out), sample, length, flops,
                held_out=held_out[:, 1:].numel(), at_once=max(1, EVALUATED_AT_ONCE // (length + 1)),
                measure=f"nats per {'token' if text else 'code'}", picture=picture)


def of_text(codec: Any, packed: Any, recipe: Recipe, out: Path) -> Source:
    """Windows of a packed token stream."""
    context = recipe.network.context
    windows = Windows(packed.tokens("train"), context, recipe.seed)
    held_out = in_turn(packed.tokens("validation"), context, recipe.training.evaluate_items)

    def sample(module: nn.Module) -> str:
        from handmill.families.autoregressive import Sampling, generate

        pieces = generate(module, codec, [""], Sampling(temperature=0.8, max_tokens=60), recipe.seed)
        return " ".join("".join(p.text for p in pieces).split())

    return windows.batch, held_out, sample, None


def of_codes(codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Source:
    """The codes of each image after the token of its class, which is hidden now and then.

    Raises UserError for a context that does not hold an image.
    """
    from handmill.data.items import Items, enough
    from handmill.families.previews import samples

    if recipe.network.context < codec.length:
        raise UserError(f"network.context = {recipe.network.context} is less than the {codec.length} codes of an image:"
                        f" set network.context = {codec.length}")
    enough(prepared, recipe.training.batch)
    items, null = Items(prepared, "train", codec, recipe.data, recipe.seed), len(codec.classes)
    items.keep()
    key = draw(recipe.seed, "labels")

    def batch(places: NDArray[np.int64]) -> Tensor:
        some = items.batch(places)
        told = uniform(key, some["place"], 1)[:, 0] >= recipe.objective.label_dropout
        return codec.tokens(some["x"], torch.where(told, some["label"], null))

    most = recipe.training.evaluate_items // codec.length
    held = Items(prepared, "validation", codec, recipe.data, recipe.seed).first(most)
    sample, picture = samples(codec, recipe, out)
    return batch, codec.tokens(held["x"], held["label"]), sample, picture
