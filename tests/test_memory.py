"""The decoder's memory and relative positions (Transformer-XL) against the paper's formula, masks and itself."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from handmill.errors import UserError
from handmill.export.onnx_decoder import _Flat
from handmill.families.autoregressive import Reading
from handmill.networks.decoder import Attention, Decoder, Settings, State, with_memory
from handmill.networks.layers import aligned, rotary_table, sinusoids
from handmill.training.precision import HalfPrecision

ROTARY = Settings(layers=3, width=48, heads=4, kv_heads=2, context=16, memory=5)
RELATIVE = dataclasses.replace(ROTARY, positions="relative")
BOTH = pytest.mark.parametrize("settings", [ROTARY, RELATIVE], ids=["rotary", "relative"])
VOCABULARY = 61


def decoder(settings: Settings, seed: int = 1) -> Decoder:
    """A float64 network whose every weight is far from its initial value."""
    torch.manual_seed(seed)
    network = Decoder(settings, VOCABULARY).double().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def some_tokens(rows: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))  # (B, T)


def read(network: Any, tokens: Tensor, *sizes: int, state: State | None = None) -> tuple[Tensor, State]:
    """The logits of all tokens, read in pieces of these sizes, the last of them over and over."""
    parts, at = [], 0
    while at < tokens.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        logits, state = network(tokens[:, at:at + size], state)
        parts.append(logits)
        at += size
    assert state is not None
    return torch.cat(parts, 1), state  # (B, T, V)


def four_terms(attention: Attention, q: Tensor, k: Tensor, i: int, j: int, head: int) -> Tensor:
    """The score of query i for key j, term by term (Dai et al. 2019, section 3.3); q (T, H, D), k (T, K, D)."""
    s = attention.settings
    key_head = head * s.key_heads // s.heads
    angles = [(i - j) / s.theta ** (c / s.width) for c in range(0, s.width, 2)]
    encoding = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=q.dtype)  # (C,)
    distance = (attention.distance.weight @ encoding).view(s.key_heads, -1)[key_head]  # (D,)
    u, v = (bias.view(s.heads, -1)[head] for bias in (attention.content_bias, attention.distance_bias))
    content, key = q[i, head], k[j, key_head]
    return content @ key + content @ distance + u @ key + v @ distance


@pytest.mark.parametrize("memory", [0, 3])
@torch.no_grad()
def test_relative_attention_is_the_formula(memory: int) -> None:
    settings = Settings(layers=1, width=24, heads=4, kv_heads=2, memory=memory, positions="relative", qk_norm=False)
    network, length = decoder(settings), 7
    attention = network.blocks[0].attention
    x = torch.randn(1, length, 24, dtype=torch.float64)
    q, k, v = (layer(x)[0].unflatten(-1, (-1, 6)) for layer in (attention.query, attention.key, attention.value))
    heads = torch.zeros(length, 4, 6, dtype=torch.float64)
    for i in range(length):
        seen = range(max(0, i - memory) if memory else 0, i + 1)
        for h in range(4):
            scores = torch.stack([four_terms(attention, q, k, i, j, h) for j in seen]) / 6**0.5
            heads[i, h] = scores.softmax(0) @ v[list(seen), h // 2]
    positions = torch.arange(length)
    table, mask = network._table(positions, length, x.dtype), network._mask(positions, length, None)
    assert (attention(x, table, mask, None)[0][0] - heads.flatten(1) @ attention.out.weight.T).abs().max() < 1e-12


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (4, 4), (3, 8)])
def test_aligned_scores_stand_at_their_keys(queries: int, keys: int) -> None:
    by_distance = torch.randn(2, 3, queries, keys)
    by_key = aligned(by_distance)
    assert by_key.shape == by_distance.shape
    for i in range(queries):
        for j in range(keys - queries + i + 1):  # the keys up to the query's own
            distance = keys - queries + i - j
            assert torch.equal(by_key[..., i, j], by_distance[..., i, keys - 1 - distance])


def test_sinusoids() -> None:
    encoding = sinusoids(torch.tensor([0, 7]), 4, 100.0)
    expected = torch.tensor([[0, 0, 1, 1], [math.sin(7), math.sin(0.7), math.cos(7), math.cos(0.7)]])
    assert torch.allclose(encoding, expected)


@torch.no_grad()
def test_the_memory_is_a_sliding_window() -> None:
    """The plain decoder's blocks under a band of the mask, with rotary positions counted from the beginning."""
    network, tokens = decoder(ROTARY), some_tokens(2, 24)
    plain = with_memory(network, 0)
    distance = torch.arange(24)[:, None] - torch.arange(24)  # (T, S)
    x, table = plain.embedding(tokens), rotary_table(torch.arange(24), ROTARY.head_width, ROTARY.theta, torch.float64)
    for block in plain.blocks:
        x, _ = block(x, table, (distance >= 0) & (distance <= ROTARY.memory), None)
    assert (plain.head(plain.norm(x)) - network(tokens)[0]).abs().max() < 1e-12


@BOTH
@pytest.mark.parametrize("memory", [1, 5, 40])
@pytest.mark.parametrize("sizes", [(1,), (9, 1), (5, 1, 6), (23, 1), (1, 23), (4,), (16,)])
@torch.no_grad()
def test_the_cut_into_pieces_changes_nothing(settings: Settings, memory: int, sizes: tuple[int, ...]) -> None:
    network, tokens = with_memory(decoder(settings), memory), some_tokens(2, 24)
    logits, state = read(network, tokens, *sizes)
    assert (logits - network(tokens)[0]).abs().max() < 1e-12
    assert (state.length, state.kept) == (24, min(24, memory))
    assert all(x.shape == (2, 2, state.kept, 12) for x in (*state.keys, *state.values))


@BOTH
@torch.no_grad()
def test_rows_padded_on_the_left_read_on_as_if_alone(settings: Settings) -> None:
    network, tokens = decoder(settings), some_tokens(3, 30)
    padding = torch.tensor([0, 9, 4])
    padded = torch.stack([torch.cat((tokens.new_zeros(p), row[:30 - p]))
                          for p, row in zip(padding.tolist(), tokens, strict=True)])
    logits, state = read(network, padded, 12, 1, 1, 3, state=network.padded(padding))
    assert logits.isfinite().all()
    assert state.length == 30
    for row, p, ours in zip(tokens, padding.tolist(), logits, strict=True):
        assert (ours[p:] - network(row[None, :30 - p])[0][0]).abs().max() < 1e-12


@BOTH
@torch.no_grad()
def test_rows_may_be_taken_out_of_a_state(settings: Settings) -> None:
    network, tokens = decoder(settings), some_tokens(3, 20)
    _, state = network(tokens, network.padded(torch.tensor([0, 2, 1])))
    some = Reading(state, (state.length,) * state.keys[0].shape[0], state.length).rows([2, 0]).state
    assert some.length == state.length == 20
    following = some_tokens(3, 4)
    assert (network(following[[2, 0]], some)[0] - network(following, state)[0][[2, 0]]).abs().max() < 1e-12


@BOTH
@torch.no_grad()
def test_a_logit_hears_layers_times_memory_positions_back(settings: Settings) -> None:
    network, tokens = decoder(settings), some_tokens(1, 30)
    reach = settings.layers * settings.memory
    tokens, changed = tokens.expand(2, -1).contiguous(), 5
    tokens[1, changed] = (tokens[0, changed] + 1) % VOCABULARY
    logits = network(tokens)[0]
    difference = (logits[0] - logits[1]).abs().amax(-1)  # (T,)
    assert difference[:changed].max() == difference[changed + reach + 1:].max() == 0
    assert difference[changed:changed + reach + 1].min() > 0


@BOTH
@torch.no_grad()
def test_ten_thousand_tokens_on_nothing_has_drifted(settings: Settings) -> None:
    network, tokens = decoder(dataclasses.replace(settings, memory=16)).float(), some_tokens(1, 10_000)
    logits, state = read(network, tokens, 500)
    assert logits.isfinite().all()
    assert (state.length, state.kept) == (10_000, 16)
    reach = 3 * 16
    for end in (200, 7_301, 10_000):
        fresh = network(tokens[:, end - reach - 1:end])[0][0, -1]
        assert (fresh - logits[0, end - 1]).abs().max() < 2e-5 * fresh.abs().max()


@BOTH
def test_no_gradient_reaches_the_memory(settings: Settings) -> None:
    network, tokens = decoder(settings), torch.arange(32).view(1, 32)  # every token once

    def touched(cut: Any) -> Tensor:
        """Which tokens' embeddings the loss of the second segment has a gradient for."""
        network.zero_grad()
        state = cut(network(tokens[:, :16])[1])
        network(tokens[:, 16:], state, targets=tokens[:, 16:])[0].backward()
        return network.embedding.weight.grad.abs().amax(-1).nonzero()[:, 0]

    assert network.carries
    assert torch.equal(touched(network.detached), torch.arange(16, 32))
    assert torch.equal(touched(lambda state: state), torch.arange(16 - settings.layers * settings.memory, 32))
    assert not any(x.requires_grad for x in network.detached(network(tokens)[1])[0])


@BOTH
def test_half_precision_is_close(settings: Settings) -> None:
    exact, tokens = decoder(settings).float(), some_tokens(4, 33)
    half, losses, gradients = HalfPrecision(exact), [], []
    for network in (exact, half):
        exact.zero_grad()
        state, total = None, torch.zeros(())
        for first in (0, 16):
            part = tokens[:, first:first + 17]
            loss, state = network(part[:, :-1], state, targets=part[:, 1:])
            total, state = total + loss, exact.detached(state)
        total.backward()
        losses.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in exact.parameters()]))
    assert state.keys[0].dtype == torch.bfloat16
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.995


def arguments(rows: int, past: int, length: int) -> tuple[Any, ...]:
    caches = [[torch.randn(rows, 2, past, 12) for _ in range(2)] for _ in range(2)]
    return some_tokens(rows, length), torch.arange(rows), *caches


@BOTH
@torch.no_grad()
def test_a_step_can_be_captured(settings: Settings) -> None:
    """One token after a full memory, and one graph for every batch, past and chunk."""
    flat = _Flat(decoder(dataclasses.replace(settings, layers=2)).float())
    size = torch.export.Dim.DYNAMIC
    shapes = ({0: size, 1: size}, {0: size}, [{0: size, 2: size}] * 2, [{0: size, 2: size}] * 2)
    step = torch.export.export(flat, arguments(2, 5, 1)).module()
    every = torch.export.export(flat, arguments(3, 4, 7), dynamic_shapes=shapes).module()
    for program, sizes in ((step, (2, 5, 1)), (every, (2, 5, 1)), (every, (4, 2, 2)), (every, (2, 0, 9))):
        values = arguments(*sizes)
        for ours, expected in zip(program(*values), flat(*values), strict=True):
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < 1e-5


@BOTH
@torch.no_grad()
def test_another_memory_stands_on_the_same_weights(settings: Settings) -> None:
    network, tokens = decoder(settings), some_tokens(2, 30)
    before, other = network(tokens)[0], with_memory(network, 9)
    assert all(a is b for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert (other.settings.memory, network.settings.memory) == (9, 5)
    made = Decoder(dataclasses.replace(settings, memory=9), VOCABULARY).double().eval()
    made.load_state_dict(network.state_dict())
    assert torch.equal(other(tokens)[0], made(tokens)[0])
    assert torch.equal(network(tokens)[0], before)
    assert not torch.allclose(other(tokens)[0], before)
    assert not with_memory(network, 0).carries
    long = with_memory(network, 40)(tokens)[0]
    assert torch.allclose(with_memory(network, 0)(tokens)[0], long, atol=1e-4)  # both see everything


def test_tied_weights_stay_tied_with_another_memory() -> None:
    other = with_memory(Decoder(dataclasses.replace(ROTARY, tied=True), VOCABULARY), 9)
    assert other.head.weight is other.embedding.weight


@torch.no_grad()
def test_operations_count_the_memory() -> None:
    network = decoder(dataclasses.replace(ROTARY, kv_heads=0)).float()
    _, state = network(some_tokens(1, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(some_tokens(1, 1), state)
    assert network.flops_per_token() == 3 * counter.get_total_flops()
    relative = Decoder(dataclasses.replace(RELATIVE, kv_heads=0), VOCABULARY)
    assert relative.flops_per_token() > network.flops_per_token()


@pytest.mark.parametrize(("wrong", "says"), [
    ({"memory": -1}, "memory = -1 must be 0 or more"),
    ({"memory": 4, "positions": "learned"}, 'memory = 4 goes beyond learned positions.* set positions = "rotary"'),
    ({"width": 9, "heads": 3, "kv_heads": 0, "positions": "relative"}, "width = 9 must be even for relative"),
])
def test_settings_refuse(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(ROTARY, **wrong)


@BOTH
def test_what_lies_before_the_segment_is_learned_from(settings: Settings) -> None:
    """Nine tokens in ten repeat the one 6 before them, and segments are of 4: without a memory log 8 = 2.08 nats."""
    torch.manual_seed(3)
    text, fresh = torch.randint(8, (32, 1001)), torch.rand(32, 1001) < 0.1  # (B, T)
    for t in range(6, 1001):
        text[:, t] = torch.where(fresh[:, t], text[:, t], text[:, t - 6])
    network = Decoder(dataclasses.replace(settings, layers=1, context=4, memory=8, qk_norm=False), 8)
    optimizer, state, losses = torch.optim.AdamW(network.parameters(), 3e-3), None, []
    for first in range(0, 1000, 4):
        loss, state = network(text[:, first:first + 4], state, targets=text[:, first + 1:first + 5])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = network.detached(state)
        losses.append(loss.item() / 128)
    likely = 0.9 + 0.1 / 8
    entropy = -likely * math.log(likely) - (1 - likely) * math.log((1 - likely) / 7)
    assert sum(losses[-40:]) / 40 < entropy + 0.1
