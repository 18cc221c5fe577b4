"""Wall time to a validation loss on tiny-shakespeare, ours beside nanoGPT's CPU settings, start-up included.

    python benchmarks/shakespeare.py [--data FILE] [--runs 5] [--long]

Ours is the command `handmill train character` as a user types it, in a fresh process and an empty folder: time until
the full-validation-set loss is at or below 1.88 as seen from outside, and until the command has ended with the model
folder and the curve written. The peer is benchmarks/peer.py: 4 layers, 128 wide, context 64, batch 12, 2000 steps.
`--long` gives ours 83 s instead, the time nanoGPT's documented run took.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import append

DATA = Path(__file__).parents[2] / "shared" / "data" / "text" / "tinyshakespeare.txt"
LONG = ("training.steps=2100", "training.batch=24", "training.evaluate_every=700", "training.save_every=2100")


def ours(data: Path, target: float, extra: tuple[str, ...]) -> tuple[float, float, float]:
    """(seconds until the validation loss is at or below target, seconds until the command ends, validation loss)."""
    with tempfile.TemporaryDirectory() as folder:
        start, reached = time.perf_counter(), float("nan")
        command = [sys.executable, "-m", "handmill", "train", "character", f"data.paths=['{data}']",
                   "--out", f"{folder}/model", *extra]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                found = re.search(r"step .* validation ([\d.]+)", line)
                if found and float(found[1]) <= target and reached != reached:
                    reached = time.perf_counter() - start
        assert process.returncode == 0, process.returncode
        ended = time.perf_counter() - start
        loss = json.loads(Path(folder, "model/receipt.json").read_text())["training"]["validation_loss"]
    return reached, ended, loss


def peer(data: Path) -> tuple[float, float]:
    """(seconds of the whole process, validation loss)."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).with_name("peer.py")), str(data)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, float(said.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    if not args.data.is_file():
        sys.exit(f"{args.data} is missing: give tiny-shakespeare's file with --data")
    extra = LONG if args.long else ()
    runs = [ours(args.data, 1.58 if args.long else 1.88, (*extra, f"seed={i + 1}")) for i in range(args.runs)]
    missed = sum(r[0] != r[0] for r in runs)
    assert not missed, f"{missed} of {args.runs} runs did not reach the loss"
    reached, ended, losses = (statistics.median(column) for column in zip(*runs, strict=True))
    peer_seconds, peer_loss = peer(args.data)
    append("shakespeare", {
        "ours": "83 s budget" if args.long else "to 1.88", "runs": args.runs,
        "reached, s": f"{reached:.1f}" + f" ({min(r[0] for r in runs):.1f} to {max(r[0] for r in runs):.1f})",
        "command ended, s": f"{ended:.1f}", "validation loss": f"{losses:.4f}",
        "peer, s": f"{peer_seconds:.1f}", "peer loss": f"{peer_loss:.4f}",
        "times faster": "" if args.long else f"{peer_seconds / reached:.1f}"})


if __name__ == "__main__":
    main()
