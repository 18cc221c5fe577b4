"""Model folders of music with a tiny random network, for tests of what takes a model folder, the card among them."""

import random
from pathlib import Path
from typing import Any

import torch

from handmill import folder, recipe
from handmill.data.music_prepare import prepare
from handmill.folder import Model
from handmill.media import midi
from handmill.media.music_tokens import Events, Frames, FrameSettings
from handmill.media.scores import from_grid
from handmill.networks import build

DECODER: dict[str, Any] = {"kind": "decoder", "layers": 1, "width": 16, "heads": 2, "context": 48}
LSTM: dict[str, Any] = {"kind": "recurrent", "layers": 1, "width": 16, "context": 48}
CHORALES: dict[str, Any] = {"kind": "frames", "lowest": 36, "highest": 81, "voices": 4, "keys": True,
                            "tempos": [80.0, 120.0], "names": ["bach", "de Falla"]}
HARMONISER: dict[str, Any] = {"kind": "frames", "lowest": 36, "highest": 81, "voices": 4, "melody": True}
PIANO: dict[str, Any] = {"kind": "events", "lowest": 48, "highest": 72, "velocities": 4, "shifts": "doubling"}


def write(path: Path, codec: dict[str, Any] = CHORALES, network: dict[str, Any] = DECODER, seed: int = 1,
          data: dict[str, Any] | None = None) -> Path:
    """A model folder with random weights; with a [data] table the pieces are prepared in .prepared beside it."""
    made = recipe.parse({"name": path.name, "medium": "music", "family": "autoregressive", "seed": seed,
                         "data": data or {}, "codec": codec, "network": network, "sampling": {"max_tokens": 60}})
    tokens = Frames(made.codec) if isinstance(made.codec, FrameSettings) else Events(made.codec)
    parts: dict[str, Path] = {}
    training: dict[str, Any] = {"seed": seed, "steps": 20, "items": 5000, "unit": "tokens", "parameters": 54_321}
    if data:
        pieces = prepare(made, path.parent / ".prepared", progress=False)
        tokens, training = pieces.codec(), training | {"fingerprint": pieces.fingerprint}
        parts = {f"data/{name}": pieces.folder / name for name in pieces.held_out_files()}
    torch.manual_seed(seed)
    weights = folder.weights_of(build(made.network, tokens))
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    folder.write(path, made, weights, tokens, parts, training)
    return path


def album(home: Path, count: int = 10) -> Path:
    """MIDI files of chords in D minor, in the sub-folders `even` and `odd`."""
    for i in range(count):
        chance = random.Random(i)
        roots = [chance.choice((0, 3, 5, 7, 10)) for _ in range(12)]
        grid = [tuple(sorted({50 + root, 62 + chance.choice((0, 2, 3, 5, 7))})) for root in roots for _ in range(2)]
        file = home / ("even", "odd")[i % 2] / f"{i}.mid"
        file.parent.mkdir(parents=True, exist_ok=True)
        midi.write(file, from_grid(grid, 4, tempo=70 + 8 * i))
    return home


def load(path: Path, **settings: Any) -> Model:
    """The model of `write` with the same settings."""
    return folder.load(write(path, **settings))
