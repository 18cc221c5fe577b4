"""One .onnx file with the key/value cache as inputs and outputs: one graph for prompts and for single tokens.

    inputs   tokens (B, T) and padding (B,) int64, past.i.key and past.i.value (B, K, P, D) fp32 (P may be 0)
    outputs  logits (B, T, V), present.i.key and present.i.value (B, K, P + T, D)

B batch, T new positions, P past positions, K key/value heads, D head width, V vocabulary.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.errors import optional
from handmill.networks.decoder import State

OPSET = 23  # the first with attention and RMS norm as operators
WHOLE = 1_500_000_000  # bytes of weights up to which they stay inside the .onnx file, whose limit is 2 GiB


def cache_names(layers: int, which: str) -> list[str]:
    """The names of the cache's tensors: all keys, then all values. `which` is "past" or "present"."""
    return [f"{which}.{i}.{part}" for part in ("key", "value") for i in range(layers)]


def write(network: nn.Module, file: Path) -> None:
    """Write the network's graph and fp32 weights to `file`. Raises UserError without the onnx extra."""
    optional("onnx", "onnx")
    optional("onnxscript", "onnx")
    flat = _Flat(copy.deepcopy(network).cpu().float()).eval()
    layers = flat.network.settings.layers
    batch, time, past = (torch.export.Dim(name) for name in ("batch", "time", "past"))
    cache = [{0: batch, 2: past}] * layers
    with _quiet():
        program = torch.onnx.export(
            flat, flat.example(), dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
            dynamic_shapes=({0: batch, 1: time}, {0: batch}, cache, cache),
            input_names=["tokens", "padding", *cache_names(layers, "past")],
            output_names=["logits", *cache_names(layers, "present")])
    assert program is not None
    size = sum(parameter.nbytes for parameter in flat.parameters())
    program.save(str(file), external_data=size > WHOLE)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages and functions that this graph does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
