"""A decoder-only transformer: GPT-2's shape, Llama's, and what lies between, by explicit settings.

Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama); Ainslie et al. 2023 (grouped queries);
Dehghani et al. 2023 (query-key norm); So et al. 2021 (squared ReLU); Shazeer 2020 (SwiGLU).

B batch, T new positions, S all positions so far, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.layers import (
    LayerNorm,
    RMSNorm,
    attend,
    linear_cross_entropy,
    relu_squared,
    rotary_table,
    rotate,
)
from handmill.recipe import not_negative, positive, within


@dataclass(frozen=True)
class Settings:
    """The [network] table of a decoder."""

    kind: Literal["decoder"] = "decoder"
    layers: int = 4
    width: int = 128  # C, channels of the residual stream
    heads: int = 4  # H, query heads
    kv_heads: int = 0  # K, key and value heads; 0: as many as query heads
    context: int = 256  # T, tokens seen in training
    hidden: int = 0  # units of the MLP; 0: 4 C, and 8/3 C (a multiple of 32) with SwiGLU
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    theta: float = 10_000.0  # base of the rotary wavelengths
    activation: Literal["gelu", "swiglu", "relu2"] = "relu2"
    attention_scale: float = 0.0  # times q k^T; 0: 1 / sqrt(D)
    qk_norm: bool = True  # layer norm of queries and keys, no gain, before the rotation
    tied: bool = False  # the output head shares the embedding's weights
    gain: bool = True  # LayerNorm has a learned gain
    bias: bool = False  # in every linear layer and LayerNorm
    dropout: float = 0.0
    start: Literal["gpt2", "zero"] = "zero"  # initial weights, see Decoder._initialise

    def __post_init__(self) -> None:
        positive(self, "layers", "width", "heads", "context", "norm_epsilon", "theta")
        within(self, 0.0, 0.99, "dropout")
        not_negative(self, "kv_heads", "hidden", "attention_scale")
        if self.width % self.heads:
            raise UserError(f"width = {self.width} is not divisible by heads = {self.heads}: "
                            f"choose a multiple of {self.heads}")
        if self.heads % self.key_heads:
            raise UserError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}: "
                            "each key head serves the same number of query heads")
        if self.positions == "rotary" and self.head_width % 2:
            raise UserError(f"width / heads = {self.head_width} must be even for rotary positions")

    @property
    def head_width(self) -> int:  # D
        return self.width // self.heads

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_width**-0.5

    @property
    def key_heads(self) -> int:  # K
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        swiglu = 32 * math.ceil(self.width * 8 / 3 / 32)
        return self.hidden or (swiglu if self.activation == "swiglu" else 4 * self.width)


class State(NamedTuple):
    """Keys and values of every position so far, and how many positions at the left of each row are padding."""

    keys: tuple[Tensor, ...]  # a layer: (B, K, S, D)
    values: tuple[Tensor, ...]  # a layer: (B, K, S, D)
    padding: Tensor | None = None  # (B,) int64; None: no row is padded

    @property
    def length(self) -> int:  # S
        return self.keys[0].shape[2]


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = s = settings
        self.query = nn.Linear(s.width, s.heads * s.head_width, bias=s.bias)
        self.key = nn.Linear(s.width, s.key_heads * s.head_width, bias=s.bias)
        self.value = nn.Linear(s.width, s.key_heads * s.head_width, bias=s.bias)
        self.out = nn.Linear(s.heads * s.head_width, s.width, bias=s.bias)
        if s.qk_norm:
            self.qk_norm = LayerNorm(s.head_width, s.norm_epsilon, gain=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s = self.settings
        q = self.query(x).unflatten(-1, (s.heads, s.head_width)).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).unflatten(-1, (s.key_heads, s.head_width)).transpose(1, 2)  # (B, K, T, D)
        v = self.value(x).unflatten(-1, (s.key_heads, s.head_width)).transpose(1, 2)  # (B, K, T, D)
        if s.qk_norm:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, K, S, D)
        y = attend(q, k, v, mask, s.scale, s.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    """Two linear layers and what stands between them: GELU (tanh form, as GPT-2), squared ReLU, or SwiGLU."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.activation = settings.activation
        self.up = nn.Linear(settings.width, settings.hidden_width, bias=settings.bias)
        self.down = nn.Linear(settings.hidden_width, settings.width, bias=settings.bias)
        if self.activation == "swiglu":
            self.gate = nn.Linear(settings.width, settings.hidden_width, bias=settings.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        hidden = self.up(x)
        return self.down(F.gelu(hidden, approximate="tanh") if self.activation == "gelu" else relu_squared(hidden))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention_norm = _norm(settings)
        self.attention = Attention(settings)
        self.mlp_norm = _norm(settings)
        self.mlp = MLP(settings)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.attention(self.attention_norm(x), rotary, mask, past)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), present


class Decoder(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V), with the state that lets the next call go on from here."""

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        super().__init__()
        assert vocabulary > 0
        self.settings, self.vocabulary = settings, vocabulary
        self.embedding = nn.Embedding(vocabulary, settings.width)
        if settings.positions == "learned":
            self.position = nn.Embedding(settings.context, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = _norm(settings)
        self.head = nn.Linear(settings.width, vocabulary, bias=False)
        if settings.tied:
            self.head.weight = self.embedding.weight
        self._initialise()

    def forward(self, tokens: Tensor, state: State | None = None,
                targets: Tensor | None = None) -> tuple[Tensor, State]:
        """With `targets` (B, T), the summed loss in nats stands in the place of the logits."""
        x, state = self.features(tokens, state)  # (B, T, C)
        if targets is not None:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten()), state
        return self.head(x), state  # (B, T, V)

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads: (B, T, C), and the state after these tokens."""
        assert tokens.ndim == 2, tokens.shape
        s, length = self.settings, tokens.shape[1]
        start = state.length if state is not None and state.keys else 0
        padding = state.padding if state is not None else None
        assert s.positions == "rotary" or start + length <= s.context, "learned positions end at the context"
        positions = torch.arange(start, start + length, device=tokens.device)  # (T,)
        mask = self._mask(positions, start + length, padding) if padding is not None or (start and length > 1) else None
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        x = self.embedding(tokens)  # (B, T, C)
        rotary = None
        if s.positions == "learned":
            x = x + self.position(positions)
        else:
            cos, sin = rotary_table(positions, s.head_width, s.theta)
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            rotary = (cos, sin) if padding is None else (cos[:, None], sin[:, None])  # (T, D) or (B, 1, T, D)
        x = self.dropout(x)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            past = (state.keys[i], state.values[i]) if start and state is not None else None
            x, (k, v) = block(x, rotary, mask, past)
            keys.append(k)
            values.append(v)
        return self.norm(x), State(tuple(keys), tuple(values), padding)

    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token: 6 a matrix weight, and the causal half of attention
        (Kaplan et al. 2020, table 1)."""
        s = self.settings
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6.0 * matrices + 6.0 * s.layers * s.context * s.heads * s.head_width

    @staticmethod
    def padded(padding: Tensor) -> State:
        """The empty state for rows whose first `padding` (B,) tokens are to be ignored."""
        return State((), (), padding)

    @staticmethod
    def _mask(positions: Tensor, end: int, padding: Tensor | None) -> Tensor:
        """True where a query at `positions` (T,) may look: (T, S = end), or (B, 1, T, S) where rows are padded."""
        seen = torch.arange(end, device=positions.device)  # (S,)
        causal = seen <= positions[:, None]  # (T, S)
        if padding is None:
            return causal
        real = seen >= padding[:, None, None, None]  # (B, 1, 1, S)
        itself = seen == positions[:, None]  # a padding row sees itself, so that no softmax is empty
        return causal & (real | itself)

    def _initialise(self) -> None:
        """"gpt2": deviation 0.02, smaller by sqrt(2 layers) where the residual stream is written (GPT-2, 2.3).

        "zero": deviation 1 / sqrt(fan-in), the embedding 1, and what writes to the residual stream or the logits 0,
        so that every block starts as the identity and Muon's updates set the scale.
        """
        s = self.settings
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)
                continue
            last = name.endswith(("out.weight", "down.weight"))
            if s.start == "gpt2":
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.layers) if last else 0.02)
            elif last or name == "head.weight":
                nn.init.zeros_(p)
            else:
                outside = name.startswith(("embedding", "position"))
                nn.init.normal_(p, std=(0.02 if s.tied else 1.0) if outside else p.shape[1] ** -0.5)


def _norm(settings: Settings) -> nn.Module:
    if settings.norm == "rms":
        return RMSNorm(settings.width, settings.norm_epsilon)
    return LayerNorm(settings.width, settings.norm_epsilon, settings.gain, settings.bias)
