"""The loop's contracts on a small real task: accumulation, resume, skipped batches, averages, precision."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handmill.data.windows import Windows, in_turn
from handmill.errors import UserError
from handmill.families import next_token
from handmill.folder import weights_of
from handmill.networks.decoder import Decoder, Settings
from handmill.recipe import Training
from handmill.training import checkpoint
from handmill.training.loop import Choices, Phase, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.optimizers import AdamW, optimizers

CPU = torch.device("cpu")
VOCABULARY = 11
TRAINING = Training(steps=6, batch=8, warmup=2, evaluate_every=3, save_every=2, sample_every=0, ema=0.9)


def task_of(training: Training, dropout: float = 0.0, seed: int = 0, start: Literal["zero", "gpt2"] = "zero") -> Task:
    torch.manual_seed(seed)
    network = Decoder(Settings(layers=2, width=32, heads=2, context=16, dropout=dropout, start=start), VOCABULARY)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.uint16)
    windows, held_out = Windows(tokens[:1500], 16, 1), in_turn(tokens[1500:], 16)
    phase = Phase("network", network, next_token.loss, lambda b: b[:, 1:].numel(), optimizers(network, training))
    return Task([phase], windows.batch, lambda m: next_token.evaluate(m, held_out), lambda m: "", 16, 1.0)


def run_of(task: Task, training: Training, folder: Path, **choices: object) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(task, training, 1, folder, CPU, Monitor(folder), Choices(**choices))  # type: ignore[arg-type]


def everything(run: Run) -> dict[str, Tensor]:
    """Every tensor that the next step depends on."""
    return {f"{part}/{k}": v.clone() for part, tensors in run.tensors().items() for k, v in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("micro", [4, 2])
def test_accumulation_gives_the_same_weights(tmp_path: Path, micro: int) -> None:
    """By AdamW from a start without zeros, so that no optimizer blows rounding up to the size of a step."""
    training = replace(TRAINING, optimizer="adamw")
    whole, parts = task_of(training, start="gpt2"), task_of(training, start="gpt2")
    before = {k: v.clone() for k, v in weights_of(whole.phases[0].network).items()}
    run_of(whole, training, tmp_path / "a").train()
    run_of(parts, training, tmp_path / "b", micro_batch=micro).train()
    for k, v in weights_of(whole.phases[0].network).items():
        torch.testing.assert_close(weights_of(parts.phases[0].network)[k], v, rtol=0, atol=5e-5)
        assert (v - before[k]).abs().max() > 1e-3


def test_the_loss_is_the_mean_over_tokens_not_over_micro_batches(tmp_path: Path) -> None:
    """Micro-batches with unequal numbers of items: gradients equal those of one mean over all items."""
    network = nn.Linear(3, 1, bias=False)
    data = torch.randn(4, 5, 3)
    lengths = torch.tensor([5, 1, 2, 4])

    def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = torch.arange(5) < batch[:, :1]
        return (module(data[batch[:, 1]]).squeeze(-1).square() * mask).sum(), {}

    seen: list[Tensor] = []
    still = AdamW([{"params": list(network.parameters()), "peak": 0.0}], lr=0.0)
    phase = Phase("network", network, loss, lambda b: int(b[:, 0].sum()), [still])
    network.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))  # type: ignore[union-attr]
    task = Task([phase], lambda p: torch.stack((lengths[p % 4], torch.from_numpy(p) % 4), 1),
                lambda m: {"loss": 0.0, "items": 1.0}, lambda m: "", 1, 1.0)
    training = replace(TRAINING, batch=4, clip=0.0, ema=0.0)
    run_of(task, training, tmp_path, micro_batch=1).phase_step(phase, np.arange(4))
    mask = torch.arange(5) < lengths[:, None]
    expected = torch.autograd.grad((network(data).squeeze(-1).square() * mask).sum() / lengths.sum(), network.weight)[0]
    torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_bit_exact(tmp_path: Path, dropout: float) -> None:
    straight = run_of(task_of(TRAINING, dropout), TRAINING, tmp_path / "straight")
    straight.train()
    first = run_of(task_of(TRAINING, dropout), TRAINING, tmp_path / "broken")
    for _ in range(3):  # the third step is lost: the last checkpoint is of step 2
        first.step()
        if first.progress.step == 2:
            first.save()
    second = run_of(task_of(TRAINING, dropout, seed=99), TRAINING, tmp_path / "broken")
    assert second.resume()
    assert second.progress.step == 2
    second.train()
    assert same(everything(straight), everything(second))


def test_data_order_changes_the_weights(tmp_path: Path) -> None:
    a, b = (run_of(task_of(TRAINING), TRAINING, tmp_path / name) for name in "ab")
    b.progress.shift = 1
    a.train()
    b.train()
    assert not same(everything(a), everything(b))


def poisoned(task: Task, bad: Callable[[int], bool]) -> Task:
    """The same task whose loss is not a number for the places that `bad` picks."""
    plain, phase = task.batch, task.phases[0]

    def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, told = next_token.loss(module, batch[:, :-1])
        return total + (float("nan") if batch[:, -1].any() else 0.0), told

    phase.loss, phase.count = loss, lambda b: b[:, 1:-1].numel()
    return replace(task, batch=lambda p: torch.cat((plain(p), torch.tensor([[int(bad(int(i)))] for i in p])), 1))


def test_a_batch_that_is_not_finite_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(poisoned(task_of(TRAINING), lambda place: place == 20), TRAINING, tmp_path)
    progress = run.train()
    assert progress.step == TRAINING.steps
    assert progress.shift == 1
    assert all(v.isfinite().all() for v in everything(run).values())
    assert "batch 16 to 23 is skipped" in capsys.readouterr().err


def test_many_bad_batches_go_back_to_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(poisoned(task_of(TRAINING), lambda place: 24 <= place < 24 + 4 * 8), TRAINING, tmp_path)
    progress = run.train()
    assert progress.step == TRAINING.steps
    assert progress.returns == 1
    assert "went back to the checkpoint of step 2" in capsys.readouterr().err
    assert all(v.isfinite().all() for v in everything(run).values())


def test_a_run_that_only_diverges_ends_with_advice(tmp_path: Path) -> None:
    run = run_of(poisoned(task_of(TRAINING), lambda place: place >= 24), TRAINING, tmp_path)
    with pytest.raises(UserError, match=r"diverged.*learning_rate"):
        run.train()


def test_the_average_is_what_is_evaluated(tmp_path: Path) -> None:
    task = task_of(TRAINING)
    run = run_of(task, TRAINING, tmp_path)
    run.train()
    with run.averaged():
        sums = task.evaluate(task.phases[0].network)
    assert run.progress.validation == pytest.approx(sums["loss"] / sums["items"], rel=1e-6)
    assert sums["loss"] != pytest.approx(task.evaluate(task.phases[0].network)["loss"], rel=1e-6)


def test_the_best_weights_are_kept_and_survive_a_resume(tmp_path: Path) -> None:
    """At a rate that grows from useful to absurd, the validation loss falls first and rises later."""
    training = replace(TRAINING, steps=12, warmup=12, ema=0.0, learning_rate=10.0, evaluate_every=1)
    run = run_of(task_of(training), training, tmp_path)
    progress = run.train()
    assert progress.best_step < progress.step
    assert progress.best < progress.validation
    again = run_of(task_of(training, seed=5), training, tmp_path)
    assert again.resume()
    task = again.task
    for chosen in (run, again):
        with chosen.chosen():
            sums = task.evaluate(chosen.task.phases[0].network)
        assert sums["loss"] / sums["items"] == pytest.approx(progress.best, rel=1e-6)


def test_bf16_trains_to_nearly_the_same_loss(tmp_path: Path) -> None:
    losses = [run_of(task_of(TRAINING), TRAINING, tmp_path / p, precision=p).train().loss for p in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


def test_stop_at_ends_early_and_saves(tmp_path: Path) -> None:
    training = replace(TRAINING, stop_at=100.0)
    progress = run_of(task_of(training), training, tmp_path).train()
    assert progress.stopped
    assert progress.step == training.evaluate_every
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[0].name == "step-3"


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run_of(task_of(TRAINING), TRAINING, tmp_path).train()
    other = task_of(TRAINING)
    torch.manual_seed(0)
    other.phases[0].network = Decoder(Settings(layers=3, width=32, heads=2, context=16), VOCABULARY)
    with pytest.raises(UserError, match="another network"):
        run_of(other, TRAINING, tmp_path).resume()


def test_metrics_are_cut_back_on_resume(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.5}', '{"step": 3, "los']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    Monitor(tmp_path, resume_at=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + "\n"
