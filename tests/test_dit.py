"""The diffusion transformer against torch's own layers, counters and exporter."""

import pytest
import torch
from test_unet import drawn, inputs, stirred
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from handmill.errors import UserError
from handmill.networks import spatial
from handmill.networks.dit import Block, DiT, Settings
from handmill.networks.layers import rotate
from handmill.training.precision import HalfPrecision

SMALL = Settings(layers=2, width=32, heads=2)
SHAPES = [(1, 9), (4, 1), (3, 7, 10), (3, 8, 8), (2, 5, 6, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_zero_start_and_gradients(shape: tuple[int, ...]) -> None:
    network = DiT(SMALL, shape, 3)
    x, noise, condition = inputs(shape)
    y = network(x, noise, condition)
    assert y.shape == x.shape
    assert y.count_nonzero() == 0
    stirred(network)(x, noise, condition).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_weight_learns_within_three_steps() -> None:
    torch.manual_seed(1)
    network = DiT(SMALL, (3, 8, 8), 3)
    x, noise, condition = inputs((3, 8, 8))
    for _ in range(4):
        network.zero_grad()
        (network(x, noise, condition) - x).square().mean().backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
    assert [n for n, p in network.named_parameters() if not p.grad.count_nonzero()] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_the_counters(shape: tuple[int, ...]) -> None:
    network = DiT(SMALL, shape, 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(*inputs(shape, 1))
    assert network.flops_per_item() == 3 * counter.get_total_flops()


def test_conditions_change_the_output_and_no_label_is_the_last_one() -> None:
    network = stirred(DiT(SMALL, (3, 8, 8), 3))
    x, noise, _ = inputs((3, 8, 8))
    first, second, null = (network(x, noise, {"label": torch.full((2,), label)}) for label in (0, 1, 3))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(network(x, noise, {}), null)
    assert not torch.allclose(network(x, noise + 0.1, {}), null)
    assert DiT(SMALL, (3, 8, 8)).embedding is None


def test_a_block_starts_as_the_identity() -> None:
    x = drawn(2, 5, 32, dtype=torch.float32)
    rotary = spatial.axial_rotary((5,), 16, 100.0, x.device)
    assert torch.equal(Block(SMALL)(x, drawn(2, 32, dtype=torch.float32), rotary), x)


def test_bf16_copies_stay_close() -> None:
    network = stirred(DiT(SMALL, (3, 9, 8), 3))
    x, noise, condition = inputs((3, 9, 8))
    wide, half = network(x, noise, condition), HalfPrecision(network)(x, noise, condition)
    assert half.dtype == torch.float32
    assert (wide - half).abs().max() < 0.03 * wide.abs().max()
    gradients = []
    for y in (wide, half):
        network.zero_grad()
        y.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("shape", [(1, 9), (3, 7, 10), (2, 5, 6, 3)])
def test_exported_with_any_batch(shape: tuple[int, ...]) -> None:
    network = stirred(DiT(SMALL, shape, 3)).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, inputs(shape), dynamic_shapes=(batch, batch, {"label": batch}))
    five = inputs(shape, 5)
    torch.testing.assert_close(program.module()(*five), network(*five))


def test_fake_tensors_train() -> None:
    with FakeTensorMode():
        network = DiT(SMALL, (3, 8, 8), 3)
        y = HalfPrecision(network)(torch.randn(2, 3, 8, 8), torch.randn(2), {"label": torch.zeros(2).long()})
        y.sum().backward()
    assert y.shape == (2, 3, 8, 8)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 8, 4), (2, 3, 4, 8, 2)])
def test_patchify_is_undone_and_is_a_strided_convolution(shape: tuple[int, ...]) -> None:
    x, n = drawn(*shape, dtype=torch.float32).detach(), len(shape) - 2
    tokens = spatial.patchify(x, 2)
    torch.testing.assert_close(spatial.unpatchify(tokens, 2), x)
    weight = drawn(5, 2**n * 3, dtype=torch.float32).detach()
    kernel = weight.unflatten(1, (*(2,) * n, 3)).movedim(-1, 1)  # (5, C, p, .., p)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    torch.testing.assert_close((tokens @ weight.T).movedim(-1, 1), convolve(x, kernel, stride=2))


@pytest.mark.parametrize("space", [(6,), (4, 5), (3, 4, 2)])
def test_rotary_scores_depend_on_the_distance_along_each_axis(space: tuple[int, ...]) -> None:
    cos, sin = spatial.axial_rotary(space, 16, 100.0, torch.device("cpu"))
    q, k = (drawn(1, 1, 1, width, dtype=torch.float32)[..., :16].detach() for width in (16, 17))
    q, k = (rotate(y.expand(1, 1, len(cos), 16), cos, sin)[0, 0] for y in (q, k))  # (P, D)
    scores = (q @ k.T).view(*space, *space)
    n = len(space)
    ones, zeros = (1,) * n, (0,) * n
    torch.testing.assert_close(scores[ones + ones], scores[zeros + zeros])
    for axis in range(n):
        step = tuple(int(i == axis) for i in range(n))
        torch.testing.assert_close(scores[step + ones], scores[zeros + tuple(1 - s for s in step)])
        assert abs(scores[step + zeros] - scores[zeros + zeros]) > 1e-3


def test_attention_sees_all_places() -> None:
    network = stirred(DiT(SMALL, (1, 16), 0))
    x = torch.randn(1, 1, 16, requires_grad=True)
    network(x, torch.zeros(1), {})[..., 0].sum().backward()
    assert (x.grad != 0).all()


def test_dropout_only_in_training() -> None:
    network = stirred(DiT(Settings(layers=1, width=16, heads=2, dropout=0.5), (1, 8), 0))
    x, noise = torch.randn(2, 1, 8), torch.zeros(2)
    assert not torch.equal(network(x, noise, {}), network(x, noise, {}))
    network.eval()
    assert torch.equal(network(x, noise, {}), network(x, noise, {}))
    assert any(isinstance(m, nn.Dropout) for m in network.modules())


@pytest.mark.parametrize(("change", "named"), [
    ({"heads": 3}, "heads"), ({"patch": 0}, "patch"), ({"width": 4}, "pairs")])
def test_settings_that_cannot_be(change: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Settings(**change)  # type: ignore[arg-type]
