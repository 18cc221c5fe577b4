"""The order of the data: a permutation, complete, and the same however the work is split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data.order import draw, permute, window_starts, windows_in_epoch
from handmill.data.windows import Windows, in_turn
from handmill.errors import UserError


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**62))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_looks_shuffled() -> None:
    """Of a random permutation of n, about one element stays in place and neighbours are n / 3 apart."""
    moved = permute(np.arange(10_000), 10_000, 5)
    assert (moved == np.arange(10_000)).sum() < 10
    assert abs(np.abs(np.diff(moved)).mean() / 10_000 - 1 / 3) < 0.02


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(20, 2000), context=st.integers(1, 19), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_an_epoch_sees_every_token_once(tokens: int, context: int, seed: int, epoch: int) -> None:
    """Once each; only fewer than two contexts at the two ends together may be left for other epochs."""
    windows = windows_in_epoch(tokens, context)
    if windows == 0:
        return
    places = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = window_starts(places, tokens, context, seed)
    predicted = (starts[:, None] + 1 + np.arange(context)).ravel()
    assert len(np.unique(predicted)) == predicted.size == windows * context
    assert predicted.max() < tokens
    assert tokens - 1 - predicted.size < 2 * context


def test_order_does_not_depend_on_how_places_are_split() -> None:
    whole = window_starts(np.arange(500), 3000, 16, 7)
    parts = [window_starts(part, 3000, 16, 7) for part in np.array_split(np.arange(500), 7)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, window_starts(np.arange(500), 3000, 16, 8))


def test_epochs_differ() -> None:
    n = windows_in_epoch(3000, 16)
    first, second = (window_starts(np.arange(n) + e * n, 3000, 16, 1) for e in (0, 1))
    assert not np.array_equal(first, second)


def test_the_order_is_the_same_in_every_release() -> None:
    """A resumed run must see the order it began with: these numbers may only change with a new major version."""
    assert draw(1, "order", 0) == 299572666420262285
    assert window_starts(np.arange(5), 1000, 10, 1).tolist() == [723, 293, 233, 203, 123]


def test_batches_are_windows_of_the_stream() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batch = Windows(tokens, 10, 1).batch(np.arange(4))
    assert batch.shape == (4, 11)
    assert torch.equal(batch - batch[:, :1], torch.arange(11).expand(4, 11))
    with pytest.raises(UserError, match="less than one context"):
        Windows(tokens[:10], 10, 1)


def test_windows_in_turn() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    windows = in_turn(tokens, 10)
    assert windows[:, 1:].reshape(-1).tolist() == list(range(1, 91))
    assert in_turn(tokens, 10, limit=30).shape == (3, 11)
    assert in_turn(tokens[:5], 10).shape == (1, 5)


@pytest.mark.parametrize("tokens", [17, 20, 31, 33, 47])
def test_a_short_text_is_told_a_context_that_works(tokens: int) -> None:
    text = np.zeros(tokens, np.uint16)
    try:
        Windows(text, 16, 1)
    except UserError as error:
        Windows(text, int(str(error).rsplit(" ", 1)[1]), 1)


@pytest.mark.parametrize("tokens", [100, 111, 112, 113])
def test_every_token_is_predicted_in_some_epoch(tokens: int) -> None:
    """Only the first can never be: nothing stands before it."""
    windows, predicted = windows_in_epoch(tokens, 16), np.zeros(tokens, bool)
    starts = window_starts(np.arange(400 * windows), tokens, 16, 1)
    predicted[(starts[:, None] + 1 + np.arange(16)).ravel()] = True
    assert np.flatnonzero(~predicted).tolist() == [0]
