"""Full and read-only disks, before a run and in the middle of it, and what the safety of checkpoints costs."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import harness
import pytest

from handmill import recipe as recipes
from handmill.recipe import Training
from handmill.training import checkpoint, plan
from handmill.verbs.plan import plan as plans
from handmill.verbs.train import train

LONG = ("training.steps=160", "training.evaluate_every=80")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
Fault = Callable[[Path, Any], AbstractContextManager[None]]  # (model folder, process) -> while the block runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("disks"))


@cache
def undisturbed(home: Path) -> str:
    """The hash of a run that had room."""
    out = home / "runs" / "room"
    harness.finish(harness.words("lstm", home, out, *LONG), home / "room.log")
    return harness.hashes(out)


def sentence(said: str) -> str:
    """The one line of a command that ended with status 2."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("handmill train: ")]
    assert len(lines) == 1, said
    return lines[0]


@contextmanager
def filled(out: Path, process: Any) -> Iterator[None]:
    """Another program takes every byte of the disk, until the process ends."""
    ballast = out.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while process.is_alive():
            try:
                file.write(bytes(4096))
            except OSError:
                time.sleep(0.001)
    yield
    ballast.unlink()


@contextmanager
def limited(out: Path, process: Any) -> Iterator[None]:
    """No file of the process may become larger than 8 kB (RLIMIT_FSIZE)."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    yield


@contextmanager
def read_only(out: Path, process: Any) -> Iterator[None]:
    """The checkpoints' folder cannot be written: mounted read-only upon itself by root, else by its permissions."""
    folder = out / "checkpoints"
    if not ROOT:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a folder")
    try:
        remount, end = ["mount", "-o", "remount,ro,bind", folder], time.monotonic() + 60
        while subprocess.run(remount, capture_output=True).returncode:  # busy while a file in it is being written
            assert time.monotonic() < end
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def in_the_middle(home: Path, out: Path, fault: Fault) -> str:
    """Let a fault happen to a run that has saved: what it says. The same command goes on once the fault is mended."""
    command, log = harness.words("lstm", home, out, *LONG), home / f"{out.parent.name}.log"
    process = harness.forked(command, log)
    harness.wait_for(out / "checkpoints" / "step-8", process)
    with fault(out, process):
        code, said = harness.ended(process), log.read_text()
        assert code == 2, said
        newest = checkpoint.load(out / "checkpoints")
        assert newest is not None
        assert newest[1]["step"] >= 8
        assert newest[2] == []
        assert not (out / "receipt.json").exists()
    harness.finish(command, log)
    assert harness.hashes(out) == undisturbed(home)
    assert not [p for p in out.rglob("*.tmp")]
    return sentence(said)


def test_a_disk_that_becomes_full(home: Path, tmp_path: Path) -> None:
    with harness.disk(tmp_path / "disk", "size=4m") as disk:
        said = in_the_middle(home, disk / "run", filled)
    assert "free some space" in said
    harness.tell("a disk that becomes full in training", "lstm on a tmpfs of 4 MB, filled by another program after "
                 "step 8", "status 2, one sentence, the checkpoint before intact, no receipt; with room again the same "
                 "command goes on to the same weights")


def test_a_file_that_may_not_grow(home: Path, tmp_path: Path) -> None:
    said = in_the_middle(home, tmp_path / "run", limited)
    assert "ulimit" in said
    harness.tell("a save that is refused by a limit (RLIMIT_FSIZE)", "lstm, 8 kB from step 8 on",
                 "status 2, one sentence, the checkpoint before intact; without the limit it goes on to the same "
                 "weights")


def test_a_folder_that_becomes_read_only(home: Path, tmp_path: Path) -> None:
    said = in_the_middle(home, tmp_path / "run", read_only)
    assert "make the folder writable" in said
    harness.tell("a folder that becomes read-only in training", "lstm, " + (
        "mounted read-only upon itself" if ROOT else "by its permissions"), "status 2, one sentence, the checkpoint "
        "before intact; once writable it goes on to the same weights")


def test_a_read_only_disk_is_known_before_training(home: Path, tmp_path: Path) -> None:
    with harness.disk(tmp_path / "disk", "ro") as disk:
        log = home / "ro.log"
        assert harness.ended(harness.forked(harness.words("lstm", home, disk / "run"), log)) == 2
        said = sentence(log.read_text())
    assert "cannot be written" in said
    assert "step 1/" not in log.read_text()
    harness.tell("a read-only disk", "lstm on a tmpfs mounted ro", "status 2 before the data are read, one sentence")


def begun_in(home: Path, disk: Path) -> tuple[int, str, bool]:
    """(status, what a run on `disk` says, whether a step was taken)."""
    log = home / "small.log"
    log.unlink(missing_ok=True)
    code = harness.ended(harness.forked(harness.words("gpt", home, disk / "run"), log))
    metrics = disk / "run" / "metrics.jsonl"
    return code, log.read_text(), metrics.exists() and metrics.stat().st_size > 0


@pytest.mark.parametrize("sizes", [(300,), pytest.param((100, 200, 300, 400, 600, 800, 1000, 1200, 1400, 1600, 2000),
                                                        marks=pytest.mark.faults)], ids=["one", "many"])
def test_a_small_disk_is_known_before_training(home: Path, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Of disks from far too small to large enough, each is refused before the first step or has room for the run."""
    ends = {}
    for size in sizes:
        with harness.disk(tmp_path / "disk", f"size={size}k") as disk:
            code, said, begun = begun_in(home, disk)
            assert code == 0 or sentence(said)
            assert (disk / "run" / "receipt.json").exists() == (code == 0)
            ends[size] = "trained" if code == 0 else "began" if begun else "refused"
    assert "began" not in ends.values(), ends
    if len(sizes) > 1:
        told = ", ".join(f"{size} kB {end}" for size, end in ends.items())
        harness.tell("a disk that is too small from the start", "gpt on a tmpfs", f"{told}: never found out on the way")


# --- what safety costs ------------------------------------------------------------------------------------------------

SIZES = {  # a name -> overrides of the shipped GPT
    "0.8 million parameters": ("network.layers=4", "network.width=128", "network.heads=4"),
    "30 million parameters": ("network.layers=8", "network.width=560", "network.heads=8"),
}


def test_the_plan_says_when_checkpoints_cost_much() -> None:
    training = Training(steps=100_000, save_every=500)
    assert plan.saving(training, step=0.1, save=1.0) == ""
    said = plan.saving(training, step=0.01, save=1.0)
    assert said.startswith("17 % of the time goes into checkpoints: training.save_every = 3334 takes less")
    rarer = replace(training, save_every=3334)
    assert plan.saving(rarer, step=0.01, save=1.0) == ""
    assert plan.saving(replace(training, steps=500), step=0.001, save=1.0) == ""  # 1 s in all


@contextmanager
def clocked(patch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds spent in checksums, fsync and renames while the block runs."""
    seconds = dict.fromkeys(("fingerprint", "flush", "rename"), 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                seconds[name] += time.perf_counter() - start
        return run

    with patch.context() as here:
        here.setattr(checkpoint, "fingerprint", timed("fingerprint", checkpoint.fingerprint))
        here.setattr(checkpoint, "flush", timed("flush", checkpoint.flush))
        here.setattr(os, "rename", timed("rename", os.rename))
        yield seconds


@pytest.mark.faults
@pytest.mark.parametrize("size", SIZES)
def test_safety_costs_little(home: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """Seconds of a save beside those of the steps between two, at the shipped recipe's interval."""
    shipped = recipes.read("gpt").training
    out = home / "cost" / size
    words = ["training.steps=4", "training.save_every=2", "training.sample_every=0", "training.batch=4",
             "training.evaluate_items=4096", "codec.vocabulary=270", "data.validation=0.2", "data.test=0.2",
             *SIZES[size], f"data.paths=['{home / 'texts'}']", "training.compile='no'"]
    with clocked(monkeypatch) as seconds:
        train("gpt", out, words, quiet=True)
    told = json.loads((out / "receipt.json").read_text())["training"]
    saves = 2
    save, step = told["seconds"]["save"] / saves, told["seconds"]["train"] / told["steps"] * shipped.batch / 4
    share = save / (shipped.save_every * step)
    safety = sum(seconds.values()) / (saves + 1)  # the plan's trial is a save, too
    harness.tell("what the safety of checkpoints costs", f"gpt, {size}, every {shipped.save_every} steps as shipped",
                 f"{save:.2f} s a save ({safety:.2f} s of it checksums, fsync and renames) beside "
                 f"{shipped.save_every * step:.0f} s of training: {100 * share:.2f} %")
    assert share <= plan.SAVE_SHARE


SHIPPED = ("gpt", "transformer-xl", "lstm", "character", "vae", "autoencoder", "vqvae", "ddpm", "dcgan", "cgan")


@pytest.mark.faults
def test_safety_costs_little_in_the_shipped_recipes(home: Path) -> None:
    """By the plan of each, at its own interval; text recipes on a small text."""
    shares = {}
    for name in SHIPPED:
        shipped = recipes.read(name)
        given = [f"data.paths=['{home / 'texts'}']", "data.validation=0.2", "data.test=0.2"]
        given += ["codec.vocabulary=300"] if hasattr(shipped.codec, "vocabulary") else []
        planned = plans(name, home / "shipped" / name, given if shipped.medium == "text" else [])
        shares[name] = planned.save_seconds / (shipped.training.save_every * planned.step_seconds)
        assert not planned.saving, (name, planned.saving)
    worst = max(shares, key=lambda name: shares[name])
    assert shares[worst] <= plan.SAVE_SHARE, shares
    harness.tell("what the safety of checkpoints costs", "as planned for " + ", ".join(SHIPPED),
                 f"at most {100 * shares[worst]:.2f} % of the training time at the shipped interval ({worst})")
