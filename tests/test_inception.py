"""The FID's Inception network: published parameter count, names and shapes of the weights' file, refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from handmill.checks import inception
from handmill.checks.inception import Inception, load, prepare
from handmill.errors import UserError

# of pt_inception-2015-12-05: one of every kind of layer
SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_1a_3x3.bn.running_var": (32,),
    "Conv2d_2b_3x3.conv.weight": (64, 32, 3, 3), "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3), "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7), "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3), "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    "Mixed_7c.branch3x3dbl_1.bn.weight": (448,), "fc.weight": (1008, 2048), "fc.bias": (1008,)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)


def test_parameters_are_those_published(network):
    """Keras gives 23,851,784 for 1000 classes with two running statistics and no gain a channel."""
    parameters = sum(p.numel() for p in network.parameters())
    channels = sum(t.numel() for name, t in network.state_dict().items() if name.endswith("running_mean"))
    assert channels == 17_216
    assert parameters + 2 * channels == 23_885_392
    assert parameters + channels - 8 * 2049 == 23_851_784


def test_names_and_shapes_are_those_of_the_weights_file(network):
    state = network.state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert sum(name.endswith("conv.weight") for name in state) == 94


def test_features_have_the_shape_and_repeat(network, images):
    first = network.features(images)
    assert first.shape == (3, 2048)
    assert (first == network.features(images)).all()
    assert np.allclose(first[1:2], network.features(images[1:2]), atol=1e-5)
    grey = network.features(images[..., :1])
    assert np.allclose(grey, network.features(images[..., :1].repeat(3, -1)))


def test_average_leaves_the_padding_out_and_the_last_block_takes_the_maximum():
    torch.manual_seed(0)
    x = torch.rand(1, 4, 5, 5)
    for pooling, pooled in (("mean", F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
                            ("maximum", F.max_pool2d(x, 3, 1, 1))):
        block = inception.Block(4, [[{"branch_pool": (6, 1)}]], pooling).eval()
        assert torch.equal(block(x), block.branch_pool(pooled))
    assert torch.allclose(F.avg_pool2d(torch.ones(1, 1, 3, 3), 3, 1, 1, count_include_pad=False), torch.ones(1))


def test_images_are_resized_bilinearly_to_the_range_from_minus_one_to_one(images):
    x = prepare(images)
    assert x.shape == (3, 3, 299, 299)
    assert x.min() >= -1
    assert x.max() <= 1
    assert x[0, 0, 0, 0] == pytest.approx(images[0, 0, 0, 0] / 127.5 - 1, abs=1e-6)
    plain = prepare(np.full((1, 8, 8, 1), 51, np.uint8))
    assert torch.allclose(plain, torch.tensor(-0.6))


def test_weights_come_back_from_a_file_without_counts_of_batches(network, images, tmp_path):
    kept = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "w.safetensors")
    assert (load(tmp_path / "w.safetensors").features(images[:1]) == network.features(images[:1])).all()


def test_other_files_are_refused_with_a_sentence(network, tmp_path):
    with pytest.raises(UserError, match="is not there"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04 a pickle in a zip" * 9)
    with pytest.raises(UserError, match="convert it with python -c"):
        load(tmp_path / "w.pth")
    wrong = {name: t for name, t in network.state_dict().items() if name.startswith("Conv2d")}
    save_file(wrong, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"Mixed_5b\.branch1x1\.conv\.weight is missing"):
        load(tmp_path / "part.safetensors")
    whole = dict(network.state_dict())
    save_file(whole | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "classes.safetensors")
    with pytest.raises(UserError, match=r"fc\.weight has shape \(1000, 2048\) where \(1008, 2048\) belongs"):
        load(tmp_path / "classes.safetensors")
    save_file(whole | {"AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="also holds AuxLogits"):
        load(tmp_path / "more.safetensors")
