"""Weights, gradients and optimizer states split over the processes: PyTorch's fully_shard (FSDP2).

Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023 (FSDP). Each process holds some rows of every parameter, its
gradient and its optimizer state, as DTensors; a block's whole weights are gathered while it computes, and its gradients
are summed into the rows.

What is trained is a double of the network. The network itself is empty meanwhile, and is filled with gathered weights
to be evaluated, sampled from and, in the end, handed over: it stays an ordinary module that all the rest can work with.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from handmill.errors import UserError
from handmill.networks.weights import weights_of
from handmill.training import distributed

Tensors = dict[str, Tensor]

# a state's keys and values are views; nothing here changes what a network returned
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def split(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor: its rows, in the same memory, or all of it."""
    held: Tensor = tensor.to_local() if split(tensor) else tensor
    return held


def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def gathered(parts: Iterable[Tensor], likes: Iterable[Any]) -> Iterator[Tensor]:
    """The whole of each tensor that is split as one of `likes`, of which this process holds a part.

    One after the other, PIECE bytes in one message. Every process must take all of them.
    """
    piece: list[tuple[Tensor, Any]] = []
    for part, like in zip(parts, likes, strict=True):
        first = piece[0][0].dtype if piece else part.dtype
        if not split(like) or part.dtype != first or sum(whole.nbytes for _, whole in piece) > distributed.PIECE:
            yield from _gathered(piece)
            piece = []
        if split(like):
            piece.append((part, like))
        else:
            yield part
    yield from _gathered(piece)


def _gathered(piece: list[tuple[Tensor, Any]]) -> Iterator[Tensor]:
    """Rows are dealt out from the first process on, as many to each, until there are no more."""
    if not piece:
        return
    world, filled = distributed.world(), []
    for part, like in piece:
        each = -(-like.shape[0] // world) * (like.numel() // like.shape[0])  # numbers of the fullest part
        filled.append(torch.cat([part.flatten(), part.new_zeros(each - part.numel())]))
    mine = torch.cat(filled)  # (N,)
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine)
    sizes = [part.numel() for part in filled]
    for (_, like), *columns in zip(piece, *(theirs.split(sizes) for theirs in every), strict=True):
        yield torch.cat(columns)[:like.numel()].view(like.shape)


def parted(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor split as `like`, a view of it, or the same where `like` is whole."""
    if not split(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def taken(whole: Tensor, like: Any) -> Tensor:
    """A copy of a whole tensor, on the device of `like` and split as that."""
    return parted(whole.to(like.device), like).clone()


def collected(tensors: Tensors) -> Tensors:
    """Whole tensors, on the CPU of the first process; the others get none. Every process must call it.

    A device holds few of them at once beside the parts.
    """
    mine: Tensors = {}
    for name, whole in zip(tensors, gathered(locals_of(tensors.values()), tensors.values()), strict=True):
        if distributed.rank() == 0:
            mine[name] = whole.cpu()
    return mine


@torch.no_grad()
def clip(parameters: list[Tensor], most: float) -> float:
    """Scale the gradients so that their global norm is `most` at most; returns what it was (Pascanu et al. 2013)."""
    if not any(split(p) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, most, foreach=True).item()
    parts = locals_of(p.grad for p in parameters if split(p))
    whole = [p.grad for p in parameters if not split(p) and p.grad is not None]
    device = (parts + whole)[0].device
    squares = distributed.total(_squares(parts, device)) + _squares(whole, device)
    norm = squares.sqrt()
    torch._foreach_mul_(parts + whole, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    norms = torch._foreach_norm(tensors) if tensors else ()
    return torch.stack([torch.zeros((), device=device), *norms]).square().sum()


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one at a time: the outermost members of module lists."""
    for child in network.children():
        if isinstance(network, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from blocks(child)


class Sharded:
    """A network split over the processes.

    `groups` are those of its optimizers, whose parameters become the split ones. `kept` stay whole in every process, as
    single numbers do; their gradients are the caller's to sum. `half`: bf16 weights are gathered, gradients are summed
    in fp32.
    """

    def __init__(self, network: nn.Module, groups: list[dict[str, Any]], kept: Iterable[Tensor], half: bool) -> None:
        self.network = network
        parameters = dict(network.named_parameters())
        exact: tuple[str, ...] = getattr(network, "exact", ())
        whole = {id(p) for p in kept} | {id(p) for n, p in parameters.items() if not p.ndim or n.startswith(exact)}
        shared: dict[int, Any] = {id(t): t for t in [*parameters.values(), *network.buffers()]}
        self.double: Any = copy.deepcopy(network, shared)
        _fully_shard(self.double, {p for p in parameters.values() if id(p) in whole}, half)
        parts = dict(self.double.named_parameters())
        places = {id(p): parts[name] for name, p in parameters.items()}
        for group in groups:
            group["params"] = [places[id(p)] for p in group["params"]]
        for p in parameters.values():
            if id(p) not in whole:
                p.data = p.new_zeros(()).expand(p.shape)  # a single number that stands for all

    @torch.no_grad()
    def fill(self, weights: Tensors | None = None) -> Tensors:
        """Put whole `weights`, or those trained so far, into the network; returns what was there.

        Every process must call it.
        """
        weights = weights or weights_of(self.double)
        slots = self.network.state_dict(keep_vars=True)
        before = {name: slots[name].data for name in weights}
        whole = gathered(locals_of(weights.values()), weights.values())
        for name, tensor in zip(weights, whole, strict=True):
            slots[name].data = tensor
        return before

    @contextmanager
    def whole(self, weights: Tensors | None = None) -> Iterator[None]:
        """While the block runs, the network holds what `fill` puts there. Every process must enter it."""
        before = self.fill(weights)
        try:
            yield
        finally:
            self.fill(before)


def _fully_shard(network: nn.Module, whole: set[Any], half: bool) -> None:
    """fully_shard for each block, and for what lies outside of them together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(network.parameters()).device.type, (distributed.world(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half \
        else MixedPrecisionPolicy()
    for module in [*(b for b in blocks(network) if set(b.parameters()) - whole), network]:
        sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the items of all processes
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def sharded(phases: list[Any], batch: int, half: bool, say: Callable[[str], None]) -> Sharded | None:
    """The network of a task's only phase split over the processes; None, with a sentence, where there is one process.

    Raises UserError for a task of several phases, and for a batch that the processes cannot share evenly.
    """
    world = distributed.world()
    if world == 1:
        say("training.shard: a single process keeps everything, as there is none to share it with")
        return None
    if len(phases) > 1:
        names = ", ".join(phase.name for phase in phases)
        raise UserError(f"training.shard splits one network with one loss, and here there are {names}: set it to false")
    if batch % world:
        raise UserError(f"training.batch = {batch} cannot be shared evenly by {world} processes, as training.shard "
                        f"needs: set it to {world * -(-batch // world)}")
    (phase,) = phases
    kept = [p for o in phase.optimizers if not o.clipped for p in o.parameters()]  # a statistic is worked on as a whole
    return Sharded(phase.network, [g for o in phase.optimizers for g in o.param_groups], kept, half)
