"""Model folders with a tiny random network, for tests of what takes a model folder."""

from pathlib import Path
from typing import Any

import torch

from handmill import folder, recipe
from handmill.folder import Model
from handmill.media import tokenizers
from handmill.networks import build

TEXT = ("The quick brown fox jumps over the lazy dog. Ünïcödé → “quoted” 北京 🙂\n"
        "Twelve wet cats sat on 34 mats, 567 bats ate the rest!\n\n  indented = {'a': [1, 2]}\t# tab\n") * 8
DEFAULT: dict[str, Any] = {"kind": "decoder", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2,
                           "context": 48}
LLAMA = DEFAULT | {"norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": False}
GPT2 = DEFAULT | {"kv_heads": 0, "norm": "layer", "positions": "learned", "activation": "gelu",
                  "qk_norm": False, "tied": True, "bias": True}
LSTM = {"kind": "recurrent", "layers": 2, "width": 32, "context": 48}
TRANSFORMER_XL = DEFAULT | {"memory": 20, "positions": "relative"}


def write(path: Path, network: dict[str, Any] = DEFAULT, codec: str = "byte", seed: int = 1,
          training: dict[str, Any] | None = None, sampling: dict[str, Any] | None = None) -> Path:
    """A model folder with random weights whose predictions are far from uniform; `codec` is a kind."""
    settings = {"kind": codec} | ({"vocabulary": 300} if codec == "bpe" else {})
    made = recipe.parse({"name": "tiny", "medium": "text", "family": "autoregressive", "seed": seed,
                         "codec": settings, "network": network, "sampling": sampling or {}})
    tokenizer = tokenizers.train(made.codec, [TEXT])
    torch.manual_seed(seed)
    weights = folder.weights_of(build(made.network, tokenizer))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    folder.write(path, made, weights, tokenizer, {}, training or {"seed": seed})
    return path


def load(path: Path, **settings: Any) -> Model:
    """The model of `write` with the same settings."""
    return folder.load(write(path, **settings))
