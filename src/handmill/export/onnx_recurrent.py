"""One .onnx file of a recurrent network, whose state is inputs and outputs: one graph for prompts and single tokens.

    inputs   tokens (B, T) int64, and past.i.h and of an LSTM past.i.c (B, H) fp32 of each layer i
    outputs  logits (B, T, V), present.i.h and present.i.c (B, H)

A layer is ONNX's own LSTM or GRU operator, placed by hand: the exporter's translation of torch's fixes T at the
example's, and a graph of a single step takes 2 to 5 times as long over a prompt (256 tokens of one row, two layers:
LSTM of 128 units 1.7 against 8.9 ms, of 512 31 against 65; GRU 1.5 against 7.8, 23 against 45) and is no faster at
single steps.

B batch, T new positions, I inputs of a layer, H its units, G gates (4 or 3), E width of the embedding, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handmill.export.onnx import facts, save, thing
from handmill.folder import Model

PARTS = {"lstm": ("h", "c"), "gru": ("h",)}  # of a layer's memory
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}  # torch's i, f, g, o and r, z, n as ONNX's i, o, f, c and z, r, h
_SINCE = 22  # the operators' version in onnx.OPSET

_README = """# {name} as an ONNX graph

Made with Handmill. `model.onnx` reads tokens and what each layer of the {cell} remembers of all the tokens before
them, and gives the logits of the next token at every position together with the new memories. It may go on for ever.

| input | shape | |
| --- | --- | --- |
| tokens | (batch, time) int64 | as many as you like; a new {thing} begins with token {end} |
{memories}

Outputs: `logits` (batch, time, {vocabulary}), and {presents}: the next past.
Every row is a {thing} of its own. There is no padding: prompts of different lengths are read apart, and their
memories joined along the first axis. `codec/tokenizer.json` says what each token means; `export.json` holds the
sizes and the comparison with the trained network.
"""


def memory_names(settings: Any, which: str) -> list[str]:
    """The names of the memories' tensors, layer after layer. `which` is "past" or "present"."""
    return [f"{which}.{i}.{part}" for i in range(settings.layers) for part in PARTS[settings.cell]]


def write(network: nn.Module, file: Path) -> None:
    """Write the network's graph and fp32 weights to `file`. Raises UserError without the onnx extra."""
    flat = _Flat(network)
    settings, batch, time = flat.settings, torch.export.Dim("batch"), torch.export.Dim("time")
    names = memory_names(settings, "past")
    save(flat, flat.example(), ({0: batch, 1: time}, [{0: batch}] * len(names)),
         ["tokens", *names], ["logits", *memory_names(settings, "present")], file)


def about(model: Model) -> dict[str, Any]:
    """The values of export.json: what a program needs to know to run the file."""
    settings = model.recipe.network
    return facts(model) | {"units": list(settings.widths),
                           "inputs": ["tokens", *memory_names(settings, "past")],
                           "outputs": ["logits", *memory_names(settings, "present")]}


def readme(model: Model) -> str:
    """The text of README.md."""
    s = model.recipe.network
    memories = [f"| {', '.join(f'past.{i}.{part}' for part in PARTS[s.cell])} | (batch, {units}) float32 "
                f"| zeros for a new {thing(model)} |" for i, units in enumerate(s.widths)]
    presents = " and ".join(f"`present.i.{part}`" for part in PARTS[s.cell])
    return _README.format(name=model.recipe.name, cell=s.cell.upper(), thing=thing(model), end=model.codec.end,
                          memories="\n".join(memories), vocabulary=model.codec.size, presents=presents)


class _Flat(nn.Module):
    """The network made of ONNX's operators, with its state as plain tensors. It can be captured, not run."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.settings, self.embedding, self.head = network.settings, network.embedding, network.head
        self.layers = nn.ModuleList(nn.ParameterList(_weights(layer)) for layer in network.layers)

    def forward(self, tokens: Tensor, memories: list[Tensor]) -> tuple[Tensor, ...]:
        s, x, present = self.settings, self.embedding(tokens).transpose(0, 1), []  # (T, B, E)
        parts = len(PARTS[s.cell])
        how = {"linear_before_reset": 1} if s.cell == "gru" else {}  # the reset gate acts after the matrix product
        for i, (weights, units) in enumerate(zip(self.layers, s.widths, strict=True)):
            assert isinstance(weights, nn.ParameterList)
            past = [memory[None] for memory in memories[i * parts:(i + 1) * parts]]  # (1, B, H)
            shapes = [(x.shape[0], 1, x.shape[1], units)] + [(1, x.shape[1], units)] * parts
            y, *last = torch.onnx.ops.symbolic_multi_out(
                s.cell.upper(), (x, *weights, None, *past), {"hidden_size": units} | how,  # None: no row is shorter
                dtypes=[x.dtype] * len(shapes), shapes=shapes, version=_SINCE)
            x = y.squeeze(1)  # (T, B, H)
            present += [memory.squeeze(0) for memory in last]
        return self.head(x).transpose(0, 1), *present  # (B, T, V)

    def example(self) -> tuple[Tensor, list[Tensor]]:
        """Inputs of different sizes, none of them 0 or 1, which capturing would take for constants."""
        memories = [torch.zeros(3, units) for units in self.settings.widths for _ in PARTS[self.settings.cell]]
        return torch.zeros(3, 2, dtype=torch.long), memories


def _weights(layer: Any) -> list[nn.Parameter]:
    """A layer's W (1, GH, I), R (1, GH, H) and B (1, 2 GH), the gates in ONNX's order."""
    gates = list(GATES[layer.cell])
    given = (layer.input, layer.hidden, layer.bias, layer.hidden_bias)
    w, r, one, two = (x.detach().unflatten(0, (len(gates), -1))[gates].flatten(0, 1)[None] for x in given)
    return [nn.Parameter(x) for x in (w, r, torch.cat((one, two), 1))]
