"""The recurrent network against torch.nn.LSTM and GRU and against itself: state, steps, masks, precision, export."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.recurrent import Layer, Recurrent, Settings, State
from handmill.training.precision import HalfPrecision

V = 23
CELLS = ("lstm", "gru")
DROPOUTS = ("dropout", "input_dropout", "output_dropout", "embedding_dropout", "weight_drop")
DROPPED = dict.fromkeys(DROPOUTS, 0.5)


def recurrent(cell: str, **more: Any) -> Recurrent:
    """A network with biases away from zero."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"cell": cell, "layers": 3, "width": 16, "context": 12} | more
    network = Recurrent(Settings(**settings), V)
    for p in network.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return network


def theirs(network: Recurrent, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """torch's own layers with the same weights."""
    module = nn.LSTM if network.settings.cell == "lstm" else nn.GRU
    layers = nn.ModuleList()
    for layer in network.layers:
        assert isinstance(layer, Layer)
        copied = module(layer.input.shape[1], layer.units, batch_first=True, dtype=dtype)
        for mine, their in zip(layer.parameters(), copied.parameters(), strict=True):
            their.data.copy_(mine)
        layers.append(copied)
    return layers


def some(rows: int = 3, length: int = 12, seed: int = 2) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))  # (B, T)


def flat(state: State) -> list[Tensor]:
    return [part for memory in state.layers for part in memory]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [{}, {"embedding": 8}, {"embedding": 24, "tied": True}])
def test_outputs_states_and_gradients_are_those_of_torchs_layers(cell: str, shape: dict[str, Any]) -> None:
    network = recurrent(cell, **shape).double()
    layers, table = theirs(network, torch.float64), network.embedding.weight.detach().clone().requires_grad_()
    x, last = F.embedding(some(), table), []
    for layer in layers:
        x, end = layer(x)
        last += [part[0] for part in (end if cell == "lstm" else (end,))]
    head = table if network.settings.tied else network.head.weight.detach()
    expected = F.cross_entropy((x @ head.T).flatten(0, 1), some(seed=3).flatten(), reduction="sum")
    loss, state = network(some(), targets=some(seed=3))
    for mine, their in zip(flat(state), last, strict=True):
        torch.testing.assert_close(mine, their)
    # also through the last state, as where segments are not detached
    (loss + sum(part.square().sum() for part in flat(state))).backward()
    (expected + sum(part.square().sum() for part in last)).backward()
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-5)  # it is summed in fp32
    torch.testing.assert_close(network.embedding.weight.grad, table.grad)
    for mine, their in zip(network.layers.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, their.grad)


@pytest.mark.parametrize("cell", CELLS)
def test_fp32_is_close_to_fp64(cell: str) -> None:
    network = recurrent(cell)
    logits, _ = network(some())
    exact, _ = recurrent(cell).double()(some())
    torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("cut", [(12,), (5, 7), (1, 11), (1,) * 12, (6, 1, 5)])
def test_calls_that_follow_each_other_equal_one_long_call(cell: str, cut: tuple[int, ...]) -> None:
    network = recurrent(cell, tied=True, embedding=8).eval()
    whole, last = network(some())
    parts, state = [], None
    for tokens in some().split(list(cut), 1):
        logits, state = network(tokens, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert state is not None
    for mine, other in zip(flat(state), flat(last), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_single_steps_are_those_of_one_long_call(cell: str) -> None:
    whole, steps = recurrent(cell), recurrent(cell)
    whole(some(), targets=some(seed=3))[0].backward()
    state, loss = None, torch.zeros(())
    for tokens, targets in zip(some().split(1, 1), some(seed=3).split(1, 1), strict=True):
        more, state = steps(tokens, state, targets)
        loss = loss + more
    loss.backward()
    for one, other in zip(whole.parameters(), steps.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_state_has_a_row_a_text_and_can_be_detached(cell: str) -> None:
    network = recurrent(cell, embedding=8, tied=True)
    _, state = network(some())
    detached = network.detached(state)
    assert network.carries
    assert isinstance(detached, State)
    for memory, width in zip(state.layers, (16, 16, 8), strict=True):
        assert all(part.shape == (3, width) for part in memory)
    for part, free in zip(flat(state), flat(detached), strict=True):
        assert torch.equal(part, free)
        assert part.requires_grad
        assert not free.requires_grad
    one = State(tuple(tuple(part[1:2] for part in memory) for memory in detached.layers))
    torch.testing.assert_close(network(some(seed=5)[1:2], one)[0], network(some(seed=5), detached)[0][1:2])


def test_tied_weights_are_one_tensor() -> None:
    tied, free = recurrent("lstm", embedding=8, tied=True), recurrent("lstm", embedding=8)
    assert tied.head.weight is tied.embedding.weight
    assert tied.settings.widths == (16, 16, 8)
    assert "head.weight" not in dict(tied.named_parameters())
    assert free.head.weight.shape == (V, 16)
    assert free.settings.widths == (16, 16, 16)


def test_operations_of_a_token_are_six_a_matrix_weight() -> None:
    network = recurrent("gru", layers=2, embedding=8, tied=True)  # layers of 16 and 8 units
    assert network.flops_per_token() == 6 * (3 * 16 * (8 + 16) + 3 * 8 * (16 + 8) + V * 8)


@pytest.mark.parametrize("cell", CELLS)
def test_without_training_nothing_is_dropped(cell: str) -> None:
    dropped, plain = recurrent(cell, **DROPPED), recurrent(cell)
    expected = plain(some())[0]  # in training mode: without dropout it makes no difference
    assert not torch.equal(dropped(some())[0], dropped(some())[0])
    assert torch.equal(dropped.eval()(some())[0], expected)


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_acts_and_follows_torchs_seed(name: str) -> None:
    network, plain = recurrent("lstm", **{name: 0.5}), recurrent("lstm")
    outputs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outputs.append(network(some())[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], plain(some())[0], atol=1e-3)


@pytest.mark.parametrize("steps", [1, 5])
def test_weight_drop_zeroes_entries_of_the_hidden_matrix_once_a_pass(monkeypatch: pytest.MonkeyPatch,
                                                                     steps: int) -> None:
    layer, x, masks = Layer("lstm", 4, 6), torch.randn(2, steps, 4), []
    dropout = F.dropout

    def watched(*arguments: Any) -> Tensor:
        masks.append(dropout(*arguments))
        return masks[-1]

    monkeypatch.setattr(F, "dropout", watched)
    y, _ = layer(x, layer.start(2), 0.5)
    (mask,) = masks
    zero = mask == 0
    assert mask.shape == (24, 6)
    assert 0 < zero.sum() < zero.numel()
    assert zero.any(0).sum() > 1
    torch.testing.assert_close(mask[~zero], 2 * layer.hidden[~zero])
    layer.hidden.data = mask.detach()
    torch.testing.assert_close(layer(x, layer.start(2), 0.0)[0], y)


def test_weight_drop_keeps_the_expectation() -> None:
    layer, memory = Layer("gru", 4, 6), (torch.randn(1, 6),)
    torch.manual_seed(6)
    dropped = torch.stack([F.linear(memory[0], F.dropout(layer.hidden, 0.3)) for _ in range(4000)])
    torch.testing.assert_close(dropped.mean(0), F.linear(memory[0], layer.hidden), atol=0.05, rtol=0)


def test_a_locked_mask_is_the_same_at_every_step_and_differs_between_rows() -> None:
    network, x = recurrent("lstm"), torch.ones(200, 7, 16)
    y = network._locked(x, 0.25)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert len(y[:, 0].unique(dim=0)) > 150
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert network.eval()._locked(x, 0.25) is x


def test_a_dropped_word_is_dropped_wherever_it_stands() -> None:
    network = recurrent("lstm", embedding_dropout=0.5)
    tokens = torch.arange(V).repeat(4, 3)  # (4, 3 V)
    x = network._embedded(tokens).view(-1, V, 16)
    assert torch.equal(x, x[:1].expand_as(x))
    gone = (x[0] == 0).all(1)
    assert 0 < gone.sum() < V
    torch.testing.assert_close(x[0, ~gone], 2 * network.embedding.weight[~gone])


@pytest.mark.parametrize("cell", CELLS)
def test_bf16_is_close_to_fp32(cell: str) -> None:
    network, half = recurrent(cell, tied=True), recurrent(cell, tied=True)
    loss, _ = network(some(), targets=some(seed=3))
    rough, state = HalfPrecision(half)(some(), targets=some(seed=3))
    loss.backward()
    rough.backward()
    assert rough.dtype == torch.float32
    assert {part.dtype for part in flat(state)} == {torch.bfloat16}
    torch.testing.assert_close(rough, loss, rtol=0.01, atol=0)
    for p, q in zip(network.parameters(), half.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.05 * p.grad.norm()
    torch.testing.assert_close(network(some(), state)[0], network(some(), network(some())[1])[0], rtol=0, atol=0.2)


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_are_known_without_data(cell: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        network = Recurrent(Settings(cell=cell, layers=2, width=16, **DROPPED), V)  # type: ignore[arg-type]
        tokens = torch.zeros(3, 5, dtype=torch.int64)
        loss, state = HalfPrecision(network)(tokens, targets=tokens)
        loss.backward()
        assert network(tokens[:, :1], state)[0].shape == (3, 1, V)
        assert network.layers[1].get_parameter("hidden").grad is not None


class Step(nn.Module):
    """One step with plain tensors, as an exporter wants it."""

    def __init__(self, network: Recurrent) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
        each = len(parts) // self.network.settings.layers
        memories = tuple(tuple(parts[i:i + each]) for i in range(0, len(parts), each))
        logits, state = self.network(tokens, State(memories))
        return logits, *flat(state)


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_is_captured_for_any_number_of_rows(cell: str) -> None:
    step = Step(recurrent(cell, embedding=8, tied=True).eval())
    state = flat(step.network(some())[1])
    rows = torch.export.Dim("rows")
    program = torch.export.export(step, (some(3, 1), state), dynamic_shapes=({0: rows}, [{0: rows}] * len(state)))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("lstm" in name or "gru" in name for name in called), called
    wider = [part.repeat(2, 1) for part in state]
    for mine, other in zip(program.module()(some(6, 1), wider), step(some(6, 1), wider), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_runs_as_onnx(cell: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from handmill.export.onnx import save

    step = Step(recurrent(cell).eval())
    state = flat(step.network(some())[1])
    rows, names = torch.export.Dim("rows"), [f"past.{i}" for i in range(len(state))]
    file = tmp_path / "step.onnx"
    save(step, (some(3, 1), [part.detach() for part in state]), ({0: rows}, [{0: rows}] * len(state)),
         ["tokens", *names], ["logits", *(f"present.{i}" for i in range(len(state)))], file)
    session = onnxruntime.InferenceSession(str(file))
    wider = [part.detach().repeat(2, 1) for part in state]
    made = session.run(None, {"tokens": some(6, 1).numpy()} | {n: p.numpy() for n, p in zip(names, wider, strict=True)})
    for mine, other in zip(made, step(some(6, 1), wider), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), other.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_learns_to_repeat_what_it_was_shown(cell: str) -> None:
    """Three symbols are shown, and then asked for; the answer is given from the carried state alone."""
    torch.manual_seed(0)
    network = Recurrent(Settings(cell=cell, layers=1, width=64), 7)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    ask = torch.zeros(64, 3, dtype=torch.int64)
    for _ in range(300):
        shown = torch.randint(1, 7, (64, 3))
        _, state = network(shown)
        loss, _ = network(ask, state, shown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shown = torch.randint(1, 7, (64, 3))
    answer, _ = network(ask, network.detached(network(shown)[1]))
    assert (answer.argmax(-1) == shown).float().mean() > 0.95


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"width": -1}, {"embedding": -2}, {"weight_drop": 1.0},
                                   {"embedding_dropout": -0.1}])
def test_impossible_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(Settings(), **wrong)
