"""Exported image models against the networks they come from, run by ONNX Runtime."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import tiny_images
import torch
from torch import Tensor

from handmill import folder
from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.export import compare_tensors, onnx_tensors
from handmill.export.onnx_tensors import Graph
from handmill.families import variational
from handmill.families.diffusion.denoiser import Denoiser
from handmill.folder import Model
from handmill.media.pictures import to_uint8
from handmill.verbs import export as verb
from handmill.verbs.export import export
from handmill.verbs.generate import generate
from handmill.verbs.making import network_of

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FILES = {"asked": ["encoder", "decoder"], "vq": ["encoder", "decoder"], "unet": ["denoiser"], "dit": ["denoiser"],
         "latents": ["denoiser", "encoder", "decoder"], "prior": ["encoder", "decoder"],
         "cgan": ["generator"], "stylegan2": ["generator"], "coded": ["generator", "encoder", "decoder"]}
# no classes, so no label; DDPM's schedule, whose largest sigma is 157
PLAIN: dict[str, Any] = {"classes": (), "objective": {"parameterisation": "noise", "schedule": "linear"}}


@pytest.fixture(scope="module", params=list(FILES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """The kind of a model folder, and the folder with its ONNX export."""
    settings = PLAIN if request.param == "dit" else {}
    home = tmp_path_factory.mktemp("onnx")
    if "generator" in FILES[request.param]:
        path = adversarial(home, request.param)
    else:
        path = tiny_images.write(home / request.param, request.param, **settings)
    export(path, "onnx")
    return request.param, folder.load(path)


def adversarial(home: Path, kind: str) -> Path:
    """A model folder of the adversarial family, beside the autoencoder whose codes "coded" makes."""
    drawn = shapes.folder(home / "shapes", 10)
    codec = shapes.written(home / "map", "map", drawn) if kind == "coded" else None
    return shapes.written(home / kind, kind, drawn, codec)


def open_graph(file: Path) -> Callable[..., list[np.ndarray[Any, Any]]]:
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


# what is written

def test_the_record_is_in_the_receipt(exported: tuple[str, Model]) -> None:
    kind, model = exported
    record = folder.read_receipt(model.path)["exports"]["onnx"]
    files = [f"{name}.onnx" for name in FILES[kind]]
    others = ["model.onnx"] if kind == "prior" else []
    assert list(record["graphs"]) == [*files, *others]
    assert ("greedy_tokens" in record) == bool(others)
    for figures in record["graphs"].values():
        assert 0 <= figures["largest_error"] < (1e-4 if kind == "dit" else 1e-5)  # noise times a sigma of 157
        assert figures["tolerance"] == max(1e-4, 8 * figures["fp32_rounding"])
        assert figures["items_compared"] >= 6
    assert set(record["files"]) == {*files, *others, "export.json", "codec.json", "README.md"}
    assert record["compared_with"] == f"onnxruntime {runtime.__version__}"
    assert record["compared_on"] == "test images"
    assert record["weights"] == model.receipt["files"]["weights.safetensors"]["sha256"]
    assert ("levels_apart" in record) == (kind != "vq")
    about = json.loads((model.path / "exports/onnx/export.json").read_text())
    assert about["parity"] == {key: record[key] for key in about["parity"]}
    assert list(about["graphs"]) == files


def test_the_graphs_are_sound_and_their_batch_is_free(exported: tuple[str, Model]) -> None:
    for name in FILES[exported[0]]:
        graph = onnx.load(exported[1].path / f"exports/onnx/{name}.onnx")
        onnx.checker.check_model(graph)
        for entry in (*graph.graph.input, *graph.graph.output):
            first, *others = entry.type.tensor_type.shape.dim
            assert first.dim_param == "batch"
            assert all(dim.dim_value > 0 for dim in others)


def test_the_readmes_program_runs_without_handmill(exported: tuple[str, Model],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """And makes what `handmill generate` makes of the same noise."""
    kind, model = exported
    target = model.path / "exports" / "onnx"
    program = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), re.S)
    assert len(program) == 1
    assert "handmill" not in program[0]
    monkeypatch.chdir(target)
    places, turns = torch.arange(4), {getattr(model.network, "noise_shape", None): 1}  # else the first noise
    monkeypatch.setattr(np.random, "standard_normal", lambda size: normal(
        draw(3, "sample", turns.get(tuple(size[1:]), 0)), places, tuple(size[1:])).numpy())
    monkeypatch.setattr(np.random, "gumbel", lambda size: np.zeros(size))  # so the likeliest code
    made: dict[str, Any] = {}
    exec(program[0], made)
    if kind == "vq":
        expected = variational.reconstruct(model.network, model.recipe.objective, torch.zeros(4, 1, 16, 16), {})
        assert np.abs(made["again"] - expected.numpy()).max() < 1e-5
        return
    told = FILES[kind][0] == "generator"
    settings = {"prior": {"temperature": 0.0}, "asked": {}}.get(kind, {} if told else {"sampler": "euler"})
    asked = [model.codec.classes[i % 3] for i in range(4)] if told else [""] * 4
    images = generate(model, asked, seed=3, **settings)
    assert apart(to_uint8(torch.tensor(made["images"])), images) <= 1


def apart(some: Any, others: Any) -> int:
    return int(np.abs(np.array(some).astype(int) - np.array(others).astype(int)).max())


# the same answers

@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_the_graphs_are_the_network(exported: tuple[str, Model], rows: int) -> None:
    kind, model = exported
    generator = torch.Generator().manual_seed(rows)
    images = 2 * torch.rand(rows, 1, 16, 16, generator=generator) - 1
    target, label = model.path / "exports" / "onnx", torch.arange(rows) % 4
    asked = {"label": label} if model.codec.classes else {}
    if "denoiser" in FILES[kind]:
        denoiser = Denoiser(model.network, model.recipe.objective, model.codec.deviation)
        sigma = torch.logspace(1.9, -2.6, rows)
        x = sigma.view(-1, 1, 1, 1) * torch.randn(rows, *model.codec.shape, generator=generator)
        (denoised,) = open_graph(target / "denoiser.onnx")(x=x, sigma=sigma, **asked)
        np.testing.assert_allclose(denoised, denoiser(x, sigma, asked), rtol=1e-5, atol=1e-4 if kind == "dit" else 1e-5)
        if asked:  # and the label says something
            assert np.abs(denoised - denoiser(x, sigma, {}).numpy()).max() > 1e-4
    if "generator" in FILES[kind]:
        check_generator(model, generator, rows)
    if "encoder" in FILES[kind]:
        asked = asked if kind == "asked" else {}
        expected = encoded(kind, model, images, asked)
        made = open_graph(target / "encoder.onnx")(images=images, **asked)
        for one, two in zip(made, expected, strict=True):
            assert np.abs(one - two.numpy()).max() < (1e-5 if two.is_floating_point() else 1)
        name = "latent" if kind == "asked" else "codes"
        (back,) = open_graph(target / "decoder.onnx")(**{name: expected[0]}, **asked)
        assert np.abs(back - decoded(kind, model, expected[0], asked).numpy()).max() < 1e-5


def check_generator(model: Model, source: torch.Generator, rows: int) -> None:
    network: Any = model.network
    z, noise = (torch.randn(rows, *shape, generator=source) for shape in (network.latent_shape, network.noise_shape))
    label, psi = torch.arange(rows) % 3, torch.linspace(0, 2, rows)
    given = {"latent": z, "noise": noise, "truncation": psi, "label": label}
    run = open_graph(model.path / "exports" / "onnx" / "generator.onnx")
    inputs = [entry.name for entry in onnx.load(model.path / "exports/onnx/generator.onnx").graph.input]
    assert inputs == ["latent", *(["noise"] if network.noise_shape[0] else []), "truncation", "label"]
    (made,) = run(**{name: given[name] for name in inputs})
    condition = {"label": label}
    for i in range(rows):  # each by the network alone, with a number for psi
        one = {"label": label[i:i + 1]}
        w = network.truncated(network.map(z[i:i + 1], one), one, float(psi[i]))
        np.testing.assert_allclose(made[i:i + 1], network.render(w, noise[i:i + 1]), atol=1e-5)
    plain, _ = network(z, condition, noise)
    full = run(**{name: (given | {"truncation": torch.ones(rows)})[name] for name in inputs})[0]
    np.testing.assert_allclose(full, plain, atol=1e-5)


def encoded(kind: str, model: Model, images: Tensor, asked: dict[str, Tensor]) -> tuple[Tensor, ...]:
    if kind == "asked":
        return variational.posterior(model.network, images, asked)
    if kind in ("latents", "coded"):
        return (model.codec.encode(images),)
    if kind == "prior":
        return (model.codec.encode(images).view(-1, *model.codec.shape),)
    return (variational.codes(model.network, images, {}),)


def decoded(kind: str, model: Model, codes: Tensor, asked: dict[str, Tensor]) -> Tensor:
    if kind in ("latents", "coded", "prior"):
        images: Tensor = model.codec.decode(codes)
        return images
    way = variational.images if kind == "asked" else variational.from_codes
    return way(model.network, model.recipe.objective, codes, asked)


def test_onnx_runtime_makes_the_same_images(exported: tuple[str, Model]) -> None:
    kind, model = exported
    if kind == "vq":
        with pytest.raises(UserError, match="has no prior"):
            generate(model, [""], runtime="onnx")
        return
    prompts = [model.codec.classes[i] if i >= 0 else "" for i in (-1, 2, 0, 0, 1)] if model.codec.classes else [""] * 5
    ways: dict[str, list[dict[str, Any]]] = {"denoiser": [{"clip": 1.0}, {"sampler": "heun", "guidance": 2.5}],
                                             "generator": [{}, {"truncation": 0.7}]}
    for settings in ways.get(FILES[kind][0], [{}]):
        expected = generate(model, prompts, seed=7, **settings)
        made = generate(model, prompts, runtime="onnx", seed=7, **settings)
        assert made[0].shape == (16, 16, 1)
        assert apart(made, expected) <= 1
        assert apart(made[2], made[3]) > 1
    assert apart(generate(model, prompts, runtime="onnx", seed=8), generate(model, prompts, seed=7)) > 1


def test_a_graph_without_classes_takes_no_label(exported: tuple[str, Model]) -> None:
    kind, model = exported
    if kind == "dit":
        graph = onnx.load(model.path / "exports/onnx/denoiser.onnx")
        assert [entry.name for entry in graph.graph.input] == ["x", "sigma"]
        about = json.loads((model.path / "exports/onnx/export.json").read_text())
        assert about["sigma_max"] == pytest.approx(157.4, abs=0.1)
        assert about["classes"] == []
        with pytest.raises(UserError, match="was not told classes"):
            generate(model, ["ring"], runtime="onnx", seed=1)


def test_a_changed_or_missing_graph_is_not_run(exported: tuple[str, Model], tmp_path: Path) -> None:
    kind, model = exported
    if kind != "dit":
        return
    model = dataclasses.replace(model, path=shutil.copytree(model.path, tmp_path / "copy"))
    target = model.path / "exports" / "onnx"
    file, about = target / "denoiser.onnx", target / "export.json"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"denoiser\.onnx is not as exported"):
        generate(model, [""], runtime="onnx")
    file.unlink()
    with pytest.raises(UserError, match=r"denoiser\.onnx is not as exported"):
        generate(model, [""], runtime="onnx")
    for broken in ("{", "[]", '{"family": "diffusion"}'):
        about.write_text(broken)
        record(model)
        with pytest.raises(UserError, match=r"cannot be read .*export again"):
            generate(model, [""], runtime="onnx")
    shutil.rmtree(target)
    folder.record(model.path, "exports", {})
    with pytest.raises(UserError, match="has no ONNX export"):
        generate(model, [""], runtime="onnx")


def record(model: Model) -> None:
    """As if the export's files were what was exported."""
    files = [p for p in (model.path / "exports" / "onnx").iterdir() if p.is_file()]
    folder.record(model.path, "exports", {"onnx": {"files": {p.name: folder.fingerprint(p) for p in files}}})


# the comparison

@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    home = tmp_path_factory.mktemp("compared")
    made = {kind: tiny_images.load(home / kind, kind) for kind in ("dit", "asked", "vq", "fsq", "latents")}
    drawn = shapes.folder(home / "shapes", 10)
    return made | {kind: folder.load(shapes.written(home / kind, kind, drawn)) for kind in ("cgan", "stylegan2")}


def compared(model: Model, file: str, wrong: Callable[..., tuple[Tensor, ...]]) -> dict[str, Any]:
    """The figures where `wrong(graph, inputs)` stands for the written file."""
    graph = next(graph for graph in onnx_tensors.graphs(model) if graph.file == f"{file}.onnx")
    images, labels, _ = verb.held_out_images(model)
    inputs = compare_tensors.inputs_of(graph, model, images, labels)
    return compare_tensors.compare(graph, lambda some: wrong(graph, some), inputs)


def right(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    made = graph.module(*inputs.values())
    return (made,) if isinstance(made, Tensor) else tuple(made)


def a_little(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(v + 3e-4 for v in right(graph, inputs))


def not_a_number(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    first, *others = right(graph, inputs)
    first = first.clone()
    first.view(-1)[0] = torch.nan
    return first, *others


def first_of_the_batch(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a graph gives that takes one sigma, or one label, for all items."""
    alike = {name: v[:1].expand_as(v) if v.ndim == 1 else v for name, v in inputs.items()}
    return right(graph, alike)


def without_label(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return right(graph, inputs | {"label": torch.full_like(inputs["label"], 3)})


def other_label(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return right(graph, inputs | {"label": (inputs["label"] + 1) % 3})


def without_noise(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return right(graph, inputs | {"noise": torch.zeros_like(inputs["noise"])})


def as_trained(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return right(graph, inputs | {"truncation": torch.ones_like(inputs["truncation"])})


def next_code(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple((v + 1) % graph.module.network.vocabulary for v in right(graph, inputs))  # type: ignore[union-attr]


def no_code(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(v - 1000 for v in right(graph, inputs))


@pytest.mark.parametrize(("kind", "file", "fault"), [
    ("dit", "denoiser", a_little), ("dit", "denoiser", not_a_number), ("dit", "denoiser", first_of_the_batch),
    ("dit", "denoiser", without_label), ("asked", "encoder", a_little), ("asked", "encoder", not_a_number),
    ("asked", "encoder", without_label), ("asked", "decoder", without_label), ("asked", "decoder", a_little),
    ("latents", "encoder", a_little), ("latents", "decoder", a_little), ("latents", "decoder", not_a_number),
    ("vq", "encoder", next_code), ("vq", "encoder", no_code), ("fsq", "encoder", next_code),
    ("cgan", "generator", a_little), ("cgan", "generator", not_a_number), ("cgan", "generator", other_label),
    ("cgan", "generator", as_trained), ("stylegan2", "generator", without_noise),
    ("stylegan2", "generator", as_trained), ("stylegan2", "generator", first_of_the_batch),
    ("fsq", "encoder", no_code), ("vq", "decoder", a_little), ("fsq", "decoder", not_a_number)])
def test_every_fault_is_seen(models: dict[str, Model], kind: str, file: str, fault: Any) -> None:
    assert compared(models[kind], file, right)["largest_error"] < 1e-5
    with pytest.raises(UserError, match=f"{file}.onnx does not compute what the trained network does"):
        compared(models[kind], file, fault)


def test_a_changed_weight_is_seen(exported: tuple[str, Model], tmp_path: Path) -> None:
    """One large weight of every written file moved by a twentieth."""
    _, model = exported
    images, labels, _ = verb.held_out_images(model)
    from handmill.serving import onnxruntime

    for graph in onnx_tensors.graphs(model):
        written = onnx.load(model.path / "exports" / "onnx" / graph.file)
        tensor = max((t for t in written.graph.initializer if t.data_type == onnx.TensorProto.FLOAT),
                     key=lambda t: int(np.prod(t.dims)))
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[:: max(1, values.size // 8)] *= 1.5
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(written, tmp_path / graph.file)
        inputs = compare_tensors.inputs_of(graph, model, images, labels)
        if graph.module(*inputs.values())[0].is_floating_point():  # a small change need not change a code
            with pytest.raises(UserError, match=f"{graph.file} does not compute"):
                compare_tensors.compare(graph, onnxruntime.Graph(tmp_path / graph.file), inputs)


@torch.no_grad()
def test_codes_that_are_as_near_may_be_either(models: dict[str, Model]) -> None:
    model = copy.deepcopy(models["vq"])
    network: Any = model.network
    images = verb.held_out_images(model)[0]
    chosen = variational.codes(network, images, {})
    most = int(chosen.flatten().mode().values)
    other = (most + 1) % 32
    network.codebook.weight[other] = network.codebook.weight[most]

    def swapped(graph: Graph, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        (codes,) = right(graph, inputs)
        return (torch.where(codes == most, other, torch.where(codes == other, most, codes)),)

    assert compared(model, "encoder", swapped)["largest_error"] == 0


@torch.no_grad()
def test_what_fp32_itself_changes_is_allowed(models: dict[str, Model]) -> None:
    """A denoiser that estimates noise of deviation 3000 is off by more than 1e-4 in fp32, against itself in fp64."""
    model = models["dit"]
    objective = dataclasses.replace(model.recipe.objective, parameterisation="noise", sigma_max=3000.0)
    model = dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, objective=objective))

    def exact(graph: Graph, inputs: dict[str, Tensor], by: float = 0.0) -> tuple[Tensor, ...]:
        wide = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
        return tuple(v * (1 + by) for v in right(graph._replace(module=copy.deepcopy(graph.module).double()), wide))

    figures = compared(model, "denoiser", exact)
    assert 1e-4 < figures["fp32_rounding"] <= figures["largest_error"] < figures["tolerance"]
    with pytest.raises(UserError, match="does not compute"):
        compared(model, "denoiser", lambda graph, inputs: exact(graph, inputs, 1e-4))


def test_a_denoiser_is_compared_at_every_noise_level(models: dict[str, Model]) -> None:
    model = models["dit"]
    (graph,) = onnx_tensors.graphs(model)
    images, labels, _ = verb.held_out_images(model)
    inputs = compare_tensors.inputs_of(graph, model, images, labels)
    levels, counts = inputs["sigma"].unique(return_counts=True)
    assert levels[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
    assert counts.tolist() == [len(images)] * 6
    assert len(inputs["sigma"][:8].unique()) > 1
    noise = (inputs["x"] / inputs["sigma"].view(-1, 1, 1, 1))[inputs["sigma"] > 50]
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert set(inputs["label"].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_any_number_of_images_is_compared(models: dict[str, Model], count: int) -> None:
    graph = onnx_tensors.graphs(models["asked"])[0]
    images, batches = torch.linspace(-1, 1, count)[:, None, None, None].expand(-1, 1, 16, 16), []

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        batches.append(len(inputs["images"]))
        return right(graph, inputs)

    inputs = compare_tensors.inputs_of(graph, models["asked"], images, torch.zeros(count, dtype=torch.long))
    assert compare_tensors.compare(graph, run, inputs)["items_compared"] == count
    assert batches == {1: [1], 2: [1, 1], 9: [1, 8], 10: [1, 8, 1]}[count]


def test_held_out_images_or_noise(models: dict[str, Model], tmp_path: Path) -> None:
    images, labels, source = verb.held_out_images(models["dit"])
    assert (source, tuple(images.shape[1:])) == ("test images", (1, 16, 16))
    held = np.load(models["dit"].path / "data" / "test.npy")
    assert (to_uint8(images)[0] == held[0]).all()
    assert labels.tolist()[:-1] == np.load(models["dit"].path / "data" / "test.labels.npy").tolist()[:len(labels) - 1]
    assert labels[-1] == 3  # none asked for
    images, labels, source = verb.held_out_images(dataclasses.replace(models["dit"], path=tmp_path))
    assert (source, tuple(images.shape)) == ("random noise", (8, 1, 16, 16))
    assert images.min() < -0.9 < 0.9 < images.max()
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 3]


def test_a_refused_export_leaves_nothing(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    path = models["asked"].path
    monkeypatch.setattr(compare_tensors, "TOLERANCE", 0.0)
    monkeypatch.setattr(compare_tensors, "ROUNDING", 0)
    with pytest.raises(UserError, match="the export was removed"):
        export(path, "onnx")
    assert list((path / "exports").iterdir()) == []
    assert "exports" not in folder.read_receipt(path)


def test_transformers_has_no_such_models(models: dict[str, Model]) -> None:
    with pytest.raises(UserError, match="export --to onnx instead"):
        export(models["dit"].path, "huggingface")
    assert not (models["dit"].path / "exports" / "huggingface").exists()


def test_what_the_command_says() -> None:
    text = {"logits_error": 1.5e-6, "tolerance": 1e-4, "greedy_tokens": 128, "compared_with": "x 1", "compared_on": "y"}
    assert verb.lines(text) == [
        "largest difference from the trained network's logits: 1.5e-06 (allowed 0.0001), 128 greedy tokens the same",
        "compared with x 1 on y; recorded in the receipt"]
    images = {"graphs": {"denoiser.onnx": {"largest_error": 2e-7, "tolerance": 1e-4}}, "samples": 4, "levels_apart": 1,
              "compared_with": "x 1", "compared_on": "y"}
    assert verb.lines(images) == [
        "denoiser.onnx: largest difference from the trained network 2e-07 (allowed 0.0001)",
        "4 images made by both: at most 1 of 255 levels apart", "compared with x 1 on y; recorded in the receipt"]


def test_a_call_needs_no_label_and_keeps_the_dtype(exported: tuple[str, Model]) -> None:
    kind, model = exported
    if "denoiser" in FILES[kind]:
        denoiser = network_of(model, "onnx")
        x = torch.randn(2, *model.codec.shape, dtype=torch.float64)
        made = denoiser(x, 0.5, {})
        assert made.dtype == torch.float64
        assert torch.equal(made, denoiser(x, torch.full((2,), 0.5), {"label": torch.tensor([3, 3])}))
