"""SIGTERM and Ctrl-C: the step at hand is finished and saved; a second signal ends the run at once."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import harness
import pytest
from harness import FAMILIES

from handmill.training import checkpoint

SECONDS = 10.0  # within which a run must be saved and gone
STEPS, APART = 160, 32  # so many between two signals, as on a busy machine a signal may come some steps late
LONG = (f"training.steps={STEPS}", "training.save_every=40", "training.evaluate_every=80")
SLOW = ("training.steps=3", "training.batch=2048", "training.save_every=1")  # steps of seconds


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("signals"))


def asked_to_stop(command: list[str], out: Path, step: int, number: int) -> float:
    """Send the signal in the course of `step`: the seconds until the process is gone, the step at hand saved."""
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = harness.forked(command, log, tell)
    tell.close()
    while listen.recv() != ("step", step):
        pass
    start = time.monotonic()
    os.kill(process.pid or 0, number)
    told = harness.heard(listen)
    code, seconds = harness.ended(process), time.monotonic() - start
    begun = max([step, *(count for what, count in told if what == "step")])
    said, saved = log.read_text(), checkpoint.newest_facts(out / "checkpoints")
    assert code == 0, said
    assert saved is not None
    assert saved["step"] == begun + 1  # the last step begun was finished and is in the checkpoint
    assert "stopping: this step is finished and saved first" in said
    assert f"stopped at step {begun + 1}; the same command goes on from there" in said
    return seconds


def stopped_and_resumed(name: str, home: Path, numbers: list[int], chance: random.Random) -> float:
    """A run asked to stop at a random step for each signal, then left to end; the longest it took to stop."""
    out = home / "runs" / f"{name}-{'-'.join(map(str, numbers))}-{chance.random()}"
    command, longest = harness.words(name, home, out, *LONG), 0.0
    steps = [APART * i + chance.randrange(APART // 2) for i in sorted(chance.sample(range(4), len(numbers)))]
    for step, number in zip(steps, numbers, strict=True):
        longest = max(longest, asked_to_stop(command, out, step, number))
    harness.finish(command, out.with_suffix(".log"))
    assert harness.hashes(out) == harness.hash_of(name, home, "straight", *LONG)
    return longest


def test_a_run_that_is_asked_to_stop(home: Path) -> None:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    assert stopped_and_resumed("lstm", home, numbers, random.Random(1)) < SECONDS


@pytest.mark.faults
@pytest.mark.parametrize("name", FAMILIES)
def test_runs_that_are_asked_to_stop(name: str, home: Path) -> None:
    chance = random.Random(name)
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM]
    longest = max(stopped_and_resumed(name, home, numbers, chance) for _ in range(3))
    assert longest < SECONDS
    harness.tell("SIGTERM, Ctrl-C and SIGHUP at a random step", name, "12 times: that step finished and saved, status "
                 f"0 after at most {longest:.2f} s, gone on with to bit-equal weights")


def test_a_second_signal_ends_the_run_at_once(home: Path) -> None:
    out, log = home / "runs" / "slow", home / "slow.log"
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = harness.forked(harness.words("gpt", home, out, *SLOW), log, tell)
    tell.close()
    began = time.monotonic()
    while (message := listen.recv()) != ("step", 1):
        began = time.monotonic() if message == ("step", 0) else began
    usual = time.monotonic() - began
    time.sleep(0.2 * usual)
    os.kill(process.pid or 0, signal.SIGTERM)
    time.sleep(0.1 * usual)
    assert process.is_alive()  # it finishes its step
    start = time.monotonic()
    os.kill(process.pid or 0, signal.SIGTERM)
    code, seconds = harness.ended(process), time.monotonic() - start
    assert code == 128 + signal.SIGTERM, log.read_text()
    assert seconds < 0.6 * usual
    newest = checkpoint.newest_facts(out / "checkpoints")
    assert newest is not None
    assert newest["step"] == 1
    harness.tell("a second SIGTERM", f"gpt, in a step of {usual:.1f} s", f"gone after {seconds:.2f} s with status 143; "
                 "the checkpoint before is intact")


def test_a_terminal_that_is_closed(home: Path) -> None:
    """Without the signal, as in a session of its own: nothing can be written to it any more, and training goes on."""
    out = home / "runs" / "closed"
    ours, its = os.openpty()
    process = subprocess.Popen(harness.words("lstm", home, out, *LONG), stdin=its, stdout=its, stderr=its,
                               env=harness.environment(), start_new_session=True)
    os.close(its)
    while b"parameters" not in os.read(ours, 4096):
        pass
    os.close(ours)
    assert process.wait(timeout=300) == 0
    assert harness.hashes(out) == harness.hash_of("lstm", home, "straight", *LONG)
    harness.tell("the terminal is closed", "lstm, in a session of its own", "training goes on to its end in silence")
