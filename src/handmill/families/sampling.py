"""Pure functions from logits to the next token. B rows, V vocabulary.

`filtered` applies them in the order penalty, temperature, top-k, top-p, min-p. A dropped token has the logit
-inf; every row keeps at least one token.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` (B, V) bool less likely by `penalty` (Keskar et al. 2019, section 4.1).

    Positive logits are divided and negative ones multiplied, since dividing a negative logit would raise it.
    """
    assert logits.shape == seen.shape, (logits.shape, seen.shape)
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)  # (B, V)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and what ties with the k-th (Fan et al. 2018)."""
    assert k > 0
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to at least p: the nucleus (Holtzman et al. 2020)."""
    assert 0 < p <= 1
    ordered, order = logits.sort(descending=True, stable=True)  # (B, V)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # (B, V) the mass above each token; 0 for the first
    drop = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    assert 0 <= p <= 1
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(-1, keepdim=True), -torch.inf)


def filtered(logits: Tensor, seen: Tensor, *, temperature: float, k: int, p: float, least: float,
             penalty: float) -> Tensor:
    """The logits (B, V) float64 to draw from. Temperature 0 keeps the likeliest token only; k 0 is all."""
    assert logits.ndim == 2, logits.shape
    assert logits.isfinite().all(), "the network gave a logit that is not a number"
    logits = logits.double()
    if penalty != 1:
        logits = penalise(logits, seen, penalty)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no temperature, however low, overflows
    if k:
        logits = top_k(logits, k)
    if p < 1:
        logits = top_p(logits, p)
    return min_p(logits, least) if least > 0 else logits


def uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1) that depends on the three numbers alone: 48 bits of their BLAKE2 hash."""
    key = struct.pack("<3q", seed, row, step)
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little") / 2**48


def draw(logits: Tensor, seed: int, rows: Sequence[int], step: int) -> Tensor:
    """One token a row (B,) int64, by inverting the distribution of logits (B, V) at `uniform`.

    No state is kept: a row's draws depend neither on other rows, nor on the runtime, nor on when it draws.
    """
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    chance = [[uniform(seed, row, step)] for row in rows]
    at = torch.tensor(chance, dtype=torch.float64, device=logits.device) * cumulative[:, -1:]  # (B, 1)
    # right=True: the first token whose cumulative probability exceeds `at`, so never one of probability 0
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)  # (B,)
