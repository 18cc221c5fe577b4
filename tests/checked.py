"""A model folder beside its prepared data, with a tiny random network, for tests of the checks and the card."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from handmill import folder, recipe
from handmill.data import prepare
from handmill.networks import build

WORDS = "river stone lamp quiet garden winter candle harbour copper meadow thunder velvet orchard mirror pocket"


def sentences(count: int, seed: int) -> list[str]:
    """Distinct lines of random words, so that no line stands in another."""
    generator = random.Random(seed)
    lengths = [generator.randint(6, 20) for _ in range(count)]
    return [f"{' '.join(generator.choices(WORDS.split(), k=k))} {number}." for number, k in enumerate(lengths)]


def write(where: Path, name: str = "tiny", codec: str = "byte", lines: int = 400, data: dict[str, Any] | None = None,
          steps: int = 3) -> Path:
    """The model folder `where`/`name`, its prepared data in `where`/.prepared, as training leaves them."""
    source = where / f"{name}.txt"
    source.write_text("\n".join(sentences(lines, 1)) + "\n", encoding="utf-8")
    table = {"paths": [str(source)], "licence": "CC0-1.0", "document": "line", "validation": 0.1, "test": 0.2}
    network = {"kind": "decoder", "layers": 1, "width": 16, "heads": 2, "context": 32}
    made = recipe.parse({"name": name, "medium": "text", "family": "autoregressive", "data": table | (data or {}),
                         "codec": {"kind": codec}, "network": network, "check": {"samples": 8, "sample_tokens": 80}})
    packed = prepare(made, where / ".prepared", progress=False)
    torch.manual_seed(1)
    weights = folder.weights_of(build(made.network, packed.codec()))
    weights = {key: weight + 0.1 * torch.randn_like(weight) for key, weight in weights.items()}
    parts = {f"data/{name}": packed.folder / name for name in packed.held_out_files()}
    folder.write(where / name, made, weights, packed.codec(), parts, training(packed, steps))
    rows = [{"step": step, "loss": 5 - step, "rate": 1.0} for step in range(1, steps + 1)]
    (where / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where / name


def training(packed: Any, steps: int) -> dict[str, Any]:
    """What the receipt says of the run, as the trainer writes it."""
    return {"steps": steps, "seed": 1, "items": 3072, "unit": "tokens", "measure": "nats per token",
            "parameters": 12345, "loss": 2.5, "validation_loss": 2.625,
            "seconds": {"setup": 1.0, "train": 61.0}, "precision": "fp32", "compile": False, "processes": 1,
            "machine": {"cpu": "Abacus", "cores": 2}, "fingerprint": packed.fingerprint,
            "plan": {"predicted": {"seconds": 60.0, "memory_bytes": 2e8, "disk_bytes": 1e6},
                     "actual": {"seconds": 62.0, "memory_bytes": 2.1e8}}}
