"""kill -9 at random moments: the run goes on to the weights and optimizer states of one that was never stopped."""

import json
import multiprocessing
import random
import time
from contextlib import suppress
from pathlib import Path

import harness
import pytest
from harness import FAMILIES, STEPS

from handmill.training import checkpoint, plan


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("kills"))


def killed_at(step: int, command: list[str], log: Path, chance: random.Random) -> None:
    """Start the command and kill it in the course of `step`, the end of it and what follows it included."""
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = harness.forked(command, log, tell)
    tell.close()
    start = end = time.monotonic()
    with suppress(EOFError):  # the steps were all done when it was killed before
        while (message := listen.recv()) < ("step", step):  # "save" and "saved" come before "step"
            start, end = (end, time.monotonic()) if message[0] == "step" else (start, end)
    time.sleep(chance.uniform(0, 1.5) * min(end - start, 1.0))
    process.kill()
    assert harness.ended(process) in (-9, 0)  # 0: the last step, and it was through


def steps_told(out: Path) -> list[int]:
    """The steps in metrics.jsonl that have a loss."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def broken_and_mended(name: str, home: Path, out: Path, kills: int, chance: random.Random) -> None:
    """A run killed `kills` times at random steps, then left to end: equal to the uninterrupted one, bit for bit."""
    command, log = harness.words(name, home, out), home / f"{name}.log"
    for step in sorted(chance.randrange(STEPS) for _ in range(kills)):
        killed_at(step, command, log, chance)
        newest = checkpoint.newest_facts(out / "checkpoints")
        assert (newest["step"] if newest else 0) > step - 4 - 1
    harness.finish(command, log)
    assert harness.hashes(out) == harness.hash_of(name, home, "straight")
    assert {p.name for p in (out / "checkpoints").iterdir()} <= {f"step-{step}" for step in range(STEPS + 1)}


@pytest.mark.parametrize("name", ["gpt", "lstm", "ddpm", "cgan"])
def test_a_killed_run_ends_as_one_that_was_not(name: str, home: Path) -> None:
    out = home / "runs" / f"{name}-killed"
    broken_and_mended(name, home, out, 1, random.Random(name))
    assert steps_told(out) == [*range(1, STEPS + 1)]


def test_a_kill_between_the_seal_and_the_name_of_a_checkpoint(home: Path) -> None:
    """It gets its name, and the metrics up to it stay."""
    out = home / "runs" / "gpt-nameless"
    command, log = harness.words("gpt", home, out), home / "gpt.log"
    harness.finish(command, log)
    last = out / "checkpoints" / f"step-{STEPS}"
    last.rename(last.with_name(f"{last.name}.tmp"))
    (out / f"{plan.TRIAL}x" / "step-0.tmp").mkdir(parents=True)  # and one in the plan's trial, at another time
    assert f"going on from step {STEPS}" in harness.finish(command, log)
    assert steps_told(out) == [*range(1, STEPS + 1)]
    assert harness.hashes(out) == harness.hash_of("gpt", home, "straight")
    assert not [*out.glob(".*")]


@pytest.mark.faults
@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_kills(name: str, home: Path) -> None:
    chance = random.Random(f"twenty {name}")
    for run in range(5):
        out = home / "runs" / f"{name}-{run}"
        broken_and_mended(name, home, out, 4, chance)
        assert steps_told(out) == [*range(1, STEPS + 1)]
    harness.tell("kill -9 at a random step", name, "20 kills in 5 runs of 30 steps, each run killed 4 times: weights, "
                 "average and optimizer states bit-equal to the uninterrupted run's in all 5")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gpt", "cgan"])
def test_kills_from_the_first_moment_to_the_last(name: str, home: Path) -> None:
    """Preparation of the data, planning and writing of the model folder included."""
    wanted, chance, ends = harness.hash_of(name, home, "straight"), random.Random(f"whole {name}"), []
    start = time.monotonic()
    harness.finish(harness.words(name, home, home / f"whole-{name}" / "run"), home / f"{name}.log")
    seconds = time.monotonic() - start
    for run in range(20):
        out = home / f"whole-{name}-{run}" / "run"
        command, log = harness.words(name, home, out), home / f"{name}.log"
        process = harness.forked(command, log)
        time.sleep(chance.uniform(0.02, seconds))
        process.kill()
        ends.append(harness.ended(process))
        harness.finish(command, log)
        assert harness.hashes(out) == wanted
        assert not [p.name for p in out.rglob("*") if p.name.startswith("tmp") or p.name.endswith((".tmp", ".old"))]
    harness.tell("kill -9 at any moment, preparation and writing of the model folder included", name,
                 f"{ends.count(-9)} kills (and {ends.count(0)} too late): bit-equal, nothing left over, in all")
