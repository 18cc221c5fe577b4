"""One .onnx file with the key/value cache as inputs and outputs: one graph for prompts and for single tokens.

    inputs   tokens (B, T) and padding (B,) int64, past.i.key and past.i.value (B, K, P, D) fp32 (P may be 0)
    outputs  logits (B, T, V), present.i.key and present.i.value (B, K, P + T, D), with a memory of its last M positions

What a memory has dropped is not the graph's to know: `padding` counts from the first position of the past, and is
networks.decoder.State.hidden.

B batch, T new positions, P past positions, K key/value heads, D head width, M memory, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.export.onnx import facts, save, thing
from handmill.folder import Model
from handmill.networks.decoder import State

_README = """# {name} as an ONNX graph

Made with Handmill. `model.onnx` reads tokens and the keys and values of the tokens before them, and gives the
logits of the next token at every position together with the {grown} keys and values.

| input | shape | |
| --- | --- | --- |
| tokens | (batch, time) int64 | {most}; a new {thing} begins with token {end} |
| padding | (batch,) int64 | tokens to ignore at the left of each row, mostly 0{counted} |
| past.*i*.key, past.*i*.value | (batch, {heads}, past, {width}) float32 | empty (past = 0) for a new {thing} |

Outputs: `logits` (batch, time, {vocabulary}), and `present.i.key` and `present.i.value`: the next past.
{memory}`codec/tokenizer.json` says what each token means; `export.json` holds the sizes and the comparison with
the trained network.
"""

_MEMORY = """The network remembers {memory} positions: a token sees itself and so many before it, in every layer.
`past` has at most {memory} positions and `present` the last {memory} of past and time, so that it may go on for ever.
Where rows are padded, take from `padding` after every call the positions that are gone, past + time - {memory} where
that is above 0; it may fall below 0, and then nothing of the padding is left.
"""
_RELATIVE = """Positions are relative: keys are of no place, and the graph counts distances from the last token.
"""


def cache_names(layers: int, which: str) -> list[str]:
    """The names of the cache's tensors: all keys, then all values. `which` is "past" or "present"."""
    return [f"{which}.{i}.{part}" for part in ("key", "value") for i in range(layers)]


def write(network: nn.Module, file: Path) -> None:
    """Write the network's graph and fp32 weights to `file`. Raises UserError without the onnx extra."""
    flat = _Flat(network)
    layers = flat.network.settings.layers
    batch, time, past = (torch.export.Dim(name) for name in ("batch", "time", "past"))
    cache = [{0: batch, 2: past}] * layers
    save(flat, flat.example(), ({0: batch, 1: time}, {0: batch}, cache, cache),
         ["tokens", "padding", *cache_names(layers, "past")], ["logits", *cache_names(layers, "present")], file)


def about(model: Model) -> dict[str, Any]:
    """The values of export.json: what a program needs to know to run the file."""
    settings = model.recipe.network
    return facts(model) | {
        "layers": settings.layers, "key_heads": settings.key_heads, "head_width": settings.head_width,
        "inputs": ["tokens", "padding", *cache_names(settings.layers, "past")],
        "outputs": ["logits", *cache_names(settings.layers, "present")]}


def readme(model: Model) -> str:
    """The text of README.md."""
    s = model.recipe.network
    memory = _MEMORY.format(memory=s.memory) if s.memory else ""
    return _README.format(
        name=model.recipe.name, heads=s.key_heads, width=s.head_width, end=model.codec.end, thing=thing(model),
        vocabulary=model.codec.size, grown=f"last {s.memory}" if s.memory else "grown",
        most="as many as you like" if s.memory else f"at most {s.context} in all",
        counted=", counted from the first of past" if s.memory else "",
        memory=memory + (_RELATIVE if s.positions == "relative" else ""))


class _Flat(nn.Module):
    """The network with its state as plain tensors; padding is given, so the mask is always explicit."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, padding: Tensor, keys: list[Tensor],
                values: list[Tensor]) -> tuple[Tensor, ...]:
        logits, state = self.network(tokens, State(tuple(keys), tuple(values), padding))
        return logits, *state.keys, *state.values

    def example(self) -> tuple[Any, ...]:
        """Inputs of different sizes, none of them 0 or 1, which capturing would take for constants."""
        s = self.network.settings
        caches = [[torch.zeros(3, s.key_heads, 5, s.head_width) for _ in range(s.layers)] for _ in range(2)]
        return torch.zeros(3, 2, dtype=torch.long), torch.tensor([0, 2, 3]), *caches
