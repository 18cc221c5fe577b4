"""The exact negative log-likelihood of held-out documents under an autoregressive network.

Long documents are read in windows of the network's context that overlap: after a document's first window
every token has at least `context - stride` tokens of history. A network that carries its state reads a document in
segments of its context, one after another, and has all the history that it remembers. Each token is counted once.

W windows, N predictions of a document, B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from handmill.checks.characters import Spelling
from handmill.checks.intervals import FEW, Figure, block_ratio, ratio
from handmill.errors import UserError

COUNTED = ("every token of a document and its closing end token, given the tokens before them in the "
           "document and the end token that opens it; bits are divided by the document's text alone")
_LOGITS = 1 << 24  # numbers in one batch of logits: 64 MiB
_STRETCH = 128  # tokens
_CARRIED = 1 << 13  # positions of a batch that carries its state, those remembered included


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


class Plan(NamedTuple):
    """Windows of the selected documents, all (W,)."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]  # of the window's first input, in the split
    length: NDArray[np.int64]  # inputs
    skip: NDArray[np.int64]  # first targets that the window before has counted


def select(packed: Any, limit: int, seed: int) -> Selection:
    """The test split, or the validation split where there is none; at most `limit` tokens of it, as `take` has them.

    Raises UserError when both splits are empty.
    """
    split = next((name for name in ("test", "validation") if len(packed.starts(name))), None)
    if split is None:
        raise UserError(f"{packed.folder} holds nothing held out to check on: "
                        "train with data.test or data.validation above 0")
    return take(packed, split, limit, seed)


def take(packed: Any, split: str, limit: int, seed: int) -> Selection:
    """At most `limit` tokens of a split (0: all): documents in random order, of which the last is cut."""
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
    """Score the selected documents in fp32. `network(tokens, state)` gives logits (B, T, V) and a state."""
    plan = plan_for(network, selection, context, stride)
    nats = np.zeros(len(plan.start))
    counts = np.zeros((4, len(plan.start)), np.int64)
    with tqdm(total=int(selection.predictions.sum()), unit=" tokens", desc="held-out text",
              disable=not progress) as bar:
        for batch, wanted, counted, losses in _batches(network, selection, plan, end, len(spelling.bytes), device):
            nats[batch] = (losses * counted).sum(1).numpy()
            counts[:, batch] = _counts(wanted.numpy(), counted.numpy(), spelling, end)
            bar.update(int(counts[0, batch].sum()))
    assert counts[0].sum() == selection.predictions.sum(), "every token is counted once"
    return Scores(nats, counts[0], counts[1], counts[2], counts[3], plan.document)


def each(network: Any, selection: Selection, end: int, size: int, plan: Plan, device: torch.device,
         head: int = 0, progress: bool = False) -> NDArray[np.float64]:
    """Nats of every prediction, in the order of `targets`: (sum of N,). `size` is V.

    A window that starts inside a document sees the `head` tokens after the document's opening end, its conditions, in
    the place of its own first ones, as data/windows.py has it in training.
    """
    first = np.cumsum(selection.predictions) - selection.predictions  # of each document, among the predictions
    place = first[plan.document] + plan.start - selection.starts[plan.document]  # (W,) of each window
    nats = np.full(int(selection.predictions.sum()), np.nan)
    with tqdm(total=len(nats), unit=" tokens", desc="held-out pieces", disable=not progress) as bar:
        for batch, _, counted, losses in _batches(network, selection, plan, end, size, device, head):
            row, column = np.nonzero(counted.numpy())
            nats[place[batch][row] + column] = losses.numpy()[row, column]
            bar.update(len(row))
    assert not np.isnan(nats).any(), "every token is counted once"
    return nats


def figure(selection: Selection, top: NDArray[Any], bottom: NDArray[Any], seed: int,
           unit: str = "documents") -> Figure:
    """sum(top) / sum(bottom), both (sum of N,), over documents, or over blocks of stretches where these are few."""
    if len(selection.starts) < FEW:
        cuts = np.arange(0, len(top), _STRETCH)
        return block_ratio(np.add.reduceat(top, cuts), np.add.reduceat(bottom, cuts), seed,
                           unit=f"stretches of {_STRETCH} tokens")
    return ratio(by_document(selection, top), by_document(selection, bottom), seed, unit=unit)


def by_document(selection: Selection, values: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of `values` (sum of N,) over each document, (documents,)."""
    first = np.cumsum(selection.predictions) - selection.predictions
    sums: NDArray[np.float64] = np.add.reduceat(values.astype(np.float64), first)
    return sums


def _plan(selection: Selection, context: int, stride: int) -> Plan:
    """Overlapping windows of at most `context` inputs; the last of a document ends with it."""
    assert 0 < stride <= context, (stride, context)
    n = selection.predictions
    beyond = np.maximum(n - context, 0)  # predictions after the first window
    document, k = _places(1 + -(-beyond // stride))
    start = np.minimum(k * stride, beyond[document])
    counted = np.where(k > 0, (k - 1) * stride + context, 0)
    length = np.minimum(n, context)[document]
    return Plan(document, selection.starts[document] + start, length, counted - start)


def segments(selection: Selection, context: int) -> Plan:
    """Segments of `context` inputs, one after another; the last of a document is what is left."""
    n = selection.predictions
    document, k = _places(-(-n // context))
    start = k * context
    length = np.minimum(n[document] - start, context)
    return Plan(document, selection.starts[document] + start, length, np.zeros_like(start))


def plan_for(network: Any, selection: Selection, context: int, stride: int) -> Plan:
    """Segments for a network that carries its state, and else windows."""
    return segments(selection, context) if carries(network) else _plan(selection, context, stride)


def carries(network: Any) -> bool:
    """Whether the network goes on from its state for ever."""
    return bool(getattr(network, "carries", False))


def _places(count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The document of each window, and its place there, (W,), from how many each document has."""
    document = np.repeat(np.arange(len(count)), count)
    return document, np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


_Batch = tuple[NDArray[np.int64], Tensor, Tensor, Tensor]  # windows (B,), targets, whether each counts, nats (B, T)


def _batches(network: Any, selection: Selection, plan: Plan, end: int, size: int, device: torch.device,
             head: int = 0) -> Iterator[_Batch]:
    """Every window's targets, whether they count, and their nats in fp64."""
    width = int(plan.length.max())
    rows = max(1, _LOGITS // (width * size))
    if not carries(network):
        return _apart(network, selection, plan, end, device, rows, head)
    most = max(1, _CARRIED // (width + getattr(network.settings, "memory", 0)))
    return _carried(network, selection, plan, end, device, min(rows, most))


def _apart(network: Any, selection: Selection, plan: Plan, end: int, device: torch.device, rows: int,
           head: int) -> Iterator[_Batch]:
    """Windows for themselves; rows of like length make batches without padding."""
    order = np.argsort(plan.length, kind="stable")
    for first in range(0, len(order), rows):
        batch = order[first:first + rows]
        inputs, wanted, counted = _batch(selection, plan, batch, end, head)
        losses, _ = _losses(network, inputs.to(device), wanted.to(device), None)
        yield batch, wanted, counted, losses


def _carried(network: Any, selection: Selection, plan: Plan, end: int, device: torch.device,
             rows: int) -> Iterator[_Batch]:
    """Documents side by side, the longest first, each segment going on from the one before."""
    count = np.bincount(plan.document)
    begin = np.cumsum(count) - count
    order = np.argsort(-selection.predictions, kind="stable")
    for first in range(0, len(order), rows):
        documents, state = order[first:first + rows], None
        for k in range(int(count[documents[0]])):
            documents = documents[count[documents] > k]  # the rows that have ended are the last ones
            batch = begin[documents] + k
            inputs, wanted, counted = _batch(selection, plan, batch, end)
            losses, state = _losses(network, inputs.to(device), wanted.to(device), _rows(state, len(batch)))
            yield batch, wanted, counted, losses


def _rows(state: Any, count: int) -> Any:
    """The state of the first rows: every tensor in its (named) tuples."""
    if not isinstance(state, tuple):
        return state[:count] if isinstance(state, Tensor) else state
    parts = [_rows(part, count) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _read(tokens: NDArray[Any], start: int, count: int, end: int) -> NDArray[Any]:
    """`count` tokens, an end token following the last one of the split."""
    piece = np.asarray(tokens[start:start + count])
    return piece if len(piece) == count else np.append(piece, np.asarray(end, piece.dtype))


def _batch(selection: Selection, plan: Plan, batch: NDArray[np.int64], end: int,
           head: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and whether a target counts, all (B, T). Rows are padded at the right, unseen."""
    width = int(plan.length[batch].max())
    both = np.full((len(batch), width + 1), end, np.int64)
    for row, w in enumerate(batch):
        both[row, :plan.length[w] + 1] = _read(selection.tokens, plan.start[w], plan.length[w] + 1, end)
        begun = selection.starts[plan.document[w]]
        if plan.start[w] > begun:
            assert plan.skip[w] >= head, "what stands in the place of the conditions is counted in another window"
            both[row, :head] = selection.tokens[begun + 1:begun + 1 + head]
    place = np.arange(width)
    counted = (place >= plan.skip[batch, None]) & (place < plan.length[batch, None])
    return torch.from_numpy(both[:, :-1]), torch.from_numpy(both[:, 1:]), torch.from_numpy(counted)


@torch.inference_mode()
def _losses(network: Any, inputs: Tensor, wanted: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The nats of each target (B, T) in fp64, and the state after the inputs."""
    logits, state = network(inputs, state)  # (B, T, V)
    losses = F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")  # (B, T)
    return losses.cpu().double(), state


def _counts(wanted: NDArray[np.int64], counted: NDArray[np.bool_], spelling: Spelling,
            end: int) -> NDArray[np.int64]:
    """Tokens, bytes, characters and symbols that each row counts, (4, B)."""
    characters = spelling.characters[wanted]
    parts = (np.ones_like(wanted), spelling.bytes[wanted], characters, characters + (wanted == end))
    return np.stack([(part * counted).sum(1) for part in parts])
