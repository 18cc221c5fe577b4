"""The road with images: every family trained, checked, sampled and gone on with; models as codecs of others."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import tomli_w
import torch
from PIL import Image
from test_road import handmill, state_hash, wait_for

from handmill import folder
from handmill.checks import lines
from handmill.errors import UserError
from handmill.media.pictures import read_metadata
from handmill.verbs.check import check
from handmill.verbs.generate import generate, images, save_images
from handmill.verbs.serve import verify
from handmill.verbs.train import train


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.folder(tmp_path_factory.mktemp("drawn") / "shapes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> dict[str, Path]:
    """A model folder of every family: name -> path."""
    runs = tmp_path_factory.mktemp("runs")
    made = {name: shapes.trained(runs, name, drawn) for name in ("vae", "map", "vq", "fsq", "unet")}
    made["dit"] = shapes.trained(runs, "dit", drawn, made["map"], ema=0.9)
    made["prior"] = shapes.trained(runs, "prior", drawn, made["vq"])
    return made


MAKERS = ["vae", "map", "unet", "dit", "prior"]


@pytest.mark.parametrize("name", [*MAKERS, "vq", "fsq"])
def test_a_model_is_checked(models: dict[str, Path], name: str) -> None:
    result = check(models[name], progress=False)
    told = "\n".join(lines(result))
    for word in ("coverage", "recall", "verdict:", "real images", "fd_cnn64-"):
        assert word in told
    assert result["fidelity"]["n"] == 18  # half of the 36 that neither the model nor the features have seen
    for figure in (*result["fidelity"]["generated"].values(), *result["fidelity"]["floor"].values()):
        assert figure["low"] <= figure["value"] <= figure["high"]
    likelihood = result["likelihood"]
    assert ("bits_per_dimension" in likelihood) == (name in ("vae", "map", "unet"))
    if name in ("vae", "map"):
        assert likelihood["importance"]["value"] <= likelihood["elbo"]["value"]
        assert likelihood["elbo"]["value"] == pytest.approx(
            likelihood["reconstruction"]["value"] + likelihood["kl"]["value"])
    assert ("perplexity" in result["codes"]) == (name in ("vq", "fsq"))
    for file in result["pictures"].values():
        assert np.asarray(Image.open(models[name] / file)).std() > 0
    assert folder.read_receipt(models[name])["check"]["weights"] == result["weights"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_sample_is_a_function_of_its_seed_and_place(models: dict[str, Path], name: str) -> None:
    model = folder.load(models[name])
    asked = [""] * 5
    whole = images(model, asked, seed=3)
    assert whole.shape == (5, 16, 16, 1)
    assert np.abs(whole[2:].astype(int) - images(model, asked[2:], seed=3, first=2)).max() <= 1  # rounding of products
    assert not np.array_equal(whole, images(model, asked, seed=4))
    assert np.array_equal(generate(model, asked[:1], seed=3)[0], generate(model, [""], seed=3)[0])


@pytest.mark.parametrize("name", ["unet", "prior"])
def test_a_class_is_asked_for_by_name(models: dict[str, Path], name: str) -> None:
    model = folder.load(models[name])
    with pytest.raises(UserError, match="'circle' is no class of this model: choose one of cross, disc, square"):
        images(model, ["circle"])
    assert images(model, ["disc", "square"], seed=1).shape == (2, 16, 16, 1)
    with pytest.raises(UserError, match="was not told classes"):
        images(folder.load(models["vae"]), ["disc"])


def test_a_code_model_says_that_it_needs_a_prior(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has no prior"):
        images(folder.load(models["vq"]), [""])


def test_files_say_how_they_were_made(models: dict[str, Path], tmp_path: Path) -> None:
    model = folder.load(models["unet"])
    paths = save_images(model, ["disc", "cross"], tmp_path / "made", 7, steps=3)
    assert [path.name for path in paths] == ["7-000-disc.png", "7-001-cross.png", "grid.png"]
    about = read_metadata(paths[1])
    assert (about["class"], about["seed"], about["index"]) == ("cross", "7", "1")
    assert "steps = 3" in about["recipe"]
    assert "drawn" not in about["recipe"]  # no path of the user's
    again = images(model, ["disc", "cross"], seed=7, steps=3)[1]
    assert np.array_equal(np.asarray(Image.open(paths[1])), again[..., 0])


def test_the_command_line_makes_images(models: dict[str, Path], tmp_path: Path) -> None:
    done = handmill("generate", models["unet"], "square", "-n", "2", "--steps", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["1-000-square.png", "1-001-square.png", "grid.png"]
    wrong = handmill("generate", models["unet"], "--set", "stepps=2")
    assert wrong.returncode == 2
    assert "did you mean sampling.steps?" in wrong.stderr


def test_a_model_used_as_a_codec_moves_along(models: dict[str, Path], tmp_path: Path) -> None:
    """The autoencoder is copied in: the latent model works without it, and sees when the copy is damaged."""
    import shutil

    moved = shutil.copytree(models["dit"], tmp_path / "moved")
    here, there = (images(folder.load(path), ["disc"], seed=1) for path in (models["dit"], moved))
    assert np.array_equal(here, there)
    weights = moved / "codec" / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(UserError, match=r"weights\.safetensors is not as it was written"):
        folder.load(moved)


@pytest.mark.parametrize("name", MAKERS)
def test_a_changed_network_is_not_served(models: dict[str, Path], name: str) -> None:
    model = folder.load(models[name])
    verify(model)
    for p in model.network.parameters():
        p.data.mul_(1.05)
    with pytest.raises(UserError, match="does not answer as its receipt says"):
        verify(model)


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("unet", "", {"training": {"batch": 5000}}, "fewer than training.batch = 5000"),
    ("dit", "vae", {}, "makes one vector of an image"),
    ("dit", "unet", {}, "name the folder of a variational model of image"),
    ("dit", "map", {"data": {"size": [32, 32]}}, "trained on images of 1 x 16 x 16 .* data are of 1 x 32 x 32"),
    ("prior", "map", {}, "has no codes to predict"),
    ("prior", "vq", {"network": {"context": 8}}, "less than the 16 codes of an image"),
    ("dit", "nowhere", {}, "is not a folder"),
]


@pytest.mark.parametrize(("name", "codec", "changes", "said"), REFUSED)
def test_what_does_not_fit_is_a_sentence(models: dict[str, Path], drawn: Path, tmp_path: Path, name: str, codec: str,
                                         changes: dict[str, Any], said: str) -> None:
    table = shapes.table(name, drawn, models.get(codec, Path("nowhere")) if codec else None)
    for key, values in changes.items():
        table[key] = table[key] | values
    from handmill import recipe as recipes

    with pytest.raises(UserError, match=said):
        train(recipes.parse(table), tmp_path / name, quiet=True)


def test_kinds_that_do_not_go_together_are_a_sentence(drawn: Path) -> None:
    from handmill import recipe as recipes

    table = shapes.table("unet", drawn)
    with pytest.raises(UserError, match=r"network.kind = 'unet' does not go with family = 'variational'"):
        recipes.parse(table | {"family": "variational", "sampling": {}})
    with pytest.raises(UserError, match=r"codec.kind = 'byte' does not go with medium = 'image': choose one of pixels"):
        recipes.parse(table | {"codec": {"kind": "byte"}})


@pytest.mark.parametrize("name", ["vq", "unet"])
def test_a_stopped_run_goes_on_bit_equal(drawn: Path, tmp_path: Path, name: str) -> None:
    """The codebook's statistics and the averaged weights are part of what a checkpoint keeps."""
    recipe = tmp_path / "recipe.toml"
    more = {"ema": 0.9, "steps": 60} if name == "unet" else {"steps": 150}
    recipe.write_text(tomli_w.dumps(shapes.table(name, drawn, **more)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert handmill("train", recipe, "--out", whole, "--quiet").returncode == 0
    command = [sys.executable, "-m", "handmill", "train", str(recipe), "--out", str(parts), "--quiet"]
    process = subprocess.Popen(command)
    wait_for(parts, "step-10", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert handmill("train", recipe, "--out", parts, "--quiet").returncode == 0
    assert state_hash(whole) == state_hash(parts)


def test_training_shows_a_picture(drawn: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(shapes.table("unet", drawn, steps=40, sample_every=0.05)))
    done = handmill("train", recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run" / "samples" / "training.png") in done.stderr
    assert np.asarray(Image.open(tmp_path / "run" / "samples" / "training.png")).std() > 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-2]["items_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "stylegan2"])
def test_two_processes_train_as_one(name: str, drawn: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(shapes.table(name, drawn, steps=10)))
    losses = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                   "-m", "handmill", "train", str(recipe), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def training_pixels(path: Path) -> tuple[Any, Any]:
    """The data a model was trained on, prepared, and its training images (N, C, H, W) in [-1, 1]."""
    from handmill.checks.image import training_split
    from handmill.media.pictures import from_uint8

    split = training_split(folder.load(path))
    assert split is not None
    return split, from_uint8(np.array(split.images("train")))


def test_latents_have_mean_0_and_deviation_1_and_come_back(models: dict[str, Path]) -> None:
    _, x = training_pixels(models["dit"])
    codec = folder.load(models["dit"]).codec
    codes = codec.encode(x)
    assert codes.shape[1:] == codec.shape
    each = codes.transpose(0, 1).flatten(1)
    assert each.mean(1).abs().max() < 1e-4
    assert (each.std(1) - 1).abs().max() < 1e-4
    plain = codec.model.network.images(codec.model.network.mean(x), "gaussian")
    assert (codec.decode(codes) - plain).abs().max() < 1e-4


def test_codes_are_tokens_and_come_back(models: dict[str, Path]) -> None:
    from handmill.families import variational

    _, x = training_pixels(models["prior"])
    codec = folder.load(models["prior"]).codec
    codes, labels = codec.encode(x[:6]), torch.tensor([0, 1, 2, 3, 0, 1])
    assert codes.shape == (6, 16)
    assert int(codes.max()) < codec.codes == 32
    tokens = codec.tokens(codes, labels)
    assert tokens[:, 0].tolist() == [32, 33, 34, 35, 32, 33]
    assert int(tokens.max()) < codec.size == 36
    objective = codec.model.recipe.objective
    again = variational.reconstruct(codec.model.network, objective, x[:6], {})
    assert (codec.decode(codes) - again).abs().max() < 1e-5


def test_items_are_the_same_however_batches_are_cut(models: dict[str, Path]) -> None:
    from dataclasses import replace

    from handmill.data.items import Items

    split, x = training_pixels(models["unet"])
    model = folder.load(models["unet"])
    items = Items(split, "train", model.codec, replace(model.recipe.data, flip=True, shift=2), 3)
    whole = items.batch(np.arange(300))
    parts = [items.batch(part) for part in np.array_split(np.arange(300), 7)]
    for name in ("x", "label", "place"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
    plain = Items(split, "train", model.codec, model.recipe.data, 3)
    epoch = plain.batch(np.arange(len(x)))
    numbers = [int(((x - image) ** 2).flatten(1).sum(1).argmin()) for image in epoch["x"]]
    assert sorted(numbers) == list(range(len(x)))  # each image once an epoch, and its own label with it
    assert epoch["label"].tolist() == [int(split.labels("train")[i]) for i in numbers]
