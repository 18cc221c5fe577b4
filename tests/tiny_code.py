"""Model folders with a tiny random network that was taught, so its recipe says, to fill in the middle."""

from pathlib import Path
from typing import Any

import tiny
import torch

from handmill import folder, recipe
from handmill.data.middle import NAMES
from handmill.folder import Model
from handmill.media import tokenizers
from handmill.networks import build


def load(path: Path, codec: str = "byte", network: dict[str, Any] | None = None, middle: float = 0.5,
         suffix_first: float = 0.5, special: tuple[str, ...] = NAMES, **tables: dict[str, Any]) -> Model:
    """As tiny.load; `codec` is a kind."""
    settings = {"kind": codec, "special": list(special)} | ({"vocabulary": 300} if codec == "bpe" else {})
    made = recipe.parse({"name": "tiny", "medium": "text", "family": "autoregressive", "codec": settings,
                         "network": network or tiny.DEFAULT,
                         "objective": {"middle": middle, "suffix_first": suffix_first}, **tables})
    tokenizer = tokenizers.train(made.codec, [tiny.TEXT])
    torch.manual_seed(1)
    weights = folder.weights_of(build(made.network, tokenizer))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    folder.write(path, made, weights, tokenizer, {}, {"seed": 1})
    return folder.load(path)
