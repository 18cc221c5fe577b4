"""The U-Net and what it shares with the transformer, against torch's own layers, counters and exporter."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from handmill.errors import UserError
from handmill.networks import spatial
from handmill.networks.unet import Settings, UNet
from handmill.training.precision import HalfPrecision

SMALL = Settings(width=16, groups=4, head_width=16, blocks=1, attention=(1,))
SHAPES = [(1, 9), (4, 1), (3, 7, 10), (3, 8, 8), (3, 1, 5), (2, 5, 6, 3)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def stirred(network: nn.Module) -> nn.Module:
    """Every weight away from its start, where the output is 0."""
    torch.manual_seed(1)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network


def inputs(shape: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = drawn(batch, *shape, dtype=torch.float32).detach()
    return x, torch.linspace(-1, 1, batch), {"label": torch.arange(batch) % 3}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_zero_start_and_gradients(shape: tuple[int, ...]) -> None:
    network = UNet(SMALL, shape, 3)
    x, noise, condition = inputs(shape)
    y = network(x, noise, condition)
    assert y.shape == x.shape
    assert y.count_nonzero() == 0
    stirred(network)(x, noise, condition).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_weight_but_the_zeroed_ones_learns_within_three_steps() -> None:
    """Zero starts in a row would leave a branch without a gradient for ever."""
    torch.manual_seed(1)
    network = UNet(SMALL, (3, 8, 8), 3)
    x, noise, condition = inputs((3, 8, 8))
    for _ in range(3):
        network.zero_grad()
        (network(x, noise, condition) - x).square().mean().backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
    network.zero_grad()
    (network(x, noise, condition) - x).square().mean().backward()
    assert [n for n, p in network.named_parameters() if not p.grad.count_nonzero()] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_the_counters(shape: tuple[int, ...]) -> None:
    network = UNet(SMALL, shape, 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(*inputs(shape, 1))
    assert network.flops_per_item() == 3 * counter.get_total_flops()


def test_conditions_change_the_output_and_no_label_is_the_last_one() -> None:
    network = stirred(UNet(SMALL, (3, 8, 8), 3))
    x, noise, _ = inputs((3, 8, 8))
    first, second, null = (network(x, noise, {"label": torch.full((2,), label)}) for label in (0, 1, 3))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, null)
    torch.testing.assert_close(network(x, noise, {}), null)
    assert not torch.allclose(network(x, noise + 0.1, {}), null)
    unlabelled = UNet(SMALL, (3, 8, 8))
    assert unlabelled.embedding is None
    unlabelled(x, noise, {})


def test_bf16_copies_stay_close() -> None:
    network = stirred(UNet(SMALL, (3, 9, 8), 3))
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
    network = stirred(UNet(SMALL, shape, 3)).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, inputs(shape), dynamic_shapes=(batch, batch, {"label": batch}))
    five = inputs(shape, 5)
    torch.testing.assert_close(program.module()(*five), network(*five))


def test_fake_tensors_train() -> None:
    with FakeTensorMode():
        network = UNet(SMALL, (3, 8, 8), 3)
        y = HalfPrecision(network)(torch.randn(2, 3, 8, 8), torch.randn(2), {"label": torch.zeros(2).long()})
        y.sum().backward()
    assert y.shape == (2, 3, 8, 8)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("change", "named"), [
    ({"multipliers": ()}, "multipliers"), ({"width": 60}, "groups"), ({"attention": (3,)}, "levels are 0 to 2"),
    ({"head_width": 48, "multipliers": (1, 2)}, "head_width"), ({"blocks": 0}, "blocks"), ({"dropout": 1.0}, "dropout"),
])
def test_settings_that_cannot_be(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Settings(**change)  # type: ignore[arg-type]


def torchs_group_norm_silu(x: Tensor, gain: Tensor, shift: Tensor, groups: int) -> Tensor:
    normalised = F.group_norm(x.mT, groups).mT
    return F.silu(normalised * gain[:, None] + shift[:, None])


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm_silu_equals_torchs(groups: int) -> None:
    leaves = drawn(2, 5, 6), drawn(2, 6), drawn(2, 6, 1)[..., 0].detach().requires_grad_()
    ours, plain = spatial.group_norm_silu(*leaves, groups), torchs_group_norm_silu(*leaves, groups)
    torch.testing.assert_close(ours, plain)
    weight = drawn(*ours.shape[::-1]).detach().permute(2, 1, 0)
    gradients = (torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda *t: spatial.group_norm_silu(*t, groups), leaves)
    with torch.no_grad():
        torch.testing.assert_close(spatial.group_norm_silu(*leaves, groups), plain)


def test_group_norm_silu_in_bf16_with_a_large_mean() -> None:
    x = (drawn(2, 64, 8, dtype=torch.float32).detach() + 20).bfloat16()
    gain, shift = torch.ones(2, 8).bfloat16(), torch.zeros(2, 8).bfloat16()
    plain = torchs_group_norm_silu(x.float(), gain.float(), shift.float(), 2)
    torch.testing.assert_close(spatial.group_norm_silu(x, gain, shift, 2).float(), plain, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [9, spatial.EXPLICIT_UP_TO + 1])
def test_attention_equals_torchs(dtype: torch.dtype, places: int) -> None:
    """Both roads of `attend_all`, values and gradients."""
    q, k, v = (drawn(1, 2, places, 4 + i, dtype=torch.float32)[..., :4].detach() for i in range(3))
    low = [y.to(dtype).requires_grad_() for y in (q, k, v)]
    wide = [y.to(dtype).double().requires_grad_() for y in (q, k, v)]
    ours, plain = spatial.attend_all(*low), (wide[0] @ wide[1].mT / 2).softmax(-1) @ wide[2]
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(ours.double(), plain, **tolerance)
    for a, b in zip(torch.autograd.grad(ours.float().square().sum(), low),
                    torch.autograd.grad(plain.square().sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_attention_module_equals_torchs_multihead() -> None:
    """With torch's weights and, on both sides, queries and keys that need no normalising."""
    ours, torchs = spatial.Attention(8, 2), nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    ours.qk_norm = nn.Identity()
    with torch.no_grad():
        ours.qkv.weight.copy_(torchs.in_proj_weight)
        ours.out.weight.copy_(torchs.out_proj.weight)
    x = drawn(2, 5, 8, dtype=torch.float32)
    torch.testing.assert_close(ours(x), torchs(x, x, x)[0])


@pytest.mark.parametrize("shape", [(2, 3, 7, 10), (2, 3, 1, 5), (1, 2, 5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_and_grow(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    small = spatial.shrink(x)
    assert small.shape[2:] == spatial.halved(shape[2:])
    assert (small == 1).all()  # cut blocks are means of the places they have
    assert (spatial.grow(small, shape[2:]) == 1).all()
    small.sum().backward()
    torch.testing.assert_close(x.grad.float().sum(), torch.tensor(float(small.numel())), atol=0.1, rtol=0.01)


def test_grow_repeats_every_place() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :3, :5]
    torch.testing.assert_close(spatial.grow(x, (3, 5)), expected)


def test_fourier_features_tell_noise_levels_apart() -> None:
    levels = torch.linspace(-3, 3, 601)
    features = spatial.fourier_features(levels, 64)
    torch.testing.assert_close(features.square().mean(1), torch.ones(601))
    assert torch.cdist(features, features).fill_diagonal_(9).min() > 0.5


def test_noise_of_a_whole_batch_is_each_ones_own() -> None:
    network = stirred(UNet(SMALL, (3, 8, 8), 3))
    x, noise, condition = inputs((3, 8, 8), 3)
    alone = network(x[1:2], noise[1:2], {"label": condition["label"][1:2]})
    torch.testing.assert_close(network(x, noise, condition)[1:2], alone, atol=1e-4, rtol=1e-4)
