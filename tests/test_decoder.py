"""The decoder against `transformers` and against itself: causality, cache, padding, grouped queries."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from handmill.errors import UserError
from handmill.export.huggingface import config, from_huggingface, to_huggingface
from handmill.networks.decoder import Decoder, Settings, State
from handmill.networks.layers import rotary_table, rotate

GPT2 = Settings(layers=3, width=48, heads=4, context=40, norm="layer", norm_epsilon=1e-5, positions="learned",
                activation="gelu", qk_norm=False, tied=True, bias=True)
LLAMA = Settings(layers=3, width=48, heads=6, kv_heads=2, context=40, hidden=80, norm="rms",
                 positions="rotary", theta=500.0, activation="swiglu", qk_norm=False)
DEFAULT = Settings(layers=3, width=48, heads=4, kv_heads=2, context=40)
SHAPES = {
    "gpt2": GPT2, "gpt2 untied": dataclasses.replace(GPT2, tied=False),
    "gpt2 without bias": dataclasses.replace(GPT2, bias=False, hidden=100),
    "gpt2 without gain": dataclasses.replace(GPT2, gain=False, bias=False, attention_scale=0.1),
    "llama": LLAMA, "llama tied": dataclasses.replace(LLAMA, tied=True),
    "llama with bias": dataclasses.replace(LLAMA, bias=True, kv_heads=0, attention_scale=0.5),
    "default": DEFAULT,
    "scaled": dataclasses.replace(DEFAULT, norm="layer", gain=False, attention_scale=0.35),
    "relative": dataclasses.replace(DEFAULT, positions="relative"),
    "memory": dataclasses.replace(DEFAULT, memory=11),
    "relative memory": dataclasses.replace(DEFAULT, positions="relative", memory=11),
}
VOCABULARY = 61


def decoder(settings: Settings, seed: int = 1) -> Decoder:
    """A network whose every weight is far from its initial value, so that no layer is near the identity."""
    torch.manual_seed(seed)
    network = Decoder(settings, VOCABULARY).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))  # (B, T)


def theirs(settings: Settings) -> Any:
    """The network of the same settings in `transformers`."""
    transformers = pytest.importorskip("transformers")
    values = config(settings, VOCABULARY, 0)
    cls = getattr(transformers, values.pop("architectures")[0])
    for key in ("model_type", "dtype", "rope_theta"):
        values.pop(key, None)
    torch.manual_seed(3)
    return cls(cls.config_class(**values, initializer_range=0.1)).eval()


HUGGINGFACE = [name for name in SHAPES if name.startswith(("gpt2", "llama"))]


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_our_weights_give_the_logits_of_transformers(name: str) -> None:
    settings = SHAPES[name]
    ours, other = decoder(settings), theirs(settings)
    report = other.load_state_dict(to_huggingface(ours.state_dict(), settings), strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= ({"lm_head.weight"} if settings.tied else set())
    tokens = some_tokens(3, 40)
    expected = other(tokens).logits
    assert expected.std() > 0.1
    assert (ours(tokens)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_weights_of_transformers_give_their_logits_in_ours(name: str) -> None:
    settings = SHAPES[name]
    other, ours = theirs(settings), Decoder(settings, VOCABULARY).eval()
    weights = from_huggingface(other.state_dict(), settings)
    report = ours.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= ({"head.weight"} if settings.tied else set())
    tokens = some_tokens(3, 40)
    expected = other(tokens).logits
    assert (ours(tokens)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_the_mapping_of_names_goes_there_and_back(name: str) -> None:
    settings = SHAPES[name]
    weights = {k: v for k, v in decoder(settings).state_dict().items() if not (settings.tied and "head" in k)}
    back = from_huggingface(to_huggingface(weights, settings), settings)
    assert back.keys() == weights.keys()
    assert all(torch.allclose(back[key], weights[key], rtol=1e-6, atol=0) for key in weights)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_token_changes_no_logit_before_it(name: str) -> None:
    network = decoder(SHAPES[name]).double()
    tokens = some_tokens(2, 24)
    logits = network(tokens)[0]
    for t in (1, 7, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        after = network(changed)[0]
        assert torch.equal(after[:, :t], logits[:, :t])
        assert (after[:, t:] - logits[:, t:]).abs().amax(-1).gt(1e-4).all()  # and every later one does change


@pytest.mark.parametrize("name", SHAPES)
def test_no_gradient_reaches_a_later_token(name: str) -> None:
    network = decoder(SHAPES[name]).double()
    tokens, seen = some_tokens(1, 12), {}
    network.embedding.register_forward_hook(lambda _m, _i, out: seen.update(x=out.requires_grad_(True)))
    logits = network(tokens)[0]
    (gradient,) = torch.autograd.grad(logits[0, 5].square().sum(), seen["x"])
    assert torch.equal(gradient[0, 6:], torch.zeros_like(gradient[0, 6:]))
    assert gradient[0, :6].abs().amax(-1).gt(0).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunks", [(1,) * 20, (9, *(1,) * 11), (5, 1, 6, 8), (19, 1), (1, 19)])
@torch.no_grad()
def test_cached_equals_uncached(name: str, chunks: tuple[int, ...]) -> None:
    network = decoder(SHAPES[name]).double()
    tokens = some_tokens(2, 20)
    expected, state = network(tokens)[0], None
    parts = []
    for chunk in tokens.split(chunks, dim=1):
        logits, state = network(chunk, state)
        parts.append(logits)
    assert isinstance(state, State)
    assert state.length == 20
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_left_padding_changes_nothing(name: str) -> None:
    network = decoder(SHAPES[name]).double()
    lengths, longest = (4, 11, 9), 11
    rows = [some_tokens(3, longest + 5)[i, :length + 5] for i, length in enumerate(lengths)]
    padded = torch.stack([torch.cat((torch.zeros(longest - n, dtype=torch.long), row))
                          for n, row in zip(lengths, rows, strict=True)])  # (B, T)
    state = network.padded(torch.tensor([longest - n for n in lengths]))
    parts = []
    for chunk in padded.split((longest, 1, 1, 3), dim=1):
        logits, state = network(chunk, state)
        parts.append(logits)
    together = torch.cat(parts, 1)  # (B, T, V)
    assert together.isfinite().all()
    for row, length, logits in zip(rows, lengths, together, strict=True):
        alone = network(row[None])[0][0]
        assert (logits[longest - length:] - alone).abs().max() < 1e-12


@torch.no_grad()
def test_grouped_queries_are_repeated_key_heads() -> None:
    grouped = decoder(DEFAULT).double()
    full = Decoder(dataclasses.replace(DEFAULT, kv_heads=0), VOCABULARY).double().eval()
    weights = grouped.state_dict()
    for key in weights:
        if ".attention.key." in key or ".attention.value." in key:
            heads = weights[key].unflatten(0, (DEFAULT.key_heads, DEFAULT.head_width))  # (K, D, C)
            weights[key] = heads.repeat_interleave(DEFAULT.heads // DEFAULT.key_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = some_tokens(2, 30)
    assert (full(tokens)[0] - grouped(tokens)[0]).abs().max() < 1e-12


@torch.no_grad()
def test_attention_is_the_formula() -> None:
    network = decoder(dataclasses.replace(DEFAULT, layers=1, positions="learned", qk_norm=False)).double()
    attention = network.blocks[0].attention
    x = torch.randn(1, 6, 48, dtype=torch.float64)
    q, k, v = (layer(x)[0] for layer in (attention.query, attention.key, attention.value))
    heads = []
    for h in range(4):
        one = slice(h // 2 * 12, h // 2 * 12 + 12)  # two query heads share a key head
        score = q[:, h * 12:h * 12 + 12] @ k[:, one].T / 12**0.5
        score = score.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(score.softmax(-1) @ v[:, one])
    expected = torch.cat(heads, -1) @ attention.out.weight.T
    assert (attention(x, (), None, None)[0][0] - expected).abs().max() < 1e-12


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 9, 12)  # each (B, H, T, D)

    def products(first: int) -> Tensor:
        cos, sin = rotary_table(torch.arange(first, first + 9), 12, 50.0)
        return rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2)

    assert (products(0) - products(31)).abs().max() < 1e-5
    assert (products(0) - q @ k.transpose(-1, -2)).abs().max() > 0.1
    assert torch.equal(rotate(q, *rotary_table(torch.zeros(9), 12, 50.0)), q)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    settings = SHAPES[name]
    network = decoder(settings)
    logits, state = network(some_tokens(2, 7))
    assert logits.shape == (2, 7, VOCABULARY)
    assert len(state.keys) == len(state.values) == settings.layers
    head = (2, settings.key_heads, 7, settings.head_width)
    assert all(x.shape == head for x in (*state.keys, *state.values))
    assert (network.head.weight is network.embedding.weight) == settings.tied
    assert any(".bias" in name for name in network.state_dict()) == settings.bias


def test_dropout_works_in_training_only() -> None:
    network = decoder(dataclasses.replace(DEFAULT, dropout=0.5))
    tokens = some_tokens(1, 9)
    assert torch.equal(network(tokens)[0], network(tokens)[0])
    network.train()
    assert not torch.equal(network(tokens)[0], network(tokens)[0])


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = decoder(DEFAULT, 1), decoder(DEFAULT, 1), decoder(DEFAULT, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"width": 50}, "width = 50 is not divisible by heads = 4"),
    ({"kv_heads": 3}, "heads = 4 is not divisible by kv_heads = 3"),
    ({"width": 12}, "must be even for rotary positions"),
    ({"layers": 0}, "layers = 0 must be above 0"),
    ({"context": -1}, "context = -1 must be above 0"),
    ({"dropout": 1.0}, "dropout = 1.0 must lie between"),
    ({"norm_epsilon": 0.0}, "norm_epsilon"),
    ({"theta": float("nan")}, "theta"),
])
def test_settings_refuse(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(Settings(), **wrong)


def test_learned_positions_end_at_the_context() -> None:
    network = decoder(GPT2)
    _, state = network(some_tokens(1, 40))
    with pytest.raises(AssertionError, match="context"):
        network(some_tokens(1, 1), state)


@torch.no_grad()
def test_the_decoder_can_be_captured_with_any_past() -> None:
    """One `torch.export` graph must serve every batch, past and chunk: what the export to ONNX stands on."""
    network = decoder(DEFAULT)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Tensor, padding: Tensor, keys: Any, values: Any) -> Tensor:
            return self.network(tokens, State(tuple(keys), tuple(values), padding))[0]

    def past(rows: int, length: int) -> list[Tensor]:
        return [torch.randn(rows, 2, length, 12) for _ in range(3)]

    any_size = torch.export.Dim.DYNAMIC
    sizes = [{0: any_size, 2: any_size}] * 3
    example = (some_tokens(3, 7), torch.tensor([0, 2, 3]), past(3, 5), past(3, 5))
    program = torch.export.export(
        Flat(), example, dynamic_shapes=({0: any_size, 1: any_size}, {0: any_size}, sizes, sizes))
    arguments = (some_tokens(2, 4), torch.tensor([0, 6]), past(2, 9), past(2, 9))
    assert (program.module()(*arguments) - Flat()(*arguments)).abs().max() < 1e-6
