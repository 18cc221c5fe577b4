"""Dated rows for the result tables: what was measured, on what, with which versions."""

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append(name: str, row: dict[str, Any]) -> None:
    """Append a row to results/NAME.md (a Markdown table, made on first use) and print it."""
    from handmill.training.precision import machine

    facts = machine()
    row = {"date": datetime.date.today().isoformat(), **row,
           "machine": f"{facts['cpu']}, {facts['cores']} cores" + (f", {facts['gpu']}" if "gpu" in facts else ""),
           "versions": f"python {platform.python_version()}, torch {facts['torch']}"}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    header = f"| {' | '.join(row)} |\n|{' --- |' * len(row)}\n"
    if not path.exists():
        path.write_text(f"# {name}\n", encoding="utf-8")
    old = path.read_text(encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        if header not in old:
            file.write("\n" + header)
        file.write(f"| {' | '.join(str(v) for v in row.values())} |\n")
    print("  ".join(f"{k}: {v}" for k, v in row.items()), file=sys.stderr)
