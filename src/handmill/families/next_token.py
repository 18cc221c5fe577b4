"""The autoregressive family's objective: the negative log-likelihood of each token given those before it.

N sequences, T context. Losses are in nats.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.data.windows import Windows, in_turn
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training.loop import Phase, Task
from handmill.training.optimizers import optimizers

EVALUATED_AT_ONCE = 8192  # tokens


def loss(network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the tokens of `batch` (N, T + 1), and how many there are."""
    targets = batch[:, 1:]  # (N, T)
    total, _ = network(batch[:, :-1], targets=targets)
    return total, torch.tensor(targets.numel())


def evaluate(network: nn.Module, windows: Tensor) -> dict[str, float]:
    """This process's share of `windows` (N, T + 1): the "loss" summed, in nats, over how many "items" (tokens)."""
    mine = windows[distributed.rank()::distributed.world()]
    device = next(network.parameters()).device
    nats, tokens = 0.0, 0
    for batch in mine.split(max(1, EVALUATED_AT_ONCE // windows.shape[1])):
        total, count = loss(network, batch.to(device))
        nats, tokens = nats + total.item(), tokens + int(count)
    return {"loss": nats, "items": float(tokens)}


def task(network: nn.Module, codec: Any, packed: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train `network` on the packed tokens of `packed`."""
    training, context = recipe.training, recipe.network.context
    windows = Windows(packed.tokens("train"), context, recipe.seed)
    held_out = in_turn(packed.tokens("validation"), context, training.evaluate_items)
    phase = Phase("network", network, loss, lambda batch: batch[:, 1:].numel(), optimizers(network, training))

    def sample(module: nn.Module) -> str:
        from handmill.families.autoregressive import Sampling, generate

        pieces = generate(module, codec, [""], Sampling(temperature=0.8, max_tokens=60), recipe.seed)
        return " ".join("".join(p.text for p in pieces).split())

    flops: float = network.flops_per_token()  # type: ignore[operator,assignment]
    return Task([phase], windows.batch, lambda module: evaluate(module, held_out), sample, context, flops,
                held_out=held_out[:, 1:].numel(), at_once=max(1, EVALUATED_AT_ONCE // (context + 1)))
