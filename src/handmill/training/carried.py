"""The state that a network carries from step to step: truncated backpropagation through time.

Segments of a row follow each other, and each starts from the state, without its graph, that the one before left
(Williams & Peng 1990; Dai et al. 2019, section 3.2). A state counts only once its step was taken: after a step that
was skipped, or another gap, rows start anew. It is part of a checkpoint, so a resumed run is bit-equal.

R rows of a batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from handmill.training import distributed


class Carried:
    """The rows' states. It keeps nothing until `on`, so that steps may be rehearsed."""

    def __init__(self, network: nn.Module, rows: int) -> None:
        self.network: Any = network
        self.rows, self.on = rows, False
        self.turn = -1  # of the segments that may go on from `state`
        self.state: Any = None  # of all rows (R, ...); those of other processes are not filled in
        self.pending: list[tuple[Tensor, Any]] = []  # rows and their new states, of the step being taken,
        self.pending_turn = -1  # and its turn
        self.mine: list[int] = []  # rows that this process trains

    def start(self, batch: dict[str, Tensor]) -> Any:
        """What the rows of a batch go on from."""
        rows, device = batch["row"], batch["tokens"].device
        if not self.on or self.state is None or int(batch["turn"][0]) != self.turn:
            return self.network.blank(len(rows), device)
        return self.network.restarted(mapped(lambda x: x[rows.to(x.device)], self.state), batch["fresh"])

    def keep(self, batch: dict[str, Tensor], state: Any) -> None:
        """What the rows came to; it counts once `advance` is called for their step."""
        if not self.on:
            return
        if (turn := int(batch["turn"][0])) != self.pending_turn:
            self.pending, self.pending_turn = [], turn
        self.pending.append((batch["row"], self.network.detached(state)))

    def advance(self) -> None:
        """The step was taken."""
        assert self.pending, "a step without a segment"
        if self.state is None:
            self.state = mapped(lambda x: x.new_zeros((self.rows, *x.shape[1:])), self.pending[0][1])
        for rows, state in self.pending:
            for whole, part in zip(leaves(self.state), leaves(state), strict=True):
                whole[rows] = part
        self.mine = [row for rows, _ in self.pending for row in rows.tolist()]
        self.turn, self.pending, self.pending_turn = self.pending_turn + 1, [], -1

    def example(self) -> list[Tensor]:
        """Tensors of the size of all rows' states."""
        blank = self.network.blank(self.rows, next(self.network.parameters()).device)
        return [leaf.clone() for leaf in leaves(blank)]

    def tensors(self) -> dict[str, Tensor]:
        """All rows of all processes, for a checkpoint. Every process must call it."""
        if self.state is None:
            return {"turn": torch.tensor([-1])}
        others = sorted(set(range(self.rows)) - set(self.mine))
        whole = [leaf.clone() for leaf in leaves(self.state)]
        for leaf in whole:
            leaf[others] = 0
        distributed.total_of(whole)
        return {"turn": torch.tensor([self.turn])} | {str(i): leaf for i, leaf in enumerate(whole)}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Take up what a checkpoint kept."""
        self.turn, self.state, self.pending = int(tensors["turn"]), None, []
        self.mine = [*range(self.rows)] if distributed.rank() == 0 else []
        if self.turn < 0:
            return
        kept = iter([tensors[str(i)].to(device) for i in range(len(tensors) - 1)])
        self.state = mapped(lambda _: next(kept), self.network.blank(1, device))


def mapped(work: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state, (named) tuples of tensors, with every tensor changed by `work`, in the order of `leaves`."""
    if isinstance(state, Tensor):
        return work(state)
    parts = [mapped(work, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def leaves(state: Any) -> Iterator[Tensor]:
    """The tensors of a state in order."""
    if isinstance(state, Tensor):
        yield state
        return
    for part in state:
        yield from leaves(part)
