"""Exports of networks that carry a state, or count positions as distances, run by ONNX Runtime."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from handmill import folder, recipe
from handmill.data import music
from handmill.data.prepared import write_json
from handmill.errors import UserError
from handmill.export import compare as comparing
from handmill.export import onnx_recurrent
from handmill.export.compare import compare
from handmill.families.autoregressive import Sampling, greedy
from handmill.families.composing import Wish, compose
from handmill.folder import Model
from handmill.media import music_tokens, tokenizers
from handmill.networks import build
from handmill.networks.recurrent import Layer, Recurrent, Settings
from handmill.verbs import export as verb
from handmill.verbs.export import export
from handmill.verbs.generate import generate
from handmill.verbs.making import network_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONTEXT = 12
MEMORY = tiny.DEFAULT | {"context": CONTEXT, "memory": 16}
RECURRENT = {"kind": "recurrent", "layers": 3, "width": 24, "context": CONTEXT}
NETWORKS = {
    "transformer-xl": MEMORY | {"positions": "relative", "norm": "layer", "memory": 20},
    "lstm": RECURRENT | {"cell": "lstm", "embedding": 16, "tied": True, "weight_drop": 0.3},
    "gru": RECURRENT | {"cell": "gru", "layers": 2},
    "memory": MEMORY,
    "relative": MEMORY | {"positions": "relative", "memory": 0, "context": 48},
}
DECODERS, RECURRENTS = ("transformer-xl", "memory", "relative"), ("lstm", "gru")


def named(*names: str) -> list[Any]:
    """Parameters of a test; an export of a decoder takes seconds, and one of its kinds will do."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in ("memory", "relative"))) for name in names]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Model folders with their ONNX exports, by name, made when they are first asked for."""
    @cache
    def made(name: str) -> Model:
        path = write(tmp_path_factory.mktemp("state") / name, NETWORKS[name])
        assert export(path, "onnx")["logits_error"] < 2e-5
        return folder.load(path)

    return made


def write(path: Path, network: dict[str, Any], medium: str = "text") -> Path:
    """A model folder with random weights, in a recurrent network such that its texts do not stand still."""
    codec: dict[str, Any] = {"text": {"kind": "byte"}, "music": {"kind": "frames", "voices": 4}}[medium]
    made = recipe.parse({"name": "tiny", "medium": medium, "family": "autoregressive", "seed": 1, "codec": codec,
                         "network": network})
    tokens = music_tokens.Frames(made.codec) if medium == "music" else tokenizers.train(made.codec, [tiny.TEXT])
    torch.manual_seed(1)
    weights = folder.weights_of(build(made.network, tokens))
    scale = {name: 1.0 if len(w) == tokens.size else 0.3 for name, w in weights.items()}
    for name, w in weights.items():
        w += (scale[name] if network["kind"] == "recurrent" else 0.1) * torch.randn_like(w)
    folder.write(path, made, weights, tokens, {}, {})
    return path


def some(rows: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(seed))  # (B, T)


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state or () for tensor in tensors(part)]


def alike(one: Any, other: Any) -> None:
    for mine, its in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-4, atol=2e-5)


# the runtime is called as the network

@pytest.mark.parametrize("name", named(*NETWORKS))
@pytest.mark.parametrize("cut", [(48,), (1,) * 48, (5, 1, 1, 30, 11), (17, 16, 15)])
@torch.no_grad()
def test_calls_that_follow_each_other_equal_the_full_run(exported: Callable[[str], Model], name: str,
                                                         cut: tuple[int, ...]) -> None:
    """Four contexts of three rows, and the state after each call is the network's."""
    model, runtime = exported(name), network_of(exported(name), "onnx")
    whole, parts, mine, its = model.network(some(3, 48))[0], [], None, None
    for tokens in some(3, 48).split(list(cut), 1):
        _, mine = model.network(tokens, mine)
        logits, its = runtime(tokens, its)
        assert type(its) is type(mine)
        alike(mine, its)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", named(*DECODERS))
@torch.no_grad()
def test_rows_with_padding_are_the_texts_alone(exported: Callable[[str], Model], name: str) -> None:
    """While the padding is in the memory, while it leaves it, and long after."""
    runtime, padding, tokens = network_of(exported(name), "onnx"), torch.tensor([0, 3, 14]), some(3, 48)
    state, parts = runtime.padded(padding), []
    for chunk in tokens.split([15, 1, 1, 6, 1, 24], 1):
        logits, state = runtime(chunk, state)
        parts.append(logits)
    assert state.length == 48
    made = torch.cat(parts, 1)
    for row, pad in enumerate(padding.tolist()):
        alone = exported(name).network(tokens[row:row + 1, pad:])[0]
        torch.testing.assert_close(made[row:row + 1, pad:], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", named(*NETWORKS))
def test_settings_and_what_carries_are_the_networks(exported: Callable[[str], Model], name: str) -> None:
    network, runtime = exported(name).network, network_of(exported(name), "onnx")
    assert runtime.settings == network.settings
    assert runtime.carries == getattr(network, "carries", False) == (name != "relative")
    assert hasattr(runtime, "padded") == hasattr(network, "padded") == (name in DECODERS)
    one = runtime(some(3, 5))[1]
    assert all(len(tensor) == 3 for tensor in tensors(one))


@pytest.mark.parametrize("name", named(*NETWORKS))
def test_greedy_tokens_of_four_contexts_are_the_same(exported: Callable[[str], Model], name: str) -> None:
    model, runtime, seen = exported(name), network_of(exported(name), "onnx"), set()
    for prompt in ([256], [256, 1, 2, 3], some(1, 20)[0].tolist()):
        expected = greedy(model.network, prompt, 4 * model.recipe.network.context)
        assert greedy(runtime, prompt, len(expected)) == expected
        seen |= set(expected)
    assert len(seen) > 5


@pytest.mark.parametrize("name", named(*NETWORKS))
def test_the_same_texts_are_made(exported: Callable[[str], Model], name: str) -> None:
    """Prompts of different lengths, one longer than the context, and texts that go far beyond it."""
    prompts = ["", "Hello", "The quick brown fox jumps over the lazy dog, and again!"]
    for how in ({"temperature": 0.0}, {"top_p": 0.9}):
        expected = generate(exported(name), prompts, seed=4, max_tokens=60, **how)
        assert generate(exported(name), prompts, runtime="onnx", seed=4, max_tokens=60, **how) == expected


# the graphs

@pytest.mark.parametrize("name", RECURRENTS)
def test_a_layer_is_one_operator(exported: Callable[[str], Model], name: str) -> None:
    onnx = pytest.importorskip("onnx")
    graph, s = onnx.load(exported(name).path / "exports" / "onnx" / "model.onnx"), exported(name).recipe.network
    onnx.checker.check_model(graph, full_check=True)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count(s.cell.upper()) == s.layers
    assert not {"Loop", "Scan", "Reshape", "Sigmoid"} & set(kinds)
    free = {d.dim_param for i in graph.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    assert free == {"batch", "time"}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_stand_in_the_operators_order(cell: str) -> None:
    """The operator's definition (ONNX, LSTM and GRU), one step in NumPy on the weights as they are written."""
    torch.manual_seed(1)
    layer = Layer(cell, 4, 5)  # type: ignore[arg-type]
    for p in layer.parameters():
        p.data = torch.randn_like(p)
    x, memory = torch.randn(3, 4), tuple(torch.randn(3, 5) for _ in layer.start(3))
    w, r, b = (p[0].detach() for p in onnx_recurrent._weights(layer))
    gates = len(w) // 5
    one, two = b.chunk(2)
    read, heard = (x @ w.T + one).chunk(gates, 1), (memory[0] @ r.T + two).chunk(gates, 1)
    if cell == "lstm":
        i, o, f, c = (one + two for one, two in zip(read, heard, strict=True))
        after = f.sigmoid() * memory[1] + i.sigmoid() * c.tanh()
        expected = [o.sigmoid() * after.tanh(), after]
    else:
        z, reset = ((one + two).sigmoid() for one, two in zip(read[:2], heard[:2], strict=True))
        n = (read[2] + reset * heard[2]).tanh()  # linear_before_reset = 1
        expected = [(1 - z) * n + z * memory[0]]
    alike(layer(x[:, None], memory, 0.0)[1], expected)


@pytest.mark.parametrize("name", named("transformer-xl", "memory"))
def test_attention_is_one_operator_and_keeps_the_memory(exported: Callable[[str], Model], name: str) -> None:
    onnx = pytest.importorskip("onnx")
    graph, s = onnx.load(exported(name).path / "exports" / "onnx" / "model.onnx"), exported(name).recipe.network
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Attention") == s.layers
    assert "Softmax" not in kinds
    runtime = network_of(exported(name), "onnx")
    state = runtime(some(1, 100))[1]
    assert (state.kept, state.length) == (s.memory, 100)


@pytest.mark.parametrize("name", ["transformer-xl", "gru", "lstm"])
def test_the_file_runs_without_handmill(exported: Callable[[str], Model], name: str) -> None:
    """Greedy text with onnxruntime, numpy and export.json alone."""
    runtime = pytest.importorskip("onnxruntime")
    target = exported(name).path / "exports" / "onnx"
    about = json.loads((target / "export.json").read_text(encoding="utf-8"))
    session = runtime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
    if "units" in about:
        past = [np.zeros((1, about["units"][int(i.split(".")[1])]), np.float32) for i in about["inputs"][1:]]
    else:
        past = [np.zeros((1, about["key_heads"], 0, about["head_width"]), np.float32)] * (2 * about["layers"])
    step, made, padding = [about["end"], 65, 66], [], [np.zeros(1, np.int64)] * ("padding" in about["inputs"])
    for _ in range(40):
        inputs = dict(zip(about["inputs"], [np.array([step]), *padding, *past], strict=True))
        logits, *past = session.run(about["outputs"], inputs)
        step = [int(logits[0, -1].argmax())]
        made += step
    assert made == greedy(exported(name).network, [about["end"], 65, 66], 40)


SAID = {
    "transformer-xl": ["last 20 keys", "network remembers 20 positions", "past + time - 20", "Positions are relative"],
    "relative": ["grown keys", "at most 48 in all", "Positions are relative"],
    "lstm": ["of the LSTM", "| past.2.h, past.2.c | (batch, 16) float32", "`present.i.h` and `present.i.c`"],
    "gru": ["of the GRU", "| past.0.h | (batch, 24) float32", "no padding"],
}


@pytest.mark.parametrize("name", named(*SAID))
def test_the_page_says_what_the_inputs_mean(exported: Callable[[str], Model], name: str) -> None:
    text = (exported(name).path / "exports" / "onnx" / "README.md").read_text(encoding="utf-8")
    assert [part for part in SAID[name] if part not in " ".join(text.split())] == []
    assert "{" not in text
    assert ("positions that are gone" in text) == (name == "transformer-xl")


# the comparison

@pytest.mark.parametrize("name", named("transformer-xl", "lstm", "gru", "memory"))
def test_the_record_says_how_far_the_state_was_followed(exported: Callable[[str], Model], name: str) -> None:
    record, s = folder.read_receipt(exported(name).path)["exports"]["onnx"], exported(name).recipe.network
    assert record["segments"] == 4
    assert record["steps_tokens"] == 4 * (4 * CONTEXT + getattr(s, "memory", 0))
    assert record["steps_alike"] == record["steps_tokens"]
    assert 0 < record["steps_error"] < record["steps_tolerance"] == 1e-4
    assert any("steps far beyond the context" in line for line in verb.lines(record))


class Wrong:
    """A runtime with one fault."""

    def __init__(self, runtime: Any, fault: str) -> None:
        self.runtime, self.fault, self.settings, self.carries = runtime, fault, runtime.settings, runtime.carries
        if hasattr(runtime, "padded"):
            self.padded = runtime.padded

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if self.fault == "forgets" and tokens.shape[1] == CONTEXT:
            state = None
        logits, after = self.runtime(tokens, state)
        if self.fault == "keeps too little" and after.kept > 8:
            after = after._replace(keys=tuple(k[:, :, -8:] for k in after.keys),
                                   values=tuple(v[:, :, -8:] for v in after.values),
                                   dropped=after.dropped + after.kept - 8)
        if self.fault == "drifts" and tokens.shape[1] == 1:
            after = type(after)(tuple(tuple(1.001 * part for part in memory) for memory in after.layers))
        return logits, after


@pytest.mark.parametrize(("name", "fault"), [("transformer-xl", "forgets"), ("lstm", "forgets"),
                                             ("transformer-xl", "keeps too little"), ("gru", "drifts")])
def test_every_fault_of_the_state_is_seen(exported: Callable[[str], Model], name: str, fault: str) -> None:
    model, runtime = exported(name), network_of(exported(name), "onnx")
    windows, _ = verb.held_out(model)
    assert windows.shape == (4, 4 * CONTEXT)
    assert compare(model.network, Wrong(runtime, "none"), windows)["logits_error"] < 2e-5
    with pytest.raises(UserError, match="does not compute what the trained network does"):
        compare(model.network, Wrong(runtime, fault), windows)


def test_an_error_that_comes_late_is_seen(exported: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, runtime, calls = exported("gru"), network_of(exported("gru"), "onnx"), 0
    windows, _ = verb.held_out(model)

    class Late(Wrong):
        def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            nonlocal calls
            logits, after = self.runtime(tokens, state)
            calls += len(tokens) == len(windows) and tokens.shape[1] == 1
            return logits + 0.01 * (calls > 40), after

    with pytest.raises(UserError, match=r"steps differ by 1\.0e-02, at most 1e-04 allowed"):
        compare(model.network, Late(runtime, "none"), windows)
    calls = 0
    monkeypatch.setattr(comparing, "LONGEST", 20)
    assert compare(model.network, Late(runtime, "none"), windows)["steps_tokens"] == 80


@torch.no_grad()
def test_errors_that_grow_by_themselves_hide_no_other(exported: Callable[[str], Model]) -> None:
    """A recurrent network whose fp32 errors grow from step to step until whole windows say little."""
    torch.manual_seed(1)
    network = Recurrent(Settings(cell="gru", layers=2, width=64, context=CONTEXT), 50).eval()
    for p in network.parameters():
        p += 0.6 * torch.randn_like(p)
    nearly = copy.deepcopy(network)
    nearly.head.weight *= 1.001
    windows = torch.randint(50, (4, 200), generator=torch.Generator().manual_seed(1))
    found = compare(network, copy.deepcopy(network), windows)
    assert found["tolerance"] > 0.1
    assert found["steps_tolerance"] < 0.005
    with pytest.raises(UserError, match="steps differ by"):
        compare(network, nearly, windows)


# targets and media

@pytest.mark.parametrize(("network", "says"), [
    (NETWORKS["lstm"], "no name for a recurrent network such as"), (MEMORY, "no name for a decoder with a memory"),
    (tiny.LLAMA | {"positions": "relative"}, "no name for a decoder with relative positions"),
])
def test_transformers_is_refused_in_one_sentence(tmp_path: Path, network: dict[str, Any], says: str) -> None:
    path = tiny.write(tmp_path / "model", network=network)
    with pytest.raises(UserError, match=f"{says}.*: export --to onnx instead$"):
        export(path, "huggingface")
    assert not (path / "exports").exists()


@pytest.mark.parametrize("network", ["lstm", pytest.param("transformer-xl", marks=pytest.mark.slow)])
def test_music_is_exported_with_its_held_out_pieces(tmp_path: Path, network: str) -> None:
    path = write(tmp_path / "model", NETWORKS[network], "music")
    hold_out(path)
    record = export(path, "onnx")
    assert record["compared_on"] == "validation music"
    assert record["logits_error"] < 2e-5
    assert "a new piece begins with token 0" in (path / record["path"] / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no name for a model of music such as"):
        export(path, "huggingface")
    model, wishes = folder.load(path), [Wish(), Wish(steps=8), Wish(beginning=(3, 4, 1))]
    pieces = [compose(one, model.codec, wishes, Sampling(max_tokens=40), 1)
              for one in (model.network, network_of(model, "onnx"))]
    assert pieces[0] == pieces[1]
    assert max(map(len, pieces[0])) > 2 * CONTEXT


def hold_out(path: Path) -> None:
    """Give a model folder of music random pieces."""
    (path / "data").mkdir()
    codec, about, generator = music_tokens.load(None, path / "codec"), {}, np.random.default_rng(1)
    for split in ("train", "validation", "test"):
        pieces = [generator.integers(1, codec.size, 300).astype(np.uint16) for _ in range(2)]
        count = music.write_split(path / "data", split, codec, ["a.mid", "b.mid"], pieces)
        about[split] = {"documents": 2, "tokens": count}
    write_json(path / "data" / "data.json", {"format": music.FORMAT, "fingerprint": "", "dtype": "uint16",
                                             "splits": about})
