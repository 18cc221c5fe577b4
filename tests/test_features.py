"""The feature network: it learns, repeats, is kept whole, and bears images of any size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from handmill.checks import features
from handmill.checks.features import FILE, Settings, contrast, distort, for_data, load, prepare, reduced, tint, train
from handmill.errors import UserError

DIGITS = Path(__file__).parents[1].parent / "shared" / "data" / "images"
BRIEF = Settings(images=6000, batch=64, warmup=20)


def bars(seed, n, side=16, channels=1):
    """Horizontal, vertical and diagonal bars on noise, and which of the three: (n, side, side, channels), (n,)."""
    generator = np.random.default_rng(seed)
    labels, place = generator.integers(0, 3, n), generator.integers(3, side - 3, n)[:, None, None]
    row, column = np.mgrid[:side, :side]
    distance = np.stack([abs(row - place), abs(column - place), abs(row - column + place - side // 2)])  # (3, n, ...)
    images = 200.0 * (distance[labels, np.arange(n)] < 2) + generator.normal(20, 20, (n, side, side))
    return images.clip(0, 255).astype(np.uint8)[..., None].repeat(channels, -1), labels.astype(np.int64)


@pytest.fixture(scope="module")
def trained():
    return train(*bars(0, 500), 3, seed=0, settings=BRIEF, fingerprint="abc")


def test_it_learns_to_tell_bars_apart(trained):
    figure = trained.measure(*bars(1, 300))
    assert figure.value > 0.97
    assert figure.low < figure.value <= figure.high
    assert figure.n == 300
    probabilities = trained.probabilities(bars(1, 300)[0])
    assert probabilities.shape == (300, 3)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


def test_features_are_normalised_and_do_not_depend_on_the_batch(trained, monkeypatch):
    images = bars(0, 500)[0]
    found = trained.features(images)
    assert found.shape == (500, 64)
    assert found.dtype == np.float32
    assert np.square(found).mean() == pytest.approx(1, abs=0.5)
    monkeypatch.setattr(features, "_BATCH", 7)
    assert np.allclose(found[:20], trained.features(images[:20]), atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_name():
    brief = Settings(images=640, batch=64)
    images, labels = bars(0, 100)
    torch.manual_seed(1)
    first = train(images, labels, 3, 5, brief)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = train(images, labels, 3, 5, brief), train(images, labels, 3, 6, brief)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.network.state_dict().values(),
                                                 again.network.state_dict().values(), strict=True))
    assert first.name == again.name != other.name
    assert first.name.startswith("cnn64-")
    assert len(first.name) == len("cnn64-") + 8


def test_every_epoch_visits_each_image_once():
    chosen = [features._chosen(step, 10, 55, seed=0) for step in range(10)]
    for epoch in (chosen[:5], chosen[5:]):
        assert len(np.unique(np.concatenate(epoch))) == 50
    assert not np.array_equal(chosen[0], chosen[5])


def test_what_is_saved_comes_back(trained, tmp_path):
    trained.save(tmp_path / "kept")
    back = load(tmp_path / "kept")
    images = bars(2, 50)[0]
    assert back.name == trained.name
    assert (back.features(images) == trained.features(images)).all()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [FILE]


def test_a_damaged_file_is_named_and_made_anew(trained, tmp_path):
    path = tmp_path / FILE
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    trained.save(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"nothing", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=FILE):
            load(tmp_path)
    made = for_data(tmp_path, *bars(0, 100), 3, "abc", 0, settings=Settings(images=640))
    assert load(tmp_path).name == made.name


def test_it_is_trained_once_for_the_same_data(tmp_path, monkeypatch):
    images, labels = bars(0, 100)
    brief, trainings = Settings(images=128), []
    monkeypatch.setattr(features, "train", lambda *a, **k: trainings.append(1) or train(*a, **k))
    first = for_data(tmp_path, images, labels, 3, "abc", 0, settings=brief)
    assert for_data(tmp_path, images, labels, 3, "abc", 0, settings=brief).name == first.name
    assert len(trainings) == 1
    for other in (("abd", 0, brief), ("abc", 1, brief), ("abc", 1, Settings(images=256))):
        for_data(tmp_path, images, labels, 3, *other[:2], settings=other[2])
    assert len(trainings) == 4


def test_without_labels_it_learns_by_contrast():
    images, labels = bars(0, 500)
    found = train(images, None, 0, 0, Settings(images=12_000, batch=64))
    assert found.name.startswith("simclr64-")
    x, y = found.features(images), found.features(bars(1, 300)[0])
    nearest = np.square(y[:, None] - x).sum(-1).argmin(1)
    assert (labels[nearest] == bars(1, 300)[1]).mean() > 0.9
    with pytest.raises(AssertionError, match="without labels"):
        found.probabilities(images)
    assert train(images[:20], labels[:20] * 0, 1, 0, Settings(images=64)).name.startswith("simclr64-")


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 20), (64, 8), (256, 256)])
def test_any_size_goes_through(size):
    images = np.random.default_rng(0).integers(0, 256, (20, *size, 3), dtype=np.uint8)
    found = train(images, np.arange(20) % 4, 4, 0, Settings(images=20))
    assert found.features(images[:3]).shape == (3, 64)


def test_too_few_images_are_refused():
    images, labels = bars(0, 15)
    with pytest.raises(UserError, match="needs 16 of them, not 15"):
        train(images, labels, 3, 0)


@pytest.mark.parametrize("bad", [{"images": 0}, {"side": -1}, {"shift": 0.6}, {"angle": -1.0}, {"temperature": 0.0}])
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Settings(**bad)


def test_reduction_is_the_mean_over_areas():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 3), dtype=np.uint8)
    means = images.reshape(2, 8, 4, 4, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.allclose(prepare(images, 8).numpy(), means, atol=1e-5)
    assert reduced((28, 28), 64) == (28, 28)
    assert reduced((300, 200), 64) == (64, 43)


def test_distortions_are_small_and_none_at_strength_zero():
    x = prepare(bars(0, 8)[0], 64)
    still = distort(x, Settings(), torch.Generator().manual_seed(0), 0.0)
    assert torch.allclose(still, x, atol=1e-5)
    assert torch.equal(tint(x, 0.0, torch.Generator()), x)
    moved = distort(x, Settings(angle=0.0, scale=0.0, shift=0.5), torch.Generator().manual_seed(0))
    assert not torch.allclose(moved, x, atol=0.1)
    assert moved.min() >= x.min()
    assert moved.max() <= x.max()


def test_contrast_is_the_papers_sum():
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    unit, total = z / z.norm(dim=1, keepdim=True), 0.0
    for i in range(6):
        likeness = [float(unit[i] @ unit[k]) / 0.3 for k in range(6)]
        others = sum(np.exp(likeness[k]) for k in range(6) if k != i)
        total -= np.log(np.exp(likeness[(i + 3) % 6]) / others)
    assert float(contrast(z, 0.3)) == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.slow
def test_digits_are_told_apart():
    if not DIGITS.is_dir():
        pytest.skip(f"{DIGITS} with the MNIST digits is absent")
    train_set, test_set = (np.load(DIGITS / f"mnist-{part}10k.npz") for part in ("train", "test"))
    found = train(train_set["x"][..., None], train_set["y"].astype(np.int64), 10, 0)
    assert found.measure(test_set["x"][..., None], test_set["y"].astype(np.int64)).value >= 0.985
