"""Mixing, walking and projecting, with small generators of random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.interpolate import CubicSpline
from torch import Tensor

from handmill import folder, recipe
from handmill.checks import features
from handmill.data.noise import normal
from handmill.errors import UserError
from handmill.families.adversarial import exploring
from handmill.folder import Model
from handmill.media import pictures
from handmill.media.pixels import Pixels
from handmill.networks import build, dcgan, stylegan2
from handmill.verbs import explore
from handmill.verbs.generate import generate

SHAPE, CLASSES = (1, 16, 16), ("bar", "dot", "ring")
NETWORKS: dict[str, dict[str, Any]] = {
    "stylegan2": {"kind": "stylegan2", "latent": 12, "style": 12, "width": 8, "most": 16, "discriminator_width": 8,
                  "conditional": True},
    "dcgan": {"kind": "dcgan", "latent": 12, "width": 8, "most": 16, "norm": "none", "discriminator_norm": "none"},
}


def stylish(classes: int = 0) -> Any:
    """A StyleGAN2 whose images lie about within [-1, 1] and have noise."""
    torch.manual_seed(1)
    settings = stylegan2.Settings(latent=12, style=12, width=8, most=16)
    return tamed(stylegan2.Generator(settings, SHAPE, classes)).eval()


def plain(classes: int = 0) -> Any:
    torch.manual_seed(1)
    return dcgan.Generator(dcgan.Settings(latent=12, width=8, most=16, norm="none"), SHAPE, classes).eval()


def tamed(network: Any) -> Any:
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.startswith("colours.") and name.endswith(".weight") and p.ndim == 4:
                p.mul_(0.3)
            if name.endswith("strength"):
                p.fill_(0.1)
    return network


def z_of(count: int, seed: int = 1) -> Tensor:
    return normal(seed, torch.arange(count), (12,))


def noise_of(generator: Any, count: int) -> Tensor:
    return normal(2, torch.arange(count), generator.noise_shape)


# Mixing

@pytest.mark.parametrize("cut", [1, 3, "coarse", "middle", "fine"])
def test_an_image_mixed_with_itself_is_itself_and_others_differ(cut: int | str) -> None:
    generator = stylish()
    w, noise = exploring.styles(generator, z_of(3), {}), noise_of(generator, 3)
    images = exploring.mixed(generator, w, w, cut, noise)  # (3, 3, C, H, W)
    own = exploring.rendered(generator, w, noise)
    assert images.shape == (3, 3, *SHAPE)
    for i in range(3):
        torch.testing.assert_close(images[i, i], own[i])
        assert (images[i, (i + 1) % 3] - own[i]).abs().max() > 0.01


def test_a_cut_gives_the_rows_layers_below_it_and_the_columns_from_it_on() -> None:
    generator = stylish()
    w, noise = exploring.styles(generator, z_of(3), {}), noise_of(generator, 1)
    images = exploring.mixed(generator, w[:1], w[1:], 2, noise)
    for q in (0, 1):
        by_hand = torch.cat((w[:1, :2], w[1 + q:2 + q, 2:]), 1)
        torch.testing.assert_close(images[0, q], generator.render(by_hand, noise).detach()[0])


@pytest.mark.parametrize("layers", [2, 3, 6, 8, 18])
def test_coarse_middle_and_fine_are_all_layers_once(layers: int) -> None:
    each = [i for group in exploring.GROUPS for i in range(layers)[exploring.taken(group, layers)]]
    assert each == list(range(layers))


@pytest.mark.parametrize("cut", [0, 6, -1, "bold", 1.5])
def test_a_cut_outside_the_layers_is_refused(cut: Any) -> None:
    with pytest.raises(UserError, match="1 to 5, or the part of them"):
        exploring.taken(cut, 6)


def test_one_style_cannot_be_mixed() -> None:
    generator = plain()
    w = exploring.styles(generator, z_of(2), {})
    with pytest.raises(UserError, match="stylegan2"):
        exploring.mixed(generator, w, w, 1, noise_of(generator, 2))


# Walking

@pytest.mark.parametrize("closed", [True, False])
def test_a_walk_follows_the_cubic_spline_of_scipy(closed: bool) -> None:
    keys = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    frames = exploring.walk(keys, 10, closed).numpy()
    round_trip = np.concatenate((keys, keys[:1])) if closed else keys.numpy()
    spline = CubicSpline(np.arange(len(round_trip)), round_trip, bc_type="periodic" if closed else "natural")
    dense = spline(np.linspace(0, len(round_trip) - 1, 20_001))  # (n, 4)
    far = np.linalg.norm(frames[:, None] - dense[None], axis=2).min(1)
    assert far.max() < 5e-3


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_walk_passes_through_its_keys_and_closes(count: int) -> None:
    keys = torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(1))
    frames = exploring.walk(keys, 12)
    assert frames.shape == (12 * count, 5, 8)
    torch.testing.assert_close(frames[::12], keys)
    last = exploring.walk(keys.roll(-1, 0), 12)[-12:]  # from the last key on, had it been the second last
    torch.testing.assert_close(last, exploring.walk(keys, 12)[:12])
    opened = exploring.walk(keys, 12, closed=False)
    assert opened.shape == (12 * (count - 1) + 1, 5, 8)
    torch.testing.assert_close(opened[::12], keys)


def test_steps_of_a_walk_are_even() -> None:
    keys = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    frames = exploring.walk(keys, 20)
    steps = torch.cat((frames, frames[:1])).diff(dim=0).norm(dim=1)
    assert steps.max() / steps.min() < 1.15
    assert steps.view(6, 20).std(1).max() / steps.mean() < 0.01


def test_a_walk_in_z_is_on_great_circles_in_equal_angles() -> None:
    keys = torch.nn.functional.normalize(z_of(4), dim=1)
    frames = exploring.walk_z(keys, 10)
    torch.testing.assert_close(frames.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(frames[::10], keys)
    angles = (frames * frames.roll(-1, 0)).sum(1).clamp(-1, 1).acos().view(4, 10)
    whole = (keys * keys.roll(-1, 0)).sum(1).acos()
    torch.testing.assert_close(angles, (whole / 10)[:, None].expand(4, 10), rtol=1e-2, atol=1e-4)
    assert exploring.walk_z(keys, 10, closed=False).shape == (31, 12)


@pytest.mark.parametrize("make", [stylish, plain])
def test_a_way_between_classes_starts_from_each_in_turn(make: Callable[[int], Any]) -> None:
    generator, condition = make(3), {"label": torch.tensor([2, 0, 1])}
    w = exploring.travel(generator, z_of(3), condition, 5)
    torch.testing.assert_close(w[::5], exploring.styles(generator, z_of(3), condition))
    assert w.shape[0] == 15
    one = generator.map(z_of(3), {"label": torch.tensor([2, 2, 2])}).detach()
    assert (w[5:6] - one[1:2]).abs().max() > 0.01  # another class makes another style


def test_a_dcgan_between_two_classes_has_half_of_each_label_and_z_on_the_sphere() -> None:
    generator = plain(2)
    w = exploring.travel(generator, z_of(2), {"label": torch.tensor([0, 1])}, 2)  # (4, 1, Z + E)
    half = generator.embedding.weight.mean(0)
    torch.testing.assert_close(w[1, 0, 12:], half.detach())
    torch.testing.assert_close(w[1, 0, :12], exploring.walk_z(z_of(2), 2)[1])


# Projecting

@pytest.mark.parametrize(("make", "classes"), [(stylish, 0), (plain, 0), (plain, 3), (stylish, 3)])
def test_a_generator_finds_its_own_sample_again(make: Callable[[int], Any], classes: int) -> None:
    generator = make(classes)
    condition = {"label": torch.tensor([1])} if classes else {}
    quiet = torch.zeros(1, *generator.noise_shape)
    target = exploring.rendered(generator, exploring.styles(generator, z_of(1, 99), condition), quiet)[0].clamp(-1, 1)
    found = exploring.project(generator, target, condition, 250, seed=3)
    spread = 127.5 * target.std()
    assert found.error < 0.06 * spread
    assert found.error == pytest.approx(127.5 * (found.image - target).square().mean().sqrt())
    assert found.history[-1] < 0.02 * found.history[0]
    torch.testing.assert_close(found.image, generator.render(found.w[None], quiet)[0].detach().clamp(-1, 1))
    assert all(p.grad is None for p in generator.parameters())


def test_styles_of_each_layers_own_come_nearer_to_what_no_z_makes() -> None:
    generator = stylish()
    w, noise = exploring.styles(generator, z_of(2), {}), torch.zeros(1, *generator.noise_shape)
    target = exploring.mixed(generator, w[:1], w[1:], 2, noise)[0, 0].clamp(-1, 1)
    one, own = (exploring.project(generator, target, {}, 150, each=each) for each in (False, True))
    assert (one.w == one.w[:1]).all()
    assert own.error < 0.6 * one.error


def test_projection_is_a_function_of_its_seed() -> None:
    generator = plain()
    target = exploring.rendered(generator, exploring.styles(generator, z_of(1), {}), noise_of(generator, 1))[0]
    first, again, other = (exploring.project(generator, target, {}, 10, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.w, again.w, rtol=0, atol=0)
    assert (first.w - other.w).abs().max() > 0


def test_without_a_class_all_classes_are_tried() -> None:
    generator = plain(3)
    with torch.no_grad():
        generator.embedding.weight.mul_(8)  # a class changes much
    quiet = noise_of(generator, 1)
    target = exploring.rendered(generator, exploring.styles(generator, z_of(1), {"label": torch.tensor([2])}), quiet)[0]
    free = exploring.project(generator, target, {}, 150)
    wrong = exploring.project(generator, target, {"label": torch.tensor([0])}, 150)
    assert free.error < 0.5 * wrong.error


def test_features_draw_the_search_to_what_they_see() -> None:
    """Of an image put together from two, features that see one part alone bring that part nearer than pixels do."""
    generator, part = plain(), (..., slice(8), slice(8))
    target, other = exploring.rendered(generator, exploring.styles(generator, z_of(2), {}), noise_of(generator, 2))
    target[part] = other[part]

    def seen(x: Tensor) -> Tensor:
        return 10 * x[part].flatten(1)

    errors = [(exploring.project(generator, target, {}, 150, features=f).image - target)[part].square().mean()
              for f in (None, seen)]
    assert errors[1] < 0.5 * errors[0]


def test_volumes_and_sounds_are_projected_too() -> None:
    for shape in ((1, 32), (1, 8, 8, 8)):
        torch.manual_seed(1)
        generator: Any = dcgan.Generator(dcgan.Settings(latent=12, width=8, most=8, norm="none"), shape, 0).eval()
        target = exploring.rendered(generator, exploring.styles(generator, z_of(1), {}), torch.zeros(1, 0))[0]
        assert exploring.project(generator, target, {}, 100).error < 12


# The verbs

@pytest.fixture(scope="module", params=["stylegan2", "dcgan"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return written(tmp_path_factory.mktemp(request.param), request.param)


def written(home: Path, kind: str) -> Model:
    """A model folder of grey images of three classes."""
    torch.manual_seed(1)
    made = recipe.parse({
        "name": kind, "medium": "image", "family": "adversarial", "network": NETWORKS[kind],
        "data": {"paths": [str(home)], "size": [16, 16], "colour": "grey"}, "codec": {"kind": "pixels"}})
    codec = Pixels(SHAPE, CLASSES, 0.5)
    folder.write(home / kind, made, folder.weights_of(tamed(build(made.network, codec))), codec, {}, {"seed": 1})
    return folder.load(home / kind)


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def test_mixing_writes_the_samples_of_the_seed_along_the_edges(model: Model, tmp_path: Path) -> None:
    if model.recipe.name == "dcgan":
        with pytest.raises(UserError, match="one for the whole image"):
            explore.mixing(model, tmp_path, 2, 3, seed=5)
        return
    path = explore.mixing(model, tmp_path / "out", 2, 3, seed=5, cut="2")
    assert path == tmp_path / "out" / "mixing.png"
    notes = pictures.read_metadata(path)
    assert notes["seed"] == "5"
    assert notes["shows"] == "styles mixed: columns give layers from 2 on"
    labels = [CLASSES[i % 3] for i in range(5)] if model.network.classes else [""] * 5
    samples = generate(model, labels, seed=5)
    sheet, side = pixels_of(path), 66  # 16 pixels four times, and a gap of two
    assert sheet.shape == (3 * side + 2, 4 * side + 2, 3)
    cells = [[sheet[2 + side * r:2 + side * r + 64:4, 2 + side * q:2 + side * q + 64:4, :1] for q in range(4)]
             for r in range(3)]
    assert (cells[0][0] == 255).all()
    for cell, sample in zip([cells[1][0], cells[2][0], *cells[0][1:]], samples, strict=True):
        assert np.abs(cell.astype(int) - sample).max() <= 1


def test_truncation_to_nothing_leaves_the_centre_of_each_class(tmp_path: Path) -> None:
    model = written(tmp_path, "stylegan2")
    path = explore.mixing(model, tmp_path, 1, 1, seed=5, cut="fine", prompts=["dot"] if model.network.classes else [],
                          truncation=0.0)
    sheet = pixels_of(path)
    noisy = np.abs(sheet[68:132, 2:66].astype(int) - sheet[68:132, 68:132]).max()
    assert noisy == 0  # one style, the noise of the row


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_walk_writes_a_moving_picture_that_starts_from_the_first_sample(model: Model, tmp_path: Path,
                                                                       suffix: str) -> None:
    if suffix == ".mp4":
        av = pytest.importorskip("av")
    path = explore.walk(model, tmp_path / "out" / f"walk{suffix}", stops=3, seconds=1.2, seed=5)
    if suffix == ".mp4":
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 30
        return
    with Image.open(path) as image:
        assert sum(_duration(image, i) for i in range(image.n_frames)) == 1200
        image.seek(0)
        first = np.asarray(image.convert("L"))[::16, ::16]
        assert json.loads(image.info["comment"])["shows"] == "a walk through 3 samples"
    sample = generate(model, [CLASSES[0] if model.network.classes else ""], seed=5)[0]
    assert np.abs(first.astype(int) - sample[..., 0]).max() <= 1


def _duration(image: Any, frame: int) -> int:
    image.seek(frame)
    return int(image.info["duration"])


def test_project_finds_a_sample_that_was_saved(model: Model, tmp_path: Path) -> None:
    sample = generate(model, ["dot" if model.network.classes else ""], seed=9)[0]
    picture = tmp_path / "a dot.png"
    pictures.save_png(picture, sample)
    found = explore.project(model, tmp_path / "out", picture, "dot" if model.network.classes else "", 150, seed=5)
    assert found.picture == tmp_path / "out" / "projection-a_dot.png"
    w = load_file(found.weights)["w"]
    assert w.shape[0] == model.network.layers
    assert float(pictures.read_metadata(found.picture)["error"]) == pytest.approx(found.error, abs=1e-3)
    both = pixels_of(found.picture)[2:66:4]
    assert np.array_equal(both[:, 2:66:4, :1], sample)
    assert found.error < 0.35 * sample.std()  # its noise cannot be found


def test_projection_uses_the_features_of_the_check_where_they_are(tmp_path: Path) -> None:
    model = written(tmp_path, "dcgan")
    images = np.stack([tiny_images.drawing(i) for i in range(32)])[..., None]
    settings = features.Settings(features=8, images=256, batch=32)
    features.train(images, None, 0, 1, settings).save(model.path / features.FEATURES)
    seen = explore._features(model)
    assert seen is not None
    expected = features.load(model.path / features.FEATURES).features(images[:4])
    torch.testing.assert_close(seen(pictures.from_uint8(images[:4])), torch.from_numpy(expected))
    pictures.save_png(tmp_path / "a.png", images[0])
    assert explore.project(model, tmp_path, tmp_path / "a.png", "", 5, seed=1).error > 0


def test_a_target_that_does_not_fit_is_refused_with_both_sizes_unless_it_may_be_fitted(tmp_path: Path) -> None:
    model = written(tmp_path, "dcgan")
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "large.png")
    Image.new("RGB", (16, 16), (250, 9, 9)).save(tmp_path / "red.png")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "grey.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    for name, said in (("large", "40 x 20 pixels and the model makes 16 x 16: resize it, or let --fit"),
                       ("red", "3 channels of colour and the model makes 1 of grey"),
                       ("none", "no PNG, JPEG"), ("absent", "cannot be read")):
        with pytest.raises(UserError, match=said):
            explore.project(model, tmp_path, tmp_path / f"{name}.png", steps=2, seed=1)
    explore.project(model, tmp_path, tmp_path / "grey.png", steps=2, seed=1)
    for name in ("large", "red"):
        explore.project(model, tmp_path, tmp_path / f"{name}.png", steps=2, seed=1, fit=True)


def test_what_cannot_be_explored_is_refused(model: Model, tmp_path: Path) -> None:
    other = tiny_images.load(tmp_path / "gaussian", "gaussian")
    for call in (lambda: explore.mixing(other, tmp_path), lambda: explore.walk(other, tmp_path / "a.gif"),
                 lambda: explore.project(other, tmp_path, tmp_path / "a.png")):
        with pytest.raises(UserError, match="variational family, and only an adversarial model"):
            call()
    with pytest.raises(UserError, match="end it in"):
        explore.walk(model, tmp_path / "a.avi")
    with pytest.raises(UserError, match="1 stops"):
        explore.walk(model, tmp_path / "a.gif", stops=1)
    with pytest.raises(UserError, match="truncaton"):
        explore.walk(model, tmp_path / "a.gif", truncaton=0.5)
    with pytest.raises(UserError, match="choose 1x1"):
        explore.mixing(model, tmp_path, 0, 3)
    with pytest.raises(UserError, match="steps = 0"):
        explore.project(model, tmp_path, tmp_path / "a.png", steps=0)
    with pytest.raises(UserError, match="write for example 6x6"):
        explore.matrix("6")
    assert explore.matrix("6x4") == (6, 4)
