"""One .onnx file with the key/value cache as inputs and outputs: one graph for prompts and for single tokens.

    inputs   tokens (B, T) and padding (B,) int64, past.i.key and past.i.value (B, K, P, D) fp32 (P may be 0)
    outputs  logits (B, T, V), present.i.key and present.i.value (B, K, P + T, D)

B batch, T new positions, P past positions, K key/value heads, D head width, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.export.onnx import FORMAT, OPSET, save
from handmill.folder import Model
from handmill.networks.decoder import State

_README = """# {name} as an ONNX graph

Made with Handmill. `model.onnx` reads tokens and the keys and values of the tokens before them, and gives the
logits of the next token at every position together with the grown keys and values.

| input | shape | |
| --- | --- | --- |
| tokens | (batch, time) int64 | at most {context} in all; documents begin with token {end} |
| padding | (batch,) int64 | tokens to ignore at the left of each row, mostly 0 |
| past.*i*.key, past.*i*.value | (batch, {heads}, past, {width}) float32 | empty (past = 0) for a new text |

Outputs: `logits` (batch, time, {vocabulary}), and `present.i.key` and `present.i.value`: the next past.
`codec/tokenizer.json` says which token is which text; `export.json` holds the sizes and the comparison with
the trained network.
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
    return {"format": FORMAT, "name": model.recipe.name, "opset": OPSET, "context": settings.context,
            "vocabulary": model.codec.size, "end": model.codec.end,
            "layers": settings.layers, "key_heads": settings.key_heads, "head_width": settings.head_width,
            "network": model.recipe.table()["network"],
            "inputs": ["tokens", "padding", *cache_names(settings.layers, "past")],
            "outputs": ["logits", *cache_names(settings.layers, "present")]}


def readme(model: Model) -> str:
    """The text of README.md."""
    s = model.recipe.network
    return _README.format(name=model.recipe.name, heads=s.key_heads, width=s.head_width, end=model.codec.end,
                          vocabulary=model.codec.size, context=s.context)


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
