"""Quality against cost of every sampler on one diffusion model: Fréchet distance over network evaluations, as a plot.

    python benchmarks/samplers.py runs/ddpm --samples 1000 --evaluations 5,10,20,40 --guidance 1

The model must have been checked, so that its folder holds the feature network. A row for each sampler and cost goes
into results/samplers.md, the picture into docs/samplers.png.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from table import append

from handmill import folder
from handmill.checks import features, fidelity
from handmill.checks.image import Settings, _asked, _ground
from handmill.families import tensors
from handmill.families.diffusion.samplers import SAMPLERS, evaluations
from handmill.folder import Model
from handmill.verbs.making import sampling

PICTURE = Path(__file__).parent.parent / "docs" / "samplers.png"
SEED = 5


def measure(model: Model, sampler: str, steps: int, ground: Any, samples: int, guidance: float) -> dict[str, Any]:
    """Fréchet distance, coverage and label agreement of `samples` images, and what they cost."""
    asked = _asked(ground, samples)
    settings = sampling(model, sampler=sampler, steps=steps, guidance=guidance)
    began = time.perf_counter()
    made = tensors.make(model.network, model.codec, model.recipe, asked.tolist(), settings, SEED)
    seconds = time.perf_counter() - began
    network = features.load(model.path / features.FEATURES)
    real = np.random.default_rng(0).permutation(ground.real)[:samples]
    a, b = network.features(real), network.features(made)
    _, coverage = fidelity.density_coverage(a, b)
    agreement = fidelity.label_agreement(network.probabilities(made), asked)
    return {"evaluations": evaluations(sampler, steps) * (1 if guidance == 1 else 2), "seconds": seconds,
            "fd": fidelity.frechet(a, b), "coverage": coverage, "agreement": agreement}


def draw(found: dict[str, list[dict[str, Any]]], title: str) -> None:
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for sampler, rows in found.items():
        cost, value = [row["evaluations"] for row in rows], [row["fd"].value for row in rows]
        axes.plot(cost, value, marker="o", markersize=4, linewidth=1.4, label=sampler)
        axes.fill_between(cost, [row["fd"].low for row in rows], [row["fd"].high for row in rows], alpha=0.12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("network evaluations a sample")
    axes.set_ylabel("Fréchet distance, shaded: 95 %")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--evaluations", default="5,10,20,40")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    model = folder.load(args.folder)
    ground = _ground(model, Settings(), False)
    found: dict[str, list[dict[str, Any]]] = {}
    for sampler in args.samplers.split(","):
        for wanted in map(int, args.evaluations.split(",")):
            steps = wanted // 2 if sampler == "heun" else wanted
            row = measure(model, sampler, steps, ground, args.samples, args.guidance)
            found.setdefault(sampler, []).append(row)
            shown = [f"{row['fd'].value:.3f} [{row['fd'].low:.3f}, {row['fd'].high:.3f}]",
                     f"{row['coverage'].value:.3f}", f"{row['agreement'].value:.3f}"]
            print(f"{sampler:10s} {row['evaluations']:4d} evaluations  {'  '.join(shown)}  {row['seconds']:.1f} s",
                  flush=True)
            append("samplers", {
                "model": model.recipe.name, "sampler": sampler, "steps": steps, "evaluations": row["evaluations"],
                "guidance": args.guidance, "samples": args.samples, "Fréchet distance": shown[0],
                "coverage": shown[1], "label agreement": shown[2], "s": f"{row['seconds']:.1f}"})
    draw(found, f"{model.recipe.name}: {args.samples:,} samples, guidance {args.guidance:g}")


if __name__ == "__main__":
    main()
