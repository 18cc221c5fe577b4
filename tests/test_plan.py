"""The plan of a run: it changes nothing, its memory is what is really taken, and what does not fit is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families import next_token
from handmill.networks import build
from handmill.recipe import Recipe
from handmill.training import memory, plan
from handmill.training.loop import Choices, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.plan import Need
from handmill.training.rehearsal import rehearsing

CPU = torch.device("cpu")
VOCABULARY = 50


class Packed:
    """Random tokens in the place of a prepared corpus."""

    def tokens(self, split: str) -> np.ndarray:
        return np.random.default_rng(0).integers(0, VOCABULARY, 4000 if split == "train" else 600).astype(np.uint16)


def recipe_of(network: dict[str, Any] | None = None, **training: Any) -> Recipe:
    shape = {"kind": "decoder", "layers": 2, "width": 32, "heads": 2, "context": 16} | (network or {})
    settings = {"steps": 4, "batch": 8, "sample_every": 0.0, "compile": "no"} | training
    return recipes.parse({"name": "tiny", "medium": "text", "family": "autoregressive", "codec": {"kind": "byte"},
                          "network": shape, "training": settings})


def task_of(recipe: Recipe) -> tuple[torch.nn.Module, Task]:
    torch.manual_seed(0)
    network = build(recipe.network, SimpleNamespace(size=VOCABULARY))
    for p in network.parameters():  # nothing stays at zero, so that every step would move something
        torch.nn.init.normal_(p, std=0.1)
    return network, next_token.task(network, None, Packed(), recipe, Path())


def plan_of(recipe: Recipe, out: Path, **how: Any) -> plan.Plan:
    return plan.make(recipe, *task_of(recipe), CPU, out, **how)


def child(script: str, *arguments: object, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=seconds, cwd=Path(__file__).parent.parent)


class Noisy:
    """Times instead of passes: a quarter of them come at a moment when another program takes most of the machine."""

    warm: frozenset[object] = frozenset()

    def __init__(self, seconds: dict[str, float], seed: int) -> None:
        self.seconds, self.chance = seconds, np.random.default_rng(seed)

    def passes(self, choices: Choices, elements: int) -> float:
        noise = self.chance.uniform(1.3, 3) if self.chance.random() < 1 / 4 else self.chance.uniform(1, 1.05)
        return self.seconds[choices.precision] * float(noise)

    def update(self) -> float:
        return 0.001

    def drop(self) -> None:
        pass


@pytest.mark.parametrize(("bf16", "chosen"), [(0.030, "bf16"), (0.054, "fp32"), (0.200, "fp32")])
def test_a_run_that_is_repeated_finds_the_same_precision(tmp_path: Path, bf16: float, chosen: str) -> None:
    recipe = recipe_of(steps=200)
    job = plan.Job(recipe, task_of(recipe)[1], CPU, tmp_path, None, 1 << 30)
    for seed in range(100):
        noisy: Any = Noisy({"bf16": bf16, "fp32": 0.040}, seed)
        speed, reasons = plan.fastest(job, noisy, {"bf16": 8, "fp32": 8})
        assert (speed.choices.precision, reasons[0][:4]) == (chosen, chosen)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("training", [{}, {"ema": 0.9, "optimizer": "adamw", "micro_batch": 2}])
def test_a_plan_changes_nothing(tmp_path: Path, careful: bool, training: dict[str, Any]) -> None:
    recipe = recipe_of({"dropout": 0.1}, **training)
    network, task = task_of(recipe)
    optimizers = task.phases[0].optimizers
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    random = torch.get_rng_state()
    plan.make(recipe, network, task, CPU, tmp_path / "runs" / "tiny", careful=careful)
    assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(o.state for o in optimizers)
    assert groups == [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    assert torch.equal(random, torch.get_rng_state())
    assert network.training
    assert not list(tmp_path.iterdir())


def test_a_plan_in_the_midst_of_training_leaves_the_optimizers_state(tmp_path: Path) -> None:
    recipe = recipe_of()
    network, task = task_of(recipe)
    runs = [Run(task, recipe.training, 1, tmp_path, CPU, Monitor(tmp_path, quiet=True), Choices())]
    runs[0].step()
    before = {f"{part}/{k}": v.clone() for part, tensors in runs[0].tensors().items() for k, v in tensors.items()}
    plan.make(recipe, network, task, CPU, tmp_path)
    after = {f"{part}/{k}": v for part, tensors in runs[0].tensors().items() for k, v in tensors.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [{}, {"tied": True, "positions": "learned", "norm": "layer", "bias": True,
                                          "activation": "gelu", "qk_norm": False, "context": 160},
                                     {"activation": "swiglu", "norm": "rms", "kv_heads": 1}])
def test_counted_bytes_are_those_of_memtracker(network: dict[str, Any], precision: str) -> None:
    """Our account of a step on real tensors, MemTracker's, and MemTracker's on tensors without data agree."""
    recipe = recipe_of(network, ema=0.5)
    _, task = task_of(recipe)
    choices = Choices(precision)
    with rehearsing(task, recipe.training, CPU) as real:
        real.step(choices, 4)
        counted, parts = real.tracked(lambda: real.step(choices, 4, 2)), real.parts()
        real.real = False  # an account by the other tracker
        tracked = real.tracked(lambda: real.step(choices, 4, 2))
        with real.without_data() as fake:
            unreal = fake.tracked(lambda: fake.step(choices, 4, 2))
            assert fake.parts() == parts
    assert abs(tracked - counted) < 4096  # numbers that PyTorch wraps in tensors
    assert abs(tracked - unreal) < 4096


def test_counted_bytes_of_a_known_product() -> None:
    weight = torch.nn.Linear(100, 200, bias=False)  # 80 kB
    x = torch.randn(50, 100)

    def work() -> None:
        y = weight(x)  # 40 kB
        z = y * 2  # 40 kB
        del y
        z + 1  # 40 kB in the place of y

    with torch.no_grad():
        assert memory.counted(work, [weight, x]) == 80_000 + 20_000 + 80_000


def test_the_parts_are_the_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_of(ema=0.9, steps=1, save_every=1)
    _, task = task_of(recipe)
    with rehearsing(task, recipe.training, CPU) as real, real.without_data() as fake:
        parts = fake.parts()
    Run(task, recipe.training, 1, tmp_path, CPU, Monitor(tmp_path, quiet=True), Choices()).train()
    files = (tmp_path / "checkpoints" / "step-1").glob("*.safetensors")
    assert sorted(parts) == sorted(sum(t.nbytes for t in load_file(f).values()) for f in files)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_batch_fits_and_twice_it_does_not(precision: str) -> None:
    recipe = recipe_of()
    _, task = task_of(recipe)
    with rehearsing(task, recipe.training, CPU) as real, real.without_data() as fake:
        need = Need(fake, Choices(precision), 64)
        for room in (10 << 20, 25 << 20, 100 << 20):
            largest = need.largest(room)
            assert largest > 0
            assert need.beyond(largest, largest) <= room < need.beyond(2 * largest, 2 * largest)
        assert need.largest(1000) == 0


def test_the_largest_batch_is_near_the_quick_estimate() -> None:
    recipe = recipe_of()
    _, task = task_of(recipe)
    with rehearsing(task, recipe.training, CPU) as real:
        quick = Need(real, Choices(), 64).about_largest(8, 100 << 20)
        with real.without_data() as fake:
            exact = Need(fake, Choices(), 64).largest(100 << 20)
    assert exact / 2 <= quick <= exact * 2


def test_the_micro_batch_is_the_largest_divisor_that_fits() -> None:
    recipe = recipe_of(batch=48)
    _, task = task_of(recipe)
    with rehearsing(task, recipe.training, CPU) as real, real.without_data() as fake:
        need = Need(fake, Choices(), 1)
        assert need.micro_batch(48, need.beyond(48, 48)) == 48
        room = need.beyond(12, 48)
        micro = need.micro_batch(48, room)
        assert micro == 12, "16 and 24 need more"
        assert need.micro_batch(48, need.beyond(1, 48) - 1) == 0


def test_need_beyond_what_is_tracked_goes_on_in_a_line() -> None:
    recipe = recipe_of()
    _, task = task_of(recipe)
    with rehearsing(task, recipe.training, CPU) as real, real.without_data() as fake:
        need = Need(fake, Choices(), 1)
        most = plan.TRACKED_ITEMS // 16
        direct = fake.tracked(lambda: fake.step(Choices(), 3 * most // 2))
        assert abs(need.step(3 * most // 2, 1) / direct - 1) < 0.01
        assert (3 * most // 2, 1) not in need.steps


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timer")
def test_a_time_limit_ends_the_block_and_leaves_no_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="that it could save"), plan.time_limit(0.01):
        signal.pause()
    with plan.time_limit(0.0), plan.time_limit(60.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert plan.divisors(number) == [n for n in range(number, 0, -1) if number % n == 0]


@given(st.integers(-5, 1 << 70))
def test_power_of_two(number: int) -> None:
    power = plan.power_of_two(number)
    assert power == 0 if number < 1 else power <= number < 2 * power and power.bit_count() == 1


def test_time_counts_what_the_loop_does(tmp_path: Path) -> None:
    recipe = recipe_of(steps=7, evaluate_every=3, save_every=2, keep=9)
    planned = plan_of(recipe, tmp_path)
    run = Run(task_of(recipe)[1], recipe.training, 1, tmp_path, CPU, Monitor(tmp_path), planned.choices)
    progress = run.train()
    run.monitor.close()
    evaluations = (tmp_path / "metrics.jsonl").read_text().count("validation_loss")
    saves = len(list((tmp_path / "checkpoints").glob("step-*")))
    counted = 7 * planned.step_seconds + evaluations * planned.evaluate_seconds + saves * planned.save_seconds
    assert planned.seconds == pytest.approx(counted)
    assert min(planned.step_seconds, planned.evaluate_seconds, planned.save_seconds) > 0
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix == ".safetensors"]
    weights = sum(p.numel() * 4 for p in task_of(recipe)[0].parameters())
    assert planned.disk_bytes == pytest.approx(sum(f.stat().st_size for f in files) + weights, rel=0.2)
    actual = plan.actual(progress, 1.5)
    assert actual["seconds"] == sum(progress.seconds.values())
    assert actual["setup_seconds"] == 1.5
    assert set(planned.predicted()) >= {"seconds", "memory_bytes"} <= set(actual)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_recipe_says_is_not_chosen(tmp_path: Path, precision: str) -> None:
    planned = plan_of(recipe_of(precision=precision, micro_batch=4), tmp_path)
    assert planned.choices == Choices(precision, False, 4)
    assert planned.fault == ""
    plan.refuse(planned, recipe_of())


def test_a_run_that_is_gone_on_with_keeps_its_choices(tmp_path: Path) -> None:
    kept = Choices("fp32", False, 2)
    assert plan_of(recipe_of(precision="bf16", micro_batch=4), tmp_path, choices=kept).choices == kept


def test_the_faster_precision_is_chosen_and_both_are_told(tmp_path: Path) -> None:
    planned = plan_of(recipe_of(), tmp_path)
    other = {"fp32": "bf16", "bf16": "fp32"}[planned.choices.precision]
    assert planned.reasons[0].startswith(planned.choices.precision)
    assert f"{other} takes" in planned.reasons[0]
    assert planned.memory_tracked == "on real tensors"
    assert planned.largest_batch > 8
    text = "\n".join(plan.lines(planned))
    assert planned.reasons[0] in text
    assert f"{planned.parameters:,}" in text


@pytest.mark.parametrize("asked", [{}, {"micro_batch": 1_000_000_000}])
def test_a_batch_beyond_all_memory_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    """With the sizes and a batch that does fit."""
    recipe = recipe_of(batch=1_000_000_000, precision="fp32", **asked)
    planned = plan_of(recipe, tmp_path)
    with pytest.raises(UserError, match=r"batch = 1000000000 needs .* GB .*: set training\.batch = ") as error:
        plan.refuse(planned, recipe)
    assert planned.memory_bytes > planned.memory_limit
    assert ("training.micro_batch = 0" in str(error.value)) == bool(asked)
    better = recipe_of(batch=planned.largest_batch, precision="fp32")
    assert f"set training.batch = {better.training.batch}" in str(error.value)
    _, task = task_of(better)
    with rehearsing(task, better.training, CPU) as real, real.without_data() as fake:
        assert Need(fake, Choices("fp32"), 512).beyond(better.training.batch, better.training.batch) < memory.room(CPU)


def test_a_network_beyond_all_memory_is_refused(tmp_path: Path) -> None:
    """One sequence is too much: the network is what has to shrink."""
    recipe = recipe_of(batch=1)
    job = plan.Job(recipe, task_of(recipe)[1], CPU, tmp_path, None, 1000)
    assert "even for a batch of 1" in plan.memory_fault(job, plan.Size(0, 2000, 0, (1,)), 3000, 2000)
    assert "network.width" in plan.memory_fault(job, plan.Size(0, 2000, 0, (1,)), 3000, 2000)
    assert plan.memory_fault(job, plan.Size(1, 2000, 1, (1,)), 3000, 3000) == ""


def test_a_disk_too_small_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(steps=10**12, save_every=1, keep=10**9, evaluate_every=10**12)
    with pytest.raises(UserError, match=r"writes .* TB into .*training\.keep = 1"):
        plan.refuse(plan_of(recipe, tmp_path), recipe)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    missing = tmp_path / "no" / "such" / "folder"
    planned = plan_of(recipe_of(), missing)
    assert planned.disk_free > 0
    assert not missing.parent.parent.exists()


VERBS = """
import sys
from pathlib import Path
import pytest
from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.verbs.plan import plan
from handmill.verbs.train import train
root = Path(sys.argv[1])
(root / "words.txt").write_text("".join(f"the {i} small cats sat on {i * i} mats. " for i in range(400)))
overrides = [f"data.paths=['{root / 'words.txt'}']", "training.steps=3", "network.layers=1", "network.width=32"]
planned = plan("character", root / "runs" / "mine", overrides)
assert planned.memory_tracked == "without data" and not planned.fault and planned.largest_batch > 16
assert [p.name for p in (root / "runs").iterdir()] == [".prepared"]
with pytest.raises(UserError, match="set training.batch = "):
    train("character", root / "runs" / "mine", [*overrides, "training.batch=1000000000"], quiet=True)
assert not (root / "runs" / "mine" / "checkpoints").exists()
print("refused")
"""


def test_the_verbs_plan_and_refuse(tmp_path: Path) -> None:
    """`plan` leaves the prepared data and nothing else; `train` refuses before it trains."""
    done = child(VERBS, tmp_path)
    assert done.stdout.strip().endswith("refused"), done.stderr


NO_COMPILER = """
import sys
from pathlib import Path
sys.path.insert(0, "{tests}")
from test_plan import *
recipe = recipe_of(compile=sys.argv[2], steps=10**6, evaluate_every=10**6)
with rehearsing(task_of(recipe)[1], recipe.training, CPU) as real:
    job = plan.Job(recipe, real.task, CPU, Path(sys.argv[1]), None, 1 << 30)
    eager = plan.Speed(Choices("fp32"), 1.0, 1.0, 8)
    reasons = []
    assert plan.compiled(job, real, eager, reasons)[0] == eager
    print(*reasons)
"""


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is /bin/false: chosen by probe the run goes on eagerly, asked for it is an error."""
    false = tmp_path / "g++"
    false.write_text("#!/bin/sh\nexit 1\n")
    false.chmod(0o755)
    monkeypatch.setenv("CXX", str(false))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    script = NO_COMPILER.format(tests=Path(__file__).parent)
    assert "not compiled, the compiler failed" in child(script, tmp_path, "auto").stdout
    assert "UserError: the compiler failed" in child(script, tmp_path, "yes").stderr


LIMITED = """
import resource, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "{tests}")
from test_plan import *
import psutil
recipe, out = recipe_of({{"width": 64, "context": 64}}, batch=256, steps=2), Path(sys.argv[1])
network, task = task_of(recipe)
with rehearsing(task, recipe.training, CPU) as real, real.without_data() as fake:
    need = Need(fake, Choices("fp32"), 128)
    needed = {{n: need.beyond(n, 256) for n in (256, 32, 8)}}
room = (needed[256] + needed[32]) // 2
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room,) * 2)
refused = recipe_of({{"width": 64, "context": 64}}, batch=256, steps=2, micro_batch=256)
again = plan.make(refused, network, next_token.task(network, None, Packed(), refused, out), CPU, out)
assert "set training.micro_batch = " in again.fault, again.fault
planned = plan.make(replace(recipe, training=replace(recipe.training, precision="fp32")), network, task, CPU, out)
assert not planned.fault, planned.fault
assert 32 <= planned.choices.micro_batch < 256 and 256 % planned.choices.micro_batch == 0, planned.choices
assert any("micro-batches of" in r for r in planned.reasons)
out.mkdir()
Run(task, recipe.training, 1, out, CPU, Monitor(out, quiet=True), planned.choices).train()
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_under_a_limit_of_memory_the_plan_picks_micro_batches_that_train(tmp_path: Path) -> None:
    done = child(LIMITED.format(tests=Path(__file__).parent), tmp_path / "run")
    assert done.stdout.strip().endswith("trained"), done.stderr


COMPARE = """
import sys
from pathlib import Path
sys.path.insert(0, "{tests}")
import test_plan
from test_plan import *
from handmill.training.precision import keep_freed_memory
keep_freed_memory()
test_plan.VOCABULARY = 16_000
shape = {{"layers": 8, "width": 512, "heads": 8, "context": 256}}
recipe = recipe_of(shape, batch=8, steps=3, precision=sys.argv[2], save_every=3)
network, task = task_of(recipe)
assert sum(p.numel() for p in network.parameters()) > 40e6
out = Path(sys.argv[1])
planned = plan.make(recipe, network, task, CPU, out)
assert planned.memory_tracked == "without data"
progress = Run(task, recipe.training, 1, out, CPU, Monitor(out, quiet=True), planned.choices).train()
print(json.dumps([planned.predicted(), plan.actual(progress, 0.0)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the heap's growth is measured on glibc")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_memory_is_what_the_process_takes(tmp_path: Path, precision: str) -> None:
    done = child(COMPARE.format(tests=Path(__file__).parent), tmp_path, precision)
    assert done.returncode == 0, done.stderr
    predicted, actual = json.loads(done.stdout.splitlines()[-1])
    assert predicted["memory_bytes"] == pytest.approx(actual["memory_bytes"], rel=0.15)


def test_control_groups(tmp_path: Path) -> None:
    """The tightest of all groups above counts, idle file cache is not in use, and no limit is none."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    table = tmp_path / "cgroup"
    table.write_text("12:cpu,cpuacct:/x\n0::/a/b\n")
    for folder, limit in ((inner, "max"), (inner.parent, "5000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("1500\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 400\n")
    assert memory._group_room(table, tmp_path) == [5000 - 1500 + 400]
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    table.write_text("4:memory:/job\n3:cpuset:/\n")
    (old / "memory.limit_in_bytes").write_text("9000")
    (old / "memory.usage_in_bytes").write_text("2000")
    (old / "memory.stat").write_text("total_inactive_file 500\n")
    (old.parent / "memory.limit_in_bytes").write_text(str((1 << 63) - 4096))
    assert memory._group_room(table, tmp_path) == [7500]
    assert memory._group_room(tmp_path / "none", tmp_path) == []


def test_room_follows_a_limit_of_this_process() -> None:
    script = ("import resource, psutil, torch\nfrom handmill.training import memory\n"
              "cpu = torch.device('cpu')\nvms = psutil.Process().memory_info().vms\n"
              "resource.setrlimit(resource.RLIMIT_AS, (vms + (300 << 20),) * 2)\n"
              "print(memory.room(cpu), memory.used(cpu), memory.peak(cpu))")
    done = child(script)
    room, used, peak = map(int, done.stdout.split())
    assert 200 << 20 < room <= 300 << 20
    assert 50 << 20 < used <= peak
