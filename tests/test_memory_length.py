"""Perplexity against the length of a decoder's memory."""

import json
from typing import Any, Literal

import numpy as np
import pytest
import torch

from handmill.checks.likelihood import Selection
from handmill.checks.memory import by_memory, lines, stream
from handmill.errors import UserError
from handmill.networks.decoder import Decoder, Settings, with_memory

CPU = torch.device("cpu")
V = 11


def network_of(positions: Literal["rotary", "learned", "relative"] = "relative", memory: int = 8) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(Settings(layers=2, width=16, heads=2, context=8, memory=memory, positions=positions), V)
    for parameter in made.parameters():
        parameter.data.add_(0.4 * torch.randn_like(parameter))
    return made.eval()


def documents(lengths: list[int]) -> Selection:
    generator = np.random.default_rng(0)
    parts = [np.append(0, generator.integers(1, V, length - 1)) for length in lengths]
    counts = np.array(lengths)
    return Selection("test", np.concatenate(parts).astype(np.uint16), np.cumsum(counts) - counts, counts, 1, True)


@torch.no_grad()
def nats_of(network: Decoder, tokens: list[int]) -> list[float]:
    """All in one call."""
    logits, _ = network(torch.tensor([tokens[:-1]]))
    chances = torch.log_softmax(logits[0].double(), 1)
    return [-float(chances[i, token]) for i, token in enumerate(tokens[1:])]


def each_alone(network: Decoder, selection: Selection, memory: int) -> list[float]:
    """A memory of all documents in one call each; without one, segment for segment."""
    found: list[float] = []
    other = with_memory(network, memory)
    for start, length in zip(selection.starts, selection.predictions, strict=True):
        tokens = [*map(int, selection.tokens[start:start + length]), 0]
        cuts = range(0, length, 8) if not memory else [0]
        found += [x for cut in cuts for x in nats_of(other, tokens[cut:cut + 9] if not memory else tokens)]
    return found


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_each_memory_against_whole_documents(positions: Any) -> None:
    network, selection = network_of(positions), documents([30, 9, 8, 7, 1, *range(10, 30)])
    rows = by_memory(network, selection, 0, [16, 4], CPU)
    assert [row["memory"] for row in rows] == [0, 4, 16]
    nothing = np.mean(each_alone(network, selection, 0))
    for row in rows:
        nats = np.mean(each_alone(network, selection, row["memory"]))
        assert row["tokens"] == selection.predictions.sum()
        assert row["nats_per_token"]["value"] == pytest.approx(nats, rel=1e-4)
        assert row["perplexity"]["value"] == pytest.approx(np.exp(nats), rel=1e-4)
        assert row["saved_nats_per_token"]["value"] == pytest.approx(nothing - nats, abs=1e-4)
        assert row["perplexity_ratio"]["value"] == pytest.approx(np.exp(nothing - nats), rel=1e-4)
        assert row["perplexity"]["n"] == 25
    assert network.settings.memory == 8


def test_the_difference_is_paired() -> None:
    network, selection = network_of(), documents([*range(10, 40)])
    none, some = by_memory(network, selection, 0, [12], CPU, seed=3)
    assert (none["saved_nats_per_token"]["low"], none["saved_nats_per_token"]["high"]) == (0, 0)
    saved, own = some["saved_nats_per_token"], some["nats_per_token"]
    assert saved["low"] <= saved["value"] <= saved["high"]
    assert (none["nats_per_token"]["low"] - own["high"]) < saved["low"]  # tighter than the two intervals apart


def test_some_predictions_only() -> None:
    network, selection = network_of(), documents([20] * 20)
    counted = np.arange(400) % 20 >= 8  # all but the first segment of each
    rows = by_memory(network, selection, 0, [8], CPU, counted=counted)
    for row in rows:
        nats = np.array(each_alone(network, selection, row["memory"]))[counted]
        assert row["tokens"] == 240
        assert row["nats_per_token"]["value"] == pytest.approx(nats.mean(), rel=1e-4)


def test_a_stream_is_one_document_and_has_blocks_for_its_interval() -> None:
    network = network_of()
    tokens = np.random.default_rng(1).integers(1, V, 2001).astype(np.uint16)
    rows = by_memory(network, stream(tokens), 0, [8], CPU)
    assert rows[1]["tokens"] == 2000
    assert rows[1]["nats_per_token"]["value"] == pytest.approx(
        np.mean(nats_of(network, tokens.tolist())), rel=1e-4)
    assert "stretches" in rows[1]["perplexity"]["method"]
    assert rows[1]["perplexity_ratio"]["low"] < rows[1]["perplexity_ratio"]["high"]
    told = "\n".join(lines(rows))
    assert "perplexity per token" in told
    assert "memory, positions" in told
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_learned_positions_have_no_memory() -> None:
    with pytest.raises(UserError, match="learned positions"):
        by_memory(network_of("learned", 0), documents([20]), 0, [8], CPU)
