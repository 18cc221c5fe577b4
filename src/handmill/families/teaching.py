"""What the families of tensors share in training: batches of items, held-out sums, a picture of samples.

B items, C channels, *S space.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from handmill.data.items import Batch, Items, enough
from handmill.families.previews import Preview
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training.loop import Phase, Task
from handmill.training.optimizers import Optimizer

EVALUATED_AT_ONCE = 256  # items

# (module, batch, whether in training) -> parts of the loss, each (B,); "loss" is what is minimised
Parts = Callable[[nn.Module, Batch, bool], dict[str, Tensor]]


def task(network: Any, codec: Any, prepared: Any, recipe: Recipe, parts: Parts, optimizers: list[Optimizer],
         measure: str, preview: Preview) -> Task:
    """What the loop needs to teach `network` the items of `prepared` by the mean of parts(...)["loss"]."""
    training = recipe.training
    enough(prepared, training.batch)
    items = Items(prepared, "train", codec, recipe.data, recipe.seed)
    items.keep()
    held_out = Items(prepared, "validation", codec, recipe.data, recipe.seed).first(training.evaluate_items)
    sample, picture = preview

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return parts(module, batch, True)["loss"].float().sum(), {}

    phase = Phase("network", network, loss, lambda batch: len(batch["label"]), optimizers)
    return Task([phase], items.batch, lambda module: evaluate(module, held_out, parts), sample, 1,
                network.flops_per_item(), held_out=len(held_out["label"]), at_once=EVALUATED_AT_ONCE,
                positions=int(torch.tensor(codec.shape[1:]).prod()), unit="images", measure=measure, picture=picture)


def evaluate(module: nn.Module, held_out: Batch, parts: Parts) -> dict[str, float]:
    """This process's share of the held-out items: every part of the loss summed, and how many "items"."""
    mine = {name: value[distributed.rank()::distributed.world()] for name, value in held_out.items()}
    device = next(module.parameters()).device
    count = len(mine["label"])
    sums: dict[str, float] = {"items": float(count)}
    for start in range(0, count, EVALUATED_AT_ONCE):
        batch = {name: value[start:start + EVALUATED_AT_ONCE].to(device) for name, value in mine.items()}
        for name, each in parts(module, batch, False).items():
            sums[name] = sums.get(name, 0.0) + each.double().sum().item()
    return sums
