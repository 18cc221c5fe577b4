"""State that is carried from step to step: the order of segments, truncated backpropagation, resuming, gaps."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.data.streams import Streams, in_rows
from handmill.errors import UserError
from handmill.families import next_token
from handmill.networks import decoder, recurrent
from handmill.recipe import Training
from handmill.training.carried import Carried, leaves
from handmill.training.loop import Choices, Phase, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.optimizers import optimizers

CPU = torch.device("cpu")
VOCABULARY, CONTEXT, ROWS = 11, 6, 4
TRAINING = Training(steps=7, batch=ROWS, warmup=2, evaluate_every=3, save_every=2, sample_every=0, ema=0.9)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 400).astype(np.uint16)

NETWORKS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: recurrent.Recurrent(recurrent.Settings(width=16, context=CONTEXT), VOCABULARY),
    "gru": lambda: recurrent.Recurrent(recurrent.Settings(cell="gru", width=16, context=CONTEXT, dropout=0.2),
                                       VOCABULARY),
    "rotary": lambda: decoder.Decoder(decoder.Settings(layers=2, width=16, heads=2, context=CONTEXT, memory=9,
                                                       start="gpt2"), VOCABULARY),
    "relative": lambda: decoder.Decoder(decoder.Settings(layers=2, width=16, heads=2, context=CONTEXT, memory=4,
                                                         positions="relative", start="gpt2"), VOCABULARY),
}
ALL = pytest.mark.parametrize("kind", [*NETWORKS])


def made(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return NETWORKS[kind]()


def task_of(kind: str, training: Training = TRAINING, seed: int = 0) -> Task:
    network = made(kind, seed)
    streams, held = Streams(TOKENS[:300], CONTEXT, training.batch, 1), in_rows(TOKENS[300:], CONTEXT, 3)
    carried = Carried(network, training.batch)
    phase = Phase("network", network, next_token.carrying(carried), next_token.count, optimizers(network, training),
                  learn=lambda figures, items: carried.advance())
    return Task([phase], streams.batch, lambda m: next_token.evaluate_on(m, held), lambda m: "", CONTEXT, 1.0,
                carried=carried)


def run_of(task: Task, folder: Path, training: Training = TRAINING, **choices: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(task, training, 1, folder, CPU, Monitor(folder), Choices(**choices))


def everything(run: Run) -> dict[str, Tensor]:
    return {f"{part}/{k}": v.clone() for part, tensors in run.tensors().items() for k, v in tensors.items()}


def test_rows_read_on_and_an_epoch_reads_every_token_once() -> None:
    streams = Streams(np.arange(400).astype(np.uint16), CONTEXT, ROWS, 1)
    batches = [streams.batch(np.arange(ROWS) + turn * ROWS) for turn in range(2 * streams.turns)]
    for turn, (one, other) in enumerate(pairwise(batches), 1):
        fresh = turn % streams.turns == 0
        assert other["fresh"].tolist() == [fresh] * ROWS
        assert torch.equal(one["tokens"][:, -1], other["tokens"][:, 0]) != fresh
    read = torch.cat([b["tokens"][:, 1:].flatten() for b in batches[:streams.turns]])
    assert len(read) == len(set(read.tolist())) == streams.turns * ROWS * CONTEXT
    assert read.max() - read.min() + 1 == len(read)


def test_a_place_is_the_same_whoever_asks() -> None:
    streams = Streams(TOKENS, CONTEXT, ROWS, 1)
    whole, part = streams.batch(np.arange(40)), streams.batch(np.array([33, 7]))
    assert all(torch.equal(whole[name][[33, 7]], part[name]) for name in whole)


def test_too_few_tokens_for_the_rows_are_named() -> None:
    with pytest.raises(UserError, match=r"lower training\.batch"):
        Streams(TOKENS[:ROWS * CONTEXT], CONTEXT, ROWS, 1)


@pytest.mark.parametrize(("tokens", "limit"), [(100, 0), (100, 40), (5, 0), (8, 3), (7, 0)])
def test_held_out_rows_follow_themselves(tokens: int, limit: int) -> None:
    held = in_rows(np.arange(tokens).astype(np.uint16), CONTEXT, 3, limit)
    assert torch.equal(held[1:, :, 0], held[:-1, :, -1])
    predicted = held[..., 1:].flatten().tolist()
    assert len(predicted) == len(set(predicted)) <= max(limit or tokens, CONTEXT)
    assert len(predicted) > (limit or tokens - 1) - 3 * CONTEXT


@ALL
def test_the_second_step_goes_on_from_the_first(kind: str) -> None:
    """Against the network called by hand: the first segment without a graph, then the second."""
    task = task_of(kind)
    network, carried = task.phases[0].network.eval(), task.carried
    assert carried is not None
    carried.on = True
    first, second = (task.batch(np.arange(ROWS) + turn * ROWS) for turn in range(2))
    task.phases[0].loss(network, first)
    carried.advance()
    loss, _ = task.phases[0].loss(network, second)
    with torch.no_grad():
        _, state = network(first["tokens"][:, :-1])
    logits, _ = network(second["tokens"][:, :-1], state)
    expected = F.cross_entropy(logits.flatten(0, 1), second["tokens"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    given = dict(network.named_parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, [*given.values()]),
                            torch.autograd.grad(expected, [*given.values()]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@ALL
def test_a_fresh_row_has_read_nothing(kind: str) -> None:
    network = made(kind).eval()
    tokens = torch.from_numpy(TOKENS[:24].astype(np.int64)).view(2, 12)
    _, state = network(tokens, network.blank(2, CPU))
    state = network.restarted(state, torch.tensor([True, False]))
    logits, _ = network(tokens[:, :5], state)
    torch.testing.assert_close(logits[0], network(tokens[:1, :5])[0][0])
    assert not torch.allclose(logits[1], network(tokens[1:, :5])[0][0])


@ALL
def test_resume_is_bit_exact(kind: str, tmp_path: Path) -> None:
    straight = run_of(task_of(kind), tmp_path / "straight")
    straight.train()
    first = run_of(task_of(kind), tmp_path / "broken")
    for _ in range(3):  # the third step is lost: the last checkpoint is of step 2
        first.step()
        if first.progress.step == 2:
            first.save()
    second = run_of(task_of(kind, seed=99), tmp_path / "broken")
    assert second.resume()
    second.train()
    one, other = everything(straight), everything(second)
    assert one.keys() == other.keys()
    assert "carried/0" in one
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kind", ["lstm", "relative"])
def test_micro_batches_carry_the_same_state(kind: str, tmp_path: Path) -> None:
    training = replace(TRAINING, optimizer="adamw")
    whole, parts = (run_of(task_of(kind, training), tmp_path / name, training, micro_batch=micro)
                    for name, micro in (("a", 0), ("b", 2)))
    whole.train()
    parts.train()
    one, other = everything(whole), everything(parts)
    for name in one:
        if name.startswith(("network/", "carried/")):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-4)


def test_after_a_gap_rows_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = task_of("lstm")
    plain, begun = task.phases[0].loss, []

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert task.carried is not None
        begun.append(sum(float(leaf.abs().sum()) for leaf in leaves(task.carried.start(batch))))
        total, told = plain(module, batch)
        return total + (float("nan") if int(batch["turn"][0]) == 2 else 0.0), told

    task.phases[0].loss = loss
    run = run_of(task, tmp_path)
    for _ in range(4):
        run.step()
    assert "is skipped" in capsys.readouterr().err
    zero = [value == 0 for value in begun]  # of turns 0, 1, 2 (skipped), 3, 4
    assert zero == [True, False, False, True, False]


@ALL
def test_an_evaluation_reads_each_row_in_one(kind: str) -> None:
    network = made(kind).eval()
    held = in_rows(TOKENS, CONTEXT, 3)
    found = next_token.evaluate_on(network, held)
    rows = torch.cat([held[0, :, :1], held[..., 1:].transpose(0, 1).flatten(1)], 1)  # (R, turns T + 1)
    logits, _ = network(rows[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    assert found["items"] == rows[:, 1:].numel()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_targets_that_are_not_counted_add_nothing() -> None:
    network = made("rotary").eval()
    tokens = torch.from_numpy(TOKENS[:28].astype(np.int64)).view(4, 7)
    counted = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    batch = {"tokens": tokens, "counted": counted}
    total, _ = next_token.loss(network, batch)
    each = F.cross_entropy(network(tokens[:, :-1])[0].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(total, each[counted].sum())
    assert next_token.count(batch) == int(counted.sum())
    ours = torch.autograd.grad(total, network.head.weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(each[counted].sum(), network.head.weight)[0])
