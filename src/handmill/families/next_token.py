"""The autoregressive family's objective: the negative log-likelihood of each token given those before it.

A network that carries its state learns from segments that follow each other, and is evaluated so; any other one from
windows of their own. N sequences, T context, R rows of an evaluation. Losses are in nats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.families import token_sources
from handmill.families.token_sources import EVALUATED_AT_ONCE
from handmill.networks.layers import UNCOUNTED
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training.batches import Batch
from handmill.training.carried import Carried
from handmill.training.loop import Phase, Task
from handmill.training.optimizers import optimizers

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def read_and_predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (N, T), of tokens (N, T + 1); what is not `counted` is no target."""
    tokens = batch if isinstance(batch, Tensor) else batch["tokens"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if isinstance(batch, dict) and "counted" in batch:
        targets = torch.where(batch["counted"], targets, UNCOUNTED)
    return inputs, targets


def count(batch: Batch) -> int:
    """How many tokens of a batch are predicted and counted."""
    if isinstance(batch, dict) and "counted" in batch:
        return int(batch["counted"].sum())
    return read_and_predicted(batch)[1].numel()


def loss(network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the loss over the tokens of sequences that have nothing to do with each other; no other figures."""
    inputs, targets = read_and_predicted(batch)
    total, _ = network(inputs, targets=targets)
    return total, {}


def carrying(carried: Carried) -> Loss:
    """As `loss`, of segments that go on from the carried state."""
    def total(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = read_and_predicted(batch)
        summed, state = network(inputs, carried.start(batch), targets=targets)
        carried.keep(batch, state)
        return summed, {}

    return total


def evaluate(network: nn.Module, windows: Tensor) -> dict[str, float]:
    """This process's share of `windows` (N, T + 1): the "loss" summed, in nats, over how many "items" (tokens)."""
    mine = windows[distributed.rank()::distributed.world()]
    device = next(network.parameters()).device
    nats, tokens = 0.0, 0
    for batch in mine.split(max(1, EVALUATED_AT_ONCE // windows.shape[1])):
        nats, tokens = nats + loss(network, batch.to(device))[0].item(), tokens + batch[:, 1:].numel()
    return {"loss": nats, "items": float(tokens)}


def evaluate_on(network: nn.Module, segments: Tensor) -> dict[str, float]:
    """As `evaluate`, of segments (turns, R, T + 1) whose rows go on from turn to turn with the state."""
    mine = segments[:, distributed.rank()::distributed.world()]
    device = next(network.parameters()).device
    nats, state = 0.0, None
    for batch in mine.to(device) if mine.numel() else ():
        total, state = network(batch[:, :-1], state, targets=batch[:, 1:])
        nats += total.item()
    return {"loss": nats, "items": float(mine[:, :, 1:].numel())}


def task(network: nn.Module, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train `network` on the packed tokens, or the images' codes, of `prepared`."""
    training = recipe.training
    source = token_sources.of(network, codec, prepared, recipe, out)
    carried = Carried(network, training.batch) if source.streamed else None
    learn = None if carried is None else lambda figures, items: carried.advance()
    phase = Phase("network", network, loss if carried is None else carrying(carried), count,
                  optimizers(network, training), learn=learn)
    length, held_out = source.held_out.shape[-1] - 1, source.held_out[..., 1:].numel()
    flops: float = network.flops_per_token()  # type: ignore[operator,assignment]

    def evaluated(module: nn.Module) -> dict[str, float]:
        sums = (evaluate_on if source.streamed else evaluate)(module, source.held_out)
        return sums | {name: sums["loss"] * held_out / many for name, many in source.per.items()}

    at_once = source.held_out.shape[1] if source.streamed else max(1, EVALUATED_AT_ONCE // (length + 1))
    why = "" if getattr(network, "compiles", True) else "the compiler would take the recurrent layers apart"
    return Task([phase], source.batch, evaluated, source.sample, source.length, flops, held_out=held_out,
                at_once=at_once, measure=f"nats per {source.unit}", picture=source.picture, carried=carried,
                uncompiled=why, shown=tuple(source.per))
