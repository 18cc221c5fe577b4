"""docs/faults.md from the rows that tests told: python tests/faults/table.py faults.jsonl > docs/faults.md"""

import json
import platform
import sys
from pathlib import Path

HEAD = """# Faults

What was done to real runs of every family, and what came of it. `make faults` does it all again and writes this page;
`make test` does a part of each. The runs are the shipped recipes made tiny (tests/faults/harness.py): with dropout,
schedules, averaged weights, gradient accumulation, two optimizers and carried state. A hash covers every tensor of the
newest checkpoint and of the model folder's weights.
"""


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table, the cases of a fault together; of a case told twice the last result holds."""
    kept: dict[str, dict[str, str]] = {}
    for row in rows:
        kept.setdefault(row["fault"], {})[row["case"]] = row["result"]
    lines = ["| fault | case | result |", "| --- | --- | --- |"]
    for fault, cases in kept.items():
        for i, (case, result) in enumerate(cases.items()):
            lines.append(f"| {cell(fault) if i == 0 else ''} | {cell(case)} | {cell(result)} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def machine() -> str:
    import torch

    return (f"Measured with Python {platform.python_version()} and torch {torch.__version__} on {platform.system()}, "
            "OMP_NUM_THREADS=1.")


def main(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    print(f"{HEAD}\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
