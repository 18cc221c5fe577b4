"""A recurrent language model: LSTM or GRU layers between an embedding and a head, with the dropout that suits them.

Hochreiter & Schmidhuber 1997 and Gers et al. 2000 (LSTM with forget gates); Cho et al. 2014 (GRU, in the form whose
reset gate acts after the matrix product); Gal & Ghahramani 2016 (one mask for all steps of a sequence); Merity et al.
2018 (AWD-LSTM: weight drop, tied weights with a last layer as wide as the embedding).

B batch, T time, E width of the embedding, I inputs of a layer, H its units, G gates (4 or 3), C units of the last
layer, V vocabulary.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.networks.layers import linear_cross_entropy
from handmill.recipe import not_negative, positive, within

# cuDNN copies such weights together at every call, and dropped ones are never together
warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")


@dataclass(frozen=True)
class Settings:
    """The [network] table of a recurrent network. Its dropouts are shares in [0, 0.99]."""

    kind: Literal["recurrent"] = "recurrent"
    cell: Literal["lstm", "gru"] = "lstm"
    layers: int = 2
    width: int = 256  # H, units of a layer
    embedding: int = 0  # E, width of the embedding; 0: as wide as a layer
    context: int = 128  # T, tokens of a training segment: gradients end where it begins, the state goes on
    tied: bool = False  # the head shares the embedding's weights, and the last layer has E units
    dropout: float = 0.0  # of units between layers, one mask a sequence
    input_dropout: float = 0.0  # of the embedding's channels, one mask a sequence
    output_dropout: float = 0.0  # of the last layer's units, one mask a sequence
    embedding_dropout: float = 0.0  # of whole words, one mask a pass
    weight_drop: float = 0.0  # of single hidden-to-hidden weights, one mask a pass

    def __post_init__(self) -> None:
        positive(self, "layers", "width", "context")
        not_negative(self, "embedding")
        within(self, 0.0, 0.99, "dropout", "input_dropout", "output_dropout", "embedding_dropout", "weight_drop")

    @property
    def embedding_width(self) -> int:  # E
        return self.embedding or self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The units of each layer."""
        return (self.width,) * (self.layers - 1) + (self.embedding_width if self.tied else self.width,)


class State(NamedTuple):
    """What each layer remembers: its output h, and an LSTM its cell c too, all (B, H)."""

    layers: tuple[tuple[Tensor, ...], ...]  # a layer: (h, c) or (h,)


class Layer(nn.Module):
    """One LSTM or GRU layer. Its weights are stacked as torch.nn.LSTM and GRU stack theirs: i, f, g, o or r, z, n."""

    def __init__(self, cell: Literal["lstm", "gru"], inputs: int, units: int) -> None:
        super().__init__()
        self.cell, self.units = cell, units
        gates = 4 if cell == "lstm" else 3  # G
        self.input = nn.Parameter(torch.empty(gates * units, inputs).uniform_(-(units**-0.5), units**-0.5))
        self.hidden = nn.Parameter(torch.empty(gates * units, units).uniform_(-(units**-0.5), units**-0.5))
        self.bias = nn.Parameter(torch.zeros(gates * units))
        self.hidden_bias = nn.Parameter(torch.zeros(gates * units))
        if cell == "lstm":
            self.bias.data[units:2 * units] = 1.0  # forget nothing at first (Jozefowicz et al. 2015, section 2.2)

    def start(self, rows: int) -> tuple[Tensor, ...]:
        """The memory before the first step."""
        h = self.hidden.new_zeros(rows, self.units)
        return (h, h) if self.cell == "lstm" else (h,)

    def forward(self, x: Tensor, memory: tuple[Tensor, ...], drop: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, I) to every step's h (B, T, H) and the last memory; `drop` of the hidden weights are zero.

        torch's operator runs whole sequences (cuDNN on a GPU, oneDNN for an LSTM on a CPU), and plain products one
        step: they export as they are, and oneDNN rearranges its weights at every call (one step of two layers took it
        1.4 times as long with 128 units and 8 rows, 26 times with 512 units and one row).
        """
        hidden = F.dropout(self.hidden, drop, self.training)
        memory = tuple(part.to(x.dtype) for part in memory)  # half a run may be in bf16
        if x.shape[1] == 1:
            memory = (_lstm_step if self.cell == "lstm" else _gru_step)(
                F.linear(x[:, 0], self.input, self.bias), F.linear(memory[0], hidden, self.hidden_bias), *memory)
            return memory[0][:, None], memory
        weights, first = [self.input, hidden, self.bias, self.hidden_bias], [part[None] for part in memory]
        how = (True, 1, 0.0, torch.is_grad_enabled(), False, True)  # biases, layers, dropout, train, both ways, B first
        if self.cell == "lstm":
            y, h, c = torch._VF.lstm(x, first, weights, *how)  # type: ignore[attr-defined]
            return y, (h[0], c[0])
        y, h = torch._VF.gru(x, first[0], weights, *how)  # type: ignore[attr-defined]
        return y, (h[0],)


class Recurrent(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V), with the state that lets the next call go on from here."""

    carries = True  # one state can go on for ever
    compiles = False  # the compiler takes the operator apart into T steps, and loses oneDNN's and cuDNN's fused ones

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        super().__init__()
        assert vocabulary > 0
        self.settings, self.vocabulary = settings, vocabulary
        widths = settings.widths
        self.embedding = nn.Embedding(vocabulary, settings.embedding_width)
        self.layers = nn.ModuleList(Layer(settings.cell, inputs, units) for inputs, units in
                                    zip((settings.embedding_width, *widths), widths, strict=False))
        self.head = nn.Linear(widths[-1], vocabulary, bias=False)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)  # Merity et al. 2018, section 5
        if settings.tied:
            self.head.weight = self.embedding.weight

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
        s, memories = self.settings, []
        x = self._locked(self._embedded(tokens), s.input_dropout)  # (B, T, E)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            memory = layer.start(tokens.shape[0]) if state is None else state.layers[i]
            x, memory = layer(x, memory, s.weight_drop)  # (B, T, H)
            x = self._locked(x, s.dropout if i + 1 < s.layers else s.output_dropout)
            memories.append(memory)
        return x, State(tuple(memories))

    @staticmethod
    def detached(state: State) -> State:
        """The state without the graph that made it: what the next segment starts from."""
        return State(tuple(tuple(part.detach() for part in memory) for memory in state.layers))

    def blank(self, rows: int, device: torch.device) -> State:
        """The state of so many rows that have read nothing."""
        starts = [layer.start(rows) for layer in self.layers if isinstance(layer, Layer)]
        return State(tuple(tuple(part.detach().to(device) for part in memory) for memory in starts))

    def restarted(self, state: State, fresh: Tensor) -> State:
        """The state with the rows `fresh` (B,) bool as if they had read nothing."""
        return State(tuple(tuple(part.masked_fill(fresh[:, None], 0.0) for part in memory) for memory in state.layers))

    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token: 6 a matrix weight."""
        inner = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2)
        return 6.0 * (inner + self.head.weight.numel())

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(B, T, E), zero wherever a dropped word stands (Gal & Ghahramani 2016, section 4.2)."""
        x, rate = self.embedding(tokens), self.settings.embedding_dropout
        if not (self.training and rate):
            return x
        kept = F.dropout(x.new_ones(self.vocabulary), rate)  # (V,), in place of a masked copy of the matrix
        return x * kept[tokens, None]

    def _locked(self, x: Tensor, rate: float) -> Tensor:
        """Dropout of x (B, T, C) with one mask for all steps (Gal & Ghahramani 2016, section 4.1)."""
        return x * F.dropout(torch.ones_like(x[:, :1]), rate) if self.training and rate else x


def _lstm_step(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c (B, H), from what the gates read of the input, a, and of h, b, both (B, 4H)."""
    i, f, g, o = (a + b).chunk(4, 1)  # (B, H)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor]:
    """The next h (B, H), from what the gates read of the input, a, and of h, b, both (B, 3H)."""
    (ra, za, na), (rb, zb, nb) = a.chunk(3, 1), b.chunk(3, 1)  # (B, H)
    n = (na + (ra + rb).sigmoid() * nb).tanh()
    return (n + (za + zb).sigmoid() * (h - n),)
