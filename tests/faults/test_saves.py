"""Faults of the disk: saves cut off at any moment, flipped bits, cut and swapped files."""

import multiprocessing
import os
import random
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import harness
import pytest
import torch
from harness import FAMILIES
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed

from handmill import folder
from handmill.errors import UserError
from handmill.training import checkpoint

OFTEN = ("training.steps=120", "training.save_every=1", "training.evaluate_every=40")
KEPT = ("training.steps=8",)  # two checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("saves"))


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """A short run of a GPT with two checkpoints and a model folder."""
    out = home / "runs" / "kept"
    harness.finish(harness.words("gpt", home, out, *KEPT), home / "kept.log")
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step-8", "step-4"]
    return out


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "kept"))


def loaded(out: Path) -> tuple[int, list[str]]:
    """(step, sentences) of the checkpoint that a run would go on from."""
    found = checkpoint.load(out / "checkpoints")
    assert found is not None
    return found[1]["step"], found[2]


# --- saves that are cut off -------------------------------------------------------------------------------------------

def state(checkpoints: Path, step: int) -> str:
    """How far the save of `step` had come."""
    if (checkpoints / f"step-{step}").exists():
        return "renamed" if len(checkpoint.checkpoints(checkpoints)) < 3 else "renamed, an old one still there"
    staged = checkpoints / f"step-{step}.tmp"
    if not staged.exists():
        return "not begun"
    return "manifest" if (staged / "MANIFEST.json").exists() else f"{sum(1 for _ in staged.iterdir())} files"


def killed_in_a_save(command: list[str], out: Path, share: float, took: list[float]) -> tuple[int, bool]:
    """Kill the run `share` of a save's usual duration after its third save began.

    The step of the last save that began, and whether it had not ended.
    """
    listen, tell = multiprocessing.Pipe(duplex=False)
    began, saves = time.time(), 0
    process = harness.forked(command, out.with_suffix(".log"), tell)
    tell.close()
    while saves < 3:
        what, number = listen.recv()
        if what == "step":
            assert not left_over(out / "checkpoints", began)
        if what == "save" and number > 0:  # 0 is the plan's trial
            start, saves = time.perf_counter(), saves + 1
        if what == "saved" and number > 0:
            took.append(time.perf_counter() - start)
    end = start + share * statistics.median(took[-20:])
    while time.perf_counter() < end:
        pass
    process.kill()
    assert harness.ended(process) == -9
    told = [("save", number), *harness.heard(listen)]  # the kill may come late
    return max(later for what, later in told if what == "save"), told[-1][0] == "save"


def left_over(checkpoints: Path, began: float) -> list[str]:
    """What is no checkpoint and is older than the process."""
    found = {}
    for path in checkpoints.glob("step-*.*"):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime
    return [name for name, changed in found.items() if changed < began]


def cut_saves(home: Path, kills: int) -> Counter[str]:
    """Saves of one run cut off `kills` times, evenly over their duration; how far they had come.

    Kills that come after a save has ended must do no harm either, and are not counted.
    """
    out, straight = home / "runs" / f"often-{kills}", home / "runs" / f"often-{kills}-straight"
    command, found, took, newest = harness.words("lstm", home, out, *OFTEN), Counter[str](), [], 0
    while found.total() < kills:
        if newest > 100:
            shutil.rmtree(out)
        step, inside = killed_in_a_save(command, out, (found.total() + random.random()) / kills, took)
        found.update([state(out / "checkpoints", step)] * inside)
        newest, passed = loaded(out)
        assert passed == [], "the newest checkpoint was not readable"
        assert newest in (step - 1, step), "more than one interval was lost"
    harness.finish(command, out.with_suffix(".log"))
    harness.finish(harness.words("lstm", home, straight, *OFTEN), out.with_suffix(".log"))
    assert harness.hashes(out) == harness.hashes(straight)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-120", "step-119"}
    return found


def test_a_save_that_is_cut_off(home: Path) -> None:
    cut_saves(home, 5)


@pytest.mark.faults
def test_a_hundred_saves_that_are_cut_off(home: Path) -> None:
    found = cut_saves(home, 100)
    reached = ", ".join(f"{count} at \"{name}\"" for name, count in sorted(found.items()))
    harness.tell("kill -9 inside a save", "lstm, a save every step",
                 f"100 kills spread over the duration of a save ({reached}): the newest checkpoint readable, "
                 "at most one interval lost, nothing left over, end bit-equal, in all")


def test_a_save_cut_off_between_the_old_and_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes back saves a step again: between the two renames neither has the name, and neither is lost."""
    def save(value: float) -> None:
        checkpoint.save(tmp_path, 5, {"network": {"w": torch.full((9,), value)}}, {}, keep=1)

    def killed(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise SystemExit
        rename(source, target)

    rename = os.rename
    save(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(SystemExit):
            save(2.0)
    assert checkpoint.load(tmp_path) is None
    checkpoint.clear_leftovers(tmp_path)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert torch.equal(found[0]["network"]["w"], torch.full((9,), 2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]


# --- damage to checkpoints --------------------------------------------------------------------------------------------

def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """The file with one bit flipped while the block runs."""
    flip(file, bit)
    try:
        yield
    finally:
        flip(file, bit)


def bits(file: Path) -> int:
    return 8 * file.stat().st_size


def places(newest: Path, each: int) -> Iterator[tuple[Path, int]]:
    """Bits of every file: of headers and of all the rest, `each` of both, drawn."""
    chance = random.Random(1)
    for file in sorted(newest.iterdir()):
        for _ in range(each):
            yield file, chance.randrange(min(bits(file), 8 * 300))
            yield file, chance.randrange(bits(file))


def flip_all(out: Path, flips: Iterator[tuple[Path, int]]) -> int:
    count = 0
    for file, bit in flips:
        with flipped(file, bit):
            step, passed = loaded(out)
        assert (step, len(passed)) == (4, 1), (file.name, bit, step, passed)
        assert "step-8" in passed[0]
        assert "\n" not in passed[0]
        count += 1
    assert loaded(out) == (8, [])
    return count


def test_a_flipped_bit_in_a_checkpoint(copy: Path) -> None:
    flip_all(copy, places(copy / "checkpoints" / "step-8", 3))


@pytest.mark.faults
def test_flipped_bits_in_a_checkpoint(copy: Path) -> None:
    newest = copy / "checkpoints" / "step-8"
    count = flip_all(copy, places(newest, 40))
    manifest = newest / "MANIFEST.json"
    every = flip_all(copy, ((manifest, bit) for bit in range(bits(manifest))))
    harness.tell("a flipped bit in the newest checkpoint", f"gpt, {len(list(newest.iterdir()))} files, headers and "
                 "tensors", f"{count} of {count} found, and each of the {every} bits of MANIFEST.json; the one before "
                 "is taken, one line says so")


@pytest.mark.faults
def test_what_others_load_of_a_flipped_bit(tmp_path: Path) -> None:
    """The same 200 flips in files of the same numbers: ours are all refused; how many others load is only told."""
    tensors, silent = {"w": torch.randn(50_000, generator=torch.Generator().manual_seed(1))}, {}
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    with warnings.catch_warnings(action="ignore"):  # of processes, as there is one
        distributed.save(tensors, checkpoint_id=tmp_path / "parts", no_dist=True)
    checkpoint.save(tmp_path / "ours", 1, {"network": tensors}, {}, keep=1)

    def parts() -> dict[str, torch.Tensor]:
        found = {"w": torch.zeros(50_000)}
        distributed.load(found, checkpoint_id=tmp_path / "parts", no_dist=True)
        return found

    def ours() -> dict[str, torch.Tensor]:
        found = checkpoint.load(tmp_path / "ours")
        assert found is not None
        return found[0]["network"]

    for name, file, load in (
            ("torch.load", tmp_path / "a.pt", lambda: torch.load(tmp_path / "a.pt")),
            ("safetensors", tmp_path / "a.safetensors", lambda: load_file(tmp_path / "a.safetensors")),
            ("torch.distributed.checkpoint", next((tmp_path / "parts").glob("*.distcp")), parts),
            ("Handmill", tmp_path / "ours" / "step-1" / "network.safetensors", ours)):
        chance = random.Random(1)
        silent[name] = sum(wrong(load, tensors["w"], file, chance.randrange(bits(file))) for _ in range(200))
    assert silent["Handmill"] == 0
    harness.tell("a flipped bit in a file of 50,000 numbers, loaded silently and wrongly", "200 flips each",
                 ", ".join(f"{name} {count}" for name, count in silent.items()))


def wrong(load: Callable[[], dict[str, torch.Tensor]], expected: torch.Tensor, file: Path, bit: int) -> bool:
    """Whether other numbers are loaded, without a word, from a file with one bit flipped."""
    with flipped(file, bit), warnings.catch_warnings(action="ignore"):
        try:
            return not torch.equal(load()["w"], expected)
        except (Exception, distributed.CheckpointException):  # which is no Exception
            return False


@pytest.mark.parametrize("percents", [(0, 1, 50, 99),
                                      pytest.param(tuple(range(100)), marks=pytest.mark.faults)], ids=["some", "all"])
def test_a_file_that_is_cut_off(copy: Path, percents: tuple[int, ...]) -> None:
    newest = copy / "checkpoints" / "step-8"
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for percent in percents:
            os.truncate(file, len(content) * percent // 100)
            step, passed = loaded(copy)
            assert (step, len(passed)) == (4, 1), (file.name, percent)
            file.write_bytes(content)
    if len(percents) == 100:
        harness.tell("a file of the newest checkpoint cut to 0, 1, ... 99 % of its length", "gpt, each file",
                     "found in all; the one before is taken, one line says so")


def test_missing_swapped_and_added_files(copy: Path) -> None:
    newest, before = copy / "checkpoints" / "step-8", copy / "checkpoints" / "step-4"
    names, count = sorted(p.name for p in newest.iterdir()), 0
    for name in names:
        content, others = (newest / name).read_bytes(), [before / name, newest / names[names.index(name) - 1]]
        for other in [None, *others]:
            if other is None:
                (newest / name).unlink()
            elif not other.exists() or other.read_bytes() == content:
                continue
            else:
                shutil.copy(other, newest / name)
            step, passed = loaded(copy)
            assert (step, len(passed)) == (4, 1), (name, other)
            (newest / name).write_bytes(content)
            count += 1
    (newest / "more.safetensors").write_bytes(content)
    assert loaded(copy)[0] == 4
    shutil.copytree(before, before.with_name("step-12"))
    assert [sentence.partition(": ")[2] for sentence in loaded(copy)[1]] == [
        "it is of another step", "more.safetensors does not belong to it"]
    harness.tell("a missing or swapped file in the newest checkpoint", "gpt, each file: gone, the older checkpoint's, "
                 "its neighbour's", f"{count} of {count} found; the one before is taken, one line says so")


@pytest.mark.parametrize("name", ["gpt", *(pytest.param(name, marks=pytest.mark.faults) for name in FAMILIES
                                           if name != "gpt")])
def test_a_run_goes_on_from_the_one_before(home: Path, name: str) -> None:
    """The command a user gives, after a bit of the newest checkpoint was flipped: one line, and the same end."""
    straight, out = home / "runs" / f"{name}-sound", home / "runs" / f"{name}-hurt"
    for run in (straight, out):
        harness.finish(harness.words(name, home, run, *KEPT), home / "hurt.log")
    file = sorted((out / "checkpoints" / "step-8").glob("*.safetensors"))[0]
    flip(file, bits(file) - 20)
    said = harness.finish(harness.words(name, home, out, *KEPT), home / "hurt.log")
    assert said.count("passed over checkpoint") == 1
    assert f"{file.name} is not as it was written" in said
    assert "going on from step 4" in said
    assert harness.hashes(out) == harness.hashes(straight)
    harness.tell("train again after the newest checkpoint was damaged", name,
                 "one line says which file, training goes on from the one before and ends bit-equal")


# --- damage to model folders ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("each", [5, pytest.param(200, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.toml", "codec/tokenizer.json", "data/report.json",
                                  "receipt.json"])
def test_a_flipped_bit_in_a_model_folder(copy: Path, name: str, each: int) -> None:
    chance, file = random.Random(name), copy / name
    for _ in range(each):
        with flipped(file, chance.randrange(bits(file))), pytest.raises(UserError) as refused:
            folder.load(copy)
        assert str(copy) in str(refused.value)
    folder.load(copy)
    if each > 100:
        harness.tell("a flipped bit in a model folder", name, f"{each} of {each} refused when it is loaded")


def test_a_receipt_is_copied_and_added_to_with_its_seal(copy: Path) -> None:
    folder.record(copy, "note", {"π": [1.5, 1e-300, None]})
    assert folder.load(copy).receipt["note"] == {"π": [1.5, 1e-300, None]}
