"""Layers against torch's own, and their hand-written gradients against finite differences."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from handmill.networks import layers


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_rotate_turns_by_the_angle_and_its_gradient_is_right() -> None:
    x = drawn(2, 3, 5, 8)
    cos, sin = (t.double() for t in layers.rotary_table(torch.arange(5), 8, 100.0))
    turned = layers.rotate(x, cos, sin)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(5)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(layers.rotate, (x, cos, sin))


def test_rotation_makes_scores_depend_on_distance_only() -> None:
    q, k = drawn(1, 1, 1, 16), drawn(1, 1, 1, 16)
    def score(at: int, other: int) -> Tensor:
        places = torch.tensor([at, other])
        cos, sin = (t.double() for t in layers.rotary_table(places, 16, 10_000.0))
        return (layers.rotate(q, cos[:1], sin[:1]) * layers.rotate(k, cos[1:], sin[1:])).sum()
    torch.testing.assert_close(score(3, 1), score(12, 10), atol=1e-5, rtol=0)
    assert abs(score(3, 1) - score(4, 1)) > 1e-3


def test_relu_squared() -> None:
    x = drawn(4, 7)
    torch.testing.assert_close(layers.relu_squared(x), F.relu(x).square())
    assert torch.autograd.gradcheck(layers.relu_squared, (x,))


@pytest.mark.parametrize("rows", [3, 300])
def test_linear_cross_entropy(rows: int) -> None:
    x, weight, targets = drawn(rows, 6, dtype=torch.float32), drawn(11, 6, dtype=torch.float32), torch.arange(rows) % 11
    ours = layers.linear_cross_entropy(x, weight, targets)
    plain = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, plain)
    gradients = (torch.autograd.grad(3 * loss, (x, weight)) for loss in (ours, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layers.linear_cross_entropy(x, weight, targets), plain)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        torch.testing.assert_close(ours, F.linear_cross_entropy(x, weight, targets, reduction="sum"))


def test_linear_cross_entropy_survives_large_logits() -> None:
    x, weight = torch.tensor([[300.0, -300.0]], requires_grad=True), torch.eye(2)
    loss = layers.linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.item() == 600.0
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("time", [16, 160])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_equals_the_formula(time: int, key_heads: int, dtype: torch.dtype) -> None:
    """Both roads of `attend`: training in bf16 (explicit or through fp32) and everything else."""
    q, k, v = (drawn(2, h, time, 8, dtype=torch.float32) for h in (4, key_heads, key_heads))
    low = [y.detach().to(dtype).requires_grad_() for y in (q, k, v)]
    ours = layers.attend(*low, None, 0.4, 0.0)
    wide = [y.detach().to(dtype).float().requires_grad_() for y in (q, k, v)]
    ks, vs = (y.repeat_interleave(4 // key_heads, 1) for y in wide[1:])
    scores = (0.4 * wide[0] @ ks.mT).masked_fill(~torch.ones(time, time).tril().bool(), -torch.inf)
    plain = scores.softmax(-1) @ vs
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(ours.float(), plain, **tolerance)
    for a, b in zip(torch.autograd.grad(ours.float().square().sum(), low),
                    torch.autograd.grad(plain.square().sum(), wide), strict=True):
        torch.testing.assert_close(a.float(), b, **({"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32
                                                    else {"atol": 0.3, "rtol": 0.1}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_dropout_keeps_the_mean(dtype: torch.dtype) -> None:
    q, k, v = (drawn(1, 2, 16, 8, dtype=torch.float32).detach().to(dtype).requires_grad_() for _ in range(3))
    torch.manual_seed(1)
    drops = torch.stack([layers.attend(q, k, v, None, 0.3, 0.5).detach().float() for _ in range(3000)])
    assert drops.std(0).max() > 0.1
    torch.testing.assert_close(drops.mean(0), layers.attend(q, k, v, None, 0.3, 0.0).float(), atol=0.08, rtol=0)


def test_norms_equal_torchs() -> None:
    x = drawn(3, 8, dtype=torch.float32)
    norm = layers.RMSNorm(8, 1e-5)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(layers.LayerNorm(8, 1e-5)(x), torch.nn.LayerNorm(8, 1e-5)(x))
    assert not list(layers.LayerNorm(8, gain=False).parameters())
