"""A decoder-only transformer: GPT-2's shape, Llama's, Transformer-XL's, and what lies between, by explicit settings.

Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama); Ainslie et al. 2023 (grouped queries);
Dehghani et al. 2023 (query-key norm); So et al. 2021 (squared ReLU); Shazeer 2020 (SwiGLU);
Dai et al. 2019 (Transformer-XL: the memory, relative positions).

Without a memory a query sees every position before it. With a memory of M it sees the last M positions and itself,
in every layer: a sliding window, so that the logits do not depend on how a text is cut into calls, and what a segment
sees in training it sees in evaluation and sampling. (The paper lets the first query of a segment see the same M
positions, and later ones M and those of the segment before them.) Through L layers a logit hears L M positions.

B batch, T new positions, S positions to look at, C width, H query heads, K key/value heads, D head width,
M memory, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.layers import (
    LayerNorm,
    RMSNorm,
    aligned,
    attend,
    linear_cross_entropy,
    relu_squared,
    rotary_table,
    rotate,
    sinusoids,
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
    context: int = 256  # T, tokens seen in training; with a memory, of a segment
    memory: int = 0  # M, positions before the segment whose keys and values stay visible, carried and detached; 0: none
    hidden: int = 0  # units of the MLP; 0: 4 C, and 8/3 C (a multiple of 32) with SwiGLU
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    theta: float = 10_000.0  # base of the wavelengths of rotary and relative positions
    activation: Literal["gelu", "swiglu", "relu2"] = "relu2"
    attention_scale: float = 0.0  # times q k^T; 0: 1 / sqrt(D)
    qk_norm: bool = True  # layer norm of queries and keys, no gain, before the rotation
    tied: bool = False  # the output head shares the embedding's weights
    gain: bool = True  # LayerNorm has a learned gain
    bias: bool = False  # in every linear layer and LayerNorm
    dropout: float = 0.0
    attention_dropout: float = -1.0  # of attention's weights, which costs time; below 0: as dropout
    start: Literal["gpt2", "zero"] = "zero"  # initial weights, see Decoder._initialise

    def __post_init__(self) -> None:
        positive(self, "layers", "width", "heads", "context", "norm_epsilon", "theta")
        within(self, 0.0, 0.99, "dropout")
        within(self, -1.0, 0.99, "attention_dropout")
        not_negative(self, "kv_heads", "hidden", "memory", "attention_scale")
        if self.width % self.heads:
            raise UserError(f"width = {self.width} is not divisible by heads = {self.heads}: "
                            f"choose a multiple of {self.heads}")
        if self.heads % self.key_heads:
            raise UserError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}: "
                            "each key head serves the same number of query heads")
        if self.positions == "rotary" and self.head_width % 2:
            raise UserError(f"width / heads = {self.head_width} must be even for rotary positions")
        if self.positions == "relative" and self.width % 2:
            raise UserError(f"width = {self.width} must be even for relative positions")
        if self.positions == "learned" and self.memory:
            raise UserError(f"memory = {self.memory} goes beyond learned positions, which end at the context: "
                            'set positions = "rotary" or "relative"')

    @property
    def head_width(self) -> int:  # D
        return self.width // self.heads

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_width**-0.5

    @property
    def attention_drop(self) -> float:
        return self.dropout if self.attention_dropout < 0 else self.attention_dropout

    @property
    def key_heads(self) -> int:  # K
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        swiglu = 32 * math.ceil(self.width * 8 / 3 / 32)
        return self.hidden or (swiglu if self.activation == "swiglu" else 4 * self.width)


class State(NamedTuple):
    """Keys and values that later positions may see, and how many positions at the left of each row are padding.

    With a memory the keys and values are of the last M positions at most.
    """

    keys: tuple[Tensor, ...]  # a layer: (B, K, S, D)
    values: tuple[Tensor, ...]  # a layer: (B, K, S, D)
    padding: Tensor | None = None  # (B,) int64, of all positions so far; None: no row is padded
    dropped: Tensor | None = None  # (B,) int64, positions before the first of `keys`; None: none

    @property
    def length(self) -> int:
        """All positions so far."""
        return self.kept + (0 if self.dropped is None else int(self.dropped[0]))

    @property
    def kept(self) -> int:  # S
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def hidden(self) -> Tensor | None:
        """How many of the positions kept are padding (B,), below 0 where none has been for long."""
        return self.padding if self.padding is None or self.dropped is None else self.padding - self.dropped


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
        if s.positions == "relative":
            self.distance = nn.Linear(s.width, s.key_heads * s.head_width, bias=False)  # W_kR
            self.content_bias = nn.Parameter(torch.zeros(s.heads * s.head_width))  # u
            self.distance_bias = nn.Parameter(torch.zeros(s.heads * s.head_width))  # v

    def forward(self, x: Tensor, table: tuple[Tensor, ...], mask: Tensor | None,
                past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s = self.settings
        q = self.query(x).unflatten(-1, (s.heads, s.head_width)).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).unflatten(-1, (s.key_heads, s.head_width)).transpose(1, 2)  # (B, K, T, D)
        v = self.value(x).unflatten(-1, (s.key_heads, s.head_width)).transpose(1, 2)  # (B, K, T, D)
        if s.qk_norm:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if s.positions == "rotary" and not s.memory:
            q, k = rotate(q, *table), rotate(k, *table)
        if past is not None:
            k, v = (torch.cat((old.to(new.dtype), new), 2) for old, new in zip(past, (k, v), strict=True))
            # (B, K, S, D); half a run may be in bf16
        present = k, v
        if s.positions == "rotary" and s.memory:  # keys are kept unturned: places in the window stay small for ever
            first, length = k.shape[2] - q.shape[2], q.shape[2]
            q, k = rotate(q, *(part.narrow(0, first, length) for part in table)), rotate(k, *table)
        elif s.positions == "relative":
            q, mask = self._relative(q, table[0], mask)
        y = attend(q, k, v, mask, s.scale, s.attention_drop if self.training else 0.0)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2)), present

    def _relative(self, q: Tensor, encoding: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """q + u (B, H, T, D), and what stands beside (q + u)^T k in a score: (q + v)^T W_kR R_(i - j) (B, H, T, S).

        The four terms of Dai et al. 2019, section 3.3, with u and v of each layer; `encoding` (S, C) is R of the
        distances S - 1 to 0.
        """
        s = self.settings
        u, v = (bias.view(s.heads, 1, s.head_width) for bias in (self.content_bias, self.distance_bias))
        weight = self.distance.weight.view(s.key_heads, s.head_width, s.width)  # (K, D, C)
        weight = weight.repeat_interleave(s.heads // s.key_heads, 0)  # (H, D, C)
        one, by = q.shape[2] == 1, q + v  # a single query is sooner brought to the distances than all of them to it
        scores = by @ weight @ encoding.T if one else aligned(by @ (weight @ encoding.T))  # (B, H, T, S)
        scores = scores * s.scale
        return q + u, scores if mask is None else scores.masked_fill(~mask, -math.inf)


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

    def forward(self, x: Tensor, table: tuple[Tensor, ...], mask: Tensor | None,
                past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.attention(self.attention_norm(x), table, mask, past)
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
        past = State((), ()) if state is None else state
        start, padding = past.kept, past.hidden
        assert s.positions != "learned" or start + length <= s.context, "learned positions end at the context"
        positions = torch.arange(start, start + length, device=tokens.device)  # (T,)
        mask = None
        if padding is not None or self._masked(start, length):
            mask = self._mask(positions, start + length, padding)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        x = self.embedding(tokens)  # (B, T, C)
        if s.positions == "learned":
            x = x + self.position(positions)
        table = self._table(positions, start + length, x.dtype)
        x = self.dropout(x)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x, (k, v) = block(x, table, mask, (past.keys[i], past.values[i]) if start else None)
            keys.append(k)
            values.append(v)
        return self.norm(x), self._remembered(past, keys, values)

    @property
    def carries(self) -> bool:
        """Whether the network can go on from a state for ever."""
        return self.settings.memory > 0

    @staticmethod
    def detached(state: State) -> State:
        """The state without its graph: what the next segment goes on from in training."""
        keys, values = (tuple(x.detach() for x in xs) for xs in (state.keys, state.values))
        return state._replace(keys=keys, values=values)

    def blank(self, rows: int, device: torch.device) -> State:
        """The state of so many rows that have read nothing, in the shape that it has for ever: all of it is hidden."""
        s = self.settings
        assert s.memory, "without a memory nothing is carried"
        empty = torch.zeros(rows, s.key_heads, s.memory, s.head_width, device=device)  # (B, K, M, D)
        whole, none = (torch.full((rows,), n, device=device) for n in (s.memory, 0))
        return State((empty,) * s.layers, (empty,) * s.layers, whole, none)

    def restarted(self, state: State, fresh: Tensor) -> State:
        """The state with the rows `fresh` (B,) bool as if they had read nothing."""
        assert state.padding is not None
        assert state.dropped is not None
        return state._replace(padding=torch.where(fresh, state.dropped + self.settings.memory, state.padding))

    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token: 6 a matrix weight, and of attention what is seen
        (Kaplan et al. 2020, table 1): half the context, or the memory and the token itself."""
        s = self.settings
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 6.0 * s.layers * s.heads * s.head_width * (2 * (s.memory + 1) if s.memory else s.context)
        if s.positions != "relative":
            return 6.0 * matrices + attention
        distances = s.layers * s.width * s.key_heads * s.head_width * s.memory / s.context  # before the segment's own
        return 6.0 * (matrices + distances) + 1.5 * attention  # a third product makes the scores by distance

    @staticmethod
    def padded(padding: Tensor) -> State:
        """The empty state for rows whose first `padding` (B,) tokens are to be ignored."""
        return State((), (), padding)

    def _masked(self, start: int, length: int) -> bool:
        """Whether `length` positions after `start` others see anything but all before them, as attend has it."""
        s = self.settings
        several = length > 1 and (start > 0 or s.positions == "relative")
        return several or bool(s.memory and start + length > s.memory + 1)

    def _mask(self, positions: Tensor, end: int, padding: Tensor | None) -> Tensor:
        """True where a query at `positions` (T,) may look: (T, S = end), or (B, 1, T, S) where rows are padded."""
        seen = torch.arange(end, device=positions.device)  # (S,)
        causal = seen <= positions[:, None]  # (T, S)
        if self.settings.memory:
            causal = causal & (seen >= positions[:, None] - self.settings.memory)
        if padding is None:
            return causal
        real = seen >= padding[:, None, None, None]  # (B, 1, 1, S)
        itself = seen == positions[:, None]  # a padding row sees itself, so that no softmax is empty
        return causal & (real | itself)

    def _table(self, positions: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What tells attention of positions: the rotary factors, (T, D) or (B, 1, T, D) where rows are padded,
        with a memory (S, D); or the encoding (S, C) of the distances S - 1 to 0; or nothing."""
        s = self.settings
        if s.positions == "learned":
            return ()
        if s.positions == "rotary" and not s.memory:
            cos, sin = rotary_table(positions, s.head_width, s.theta)
            cos, sin = cos.to(dtype), sin.to(dtype)
            return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])
        window = torch.arange(end, device=positions.device)  # (S,)
        wide = torch.promote_types(dtype, torch.float32)  # positions change with the cut, so fp64 needs exact angles
        if s.positions == "relative":
            return (sinusoids(end - 1 - window, s.width, s.theta, wide).to(dtype),)
        cos, sin = rotary_table(window, s.head_width, s.theta, wide)
        return cos.to(dtype), sin.to(dtype)

    def _remembered(self, past: State, keys: list[Tensor], values: list[Tensor]) -> State:
        """The state after these keys and values of each layer (B, K, S, D): all of them, or the memory's."""
        if not self.settings.memory:
            return State(tuple(keys), tuple(values), past.padding)
        end = keys[0].shape[2]
        first = torch.sym_max(0, end - self.settings.memory)
        last = torch.arange(first, end, device=keys[0].device)  # a slice would keep the other keys alive as well
        dropped = keys[0].new_zeros(keys[0].shape[0], dtype=torch.int64) if past.dropped is None else past.dropped
        return State(tuple(k.index_select(2, last) for k in keys), tuple(v.index_select(2, last) for v in values),
                     past.padding, dropped + first)

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


def with_memory(network: Decoder, memory: int) -> Decoder:
    """The network with another memory, on the same parameters: perplexity against memory is evaluated with it.

    Read the text in segments with `other = with_memory(network, m)` and the state carried on. 0 is not the shortest
    window but none: nothing is to be carried, and a segment sees all of itself. Raises UserError for learned positions.
    """
    settings = replace(network.settings, memory=memory)
    other = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    for module in other.modules():
        if isinstance(module, Decoder | Attention):
            module.settings = settings
    return other
