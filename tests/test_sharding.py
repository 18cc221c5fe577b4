"""Two processes that share a network by training.shard do what one does, and leave what one leaves."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded
import torch
from corpora import text
from safetensors.torch import load_file
from test_plan import CPU, plan_of, recipe_of, task_of

from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.training import checkpoint, distributed, sharding
from handmill.training.loop import Choices
from handmill.training.plan import Need
from handmill.training.rehearsal import rehearsing

QUICK = ("muon", "adamw", "transformer-xl")
SLOW = tuple(name for name in sharded.CASES if name not in QUICK)


def launched(folder: Path, *names: str) -> Path:
    """The folder, with what two processes made there."""
    words = [sys.executable, sharded.__file__, str(folder)]
    other = subprocess.Popen([*words, "1", *names], stderr=subprocess.PIPE, text=True)
    done = subprocess.run([*words, "0", *names], stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert other.communicate(timeout=60)[0] is None
    assert other.returncode == 0
    (folder / "screen").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("two"), *QUICK, "relay")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("more"), *SLOW)


def metrics(folder: Path, name: str) -> dict[int, float]:
    """Step -> value."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same(ours: Path, theirs: Path, tolerance: float) -> None:
    """The losses of every step and evaluation; the tensors that a model folder gets have the same names and shapes."""
    for name in ("loss", "validation_loss"):
        assert metrics(theirs, name) == pytest.approx(metrics(ours, name), rel=tolerance), name
    a, b = (load_file(folder / "weights.safetensors") for folder in (ours, theirs))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


@pytest.mark.parametrize("name", QUICK)
def test_losses_are_those_of_one_process(name: str, two: Path, tmp_path: Path) -> None:
    sharded.trained(name, tmp_path)
    assert_same(tmp_path, two / name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_losses_of_other_networks_are_those_of_one_process(name: str, more: Path, tmp_path: Path) -> None:
    """In bf16 the order of sums shows: a mean of two processes' gradients is not rounded as that of one."""
    sharded.trained(name, tmp_path)
    assert_same(tmp_path, more / name, 2e-3 if "bf16" in name else 1e-5)


def test_weights_averages_and_samples_are_those_of_one_process(two: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """By AdamW, which does not blow rounding up as Muon's bf16 does."""
    sharded.trained("adamw", tmp_path)
    parts = [checkpoint.load(folder / "checkpoints") for folder in (tmp_path, two / "adamw")]
    assert parts[0] is not None
    assert parts[1] is not None
    ours, theirs = parts[0][0], parts[1][0]
    assert {*ours} == {*theirs} == {"network", "network-average", "network-best", "network-optimizer-0"}
    for file, tensors in ours.items():
        torch.testing.assert_close(theirs[file], tensors, rtol=1e-4, atol=1e-5)
    first = next(line for line in capsys.readouterr().err.splitlines() if "sample at step 1:" in line)
    assert first in (two / "screen").read_text().splitlines()


def test_a_checkpoint_is_gone_on_with_by_other_numbers_of_processes(two: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 -> 2 without shards, two steps each, against one process without a break."""
    run = sharded.run_of("adamw", tmp_path, steps=8)
    for _ in range(8):
        run.step()
    run.monitor.close()
    assert [*metrics(two / "relay", "loss")] == [*range(1, 9)]
    assert metrics(two / "relay", "loss") == pytest.approx(metrics(tmp_path, "loss"), rel=1e-5)


def test_a_process_holds_half(two: Path, tmp_path: Path) -> None:
    run = sharded.run_of("muon", tmp_path)
    run.step()
    halves = [json.loads((two / f"held-{rank}.json").read_text()) / sharded.held(run) for rank in range(2)]
    assert halves == pytest.approx([0.5, 0.5], abs=0.02)


def test_one_process_keeps_everything_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sharded.run_of("muon", tmp_path)
    assert run.shards is None
    assert "a single process keeps everything" in capsys.readouterr().err


def test_two_networks_are_not_split() -> None:
    recipe = recipes.read("cgan")
    table = recipe.table()
    table["training"]["shard"] = True
    with pytest.raises(UserError, match=r"training\.shard = true splits one network"):
        recipes.parse(table)


def test_a_batch_that_cannot_be_shared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match=r"training\.batch = 8 .* set it to 9"):
        sharding.sharded([SimpleNamespace(name="network")], 8, False, print)


def test_blocks_are_the_outermost_members_of_lists() -> None:
    nested = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(1, 1)]), torch.nn.Linear(2, 2)])
    network = torch.nn.ModuleDict({"a": torch.nn.Sequential(nested), "b": torch.nn.Linear(3, 3)})
    assert [str(m) for m in sharding.blocks(network)] == [str(torch.nn.Linear(n, n)) for n in (1, 2)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_split_run_is_planned_with_less_memory(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step spares each of two processes half of what lasts, but for the blocks that are gathered."""
    recipe = recipe_of({"layers": 8, "width": 64}, optimizer=optimizer, ema=0.9)
    _, task = task_of(recipe)

    def need(shard: bool) -> tuple[int, int]:
        training = replace(recipe.training, shard=shard)
        with rehearsing(task, training, CPU) as real, real.without_data() as fake:
            made = Need(fake, Choices("fp32"), 8)
            return made.spared, made.gathered

    monkeypatch.setattr(distributed, "world", lambda: 2)
    weights = sum(p.nbytes for p in task.phases[0].network.parameters())
    spared, gathered = need(True)
    kept = 5 if optimizer == "adamw" else 4  # weights, average, best, and one or two states of each matrix
    assert spared == pytest.approx(kept * weights / 2, rel=0.1)
    assert 0.2 < gathered / weights < 0.5
    assert need(False) == (0, 0)


def test_what_no_process_can_hold_alone_is_planned_but_not_timed(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 8)
    monkeypatch.setattr(Need, "alone", lambda self, elements, room: False)
    made = plan_of(recipe_of(shard=True, precision="fp32"), tmp_path)
    assert not made.fault
    assert made.step_seconds == 0
    assert made.reasons == ["fp32, not timed: no process can hold the whole by itself"]


def handmill(out: Path, corpus: Path, processes: int) -> None:
    """A model folder by the command line."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    settings = [f"data.paths=['{corpus}']", "codec.vocabulary=270", "network.layers=2", "network.width=32",
                "network.heads=2", "network.context=32", "training.steps=8", "training.batch=8", "training.warmup=2",
                "training.optimizer='adamw'", "training.evaluate_every=4", "training.precision='fp32'",
                "training.sample_every=0.01", "training.shard=true"]
    words = [sys.executable, *many, "-m", "handmill", "train", "gpt", *settings, "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_model_folder_is_the_same_as_ever(tmp_path: Path) -> None:
    """By torchrun, from the plan to the receipt."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for seed in range(40):
        (corpus / f"{seed}.txt").write_text(text(seed))
    for processes in (1, 2):
        handmill(tmp_path / str(processes), corpus, processes)
    one, other = tmp_path / "1", tmp_path / "2"
    for name in ("loss", "validation_loss"):
        assert metrics(other, name) == pytest.approx(metrics(one, name), rel=1e-5)
    files = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in (one, other)]
    assert files[0] == files[1]
    torch.testing.assert_close(load_file(other / "weights.safetensors"), load_file(one / "weights.safetensors"),
                               rtol=1e-4, atol=1e-5)
