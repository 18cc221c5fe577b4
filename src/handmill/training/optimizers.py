"""AdamW for vectors and embeddings, Muon for matrices, and the schedule of their rates.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Matrices of one shape are
orthogonalised together as one batch, which is what makes it cheap for small networks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from handmill.recipe import Training

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic x -> a x + b x^3 + c x^5


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each matrix (N, R, C) with its singular values moved towards 1, by Newton-Schulz iterations in bf16."""
    assert matrices.ndim == 3, matrices.shape
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x  # (N, min, max)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, min, min)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised; the update is scaled by sqrt(max(1, rows / columns))."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    assert p.ndim == 2, p.shape
                    shapes[tuple(p.shape)].append(p)
            for same in shapes.values():
                self._step_together(same, group)

    def _step_together(self, same: list[Tensor], group: dict[str, Any]) -> None:
        buffers = []
        for p in same:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        gradients = [p.grad for p in same if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = orthogonalise(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))  # (N, R, C)
        rows, columns = same[0].shape
        torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(same, list(updates), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def optimizers(network: nn.Module, training: Training) -> list[Optimizer]:
    """The optimizers of one phase: AdamW, and with `optimizer = "muon"` Muon for the matrices inside the network.

    Embeddings and the head are AdamW's in both; only matrices decay.
    """
    outer, inner, vectors = [], [], []
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif p.ndim > 2 or name.startswith(("embedding", "position", "head")):
            outer.append(p)
        else:
            inner.append(p)
    adam_matrices = outer if training.optimizer == "muon" else outer + inner
    decay = training.weight_decay if training.optimizer == "adamw" else 0.0
    groups = [{"params": adam_matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    result: list[Optimizer] = [AdamW([g for g in groups if g["params"]], lr=training.learning_rate,
                                     betas=training.betas, fused=True)]
    if training.optimizer == "muon" and inner:
        result.append(Muon(inner, training.matrix_rate, training.momentum, training.weight_decay))
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return result


def rate(step: int, training: Training) -> float:
    """The share of the peak rate at step `step` (from 0): linear warm-up, then the schedule down to `final_rate`."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    if training.schedule == "constant":
        return 1.0
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    done = min(1.0, done)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if training.schedule == "cosine" else 1 - done
    return training.final_rate + (1 - training.final_rate) * shape
