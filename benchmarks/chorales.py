"""Bach's chorales on the grid of quarter notes: test nats per frame after one, two and twenty CPU-minutes.

    python benchmarks/chorales.py --json jsb-chorales-quarter.json --minutes 1,2,20

Public figures on the same splits, in nats per frame: TCN 8.10 (Bai et al. 2018), Deep Markov Model 6.87 (Krishnan et
al. 2017, a bound), RNN-NADE 5.56 (Boulanger-Lewandowski et al. 2012). CPU-minutes are those of `handmill train` as a
whole, from an empty folder, in one thread; the test split is scored by `handmill check` afterwards.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from networks import cpu_seconds, handmill
from table import append

# minutes -> what differs from the recipe
SIZES: dict[str, tuple[str, ...]] = {
    "1": ("training.steps=550", "training.evaluate_every=275", "training.save_every=550"),
    "2": (),
    "20": ("network.width=192", "network.heads=6", "network.dropout=0.3", "data.transpose=6",
           "data.transpose_share=0.9",
           "training.batch=8", "training.steps=4300", "training.evaluate_every=430", "training.save_every=1433",
           "training.ema=0.998"),
}
# the file's pieces were moved to C before, so all are said to be in C, which tells the model nothing
SHARED = ("data.key=C", "training.sample_every=0", "training.compile=no")
PUBLIC = "TCN 8.10, DMM 6.87, RNN-NADE 5.56"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", default="1,2,20")
    parser.add_argument("--runs", type=Path, default=Path("runs/chorales"))
    args = parser.parse_args()
    paths = f"data.paths={json.dumps([str(args.json.resolve())])}"
    for minutes in args.minutes.split(","):
        out, before = args.runs / f"chorales-{minutes}", cpu_seconds()
        handmill("train", "chorales", paths, *SHARED, *SIZES[minutes], "--out", out)
        taken = cpu_seconds() - before
        handmill("check", out)
        append("chorales", row(minutes, out, taken))


def row(minutes: str, out: Path, cpu: float) -> dict[str, Any]:
    receipt = json.loads((out / "receipt.json").read_text())
    training, check = receipt["training"], receipt["check"]
    frames, notes = (check["likelihood"][f"nats_per_{unit}"] for unit in ("frame", "note"))
    return {"CPU-minutes allowed": minutes, "CPU s of training": f"{cpu:.0f}", "steps": training["steps"],
            "parameters": f"{training['parameters']:,}",
            "test nats per frame": f"{frames['value']:.3f} [{frames['low']:.3f}, {frames['high']:.3f}]",
            "test nats per note": f"{notes['value']:.4f}", "published, nats per frame": PUBLIC,
            "verdict": check["verdict"]["text"]}


if __name__ == "__main__":
    main()
