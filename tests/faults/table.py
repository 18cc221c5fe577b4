"""docs/faults.md from the rows that tests told: python tests/faults/table.py faults.jsonl > docs/faults.md"""

import json
import sys
from datetime import date
from pathlib import Path

from handmill.training.precision import machine

HEAD = """# Faults

What a run survives, how, and what was done to real runs of every family to see it.

## How it is done

- **One rule after every fault: run the same command again.** It goes on from the newest checkpoint that is whole and
  ends with the bits that the undisturbed run ends with. All randomness is a function of (seed, position), so that a
  checkpoint holds no random state: weights, optimizer states, averages, carried state, and the step are enough.
- **The same seed gives the same weights in the same arithmetic.** Precision, compilation and threads that are left to
  `auto` are measured for a new run, and kept by one that goes on; the receipt names them, and `training.precision` and
  `training.compile` fix them. The runs below have them fixed.
- **A checkpoint is whole or not there** ([checkpoint.py](../src/handmill/training/checkpoint.py)): written beside its
  place, flushed, sealed with the SHA-256 of every file, renamed. Loading checks every byte; what is not as it was
  written is passed over with a line that names the file, and the one before is taken (`training.keep` of them stay).
- **A model folder is sealed too**: its receipt vouches for every file, and for itself. Nothing in a folder or archive
  from elsewhere is trusted: no pickle is opened, no link followed, no path leads out, no size is believed.
- **Prepared data are there whole or not at all, and as they were written**: their checksums are compared when a run
  begins, and what is damaged is prepared again. A run never goes on with other data than it began with.
- **What can be known is said before training**: disk, memory, permissions, a folder that another process trains into,
  data that changed since the run began.
- **Numbers that are not finite never reach the weights**: the batch is skipped and named with its step and process;
  after three in a row the run goes back to the last checkpoint and on past that data.
- **Processes watch each other** ([watch.py](../src/handmill/training/watch.py)): where one dies or keeps the others
  waiting for longer than `HANDMILL_TIMEOUT` seconds (600 unless set), all end with one sentence, and
  `torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m handmill train my.toml` starts them again.
- SIGTERM, Ctrl-C and a terminal that closes end a run after the step at hand, saved; a second signal ends it at once.

## What is not shown here

A power cut (files and folders are flushed in order, and no test pulled a plug); several machines, and NCCL, which
needs GPUs: all processes below are of one machine and talk through gloo; a network disk; a GPU's own errors; Windows.
No experiment tracker is part of training, so none can stop it.

## What was done

`make faults` does all of it again and writes this page; `make test` does a part of each. The runs are the shipped
recipes made tiny (tests/faults/harness.py): with dropout, schedules, averaged weights, gradient accumulation, two
optimizers and carried state. A hash covers every tensor of the newest checkpoint and of the model folder's weights.
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


def measured() -> str:
    on = machine()
    return (f"Measured on {date.today()} on {on['cores']} cores of {on['cpu']} with {on['memory_gib']} GiB, "
            f"{on['system']}, Python {on['python']}, torch {on['torch']}, OMP_NUM_THREADS=1.")


def main(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    print(f"{HEAD}\n{measured()}\n\n{table(rows)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
