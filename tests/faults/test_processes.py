"""Processes of one run that are killed, hang, give up, or come back as more or fewer.

A quick case forks the processes and starts them again itself; a full one leaves that to torchrun.
"""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest
import ranks
from ranks import Fault

SHORT = ("training.steps=16", "training.evaluate_every=8")  # saved every 4 steps
EXACT = (*SHORT, "training.optimizer='adamw'", "training.learning_rate=0.003", "training.micro_batch=0")
SPLIT = ("training.shard=true",)
CALM = {  # nothing drawn at random in a pass, as that differs with the number of processes
    "gpt": (*EXACT, "network.dropout=0.0", "network.start='gpt2'"),
    "lstm": (*EXACT, *(f"network.{part}=0.0" for part in (
        "dropout", "input_dropout", "output_dropout", "embedding_dropout", "weight_drop")))}
LOST = "the same command goes on from the last checkpoint"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("processes"))


def command(name: str, home: Path, notes: Path, *more: str) -> list[str]:
    return harness.words(name, home, notes / "run", *(more or SHORT))


@cache
def straight(name: str, home: Path, world: int = 2, *more: str) -> Path:
    """The notes of a run of so many processes that nothing happened to."""
    notes = home / f"{name}-straight-{world}-{len(more)}"
    codes = ranks.finish(ranks.forked(command(name, home, notes, *more), notes, Fault(), world))
    assert codes == [0] * world, (notes / "said").read_text()
    return notes


def said(notes: Path) -> str:
    return (notes / "said").read_text()


def losses(notes: Path) -> list[float]:
    """Of every step, and of every evaluation."""
    lines = [json.loads(line) for line in (notes / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for key in ("loss", "validation_loss") for line in lines if key in line]


def told_once(notes: Path, words: str) -> None:
    """The processes said one sentence between them, with these words, and showed no traceback."""
    found = ranks.sentences(notes)
    assert len(found) == 1, said(notes)
    assert words in found[0]
    assert "Traceback" not in said(notes)


def lost(notes: Path, process: Any) -> float:
    """Wait for torchrun to end; the seconds from the fault to the first step after it."""
    assert process.wait(timeout=280) == 0, said(notes)
    struck = float((notes / "struck").read_text())
    return min(line["time"] for line in ranks.steps(notes, 0) if line["time"] > struck + 1) - struck


# a rank that is killed, hangs or gives up

def ended(name: str, home: Path, fault: Fault, words: str, seconds: float, **more: str) -> Path:
    """Two processes, of which one has a fault: both end within so many seconds of it, and one says why."""
    notes = home / f"{name}-{fault.kind}-{fault.rank}"
    codes = ranks.finish(ranks.forked(command(name, home, notes), notes, fault, **more))
    took = time.time() - float((notes / "struck").read_text())
    assert None not in codes
    assert 0 not in codes
    assert took < seconds
    told_once(notes, words)
    return notes


def gone_on_with(name: str, home: Path, notes: Path) -> None:
    """The same command ends with the tensors of a run that nothing happened to."""
    codes = ranks.finish(ranks.forked(command(name, home, notes), notes))
    assert codes == [0, 0], said(notes)
    assert "going on from step 8" in said(notes)
    assert harness.hashes(notes / "run") == harness.hashes(straight(name, home) / "run")


def test_a_rank_that_is_killed(home: Path) -> None:
    notes = ended("gpt", home, Fault("SIGKILL", 1, (9,)), "rank 1 was killed, or crashed", 60.0)
    assert LOST in said(notes)
    gone_on_with("gpt", home, notes)


@pytest.mark.faults
def test_a_first_rank_that_is_killed(home: Path) -> None:
    ended("gpt", home, Fault("SIGKILL", 0, (9,)), "rank 0 was killed, or crashed", 60.0)


def test_a_rank_that_hangs(home: Path) -> None:
    """The one that hangs is killed by the one that waits."""
    ended("gpt", home, Fault("SIGSTOP", 1, (9,)), "rank 1 has not answered for 4 seconds (HANDMILL_TIMEOUT)", 60.0,
          HANDMILL_TIMEOUT="4")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_rank_that_gives_up(home: Path, rank: int) -> None:
    ended("gpt", home, Fault("refuse", rank, (9,)), "the disk is full: free some space", 60.0)


@pytest.mark.faults
def test_a_rank_with_a_fault_of_the_code(home: Path) -> None:
    notes = home / "crash"
    codes = ranks.finish(ranks.forked(command("gpt", home, notes), notes, Fault("crash", 1, (9,))))
    assert codes == [1, 1]
    assert said(notes).count("Traceback") == 1
    assert "ZeroDivisionError: a fault of the code" in said(notes)
    assert ranks.sentences(notes) == []


def test_data_that_all_ranks_refuse(home: Path) -> None:
    notes = home / "refused"
    words = command("gpt", home, notes, *SHORT, "data.paths=['/nowhere']")
    codes = ranks.finish(ranks.forked(words, notes))
    assert 0 not in codes
    told_once(notes, "/nowhere")


def test_a_timeout_that_is_no_time(home: Path) -> None:
    notes = home / "timeout"
    codes = ranks.finish(ranks.forked(command("gpt", home, notes), notes, HANDMILL_TIMEOUT="soon"))
    assert codes == [2, 2]
    told_once(notes, "HANDMILL_TIMEOUT = 'soon' is no time")


@pytest.mark.faults
def test_more_processes_than_a_batch_has_elements(home: Path) -> None:
    notes = home / "few"
    codes = ranks.finish(ranks.forked(command("gpt", home, notes, *SHORT, "training.batch=1", "training.micro_batch=0"),
                                      notes))
    assert 0 not in codes
    told_once(notes, "training.batch = 1 leaves some of 2 processes without work")


# other numbers of processes

def resized(name: str, home: Path, notes: Path, *more: str) -> None:
    """Two processes, one, two: each is told to stop by a signal to one of its processes, at another step."""
    words = command(name, home, notes, *CALM[name], *more)
    for world, fault in ((2, Fault("SIGTERM", 1, (5,))), (1, Fault("SIGTERM", 0, (9,))), (2, Fault())):
        (notes / "struck").unlink(missing_ok=True)
        codes = ranks.finish(ranks.forked(words, notes, fault, world))
        assert codes == [0] * world, said(notes)
    assert [line["world"] for line in ranks.steps(notes, 0)] == [2] * 6 + [1] * 4 + [2] * 6
    assert "going on from step 6" in said(notes)
    assert "going on from step 10" in said(notes)


def deviation(name: str, home: Path, notes: Path) -> float:
    """The largest relative difference of a loss from that of one process, which read the same places in one order."""
    alone = straight(name, home, 1, *CALM[name])
    assert ranks.places(notes) == ranks.places(alone, 1) == {t: list(range(8 * t, 8 * t + 8)) for t in range(16)}
    pairs = zip(losses(notes), losses(alone), strict=True)
    return max(abs(a - b) / b for a, b in pairs)


@pytest.mark.parametrize("name", ["gpt", pytest.param("lstm", marks=pytest.mark.faults)])
def test_another_number_of_processes(name: str, home: Path) -> None:
    notes = home / f"{name}-resized"
    resized(name, home, notes)
    apart = deviation(name, home, notes)
    assert apart < 1e-5
    harness.tell("2 processes, then 1, then 2, each stopped by SIGTERM", name,
                 f"the places of every batch in the same order; losses within {apart:.0e} of one process, relative")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.faults) for name in CALM])
def test_another_number_of_processes_that_split_the_network(name: str, home: Path) -> None:
    """By fully_shard; one process alone keeps everything."""
    notes = home / f"{name}-split"
    resized(name, home, notes, *SPLIT)
    apart = deviation(name, home, notes)
    assert apart < 1e-5
    harness.tell("2 processes that split the network (training.shard), then 1, then 2", name,
                 f"the checkpoints of either load in the other; losses within {apart:.0e} of one process, relative")


# under torchrun, which starts them again

@pytest.mark.faults
@pytest.mark.parametrize("name", ["gpt", "lstm"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again(name: str, rank: int, home: Path) -> None:
    recovered(name, home, Fault("SIGKILL", rank, (9,)), 0.0)


@pytest.mark.faults
def test_a_killed_rank_that_held_a_part_is_started_again(home: Path) -> None:
    recovered("gpt", home, Fault("SIGKILL", 1, (9,)), 0.0, *SHORT, *SPLIT)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["SIGSTOP", "stall"])
def test_a_rank_that_hangs_is_started_again(kind: str, home: Path) -> None:
    recovered("gpt", home, Fault(kind, 1, (9,)), 20.0)


def recovered(name: str, home: Path, fault: Fault, waits: float, *more: str) -> None:
    """Killed or cut after `waits` seconds, and gone on with by torchrun alone to the same tensors."""
    notes = home / f"{name}-{fault.kind}-{fault.rank}-{len(more)}-torchrun"
    start = time.time()
    process = ranks.torchrun(command(name, home, notes, *more), notes, fault, HANDMILL_TIMEOUT=str(waits or 600))
    seconds = lost(notes, process)
    cold = ranks.steps(notes, 0)[0]["time"] - start
    assert harness.hashes(notes / "run") == harness.hashes(straight(name, home, 2, *more) / "run")
    assert "torchrun starts all of them again, from the last checkpoint" in said(notes)
    again = seconds - waits
    assert again < 2 * cold
    cut = f", cut after {waits:.0f} s" if waits else ""
    harness.tell({"SIGKILL": "a process is killed", "SIGSTOP": "a process hangs (SIGSTOP)",
                  "stall": "a process hangs, but for its watch"}[fault.kind],
                 f"{name}, rank {fault.rank} of 2{', which split the network' if more else ''}, torchrun",
                 f"started again by itself{cut}: the next step {again:.1f} s later (a cold start: {cold:.1f} s); "
                 "bit-equal weights")


@pytest.mark.faults
def test_a_refusal_is_not_tried_again(home: Path) -> None:
    notes = home / "refuse-torchrun"
    process = ranks.torchrun(command("gpt", home, notes), notes, Fault("refuse", 1, (5,)))
    assert process.wait(timeout=280) != 0
    assert len(ranks.sentences(notes)) == 1, said(notes)
    assert said(notes).count("Traceback") == 1  # torchrun's own
    assert "torch/distributed/run.py" in said(notes)
    harness.tell("a process gives up (full disk)", "gpt, rank 1 of 2, torchrun", "all end, with one sentence; what a "
                 "user must mend is not tried again")


def under_way(home: Path, notes: Path, steps: int) -> Any:
    """torchrun with two processes in a slow run, so many steps of which are done."""
    process = ranks.torchrun(command("gpt", home, notes), notes, Fault(pause=0.3))
    while len(ranks.steps(notes, 1)) < steps:
        assert process.poll() is None, said(notes)
        time.sleep(0.05)
    return process


@pytest.mark.faults
def test_torchrun_is_asked_to_stop(home: Path) -> None:
    """SIGTERM to torchrun, which passes it on to all: they stop after the same step."""
    notes = home / "stop-torchrun"
    process = under_way(home, notes, 5)
    process.terminate()
    process.wait(timeout=60)
    done = [len(ranks.steps(notes, rank)) for rank in (0, 1)]
    assert done[0] == done[1]
    assert f"stopped at step {done[0]}; the same command goes on from there" in said(notes)
    again = ranks.torchrun(command("gpt", home, notes), notes)
    assert again.wait(timeout=280) == 0, said(notes)
    assert harness.hashes(notes / "run") == harness.hashes(straight("gpt", home) / "run")
    harness.tell("SIGTERM to torchrun", "gpt, 2 processes", f"both stopped after step {done[0]}, saved; gone on with "
                 "to bit-equal weights")


@pytest.mark.faults
def test_torchrun_is_killed(home: Path) -> None:
    """No process is left behind that would go on writing into the run's folder."""
    notes = home / "orphans"
    process = under_way(home, notes, 2)
    orphans = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    start = time.monotonic()
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive
    assert len(ranks.sentences(notes)) == 1, said(notes)
    assert "torchrun, which started the processes, is gone" in said(notes)
    took = time.monotonic() - start
    harness.tell("torchrun is killed", "gpt, 2 processes", f"both end {took:.1f} s later, with one sentence")
