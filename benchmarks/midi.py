"""The recipe `midi` on pieces of three composers, from MIDI files made of music21's corpus.

    pip install music21 && python benchmarks/midi.py

Up to 60 pieces each of Bach, Palestrina and Monteverdi, in a folder a composer; their files carry licences of their
own, so nothing of them is kept here. --midi names such a folder that is there already.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from networks import handmill
from table import append

from handmill.training.monitor import duration

COMPOSERS, MOST, LARGEST = ("bach", "palestrina", "monteverdi"), 60, 120_000  # pieces of each; bytes of one's file


def convert(out: Path) -> None:
    """Write the pieces' MIDI files below `out`; what music21 cannot convert is passed over."""
    from music21 import converter
    from music21 import corpus as music21_corpus

    home = Path(music21_corpus.__file__).parent
    random.seed(1)
    for composer in COMPOSERS:
        files = [p for p in sorted((home / composer).rglob("*"))
                 if p.suffix in (".mxl", ".xml", ".krn", ".abc", ".musicxml") and p.stat().st_size < LARGEST]
        (out / composer).mkdir(parents=True, exist_ok=True)
        for file in random.sample(files, min(MOST, len(files))):
            try:
                converter.parse(file).write("midi", fp=str(out / composer / f"{file.stem}.mid"))
            except Exception as error:  # whatever its parsers raise
                print(f"{file.name} is left out: {error}")


def row(out: Path) -> dict[str, Any]:
    receipt = json.loads((out / "receipt.json").read_text())
    training, check = receipt["training"], receipt["check"]
    found, trigram = check["likelihood"], check["baselines"]["trigram"]
    without, longest = check["memory"][0]["perplexity"], check["memory"][-1]
    return {"parameters": f"{training['parameters']:,}", "steps": training["steps"],
            "s of steps": duration(training["seconds"]["train"]), "test pieces": check["held_out"]["pieces"],
            "nats per note struck": shown(found["nats_per_note"]), "trigram": shown(trigram["nats_per_note"]),
            "nats per token": shown(found["nats_per_token"]),
            "perplexity without memory": shown(without),
            f"with {longest['memory']} positions": shown(longest["perplexity"]), "verdict": check["verdict"]["text"]}


def shown(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--midi", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    midi = args.midi or args.runs / "composers"
    if not midi.exists():
        convert(midi)
    handmill("train", "midi", f"data.paths={json.dumps([str(midi)])}", "training.compile=no",
             "training.precision=bf16", "--out", args.runs / "midi")
    handmill("check", args.runs / "midi", "memories=[64,256]")
    append("midi", row(args.runs / "midi"))


if __name__ == "__main__":
    main()
