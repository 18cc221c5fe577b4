"""One process or many: what torchrun started, seen from inside. Everything here is a no-op for one process."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

PIECE = 64 << 20  # bytes that are sent at once, about


@contextmanager
def session() -> Iterator[torch.device]:
    """Join the process group that torchrun describes (gloo on CPUs, NCCL on GPUs); yields this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if many:
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


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def first() -> Iterator[bool]:
    """Rank 0 runs the block's work while the others wait: `with first() as mine: if mine: ...`."""
    try:
        yield rank() == 0
    finally:
        if world() > 1:
            dist.barrier()
