"""The exact negative log-likelihood of held-out documents under an autoregressive network.

Long documents are read in windows of the network's context that overlap: after a document's first window
every token has at least `context - stride` tokens of history, and each token is counted once.

W windows, N predictions of a document, B rows of a batch, T positions, V vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from handmill.checks.characters import Spelling
from handmill.errors import UserError

COUNTED = ("every token of a document and its closing end token, given the tokens before them in the "
           "document and the end token that opens it; bits are divided by the document's text alone")
_LOGITS = 1 << 24  # numbers in one batch of logits: 64 MiB


class Selection(NamedTuple):
    """Which documents of a split are read."""

    split: str
    tokens: NDArray[Any]  # the whole split, memmapped
    starts: NDArray[np.int64]  # (documents,) of the opening end tokens
    predictions: NDArray[np.int64]  # (documents,) N of each, its closing end token included
    documents_in_split: int
    whole: bool  # the whole split is read


class Scores(NamedTuple):
    """Sums over the tokens that each window counts, windows in the order of the text; all (W,)."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]  # closing end tokens included
    bytes: NDArray[np.int64]
    characters: NDArray[np.int64]
    symbols: NDArray[np.int64]  # characters and closing ends
    document: NDArray[np.int64]  # place in the selection

    def by_document(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of `values` (W,) over each document's windows, (documents,)."""
        return np.bincount(self.document, values).astype(np.float64)


class _Plan(NamedTuple):
    """Windows of the selected documents, all (W,)."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]  # of the window's first input, in the split
    length: NDArray[np.int64]  # inputs
    skip: NDArray[np.int64]  # first targets that the window before has counted


def select(packed: Any, limit: int, seed: int) -> Selection:
    """The test split, or the validation split where there is none; at most `limit` tokens of it (0: all).

    Under a limit, documents are taken in random order and the last one is cut.
    Raises UserError when both splits are empty.
    """
    split = next((name for name in ("test", "validation") if len(packed.starts(name))), None)
    if split is None:
        raise UserError(f"{packed.folder} holds no held-out text to check on: "
                        "train with data.test or data.validation above 0")
    tokens, starts = packed.tokens(split), np.asarray(packed.starts(split), np.int64)
    lengths = np.diff(starts, append=len(tokens))  # one document's closing end token opens the next
    if not limit or lengths.sum() <= limit:
        return Selection(split, tokens, starts, lengths, len(starts), True)
    order = np.random.default_rng(seed).permutation(len(starts))
    taken = np.cumsum(lengths[order])
    order = order[:int(np.searchsorted(taken, limit)) + 1]
    chosen = lengths[order]
    chosen[-1] -= taken[len(order) - 1] - limit
    back = np.argsort(order)
    return Selection(split, tokens, starts[order[back]], chosen[back], len(starts), False)


def targets(selection: Selection, end: int) -> NDArray[Any]:
    """What is predicted, document after document: the text's tokens and the closing ends, (sum of N,)."""
    return np.concatenate([_read(selection.tokens, start + 1, n, end)
                           for start, n in zip(selection.starts, selection.predictions, strict=True)])


def score(network: Any, selection: Selection, spelling: Spelling, end: int, context: int, stride: int,
          device: torch.device, progress: bool = False) -> Scores:
    """Score the selected documents in fp32. `network(tokens)` gives logits (B, T, V) and a state."""
    assert 0 < stride <= context, (stride, context)
    plan = _plan(selection, context, stride)
    nats = np.zeros(len(plan.start))
    counts = np.zeros((4, len(plan.start)), np.int64)
    rows = max(1, _LOGITS // (min(context, int(plan.length.max())) * len(spelling.bytes)))
    order = np.argsort(plan.length, kind="stable")  # rows of like length make batches without padding
    with tqdm(total=int(selection.predictions.sum()), unit=" tokens", desc="held-out text",
              disable=not progress) as bar:
        for first in range(0, len(order), rows):
            batch = order[first:first + rows]
            inputs, wanted, counted = _batch(selection, plan, batch, end)
            losses = _losses(network, inputs.to(device), wanted.to(device)).cpu()  # (B, T)
            nats[batch] = (losses.double() * counted).sum(1).numpy()
            counts[:, batch] = _counts(wanted.numpy(), counted.numpy(), spelling, end)
            bar.update(int(counts[0, batch].sum()))
    assert counts[0].sum() == selection.predictions.sum(), "every token is counted once"
    return Scores(nats, counts[0], counts[1], counts[2], counts[3], plan.document)


def _plan(selection: Selection, context: int, stride: int) -> _Plan:
    n = selection.predictions
    beyond = np.maximum(n - context, 0)  # predictions after the first window
    windows = 1 + -(-beyond // stride)
    document = np.repeat(np.arange(len(n)), windows)
    k = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)  # place in the document
    start = np.minimum(k * stride, beyond[document])  # the last window ends with the document
    counted = np.where(k > 0, (k - 1) * stride + context, 0)
    length = np.minimum(n, context)[document]
    return _Plan(document, selection.starts[document] + start, length, counted - start)


def _read(tokens: NDArray[Any], start: int, count: int, end: int) -> NDArray[Any]:
    """`count` tokens, an end token following the last one of the split."""
    piece = np.asarray(tokens[start:start + count])
    return piece if len(piece) == count else np.append(piece, np.asarray(end, piece.dtype))


def _batch(selection: Selection, plan: _Plan, batch: NDArray[np.int64],
           end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and whether a target counts, all (B, T). Rows are padded at the right, unseen."""
    width = int(plan.length[batch].max())
    both = np.full((len(batch), width + 1), end, np.int64)
    for row, w in enumerate(batch):
        both[row, :plan.length[w] + 1] = _read(selection.tokens, plan.start[w], plan.length[w] + 1, end)
    place = np.arange(width)
    counted = (place >= plan.skip[batch, None]) & (place < plan.length[batch, None])
    return torch.from_numpy(both[:, :-1]), torch.from_numpy(both[:, 1:]), torch.from_numpy(counted)


@torch.inference_mode()
def _losses(network: Any, inputs: Tensor, wanted: Tensor) -> Tensor:
    logits, _ = network(inputs)  # (B, T, V)
    return F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")  # (B, T)


def _counts(wanted: NDArray[np.int64], counted: NDArray[np.bool_], spelling: Spelling,
            end: int) -> NDArray[np.int64]:
    """Tokens, bytes, characters and symbols that each row counts, (4, B)."""
    characters = spelling.characters[wanted]
    parts = (np.ones_like(wanted), spelling.bytes[wanted], characters, characters + (wanted == end))
    return np.stack([(part * counted).sum(1) for part in parts])
