"""A module as an .onnx file: the exporter, quiet, with fp32 weights."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handmill.errors import optional
from handmill.folder import Model

OPSET = 23  # the first with attention and RMS norm as operators
FORMAT = "handmill-onnx/1"
WHOLE = 1_500_000_000  # bytes of weights up to which they stay inside the .onnx file, whose limit is 2 GiB


def save(module: nn.Module, example: tuple[Any, ...], free: tuple[Any, ...], inputs: Sequence[str],
         outputs: Sequence[str], file: Path) -> None:
    """Write the graph and fp32 weights of `module`, called as module(*example), to `file`.

    `free` says which dimensions of each input are free ({dimension: torch.export.Dim}); the sizes of the example should
    be none of 0 and 1 there, which capturing takes for constants. Raises UserError without the onnx extra.
    """
    optional("onnx", "onnx")
    optional("onnxscript", "onnx")
    module = copy.deepcopy(module).cpu().float().eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(module, example, dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
                                    dynamic_shapes=free, input_names=list(inputs), output_names=list(outputs))
    assert program is not None
    size = sum(parameter.nbytes for parameter in module.parameters())
    program.save(str(file), external_data=size > WHOLE)


def facts(model: Model) -> dict[str, Any]:
    """What export.json says of every network of tokens."""
    codec = model.codec
    return {"format": FORMAT, "name": model.recipe.name, "opset": OPSET, "context": model.recipe.network.context,
            "vocabulary": codec.size, "end": codec.end, "special": dict(getattr(codec, "special", {})),  # never drawn
            "network": model.recipe.table()["network"]}


def thing(model: Model) -> str:
    """What the end token stands in front of."""
    return "piece" if model.recipe.medium == "music" else "document"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages and functions that these graphs do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
