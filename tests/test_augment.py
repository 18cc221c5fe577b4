"""Augmentation: each change against its closed form, and nothing that depends on how a batch is cut."""

from typing import Any

import numpy as np
import pytest
import torch
from pixels import scene
from torch import Tensor

from handmill.data.augment import augment, jitter, move
from handmill.media.image import Data


def batch(count: int = 6, size: int = 16, channels: int = 3) -> Tensor:
    images = np.stack([scene(i, size, channels) for i in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


ALL = Data(flip=True, shift=3, rotation=20.0, colour_jitter=0.3)
GREY = Data(flip=True, shift=2, colour="grey", binarise="sampled")


@pytest.mark.parametrize("data", [ALL, GREY])
def test_the_cut_of_the_batch_does_not_matter(data: Data) -> None:
    images, places = batch(channels=data.shape[2]), torch.tensor([5, 900, 3, 3, 77, 12])
    whole = augment(images, places, data, seed=4)
    parts = [augment(images[i:i + 1], places[i:i + 1], data, seed=4) for i in range(6)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert torch.equal(whole, augment(images, places.numpy(), data, seed=4))
    assert not torch.equal(whole, augment(images, places, data, seed=5))
    assert not torch.equal(whole, augment(images, places + 1, data, seed=4))


def test_without_settings_and_in_evaluation_only_the_scale_changes() -> None:
    images, places = batch(), torch.arange(6)
    expected = images.float() / 127.5 - 1
    for data, training in ((Data(), True), (ALL, False)):
        x = augment(images, places, data, 1, training)
        assert x.dtype == torch.float32
        assert torch.allclose(x, expected, atol=1e-6)
        assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), images)


def test_half_are_flipped_and_whole() -> None:
    images = batch(1).repeat(2000, 1, 1, 1)
    x = augment(images, torch.arange(2000), Data(flip=True), 3)
    plain = augment(images, torch.arange(2000), Data(), 3)
    flipped = (x == plain.flip(3)).flatten(1).all(1)
    assert (flipped | (x == plain).flatten(1).all(1)).all()
    assert abs(flipped.float().mean().item() - 0.5) < 0.05  # 4.5 standard errors


def test_shifts_are_whole_pixels_with_the_edge_repeated() -> None:
    images, shift = batch(1).repeat(400, 1, 1, 1), 2
    x = augment(images, torch.arange(400), Data(shift=shift), 3)
    padded = torch.nn.functional.pad(images[:1].float() / 127.5 - 1, (2, 2, 2, 2), mode="replicate")
    crops = torch.cat([padded[:, :, i:i + 16, j:j + 16] for i in range(5) for j in range(5)])  # (25, C, H, W)
    which = (x[:, None] - crops).abs().flatten(2).amax(2) < 1e-5  # (400, 25)
    assert (which.sum(1) == 1).all()
    assert which.any(0).all(), "some shifts never come"


def test_a_shift_goes_right_and_down() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 2, 3] = 1
    assert torch.nonzero(move(x, torch.tensor([[2.0, 1.0]]))[0, 0]).tolist() == [[3, 5]]


def test_quarter_turns_are_rot90() -> None:
    x = batch(4).float() / 255
    angles = torch.tensor([0.0, 0.5, 1.0, 1.5]) * torch.pi
    turned = move(x, torch.zeros(4, 2), angles)
    expected = torch.stack([torch.rot90(image, k, (1, 2)) for k, image in enumerate(x)])
    assert torch.allclose(turned, expected, atol=1e-4)


def test_half_a_turn_of_an_oblong() -> None:
    x = torch.rand(1, 3, 6, 20)
    assert torch.allclose(move(x, torch.zeros(1, 2), torch.tensor([torch.pi])), x.flip(2, 3), atol=1e-4)


def test_rotation_stays_within_its_degrees() -> None:
    rows, columns = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    dot = (255 * torch.exp(-((columns - 20) ** 2 + rows**2) / 18)).to(torch.uint8).expand(300, 1, 65, 65)
    x = (augment(dot, torch.arange(300), Data(size=(65, 65), colour="grey", rotation=30.0), 1) + 1)[:, 0]
    right, down = ((x * axis).sum((1, 2)) / x.sum((1, 2)) for axis in (columns, rows))
    angles = torch.rad2deg(torch.atan2(-down, right))
    assert angles.abs().max() < 30.5
    assert abs(angles.std().item() - 30 / 3**0.5) < 1.5


def test_jitter_by_hand() -> None:
    x = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    luma = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    assert torch.allclose(jitter(x, torch.tensor([[0.5, 0.0, 0.0]])), x * 1.5)
    assert torch.allclose(jitter(x, torch.tensor([[0.0, -1.0, 0.0]])), torch.full_like(x, luma))
    assert torch.allclose(jitter(x, torch.tensor([[0.0, 0.0, -1.0]])), torch.full_like(x, luma))
    assert torch.allclose(jitter(x, torch.zeros(1, 3)), x)
    grey = torch.rand(2, 1, 4, 4)
    assert torch.allclose(jitter(grey, torch.tensor([[0.0, 0.0, 0.9]] * 2)), grey, atol=1e-6)
    assert jitter(torch.rand(8, 3, 4, 4), torch.ones(8, 3)).max() <= 1


def test_sampled_pixels_have_the_mean_of_their_grey_value() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    data = Data(colour="grey", binarise="sampled", size=(16, 16))
    x = augment(levels.expand(4000, 1, 16, 16), torch.arange(4000), data, 9)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    mean, expected = (x.mean(0).flatten() + 1) / 2, torch.arange(256) / 255
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((mean - expected).abs() <= 4.5 * error + 1e-7).all()
    assert (x[:, 0, 0, 0] == -1).all()
    assert (x[:, 0, -1, -1] == 1).all()


def test_held_out_images_are_drawn_once() -> None:
    images, numbers = batch(6, channels=1), torch.arange(6)
    first = augment(images, numbers, GREY, 1, training=False)
    assert torch.equal(first, augment(images, numbers, GREY, 1, training=False))
    assert set(first.unique().tolist()) == {-1.0, 1.0}


def test_threshold() -> None:
    levels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    data: Any = Data(colour="grey", binarise="threshold", size=(4, 4))
    assert augment(levels, torch.zeros(1), data, 1).flatten().tolist() == [-1, -1, 1, 1]
