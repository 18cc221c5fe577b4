"""Runs made to collapse: what training says and does, and what the check says of what is left.

    python benchmarks/collapse.py --train mnist-train10k.npz --test mnist-test10k.npz --runs runs/collapse

The cgan recipe with its guards taken away (no penalty on the discriminator's slope, no deviation over a group) and
learning rates that rise from useful to twenty times too high, and stylegan2 with a hundredth of its penalty. Rows in
results/collapse.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from images import handmill, shown
from table import append

MADE = {
    "cgan": ("network.group=0", "objective.r1=0", "training.learning_rate=0.02", "training.warmup=800",
             "training.steps=800", "training.evaluate_every=50"),
    "stylegan2": ("objective.r1=0.1", "objective.r1_every=16", "objective.discriminator_rate=1.0",
                  "training.betas=[0.0,0.99]", "training.steps=1600", "training.evaluate_every=50",
                  "data.size=[28,28]"),
}


def row(name: str, path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    receipt = json.loads((path / "receipt.json").read_text())
    check, training = receipt["check"], receipt["training"]
    found = check["fidelity"]["generated"]
    return {"recipe": name, "with": " ".join(overrides), "steps": training["steps"],
            "training said": "<br>".join(training["faults"]) or "nothing", "kept": f"step {training['best_step']}",
            "precision": shown(found["precision"]), "recall": shown(found["recall"]),
            "coverage": shown(found["coverage"]), "called good": check["verdict"]["good"],
            "verdict": check["verdict"]["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--recipes", default=",".join(MADE))
    args = parser.parse_args()
    data = [f"data.paths={json.dumps([str(args.train.resolve())])}",
            f"data.test_paths={json.dumps([str(args.test.resolve())])}"]
    for name in args.recipes.split(","):
        handmill("train", name, *data, *MADE[name], "--out", args.runs / name)
        handmill("check", args.runs / name)
        append("collapse", row(name, args.runs / name, MADE[name]))


if __name__ == "__main__":
    main()
