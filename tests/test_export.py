"""Exports against the network they come from, run by ONNX Runtime and by `transformers`."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_code
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from handmill import folder
from handmill.errors import UserError
from handmill.export import tokenizer as tokenizers_json
from handmill.export.compare import compare
from handmill.export.huggingface import shape
from handmill.families import filling
from handmill.families.autoregressive import greedy
from handmill.folder import Model
from handmill.media import tokenizers
from handmill.networks.decoder import Decoder, Settings, State
from handmill.verbs import export as verb
from handmill.verbs.export import export
from handmill.verbs.fill import fill
from handmill.verbs.generate import generate
from handmill.verbs.making import network_of

SCALED = tiny.DEFAULT | {"norm": "layer", "gain": False, "attention_scale": 0.35, "kv_heads": 0}
ONNX_SHAPES = {"default": tiny.DEFAULT, "gpt2": tiny.GPT2, "llama": tiny.LLAMA, "scaled": SCALED}


@pytest.fixture(scope="module", params=list(ONNX_SHAPES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model folder with its ONNX export."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / request.param
    tiny.write(path, network=ONNX_SHAPES[request.param])
    record = export(path, "onnx")
    assert record["logits_error"] < 1e-5
    return folder.load(path)


# ONNX

@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("past", [0, 1, 5, 17])
@pytest.mark.parametrize("time", [1, 7])
@torch.no_grad()
def test_the_graph_is_the_network(exported: Model, rows: int, past: int, time: int) -> None:
    """One graph for prompts and single tokens, any batch, any past, with and without padding."""
    runtime, s = network_of(exported, "onnx"), exported.recipe.network
    generator = torch.Generator().manual_seed(rows + past + time)
    size = (rows, s.key_heads, past, s.head_width)
    keys, values = (tuple(torch.randn(size, generator=generator) for _ in range(s.layers)) for _ in range(2))
    tokens = torch.randint(257, (rows, time), generator=generator)
    for padding in (None, torch.arange(rows).clamp(max=past)):
        expected, state = exported.network(tokens, State(keys, values, padding))
        logits, its = runtime(tokens, State(keys, values, padding))
        assert logits.shape == (rows, time, 257)
        assert (logits - expected).abs().max() < 1e-5
        for one, two in zip((*its.keys, *its.values), (*state.keys, *state.values), strict=True):
            assert one.shape == (rows, s.key_heads, past + time, s.head_width)
            assert (one - two).abs().max() < 1e-5


def test_attention_is_one_operator(exported: Model) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported.path / "exports" / "onnx" / "model.onnx")
    onnx.checker.check_model(graph)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Attention") == exported.recipe.network.layers
    assert "Softmax" not in kinds
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [23]
    free = {d.dim_param for i in graph.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    assert free == {"batch", "time", "past"}


def test_onnx_runtime_generates_the_same_text(exported: Model) -> None:
    prompts = ["", "Hello", "The quick brown fox jumps over the lazy dog, and again!"]
    for how in ({"temperature": 0.0}, {"top_p": 0.9}):
        expected = generate(exported, prompts, seed=4, max_tokens=70, **how)
        assert generate(exported, prompts, runtime="onnx", seed=4, max_tokens=70, **how) == expected


def test_the_file_runs_without_handmill(exported: Model) -> None:
    """Greedy text with onnxruntime, numpy and the names in export.json alone."""
    runtime = pytest.importorskip("onnxruntime")
    target = exported.path / "exports" / "onnx"
    about = json.loads((target / "export.json").read_text(encoding="utf-8"))
    session = runtime.InferenceSession(str(target / "model.onnx"), providers=["CPUExecutionProvider"])
    past = [np.zeros((1, about["key_heads"], 0, about["head_width"]), np.float32)] * (2 * about["layers"])
    step, made = [about["end"], 65, 66], []
    for _ in range(12):
        inputs = [np.array([step]), np.zeros(1, np.int64), *past]
        logits, *past = session.run(about["outputs"], dict(zip(about["inputs"], inputs, strict=True)))
        step = [int(logits[0, -1].argmax())]
        made += step
    assert made == greedy(exported.network, [about["end"], 65, 66], 12)


def test_the_record_is_in_the_receipt(exported: Model) -> None:
    record = folder.read_receipt(exported.path)["exports"]["onnx"]
    assert 0 <= record["logits_error"] <= record["tolerance"] == 1e-4
    assert record["compared_with"].startswith("onnxruntime")
    assert record["steps_with_cache"]
    assert record["weights"] == exported.receipt["files"]["weights.safetensors"]["sha256"]
    assert {"model.onnx", "export.json", "codec/tokenizer.json", "README.md"} == set(record["files"])
    assert not (exported.path / "exports" / "onnx.tmp").exists()


def test_a_changed_or_missing_export_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny.load(tmp_path / "model", network=tiny.DEFAULT | {"layers": 1})
    with pytest.raises(UserError, match="has no ONNX export"):
        generate(model, ["a"], runtime="onnx")
    export(model.path, "onnx")
    assert len(generate(model, ["a"], runtime="onnx", max_tokens=3)) == 1
    file = model.path / "exports" / "onnx" / "model.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.onnx is not as exported"):
        generate(model, ["a"], runtime="onnx")
    file.unlink()
    with pytest.raises(UserError, match=r"model\.onnx is not as exported"):
        generate(model, ["a"], runtime="onnx")


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("handmill.export.onnx.WHOLE", 0)
    model = tiny.load(tmp_path / "model", network=tiny.DEFAULT | {"layers": 1})
    record = export(model.path, "onnx")
    assert record["files"]["model.onnx.data"]["bytes"] > 4 * 257 * 32
    assert generate(model, ["a"], runtime="onnx", seed=1) == generate(model, ["a"], seed=1)


# the comparison

class Wrong:
    """A network with one fault, called as the true one."""

    def __init__(self, network: Any, fault: str) -> None:
        self.network, self.fault = network, fault
        self.settings, self.padded = network.settings, network.padded

    def __call__(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        logits, after = self.network(tokens, state)
        if self.fault == "a little":
            logits = logits + 3e-4
        if self.fault == "nan":
            logits = logits.index_fill(1, torch.tensor([tokens.shape[1] - 1]), torch.nan)
        if self.fault == "cached steps" and state is not None and state.keys:
            logits = logits.roll(1, -1)
        if self.fault == "padding" and state is not None and not state.keys:
            logits = self.network(tokens)[0]
        return logits, after


@pytest.mark.parametrize("fault", ["a little", "nan", "cached steps", "padding"])
def test_every_fault_is_seen(tmp_path: Path, fault: str) -> None:
    model = tiny.load(tmp_path / "model")
    windows, _ = verb.held_out(model)
    assert compare(model.network, Wrong(model.network, "none"), windows)["logits_error"] < 1e-5
    with pytest.raises(UserError, match="does not compute what the trained network does"):
        compare(model.network, Wrong(model.network, fault), windows)


def test_other_greedy_tokens_are_seen(tmp_path: Path) -> None:
    """Errors far below the tolerance that still change which of two equal tokens is likeliest."""
    model = tiny.load(tmp_path / "model")
    model.network.head.weight.data[128:256] = model.network.head.weight.data[:128].clone()
    other = Decoder(model.recipe.network, 257).eval()
    other.load_state_dict(model.network.state_dict())
    other.head.weight.data[128:256] *= 1 + 2e-6
    windows, _ = verb.held_out(model)
    with pytest.raises(UserError, match="greedy tokens differ"):
        compare(model.network, other, windows)


@torch.no_grad()
def test_what_fp32_itself_changes_is_allowed() -> None:
    """A deep network with large logits, whose fp32 results are off by more than 1e-4, against itself in fp64."""
    torch.manual_seed(1)
    network = Decoder(Settings(layers=12, width=64, context=32, qk_norm=False), 100).eval()
    for parameter in network.parameters():
        parameter.data = 3 * torch.randn_like(parameter) / parameter.shape[-1]**0.5
    network.head.weight.data *= 60
    exact = copy.deepcopy(network).double()
    windows = torch.randint(100, (4, 32))
    figures = compare(network, Called(exact), windows, cached=False)
    assert 1e-4 < figures["fp32_rounding"] <= figures["logits_error"] < figures["tolerance"]
    exact.blocks[11].mlp.up.weight.data[0] *= 1.01
    with pytest.raises(UserError, match="does not compute"):
        compare(network, Called(exact), windows, cached=False)


class Called:
    def __init__(self, network: Any) -> None:
        self.network, self.settings = network, network.settings

    def __call__(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return self.network(tokens, state)


def test_a_refused_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write(tmp_path / "model", network=tiny.LLAMA)
    monkeypatch.setattr("handmill.export.compare.TOLERANCE", 0.0)
    monkeypatch.setattr("handmill.export.compare.ROUNDING", 0)
    with pytest.raises(UserError, match="it was removed"):
        export(path, "huggingface")
    assert list((path / "exports").iterdir()) == []
    assert "exports" not in folder.read_receipt(path)
    with pytest.raises(UserError, match="cannot export to 'tensorflow'"):
        export(path, "tensorflow")


# Hugging Face

HUGGINGFACE = {
    "gpt2": tiny.GPT2, "gpt2 plain": tiny.GPT2 | {"tied": False, "bias": False, "gain": False},
    "llama": tiny.LLAMA, "llama tied": tiny.LLAMA | {"tied": True, "bias": True, "attention_scale": 0.4},
}


@pytest.mark.parametrize("name", HUGGINGFACE)
@torch.no_grad()
def test_transformers_loads_the_folder_with_the_same_logits(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = tiny.write(tmp_path / "model", network=HUGGINGFACE[name], codec="bpe")
    record = export(path, "huggingface")
    assert record["shape"] == name.split()[0]
    assert record["compared_with"] == f"transformers {transformers.__version__}"
    assert record["logits_error"] < 1e-5
    model = folder.load(path)
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        path / "exports" / "huggingface", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(model.codec.size, (2, 48), generator=torch.Generator().manual_seed(1))
    assert (network(tokens).logits - model.network(tokens)[0]).abs().max() < 1e-5
    assert folder.read_receipt(path)["exports"]["huggingface"] == record


@pytest.mark.parametrize("codec", ["bpe", "byte", "character"])
def test_transformers_makes_the_same_greedy_text(tmp_path: Path, codec: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = tiny.write(tmp_path / codec, network=tiny.LLAMA, codec=codec, sampling={"temperature": 0.0})
    export(path, "huggingface")
    model, target = folder.load(path), path / "exports" / "huggingface"
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    network = transformers.AutoModelForCausalLM.from_pretrained(target)
    tokens = tokenizer("The quick", return_tensors="pt")
    count = tokens["input_ids"].shape[1]
    made = network.generate(**tokens, max_new_tokens=48 - count)[0, count:].tolist()
    assert not network.generation_config.do_sample
    assert greedy(model.network, [model.codec.end, *model.codec.encode("The quick")], len(made)) == made
    assert tokenizer.decode(made, skip_special_tokens=True) == model.codec.decode(made)


@pytest.mark.parametrize("codec", ["bpe", "byte", "character"])
@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_the_tokenizer_cuts_every_text_alike(tmp_path: Path, codec: str, name: str) -> None:
    library = pytest.importorskip(name)
    settings_ = {"bpe": tokenizers.BPESettings(vocabulary=300), "byte": tokenizers.ByteSettings(),
                 "character": tokenizers.CharacterSettings()}[codec]
    ours = tokenizers.train(settings_, [tiny.TEXT])
    tokenizers_json.write(ours, 1000, tmp_path)
    if name == "transformers":
        loaded = library.AutoTokenizer.from_pretrained(tmp_path)
        encode = loaded.encode
        decode = loaded.decode
    else:
        loaded = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        loaded.encode_special_tokens = True
        encode, decode = (lambda text: loaded.encode(text).ids), loaded.decode

    @given(st.one_of(st.text(max_size=60), st.text("aé1 \n\t'<|end>北🙂TheT", max_size=60)))
    @settings(max_examples=300, deadline=None)
    def same(text: str) -> None:
        expected = [ours.end, *map(int, ours.encode(text))]
        assert encode(text) == expected
        assert decode(expected, skip_special_tokens=True) == ours.decode(expected)

    same()
    assert encode("a<|end|>b").count(ours.end) == 1
    assert encode("") == [ours.end]
    assert encode(tiny.TEXT)[1:] == ours.encode(tiny.TEXT).tolist()


# special tokens

SPECIAL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|more|>")


@pytest.mark.parametrize("codec", ["bpe", "byte", "character"])
@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_special_tokens_have_the_same_numbers_and_no_text(tmp_path: Path, codec: str, name: str) -> None:
    library = pytest.importorskip(name)
    settings_ = {"bpe": tokenizers.BPESettings(vocabulary=300, special=SPECIAL),
                 "byte": tokenizers.ByteSettings(special=SPECIAL),
                 "character": tokenizers.CharacterSettings(special=SPECIAL)}[codec]
    ours = tokenizers.train(settings_, [tiny.TEXT])
    tokenizers_json.write(ours, 1000, tmp_path)
    if name == "transformers":
        loaded = library.AutoTokenizer.from_pretrained(tmp_path)
        encode, number, size = loaded.encode, loaded.convert_tokens_to_ids, len(loaded)
    else:
        loaded = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        loaded.encode_special_tokens = True
        encode, number, size = (lambda text: loaded.encode(text).ids), loaded.token_to_id, loaded.get_vocab_size()

    assert {mark: number(mark) for mark in SPECIAL} == ours.special
    assert number("<|end|>") == ours.end
    assert size == ours.size

    @given(st.text("aé1 \n\t'<|end>fim_prx🙂The", max_size=60), st.lists(st.sampled_from(SPECIAL), max_size=4))
    @settings(max_examples=200, deadline=None)
    def same(text: str, marks: list[str]) -> None:
        expected = [ours.end, *map(int, ours.encode(text))]
        assert encode(text) == expected
        tokens = [ours.special[mark] for mark in marks] + expected
        assert loaded.decode(tokens, skip_special_tokens=True) == ours.decode(tokens)
        nasty = "".join([text, *marks])
        assert encode(nasty) == [ours.end, *map(int, ours.encode(nasty))]

    same()


@pytest.mark.parametrize("suffix_first", [0.0, 0.5])
@pytest.mark.parametrize("codec", ["bpe", "character"])
def test_transformers_fills_the_same_gap(tmp_path: Path, codec: str, suffix_first: float) -> None:
    """By the prompt that the folder's README.md shows, where the marks would be the likeliest tokens."""
    transformers = pytest.importorskip("transformers")
    model = tiny_code.load(tmp_path / "model", codec, tiny.LLAMA, suffix_first=suffix_first)
    export(model.path, "huggingface")
    target = model.path / "exports" / "huggingface"
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    network = transformers.AutoModelForCausalLM.from_pretrained(target)
    before, after = "The quick", "over"
    shown = (target / "README.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {"tokenizer": tokenizer, "before": before, "after": after}
    for line in shown.split("Other tokens")[1].splitlines():
        if line.startswith("    "):
            exec(line.strip(), scope)
    assert scope["prompt"] == filling.prompt(model.recipe, model.codec, before, after, 20)
    made = network.generate(torch.tensor([scope["prompt"]]), max_new_tokens=20, do_sample=False)[0].tolist()
    text = tokenizer.decode(made[len(scope["prompt"]):], skip_special_tokens=True)
    assert text == fill(model, before, after, temperature=0.0, max_tokens=20)
    assert not {*made[len(scope["prompt"]):]} & {*model.codec.special.values()}


def test_marks_are_never_drawn_though_likeliest(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_code.load(tmp_path / "model", "byte", tiny.LLAMA, sampling={"temperature": 0.0})
    export(model.path, "huggingface")
    network = transformers.AutoModelForCausalLM.from_pretrained(model.path / "exports" / "huggingface")
    special = [*model.codec.special.values()]
    for head in (network.lm_head, model.network.head):
        head.weight.data[special] = 100 * head.weight.data[[1, 2, 3]]
    prompt = [model.codec.end, *model.codec.encode("The quick").tolist()]
    made = network.generate(torch.tensor([prompt]), max_new_tokens=30)[0, len(prompt):].tolist()
    assert not {*made} & {*special}
    assert model.codec.decode(made) == generate(model, ["The quick"], max_tokens=30)[0]
    assert {*greedy(model.network, prompt, 30)} & {*special}  # which it would have been without


def test_a_folder_with_other_marks_shows_no_gap(tmp_path: Path) -> None:
    model = tiny_code.load(tmp_path / "model", network=tiny.GPT2, middle=0.0, special=("<|user|>",))
    export(model.path, "huggingface")
    shown = (model.path / "exports" / "huggingface" / "README.md").read_text(encoding="utf-8")
    assert "`<|user|>`" in shown
    assert "prompt =" not in shown
    plain = tiny.load(tmp_path / "plain", network=tiny.GPT2)
    export(plain.path, "huggingface")
    assert "Other tokens" not in (plain.path / "exports" / "huggingface" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("codec", "name"), [("byte", "a"), ("bpe", "<|end|>"), ("character", "T"),
                                             ("character", tokenizers_json.UNKNOWN)])
def test_a_mark_with_the_name_of_a_token_is_refused(tmp_path: Path, codec: str, name: str) -> None:
    model = tiny_code.load(tmp_path / "model", codec, tiny.LLAMA, middle=0.0, special=(name,))
    with pytest.raises(UserError, match=r"special token .* cannot be exported"):
        export(model.path, "huggingface")


def test_without_transformers_the_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # as if it were not installed
    for name, network in HUGGINGFACE.items():
        record = export(tiny.write(tmp_path / name, network=network), "huggingface")
        assert record["compared_with"] == "own reading of the written file"
        assert record["logits_error"] < 1e-5


def test_reading_back_sees_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from handmill.export.huggingface import compare_folder

    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    path = tiny.write(tmp_path / "model", network=tiny.GPT2)
    export(path, "huggingface")
    model, target = folder.load(path), tmp_path / "copy"
    shutil.copytree(path / "exports" / "huggingface", target)
    tensors = load_file(target / "model.safetensors")
    windows, _ = verb.held_out(model)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].flip(0)}, target / "model.safetensors")
    with pytest.raises(UserError, match="does not compute"):
        compare_folder(model, target, windows)
    del tensors[name]
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(UserError, match=f"holds no {name}"):
        compare_folder(model, target, windows)


@pytest.mark.parametrize(("network", "says"), [
    ({}, "network.activation=swiglu, network.qk_norm=false for the shape of Llama"),
    ({"qk_norm": False}, "network.activation=swiglu for the shape of Llama"),
    ({"norm": "layer", "activation": "gelu", "positions": "learned", "qk_norm": False, "kv_heads": 2},
     "network.kv_heads=0 for the shape of GPT-2"),
    ({"norm": "layer", "activation": "gelu"}, "network.positions=learned, network.qk_norm=false"),
    ({"activation": "swiglu", "qk_norm": False, "memory": 8}, "network.memory=0"),
])
def test_other_shapes_are_refused_with_the_settings_to_change(network: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        shape(Settings(**network))


def test_held_out_text_is_compared_where_the_folder_has_it(tmp_path: Path) -> None:
    from handmill.data.packed import FORMAT, write_split
    from handmill.data.prepared import write_json

    model = tiny.load(tmp_path / "model", network=tiny.LLAMA)
    assert verb.held_out(model)[1] == "random tokens"
    data = model.path / "data"
    data.mkdir()
    about = {name: write_split(data, name, model.codec, [([tiny.TEXT], False)])
             for name in ("train", "validation", "test")}
    write_json(data / "data.json", {"format": FORMAT, "fingerprint": "", "dtype": "uint16",
                                    "splits": about})
    windows, source = verb.held_out(model)
    assert source == "validation text"
    assert windows.shape == (4, 48)
    assert model.codec.decode(windows[0].tolist()) == tiny.TEXT.encode()[:47].decode("utf-8", "replace")
    assert export(model.path, "huggingface")["compared_on"] == "validation text"
