"""The image recipes as they are shipped, on MNIST: time from an empty folder, likeness, likelihood, pictures.

    python benchmarks/images.py --train mnist-train10k.npz --test mnist-test10k.npz --runs runs/images

For each recipe: `handmill train` and `handmill check` as commands, a row in results/images.md. Then `handmill compare`.
Public figure beside the VAE's: 89.78 nats (pythae's table: binarised MNIST, 60,000 training images).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from table import append

RECIPES = ("vae", "vqvae", "vqvae-prior", "autoencoder", "latent-diffusion", "ddpm", "dcgan", "cgan", "stylegan2")
COMPARED = ("vae", "vqvae-prior", "latent-diffusion", "ddpm")


def handmill(*words: str | Path) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "handmill", *map(str, words)], check=True)
    return time.perf_counter() - began


def shown(figure: dict[str, Any] | None, form: str = ".3f") -> str:
    if not figure:
        return ""
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def row(name: str, path: Path, seconds: float, checked: float) -> dict[str, Any]:
    receipt = json.loads((path / "receipt.json").read_text())
    check, training = receipt["check"], receipt["training"]
    found, told = check["fidelity"]["generated"], check["likelihood"]
    distance = next(key for key in found if key.startswith("fd_") and not key.endswith("infinity"))
    floor = check["fidelity"]["floor"]
    return {"recipe": name, "s, train": f"{seconds:.0f}", "s, check": f"{checked:.0f}",
            "parameters": f"{training['parameters']:,}", "items": f"{training['items']:,} {training['unit']}",
            "what": check["samples"]["what"], "n": check["fidelity"]["n"],
            distance: f"{shown(found[distance])} (floor {floor[distance]['value']:.3f})",
            "precision": shown(found["precision"]), "recall": shown(found["recall"]),
            "coverage": f"{shown(found['coverage'])} (floor {floor['coverage']['value']:.3f})",
            "label agreement": shown(check["labels"].get("agreement")),
            "NLL, nats": shown(told.get("importance"), ".2f"), "bits/dim": shown(told.get("bits_per_dimension")),
            "verdict": check["verdict"]["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/images"))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    data = [f"data.paths={json.dumps([str(args.train.resolve())])}",
            f"data.test_paths={json.dumps([str(args.test.resolve())])}"]
    for name in args.recipes.split(","):
        path, more = args.runs / name, []
        if name in ("vqvae-prior", "latent-diffusion"):
            more = [f"codec.path={args.runs / ('vqvae' if name == 'vqvae-prior' else 'autoencoder')}"]
        seconds = handmill("train", name, *data, *more, "--out", path)
        images = 10_000 if name == "vae" else 500
        checked = handmill("check", path, f"samples={args.samples}", f"images={images}")
        append("images", row(name, path, seconds, checked))
    if not args.compare:
        return
    made = [args.runs / name for name in COMPARED if (args.runs / name / "receipt.json").exists()]
    if len(made) > 1:
        handmill("compare", *made, "--out", args.runs / "compare")


if __name__ == "__main__":
    main()
