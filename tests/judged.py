"""Model folders of images with training facts and a made-up check, for tests of what shows them."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny_images

from handmill import folder, recipe
from handmill.checks import image_verdict
from handmill.data.images import Images
from handmill.media import pictures

NETWORK = "cnn64-0a1b2c3d"
DRAWN = ("samples", "held out", "nearest training images")


def write(path: Path, kind: str, **settings: Any) -> Path:
    """A folder of tiny_images with what the trainer says of a run."""
    tiny_images.write(path, kind, **settings)
    data = Images.open(path / "data")
    folder.record(path, "training", {
        "steps": 100, "seed": 1, "items": 3200, "unit": "images", "measure": "weighted squared error",
        "parameters": 54321, "loss": 0.5, "validation_loss": 0.625, "seconds": {"setup": 1.0, "train": 61.0},
        "precision": "fp32", "compile": False, "processes": 1, "machine": {"cpu": "Abacus"},
        "fingerprint": data.fingerprint, "plan": {"predicted": {"seconds": 60.0}, "actual": {"seconds": 62.0}}})
    return path


def figure(value: float, half: float = 0.02, n: int = 500) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "method": "bootstrap over samples"}


def check(path: Path, distance: float = 5.0, settings: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """Record a check of the folder's weights, as `handmill check` does, and draw its pictures; returns it."""
    files = {what: f"samples/{what.replace(' ', '-')}.png" for what in DRAWN}
    (path / "samples").mkdir(exist_ok=True)
    for number, file in enumerate(files.values()):
        pictures.save_png(path / file, np.full((4, 4, 3), 60 * number, np.uint8))
    copies = {"share_closer_than_real_1pct": figure(0.0125, 0.005), "share_of_real": figure(0.01, 0.005),
              "excess": figure(0.0025, 0.01), "median_ratio": figure(1.0625, 0.05), "pairs": []}
    result = {
        "created": "2026-01-01T00:00:00Z", "medium": "image", "device": "cpu", "seed": 7,
        "settings": recipe.read(path / "recipe.toml").table()["check"] | (settings or {}),
        "weights": folder.read_receipt(path)["files"]["weights.safetensors"]["sha256"],
        "held_out": {"split": "test", "images": 500},
        "samples": {"count": 2000, "what": "samples", "sampling": {"steps": 4, "guidance": 1.5}},
        "likelihood": {"kind": "variational bound", "counted": "log likelihood of 8-bit values, nats per image",
                       "images": 500, "elbo": figure(1234.5), "bits_per_dimension": figure(2.375)},
        "codes": {"missing": "not defined: no codes"},
        "fidelity": {"network": NETWORK, "n": 500, "k": 5, "accuracy": None, "generated": figures(distance, 0.8125),
                     "floor": figures(1.25, 0.9375)},
        "labels": {"modes": {"counts": [1, 1, 1], "modes": 3, "modes_in_data": 3, "kl": 0.0321, "kl_by_chance": 0.01},
                   "agreement": figure(0.875), "ceiling": figure(0.96875)},
        "copying": {"by": {"pixels": copies, NETWORK: copies}}, "pictures": files} | parts
    result |= {"verdict": image_verdict.verdict(result)}
    folder.record(path, "check", result)
    return result


def figures(distance: float, share: float) -> dict[str, Any]:
    """Figures of likeness and variety."""
    return {f"fd_{NETWORK}@500": figure(distance, 0.5), "precision": figure(share), "recall": figure(share - 0.0625),
            "density": figure(share + 0.125), "coverage": figure(share - 0.125)}
