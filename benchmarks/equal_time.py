"""Adversarial and diffusion models of the same digits after the same CPU time, in one table of `handmill compare`.

    python benchmarks/equal_time.py --train mnist-train10k.npz --test mnist-test10k.npz --minutes 10

Each recipe's steps are set so that its planned training takes the time; the row says what it took. All see the digits
at 32 x 32, the classes where a recipe tells them.
"""

import argparse
import json
import resource
from pathlib import Path
from typing import Any

from images import handmill, shown
from table import append

from handmill.verbs.plan import plan

RECIPES = ("dcgan", "cgan", "stylegan2", "ddpm")


def steps_of(name: str, overrides: list[str], seconds: float, out: Path) -> int:
    """Steps that fit into `seconds` of training, by the product's own plan."""
    planned = plan(name, out, overrides)
    return max(100, int(seconds / planned.step_seconds))


def cpu_seconds() -> float:
    """Of all commands run so far, both cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(name: str, path: Path, cpu: float) -> dict[str, Any]:
    receipt = json.loads((path / "receipt.json").read_text())
    check, training = receipt["check"], receipt["training"]
    found, floor = check["fidelity"]["generated"], check["fidelity"]["floor"]
    distance = next(key for key in found if key.startswith("fd_") and not key.endswith("infinity"))
    copies = check["copying"]["by"]
    return {"recipe": name, "CPU s": f"{cpu:.0f}", "s of steps": f"{training['seconds']['train']:.0f}",
            "steps": training["steps"], "images": f"{training['items']:,}", "parameters": f"{training['parameters']:,}",
            "n": check["fidelity"]["n"],
            distance: f"{shown(found[distance])} (floor {floor[distance]['value']:.3f})",
            "precision": shown(found["precision"]), "recall": shown(found["recall"]),
            "coverage": f"{shown(found['coverage'])} (floor {floor['coverage']['value']:.3f})",
            "near one training image": "; ".join(f"{how} {part['share_closer_than_real_1pct']['value']:.3f}"
                                                 for how, part in copies.items()),
            "label agreement": shown(check["labels"].get("agreement")), "verdict": check["verdict"]["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=Path, default=Path("runs/equal-time"))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--steps", type=int, default=0, help="of a single recipe, in the place of its planned ones")
    parser.add_argument("--samples", type=int, default=5000)
    args = parser.parse_args()
    shared = [f"data.paths={json.dumps([str(args.train.resolve())])}", "data.size=[32, 32]",
              f"data.test_paths={json.dumps([str(args.test.resolve())])}"]
    for name in args.recipes.split(","):
        path = args.runs / name
        steps = args.steps or steps_of(name, shared, 60 * args.minutes, args.runs / f"{name}-plan")
        more = [f"training.steps={steps}", f"training.evaluate_every={max(50, steps // 15)}",
                f"training.save_every={max(50, steps // 3)}"]
        before = cpu_seconds()
        handmill("train", name, *shared, *more, "--out", path)
        cpu = cpu_seconds() - before
        handmill("check", path, f"samples={args.samples}")
        append("equal_time", row(name, path, cpu))
    made = [args.runs / name for name in RECIPES if (args.runs / name / "receipt.json").exists()]
    if len(made) > 1:
        handmill("compare", *made, "--out", args.runs / "compare")


if __name__ == "__main__":
    main()
