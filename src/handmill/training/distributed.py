"""One process or many: what torchrun started, seen from inside. Everything here is a no-op for one process.

    torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m handmill train my.toml

recovers without help from a process that is killed, crashes or hangs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from handmill.errors import UserError

PIECE = 64 << 20  # bytes that are sent at once, about
SLACK = 2.0  # seconds after which the engine gives up, too, so that the watch can name the process that hangs
_watch: Any = None  # over the processes, while there are some


@contextmanager
def session() -> Iterator[torch.device]:
    """Join the process group that torchrun describes (gloo on CPUs, NCCL on GPUs); yields this process's device.

    Where one process fails, all end, and one of them says why. Raises UserError for a HANDMILL_TIMEOUT that is no time.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    with group("nccl" if device.type == "cuda" else "gloo"):
        yield device


@contextmanager
def group(backend: str) -> Iterator[None]:
    """The process group of the block's work, and the watch over its processes."""
    global _watch
    from handmill.training.watch import Watch, join, timeout

    try:
        limit = timeout()
    except UserError:
        if os.environ["RANK"] == "0":
            raise
        raise SystemExit(2) from None  # rank 0 says it
    join(backend, limit + SLACK)
    try:
        _watch = Watch(limit)
        try:
            yield
            dist.barrier()
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                _watch.give_up(error)
            _watch.leave()
            raise
        _watch.leave()
    finally:
        _watch = None
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def total_of(tensors: Iterable[Tensor]) -> None:
    """The sum of each tensor over all processes, in place; what is alike in kind is sent together, PIECE at a time.

    Not DistributedDataParallel, whose hooks need every parameter in every loss and fit no gradients of gradients.
    """
    pieces: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    sent = 0
    for tensor in tensors if world() > 1 else ():
        pieces.setdefault((tensor.dtype, sent // PIECE), []).append(tensor)
        sent += tensor.nbytes
    for piece in pieces.values():
        flat = torch.cat([tensor.flatten() for tensor in piece])
        dist.all_reduce(flat)
        for tensor, value in zip(piece, flat.split([tensor.numel() for tensor in piece]), strict=True):
            tensor.copy_(value.view_as(tensor))


@torch.no_grad()
def where_odd(tensors: list[Tensor]) -> Tensor:
    """Float64 (W,), to be summed over the W processes: 1 at this one's rank if its own numbers are not all finite."""
    marks = torch.zeros(world(), dtype=torch.float64, device=tensors[0].device)
    if world() > 1:
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(tensors)])
        marks[rank()] = norms.isfinite().all().logical_not()
    return marks


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank, however long it takes to come."""
    if world() == 1:
        return value
    follow()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def first() -> Iterator[bool]:
    """Rank 0 runs the block's work while the others wait: `with first() as mine: if mine: ...`."""
    yield rank() == 0
    if world() > 1:
        follow()
        dist.barrier()


def follow() -> None:
    """Wait for rank 0 as long as it lives: what it does alone may take longer than a process may hang."""
    if _watch is not None:
        _watch.follow()
