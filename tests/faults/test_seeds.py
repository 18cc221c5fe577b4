"""The same seed twice: the same weights; and the order of the data, whatever the number of processes."""

from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from harness import FAMILIES
from torch import Tensor

from handmill import recipe as recipes
from handmill.data import prepare
from handmill.training.loop import Task
from handmill.verbs.setup import assemble

SHORT = ("training.steps=8",)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("name", ["transformer-xl", "vae", *(
    pytest.param(name, marks=pytest.mark.faults) for name in FAMILIES if name not in ("transformer-xl", "vae"))])
def test_the_same_seed_gives_the_same_weights(name: str, home: Path) -> None:
    one, two = (harness.hash_of(name, home, run, *SHORT) for run in "ab")
    assert one == two
    assert one != harness.hash_of(name, home, "c", *SHORT, "seed=2")
    harness.tell("the same seed twice", name, "the same hash of weights, average and optimizer states; another for "
                 "another seed")


@pytest.mark.faults
def test_threads_may_make_a_difference(home: Path) -> None:
    """Sums over more elements than one thread takes are added up in the order of the threads."""
    found = {}
    for threads in ("1", "2"):
        out = home / "runs" / f"threads-{threads}"
        done = harness.finished(harness.words("ddpm", home, out, *SHORT), OMP_NUM_THREADS=threads)
        assert done.returncode == 0, done.stderr
        found[threads] = harness.hashes(out)
    same = "the same weights here" if found["1"] == found["2"] else "other weights, by rounding: allowed"
    harness.tell("the same seed with OMP_NUM_THREADS = 1 and 2", "ddpm",
                 f"{same}. A run that is gone on with keeps its number of threads and stays bit-equal")


def task_of(name: str, home: Path, seed: int = 1) -> tuple[Task, int]:
    """The task of a family as the loop gets it, and its batch."""
    words = harness.words(name, home, home / "runs" / "order", f"seed={seed}")
    recipe = recipes.read(words[4], words[5:-2])
    prepared = prepare(recipe, home / "runs" / ".prepared", progress=False)
    return assemble(recipe, prepared, CPU, home / "runs" / "order")[2], recipe.training.batch


def joined(parts: list[Any]) -> dict[str, Tensor]:
    """The batches of all processes as one, by the names of their tensors."""
    tables = [part if isinstance(part, dict) else {"tokens": part} for part in parts]
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_is_a_function_of_seed_and_position(name: str, home: Path) -> None:
    """No loader has workers: a batch is made where it is needed, by whichever process its places fall to."""
    (task, batch), (other, _) = task_of(name, home), task_of(name, home, seed=2)
    for step in (0, 3, 50):  # of the first epoch, and of later ones
        places = np.arange(batch, dtype=np.int64) + step * batch
        whole = joined([task.batch(places)])
        for processes in (2, 4, 8):
            parts = joined([task.batch(part) for part in np.array_split(places, processes)])
            assert all(torch.equal(whole[key], parts[key]) for key in whole)
        assert any(not torch.equal(whole[key], joined([other.batch(places)])[key]) for key in whole)
    harness.tell("the order of the data with 1, 2, 4 and 8 processes", name, "the same batches: a pure function of "
                 "(seed, position); there are no loader processes")
