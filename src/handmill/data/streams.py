"""A packed token stream read in several rows at once, each on and on: what a network that carries its state trains on.

An epoch cuts the stream, at an offset drawn for it, into as many runs as a batch has rows; turn after turn each row
reads the next segment of its run. Which tokens a place holds is a pure function of (seed, place), as in order.py, so
nothing is saved but the state that the network carries.

N segments, T context, R rows.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handmill.data.order import draw
from handmill.errors import UserError

Ints = NDArray[np.int64]


class Streams:
    """Segments of `context` tokens in `rows` runs. Place i is row i % rows of turn i // rows."""

    def __init__(self, tokens: NDArray[np.unsignedinteger], context: int, rows: int, seed: int) -> None:
        self.turns = (len(tokens) - 1) // (rows * context)  # of an epoch
        if self.turns < 1:
            raise UserError(f"the training data have {len(tokens)} tokens, less than a segment of {context} for each "
                            f"of {rows} rows: add data, or lower training.batch or network.context")
        self.tokens, self.context, self.rows, self.seed = tokens, context, rows, seed

    def epochs(self, places: Ints) -> Ints:
        """The epoch of each place (N,)."""
        return places // self.rows // self.turns

    def starts(self, places: Ints) -> Ints:
        """The first token of each place's segment (N,)."""
        turn, row = np.divmod(places, self.rows)
        epoch, turn = np.divmod(turn, self.turns)
        spare = len(self.tokens) - 1 - self.turns * self.rows * self.context
        offsets = {int(e): draw(self.seed, "offset", int(e)) % (spare + 1) for e in np.unique(epoch)}
        return np.array([offsets[int(e)] for e in epoch]) + (row * self.turns + turn) * self.context

    def batch(self, places: Ints) -> dict[str, Tensor]:
        """`tokens` (N, T + 1), their `row` and `turn` (N,) int64, and whether the row begins a run: `fresh` (N,)."""
        turn, row = np.divmod(places, self.rows)
        windows = self.tokens[self.starts(places)[:, None] + np.arange(self.context + 1)].astype(np.int64)
        return {"tokens": torch.from_numpy(windows), "row": torch.from_numpy(row), "turn": torch.from_numpy(turn),
                "fresh": torch.from_numpy(turn % self.turns == 0)}


def in_rows(tokens: NDArray[np.unsignedinteger], context: int, rows: int, limit: int = 0) -> Tensor:
    """The beginning of the stream in at most `rows` runs: segments (turns, R, T + 1) int64, each following the last.

    Every token is predicted once, but for a tail shorter than a turn; `limit` > 0: at most that many.
    """
    context = min(context, len(tokens) - 1)
    if context < 1:
        raise UserError("the validation data are shorter than two tokens: raise data.validation or add data")
    predicted = min(len(tokens) - 1, max(context, limit or len(tokens)))
    rows = min(rows, predicted // context)
    turns = predicted // (rows * context)
    starts = (np.arange(rows) * turns + np.arange(turns)[:, None]) * context  # (turns, R)
    return torch.from_numpy(tokens[starts[:, :, None] + np.arange(context + 1)].astype(np.int64))
