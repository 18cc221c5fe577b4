"""The recipe `code` as it is shipped: trained, checked, and how often what it writes is Python, beside its floors.

    python benchmarks/coding.py [--paths src/] [training.steps=500 ...]

`handmill train code` and `handmill check` as commands, in a temporary folder that --keep names and leaves; a row in
results/code.md. Without --paths the text is the standard library of the Python that runs, so figures of two versions
of Python are not of the same text. Shares are those of held-out functions that compile.
(The file is not named code.py: what runs beside it would take it for the standard library's `code`.)
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table import append


def handmill(*words: str | Path) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "handmill", *map(str, words)], check=True)
    return time.perf_counter() - began


def shown(figure: dict[str, Any], form: str = ".3f") -> str:
    interval = "" if figure["low"] is None else f" [{figure['low']:{form}}, {figure['high']:{form}}]"
    return f"{figure['value']:{form}}{interval}"


def floors(rows: dict[str, Any], model: str = "this model") -> str:
    return ", ".join(f"{name} {row['compiles']['value']:.1%}" for name, row in rows.items() if name != model)


def row(path: Path, paths: Sequence[str], more: Sequence[str], seconds: float, checked: float) -> dict[str, Any]:
    receipt = json.loads((path / "receipt.json").read_text())
    check, training = receipt["check"], receipt["training"]
    likelihood, base, found = check["likelihood"], check["baselines"], check["code"]
    assert "missing" not in found, found["missing"]
    completion, middle = found["completion"], found["middle"]
    ours, gaps = completion["this model"], middle["this model"]
    library = f"the library of python {platform.python_version()}"
    return {"recipe": " ".join(["code", *more]), "text": " ".join(paths) or library,
            "s, train": f"{seconds:.0f}", "s, check": f"{checked:.0f}", "parameters": f"{training['parameters']:,}",
            "items": f"{training['items']:,} {training['unit']}",
            "bits per character": shown(likelihood["bits_per_character"]),
            "bits per byte": shown(likelihood["bits_per_byte"]),
            "trigram model": shown(base["trigram"]["bits_per_byte"]), "xz": shown(base["xz_trained"]["bits_per_byte"]),
            "functions": found["functions"], "completed: parses": shown(ours["parses"], ".1%"),
            "compiles": shown(ours["compiles"], ".1%"), "floors": floors(completion),
            "ends itself": shown(ours["ends"], ".1%"), "gap filled: parses": shown(gaps["parses"], ".1%"),
            "it compiles": shown(gaps["compiles"], ".1%"), "its floors": floors(middle),
            "exact": shown(gaps["exact"], ".1%"), "verdict": check["verdict"]["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", default=[], help="your own tree in the place of the library")
    parser.add_argument("--keep", type=Path, help="the model folder to write, and leave")
    parser.add_argument("--functions", type=int, default=400, help="to complete, and to fill a gap in")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe")
    args = parser.parse_args()
    own = [f"data.paths={json.dumps([str(Path(p).resolve()) for p in args.paths])}", "data.licence='unknown'"]
    with contextlib.ExitStack() as stack:
        path = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()), "code")
        seconds = handmill("train", "code", *(own if args.paths else []), *args.overrides, "--out", path)
        checked = handmill("check", path, f"functions={args.functions}")
        append("code", row(path, args.paths, args.overrides, seconds, checked))


if __name__ == "__main__":
    main()
