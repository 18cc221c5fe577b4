"""`ulimit -v` below what a run needs: refused in a sentence before it begins; with just enough it runs to its end.

What it needs of memory is what a run without a limit took; of addresses, which are limited, it needs more (UNSEEN).
"""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import harness
import pytest

WIDE = ("training.batch=2", "training.micro_batch=2", "training.optimizer='adamw'", "training.steps=2")
RUNS = {"gpt": ("network.width=1024", "network.context=16"), "ddpm": ("network.width=256", "network.head_width=64"),
        "lstm": ("network.width=1024", "network.embedding=1024")}  # of 20 to 30 million parameters
LEAST, MOST, LIMITS = 0.4, 1.2, 10  # addresses, as shares of the memory that is needed
UNSEEN = 700 << 20  # bytes of address space that are never resident: libraries, stacks, the heap's reserve
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("limits"))


def words(name: str, home: Path) -> list[str]:
    return harness.words(name, home, home / "runs" / name, *WIDE, *RUNS[name])


@cache
def needed(name: str, home: Path) -> tuple[int, int]:
    """Bytes that a run without a limit took at most, and those that its plan foresaw."""
    harness.finish(words(name, home), home / "log")
    plan = json.loads((home / "runs" / name / "receipt.json").read_text())["training"]["plan"]
    return plan["actual"]["memory_bytes"], plan["predicted"]["memory_bytes"]


def limited(name: str, home: Path, limit: int) -> tuple[int, str, bool]:
    """Exit status, words and whether anything was trained of a new run with so many bytes of address space."""
    out = home / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    command = ["bash", "-c", f'ulimit -v {limit >> 10}; exec "$@"', "bash", *words(name, home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=harness.environment())
    begun = (out / "checkpoints").exists() or "loss" in (out / "metrics.jsonl").read_text() if (
        out / "metrics.jsonl").exists() else False
    return done.returncode, done.stderr, begun


def refused(name: str, home: Path, limit: int) -> None:
    code, said, begun = limited(name, home, limit)
    assert code == 2, (limit, code, said[-2000:])
    assert "Traceback" not in said
    assert said.count("handmill train: ") == 1
    assert "memory" in said.splitlines()[-1]
    assert not begun


@pytest.mark.parametrize(("name", "count"), [
    ("gpt", 1), *(pytest.param(name, LIMITS, marks=pytest.mark.faults) for name in RUNS)])
def test_too_little_memory_is_refused_and_just_enough_is_not(home: Path, name: str, count: int) -> None:
    actual, predicted = needed(name, home)
    for i in range(count):
        refused(name, home, int(actual * (MOST if count == 1 else LEAST + (MOST - LEAST) * i / (count - 1))))
    code, said, begun = limited(name, home, int(max(actual, predicted) / 0.95) + UNSEEN)
    assert code == 0, said[-2000:]
    assert begun
    harness.tell("memory limit below need",
                 f"{name}, ulimit -v of {LEAST:.0%} to {MOST:.0%} of the {actual >> 20:,} MB it takes",
                 f"refused {count} of {count} before the first step, in one sentence; with enough it ran")


def test_a_limit_below_the_libraries_is_said(home: Path) -> None:
    refused("gpt", home, 300 << 20)
    harness.tell("memory limit below need", "300 MB, below the libraries' own", "refused in one sentence")
