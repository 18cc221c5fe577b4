"""AdamW for vectors and embeddings, Muon for matrices, and the schedule of their rates.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Matrices of one shape are
orthogonalised together as one batch, which is what makes it cheap for small networks. A matrix that is split over
processes is gathered for it: every process orthogonalises the whole of it, and updates its own rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from handmill.recipe import Training
from handmill.training.sharding import gathered, local, locals_of, parted, split, taken

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic x -> a x + b x^3 + c x^5
GATHERED = 1 << 24  # numbers of split matrices that are gathered at once, about


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


class Optimizer:
    """Groups of parameters with their settings, and a state for each parameter, shaped as torch's optimizers are.

    torch.optim.Optimizer itself imports the whole compiler when the first one is made: 0.9 s of every start.
    """

    clipped = True  # whether its gradients count in the norm, and shrink where that is above training.clip

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [defaults | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        raise NotImplementedError(type(self).__name__)

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: "place of the parameter.name" -> tensor."""
        return {f"{i}.{name}": tensor for i, p in enumerate(self.parameters())
                for name, tensor in self.state.get(p, {}).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        parameters = self.parameters()
        self.state = defaultdict(dict)
        for key, tensor in tensors.items():
            place, _, name = key.partition(".")
            p = parameters[int(place)]
            self.state[p][name] = taken(tensor, p if tensor.shape == p.shape else local(p))

    def _kept(self, p: Tensor, *names: str) -> list[Tensor]:
        """The state tensors of a parameter, zero on first use."""
        state = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
        return [state[name] for name in names]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), by torch's fused kernel."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            due = [p for p in group["params"] if p.grad is not None]
            if not due:
                continue
            steps, means, squares = zip(*(self._kept(p, "step", "exp_avg", "exp_avg_sq") for p in due), strict=True)
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(locals_of(due), locals_of(p.grad for p in due), locals_of(means), locals_of(squares),
                                [], list(steps), lr=group["lr"], beta1=beta1, beta2=beta2,
                                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised; the update is scaled by sqrt(max(1, rows / columns)).

    The weights of a convolution are a matrix of outputs by all that each sees.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        super().__init__([{"params": list(parameters)}], lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    assert p.ndim > 1, p.shape
                    rows, columns = p.shape[0], p.numel() // p.shape[0]
                    shapes[min(rows, columns), max(rows, columns)].append(p)
            for alike in shapes.values():
                many = max(1, GATHERED // alike[0].numel()) if split(alike[0]) else len(alike)
                for first in range(0, len(alike), many):
                    self._step_together(alike[first:first + many], group)

    def _step_together(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape, or of its transpose."""
        held, gradients = locals_of(alike), locals_of(p.grad for p in alike)
        buffers = locals_of(self._kept(p, "momentum_buffer")[0] for p in alike)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        flat = [whole.flatten(1) for whole in gathered(ahead, alike)]
        wide = torch.stack([g.T if g.shape[0] > g.shape[1] else g for g in flat])  # (N, min, max)
        updates = [u.T if g.shape[0] > g.shape[1] else u for g, u in zip(flat, orthogonalise(wide), strict=True)]
        torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
        for p, mine, update in zip(alike, held, updates, strict=True):
            mine.add_(local(parted(update.reshape(p.shape), p)),
                      alpha=-group["lr"] * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


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
        elif name.startswith(("embedding", "position", "head", "codebook")):
            outer.append(p)
        else:
            inner.append(p)
    adam_matrices = outer if training.optimizer == "muon" else outer + inner
    decay = training.weight_decay if training.optimizer == "adamw" else 0.0
    groups = [{"params": adam_matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    result: list[Optimizer] = [AdamW([g for g in groups if g["params"]], training.learning_rate, training.betas)]
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
