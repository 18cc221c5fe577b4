"""What a memory is worth: perplexity of the same weights that see more or less of what came before a segment.

Dai et al. 2019 (Transformer-XL), section 4.3, where the memory is lengthened at evaluation alone.

N predictions of a document.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmill.checks.likelihood import Selection, each, figure, segments
from handmill.checks.tables import aligned, shown
from handmill.errors import UserError
from handmill.networks.decoder import Decoder, with_memory


def by_memory(network: Decoder, selection: Selection, end: int, memories: Sequence[int], device: torch.device,
              seed: int = 0, counted: NDArray[np.bool_] | None = None, progress: bool = False) -> list[dict[str, Any]]:
    """Perplexity at each memory length (positions), 0 first: there nothing is carried and a segment sees all of itself.

    Documents are read in segments of the network's context from their beginnings. Of each length: `memory`, `tokens`,
    `nats_per_token`, `perplexity`, and beside memory 0 `saved_nats_per_token` and `perplexity_ratio` (how many times
    as high it is without memory), with intervals of the paired difference. `counted` (sum of N,) leaves out
    predictions, such as conditions. Raises UserError for learned positions.
    """
    assert all(memory >= 0 for memory in memories), memories
    plan, rows = segments(selection, network.settings.context), []
    counts = np.ones(int(selection.predictions.sum())) if counted is None else counted.astype(np.float64)
    without = None
    for memory in sorted({0, *memories}):
        other = with_memory(network, memory)
        nats = each(other, selection, end, network.vocabulary, plan, device, progress=progress) * counts  # (sum of N,)
        without = nats if without is None else without
        rows.append({"memory": memory, "tokens": int(counts.sum())}
                    | _figures(selection, nats, without - nats, counts, seed))
    return rows


def of(model: Any, selection: Selection, memories: Sequence[int], seed: int,
       counted: NDArray[np.bool_] | None = None, progress: bool = False) -> dict[str, Any]:
    """{"memory": rows of `by_memory`} of a loaded model, nothing where no lengths are named.

    Raises UserError for a network without a memory.
    """
    if not memories:
        return {}
    if not getattr(model.recipe.network, "memory", 0):
        raise UserError(f"check.memories = {list(memories)} is for a decoder with a memory: train with network.memory "
                        "above 0, or leave it out")
    return {"memory": by_memory(model.network, selection, model.codec.end, memories, model.device, seed, counted,
                                progress)}


def stream(tokens: NDArray[Any]) -> Selection:
    """A stream of tokens (N + 1,) as one document, of which all but the first are predicted."""
    assert len(tokens) > 1, "nothing to predict"
    return Selection("stream", tokens, np.zeros(1, np.int64), np.array([len(tokens) - 1]), 1, True)


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the screen shows; nothing without rows."""
    if not rows:
        return []
    table = [("memory, positions", "perplexity per token", "times as high without memory")]
    table += [(f"{row['memory']:,}", shown(row["perplexity"]), shown(row["perplexity_ratio"])) for row in rows]
    one = rows[0]["perplexity"]
    return [*aligned(table), f"{rows[0]['tokens']:,} tokens; intervals of 95 %: {one['method']}, n = {one['n']}", ""]


def _figures(selection: Selection, nats: NDArray[np.float64], saved: NDArray[np.float64], counts: NDArray[np.float64],
             seed: int) -> dict[str, Any]:
    """The same seed draws the same documents, so the differences are paired."""
    own, less = figure(selection, nats, counts, seed), figure(selection, saved, counts, seed)
    return {"nats_per_token": own.plain(), "perplexity": own.exponential().plain(),
            "saved_nats_per_token": less.plain(), "perplexity_ratio": less.exponential().plain()}
