"""Batches: one tensor, or several by name, whose first dimension counts the elements."""

from collections.abc import Callable

import torch
from torch import Tensor

Batch = Tensor | dict[str, Tensor]


def mapped(work: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with every tensor of it changed by `work`."""
    return {name: work(value) for name, value in batch.items()} if isinstance(batch, dict) else work(batch)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return mapped(lambda value: value.to(device, non_blocking=True), batch)


def size_of(batch: Batch) -> int:
    """Bytes."""
    return sum(value.nbytes for value in batch.values()) if isinstance(batch, dict) else batch.nbytes


def like(batch: Batch, elements: int, device: torch.device) -> Batch:
    """A batch of `elements` zeros shaped as the elements of `batch`."""
    return mapped(lambda v: torch.zeros((elements, *v.shape[1:]), dtype=v.dtype, device=device), batch)
