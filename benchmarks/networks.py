"""GPT, Transformer-XL, LSTM and GRU on one text: equal parameters, equal CPU-seconds, one `handmill compare` table.

    python benchmarks/networks.py --text tinyshakespeare.txt --seconds 120

Each network has about 0.8M parameters and trains by the product's commands, in a process of one thread, for as many
steps as two short runs say will take --seconds of CPU time, start-up and the evaluation at the end included. The text's
last tenth is held out and steers nothing: nobody looks at it before the end.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from table import append

from handmill.training.monitor import duration

DATA = ("data.split='tail'", "data.validation=0.1", "data.test=0", "data.clean=false", "data.near_duplicates=0.0",
        "codec={kind='character'}", "check.tokens=0", "training.precision='bf16'", "training.evaluate_items=0",
        "training.sample_every=0")

# name -> the [network] table, and the [training] keys that suit it
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GPT": ({"kind": "decoder", "layers": 4, "width": 128, "heads": 4, "context": 64, "norm": "layer",
             "attention_scale": 0.3},
            {"batch": 16, "matrix_rate": 0.06, "learning_rate": 0.02, "momentum": 0.85}),
    "Transformer-XL": ({"kind": "decoder", "layers": 4, "width": 128, "heads": 4, "context": 64, "memory": 64,
                        "norm": "layer", "attention_scale": 0.3},
                       {"batch": 16, "matrix_rate": 0.06, "learning_rate": 0.02, "momentum": 0.85}),
    "LSTM": ({"kind": "recurrent", "cell": "lstm", "layers": 1, "width": 408, "embedding": 64, "context": 64},
             {"batch": 32, "matrix_rate": 0.06, "learning_rate": 0.01, "momentum": 0.9}),
    "GRU": ({"kind": "recurrent", "cell": "gru", "layers": 1, "width": 474, "embedding": 64, "context": 64},
            {"batch": 32, "matrix_rate": 0.06, "learning_rate": 0.01, "momentum": 0.9}),
}
SHORT = (20, 100)  # steps of the runs that tell how long a step takes
COMMON = {"optimizer": "muon", "weight_decay": 0.0, "warmup": 20, "schedule": "linear", "final_rate": 0.0,
          "clip": 0.0}
RECIPE = '''name = "{name}"
medium = "text"
family = "autoregressive"

[data]
paths = [{text}]

[codec]
kind = "character"

[network]
{network}

[training]
{training}
'''


def recipe(name: str, text: Path, folder: Path, steps: int) -> Path:
    """A recipe file for one network."""
    network, training = NETWORKS[name]
    training = COMMON | training | {"steps": steps, "evaluate_every": steps, "save_every": steps}
    tables = ["\n".join(f"{key} = {json.dumps(value)}" for key, value in t.items()) for t in (network, training)]
    file = folder / f"{name.lower()}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(RECIPE.format(name=name.lower(), text=json.dumps(str(text.resolve())), network=tables[0],
                                  training=tables[1]))
    return file


def handmill(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "handmill", *map(str, words)], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(name: str, args: argparse.Namespace, steps: int, out: Path) -> float:
    """CPU-seconds of a whole training command."""
    before = cpu_seconds()
    handmill("train", recipe(name, args.text, args.runs, steps), *DATA, "--out", out)
    return cpu_seconds() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="of CPU time of each training command")
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"))
    args = parser.parse_args()
    made = []
    for name in NETWORKS:
        few, many = (train(name, args, steps, args.runs / f"{name}-{steps}") for steps in SHORT)
        step = (many - few) / (SHORT[1] - SHORT[0])
        made.append(args.runs / name)
        taken = train(name, args, int((args.seconds - few) / step) + SHORT[0], made[-1])
        handmill("check", made[-1])
        append("networks", row(name, made[-1], taken))
    handmill("compare", *made, "--out", args.runs / "compare")


def row(name: str, path: Path, cpu: float) -> dict[str, Any]:
    receipt = json.loads((path / "receipt.json").read_text())
    training, check = receipt["training"], receipt["check"]
    bits, nats = check["likelihood"]["bits_per_character"], check["likelihood"]["nats_per_token"]
    return {"network": name, "parameters": f"{training['parameters']:,}", "CPU s": f"{cpu:.0f}",
            "of steps": duration(training["seconds"]["train"]), "steps": f"{training['steps']:,}",
            "tokens": f"{training['items']:,}", "validation nats per character": f"{training['validation_loss']:.4f}",
            "as `check` reads it": f"{nats['value']:.4f} [{nats['low']:.4f}, {nats['high']:.4f}]",
            "bits": f"{bits['value']:.3f}"}


if __name__ == "__main__":
    main()
