"""The road with generators: trained, gone on with, sampled, checked, told of, exported and compared."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from test_road import state_hash
from torch import Tensor

from handmill import cli, folder
from handmill.checks import features, image_pictures, lines
from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.media import pictures
from handmill.media.pictures import read_metadata
from handmill.training import loop
from handmill.verbs.card import card
from handmill.verbs.check import check
from handmill.verbs.compare import compare
from handmill.verbs.export import export
from handmill.verbs.generate import generate, images, save_images
from handmill.verbs.serve import verify
from handmill.verbs.train import train

MODELS = ["dcgan", "cgan", "stylegan2"]
TOLD = ["cgan", "stylegan2"]  # a class


@pytest.fixture(scope="module", autouse=True)
def _hasty() -> Iterator[None]:
    """The feature network of a hundredth of its training: what it sees here need not be much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "Settings", functools.partial(features.Settings, images=1280, warmup=2))
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.folder(tmp_path_factory.mktemp("drawn") / "shapes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> dict[str, Path]:
    """A model folder of every kind: name -> path."""
    runs = tmp_path_factory.mktemp("runs")
    return {name: train(shapes.recipe_of(name, drawn, ema=0.9), runs / name) for name in MODELS}


@pytest.fixture(scope="module")
def checked(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: check(models[name], progress=False) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_training_leaves_a_model_folder(models: dict[str, Path], name: str) -> None:
    training = folder.verify(models[name])["training"]
    assert training["steps"] == 20
    assert training["measure"] == "Fréchet distance"
    assert training["faults"] == []
    rows = [json.loads(line) for line in (models[name] / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation_coverage" in row for row in rows) == 2
    losses = {key for row in rows for key in row if key.endswith("_loss") and not key.startswith("validation")}
    assert losses == {"discriminator_loss"} | ({"r1_loss"} if name != "dcgan" else set()) | (
        {"path_loss"} if name == "stylegan2" else set())
    model = folder.load(models[name])
    verify(model)
    for p in model.network.parameters():
        p.data.mul_(1.5)
    with pytest.raises(UserError, match="does not answer as its receipt says"):
        verify(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_is_a_function_of_its_seed_and_place(models: dict[str, Path], name: str) -> None:
    model = folder.load(models[name])
    whole = images(model, [""] * 5, seed=3)
    assert whole.shape == (5, 16, 16, 1)
    assert np.abs(whole[2:].astype(int) - images(model, [""] * 3, seed=3, first=2)).max() <= 1  # rounding of products
    assert not np.array_equal(whole, images(model, [""] * 5, seed=4))
    assert np.array_equal(whole[0], generate(model, [""], seed=3)[0])


@pytest.mark.parametrize("name", TOLD)
def test_a_class_is_asked_for_by_name(models: dict[str, Path], name: str) -> None:
    model = folder.load(models[name])
    made = images(model, ["disc", "square", "disc"], seed=1)
    again = images(model, ["disc", "disc", "disc"], seed=1)
    assert [np.array_equal(a, b) for a, b in zip(made, again, strict=True)] == [True, False, True]
    drawn_classes = images(model, [""] * 24, seed=1)
    of_each = [images(model, [label] * 24, seed=1) for label in shapes.CLASSES]
    chosen = [[i for i in range(3) if np.abs(of_each[i][n].astype(int) - image).max() <= 1]
              for n, image in enumerate(drawn_classes)]
    assert {n for some in chosen for n in some} == {0, 1, 2}  # asked for none, every class comes
    assert all(chosen)


def test_truncation_trades_variety(models: dict[str, Path]) -> None:
    for name in MODELS:
        model, asked = folder.load(models[name]), [""] * 8 if name == "dcgan" else ["disc"] * 8
        spread = [images(model, asked, seed=2, truncation=psi).astype(float).std(0).mean() for psi in (0.0, 0.5, 1.0)]
        assert spread[0] < spread[1] < spread[2]
        assert spread[0] == 0 or name == "stylegan2"  # whose layers have noise of their own


def test_the_command_line_makes_images_and_refuses_in_a_sentence(models: dict[str, Path], tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    def ran(*words: str) -> tuple[int, str, str]:
        code = cli.main(["generate", *words])
        return code, *capsys.readouterr()

    path = str(models["cgan"])
    code, out, _ = ran(path, "square", "-n", "2", "--set", "truncation=0.7", "--out", str(tmp_path))
    assert code == 0
    assert [Path(line).name for line in out.split()] == ["1-000-square.png", "1-001-square.png", "grid.png"]
    assert "truncation = 0.7" in read_metadata(tmp_path / "1-001-square.png")["recipe"]
    for words, said in ((["--set", "truncation=5"], "truncation = 5.0 must lie between 0 and 2"),
                        (["--set", "truncation=wide"], "truncation"), (["--set", "truncaton=1"], "did you mean"),
                        (["--temperature", "0.5"], "temperature"),
                        (["circle"], "'circle' is no class of this model: choose one of cross, disc, square")):
        code, _, error = ran(path, *words)
        assert (code, error.count("\n")) == (2, 1), error
        assert said in error
    assert "was not told classes" in ran(str(models["dcgan"]), "disc")[2]


def test_files_say_how_they_were_made(models: dict[str, Path], tmp_path: Path) -> None:
    model = folder.load(models["stylegan2"])
    paths = save_images(model, ["disc", "cross"], tmp_path / "made", 7, truncation=0.5)
    about = read_metadata(paths[1])
    assert (about["class"], about["seed"], about["index"]) == ("cross", "7", "1")
    again = images(model, ["disc", "cross"], seed=7, truncation=0.5)[1]
    assert np.array_equal(np.asarray(Image.open(paths[1])), again[..., 0])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_checked(models: dict[str, Path], checked: dict[str, dict[str, Any]], name: str) -> None:
    result = checked[name]
    told = "\n".join(lines(result))
    for word in ("coverage", "recall", "verdict:", "real images", "likelihood not defined for this family"):
        assert word in told
    assert result["fidelity"]["n"] == 18  # half of the 36 that neither the model nor the features have seen
    assert (result["labels"]["agreement"] is None) == (name == "dcgan")
    assert result["verdict"]["good"] is False
    assert set(result["pictures"]) == {"samples", "held out", "nearest training images", "truncation", "interpolation"}
    for what, file in result["pictures"].items():
        assert np.asarray(Image.open(models[name] / file)).std() > 0
        assert read_metadata(models[name] / file)["shows"] == what


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pictures_show_what_they_say(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, grid = folder.load(models[name]), pictures.grid
    network: Any = model.network
    sheets: list[Any] = []
    monkeypatch.setattr(pictures, "grid", lambda images, *more, **other: sheets.append(images.astype(int))
                        or grid(images, *more, **other))
    image_pictures.truncations(model, 5)
    asked = [""] * 12 if name == "dcgan" else [*shapes.CLASSES] * 4
    assert len(sheets) == 7
    for sheet, psi in zip(sheets, (0, 0.25, 0.5, 0.7, 0.85, 1, 1.3), strict=True):
        assert np.abs(sheet - images(model, asked, seed=5, truncation=float(psi))).max() <= 1
    image_pictures.walks(model, 5)
    z = normal(draw(5, "walks"), torch.arange(12), network.latent_shape)
    layers = normal(draw(5, "walks") + 1, torch.arange(12), network.noise_shape)
    for frame, image in enumerate(sheets[-1]):
        row, share = frame // 12, frame % 12 / 11
        a, b, told = z[2 * row], z[2 * row + 1], {"label": torch.tensor([row % 3])} if network.classes else {}
        if name == "stylegan2":
            w = torch.lerp(network.map(a[None], told), network.map(b[None], told), share)
        else:
            w = network.map(slerp(a, b, share)[None], told)
        assert np.abs(pictures.to_uint8(network.render(w, layers[2 * row:2 * row + 1]))[0] - image).max() <= 1


def test_a_card_shows_all_of_it(models: dict[str, Path], checked: dict[str, dict[str, Any]]) -> None:
    for name in MODELS:
        markdown = card(models[name])[0].read_text(encoding="utf-8").replace("\\", "")
        for file in checked[name]["pictures"].values():
            assert f"]({file})" in markdown
        for said in ("## Generator and discriminator", "2 times in training", checked[name]["verdict"]["text"],
                     "truncation 1.0", "## Samples"):
            assert said in markdown
        assert ("hinge (Lim and Ye 2017)" in markdown) == (name == "cgan")


@pytest.mark.parametrize("name", MODELS)
def test_an_export_makes_the_same_images(models: dict[str, Path], name: str) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    record = export(models[name], "onnx")
    assert record["graphs"]["generator.onnx"]["largest_error"] < 1e-5
    assert record["levels_apart"] <= 1
    model = folder.load(models[name])
    asked = [""] * 5 if name == "dcgan" else ["disc", "", "cross", "square", ""]
    for psi in (1.0, 0.4):
        expected, made = (np.array(generate(model, asked, runtime, seed=3, truncation=psi)).astype(int)
                          for runtime in ("torch", "onnx"))
        assert np.abs(made - expected).max() <= 1


def test_models_are_compared(models: dict[str, Path], checked: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    result = compare([models["cgan"], models["stylegan2"]], tmp_path / "compared", check=False, progress=False)
    rows = {row["what"]: row["cells"] for row in result["rows"]}
    assert rows["network evaluations per sample"][:2] == ["1", "1"]
    assert rows["verdict"][0] == checked["cgan"]["verdict"]["text"]
    assert np.asarray(Image.open(tmp_path / "compared" / "compare.png")).std() > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", MODELS)
def test_a_stopped_run_goes_on_bit_equal(models: dict[str, Path], drawn: Path, monkeypatch: pytest.MonkeyPatch,
                                         name: str) -> None:
    """With both networks, their optimizers, averages, running statistics and the strength of augmentation."""
    recipe, parts = shapes.recipe_of(name, drawn, ema=0.9), models[name].with_name(f"{name}-parts")
    step = loop.Run.step

    def until_13(run: loop.Run) -> None:
        if run.progress.step == 13:
            raise Killed
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", until_13)
        with pytest.raises(Killed):
            train(recipe, parts, quiet=True)
    assert not (parts / "receipt.json").exists()
    train(recipe, parts, quiet=True)
    assert state_hash(models[name]) == state_hash(parts)
    some, others = (folder.weights_of(folder.load(path).network) for path in (models[name], parts))
    assert all(torch.equal(some[key], others[key]) for key in some)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("cgan", {"network": {"conditional": True, "kind": "stylegan2", "first": 5}}, "network.first = 5"),
    ("dcgan", {"network": {"kind": "dcgan", "first": 5}}, "network.first that fits"),
    ("dcgan", {"objective": {"loss": "wasserstein"}}, "needs a penalty"),
    ("dcgan", {"objective": {"augment": ["swirl"]}}, "'swirl', which is none of"),
    ("dcgan", {"sampling": {"truncation": 3}}, "truncation = 3.* must lie between 0 and 2"),
    ("dcgan", {"training": {"batch": 5000}}, "fewer than training.batch = 5000"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_does_not_fit_is_a_sentence(drawn: Path, tmp_path: Path, models: dict[str, Path], name: str,
                                         changes: dict[str, Any], said: str) -> None:
    from handmill import recipe as recipes

    table = shapes.table(name, drawn)
    for key, values in changes.items():
        table[key] = values if key == "network" else table[key] | values
    with pytest.raises(UserError, match=said):
        train(recipes.parse(table), models[name].with_name(tmp_path.name), quiet=True)


def test_a_class_to_tell_needs_classes(tmp_path: Path) -> None:
    from handmill import recipe as recipes

    (tmp_path / "images").mkdir()
    for i in range(48):
        Image.fromarray(shapes.shape(i % 3, i)).save(tmp_path / "images" / f"{i:02}.png")
    with pytest.raises(UserError, match="conditional = true needs images of two classes or more"):
        train(recipes.parse(shapes.table("cgan", tmp_path / "images")), tmp_path / "run", quiet=True)
