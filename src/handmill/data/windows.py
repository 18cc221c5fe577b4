"""Windows of a packed token stream as batches. N windows, T context."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handmill.data.order import window_starts, windows_in_epoch
from handmill.errors import UserError


class Windows:
    """Training windows in the stateless order of data/order.py: `batch(places)` is (N, T + 1) int64.

    With the `starts` (documents,) of documents that begin with an end token and then `head` tokens that say what they
    are, a window that begins within a document begins with these.
    """

    def __init__(self, tokens: NDArray[np.unsignedinteger], context: int, seed: int,
                 starts: NDArray[np.int64] | None = None, head: int = 0) -> None:
        assert head < context, (head, context)
        if windows_in_epoch(len(tokens), context) < 1:
            raise UserError(f"the training text has {len(tokens)} tokens, less than one context of {context}: "
                            f"add text, or set network.context to at most {max(1, len(tokens) // 2)}")
        self.tokens, self.context, self.seed = tokens, context, seed
        self.columns, self.documents, self.head = np.arange(context + 1), starts, head

    def batch(self, places: NDArray[np.int64]) -> Tensor:
        starts = window_starts(places, len(self.tokens), self.context, self.seed)
        if self.documents is None:
            return torch.from_numpy(self.tokens[starts[:, None] + self.columns].astype(np.int64))  # (N, T + 1)
        document = self.documents[np.maximum(np.searchsorted(self.documents, starts, "right") - 1, 0)]
        within = (starts > document + self.head)[:, None]
        places = np.where(self.columns < self.head, document[:, None] + 1 + self.columns,
                          starts[:, None] + self.columns - self.head)
        places = np.where(within, places, starts[:, None] + self.columns)  # (N, T + 1)
        return torch.from_numpy(self.tokens[places].astype(np.int64))


def in_turn(tokens: NDArray[np.unsignedinteger], context: int, limit: int = 0) -> Tensor:
    """Consecutive windows (N, T + 1) int64 that predict every token once, but for a tail shorter than a context.

    `limit` > 0 takes evenly spaced windows with at most that many predicted tokens in all.
    """
    context = min(context, len(tokens) - 1)
    if context < 1:
        raise UserError("the validation text is shorter than two tokens: raise data.validation or add text")
    starts = np.arange((len(tokens) - 1) // context) * context
    if limit and starts.size * context > limit:
        starts = starts[np.linspace(0, starts.size - 1, max(1, limit // context)).astype(np.int64)]
    return torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
