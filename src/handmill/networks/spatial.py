"""What the networks on (batch, channels, *space) share, for 1, 2 or 3 space dimensions.

Wu & He 2018 (group normalisation); Perez et al. 2018 (FiLM); Dosovitskiy et al. 2021 (patches);
Su et al. 2021 (rotary positions); Dehghani et al. 2023 (query-key norm); Tancik et al. 2020 (Fourier features).

Maps are kept with their channels last in memory: there oneDNN's convolutions are fastest, and a map is a table of
rows (places x channels) without a copy, which is what normalisation and attention read.

B batch, C channels, *S space, P places (product of S), G groups, H heads, D head width, E embedding width, p patch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.networks.layers import LayerNorm, rotate

EXPLICIT_UP_TO = 1024  # places for which plain bf16 products train faster on a CPU than fp32's flash kernel
LOWEST, HIGHEST = 0.25, 64.0  # radians per unit of the noise level: noise levels lie within a few units of 0


def rows(x: Tensor) -> Tensor:
    """Space as one axis before the channels: (B, C, *S) -> (B, P, C)."""
    return x.movedim(1, -1).flatten(1, -2)


def unrows(x: Tensor, space: tuple[int, ...]) -> Tensor:
    """The inverse of `rows`; the channels stay last in memory: (B, P, C) -> (B, C, *S)."""
    return x.unflatten(1, space).movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """The same tensor (B, C, *S) with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def halved(space: tuple[int, ...]) -> tuple[int, ...]:
    """The space that `shrink` leaves: half, rounded up."""
    return tuple(-(-size // 2) for size in space)


def shrink(x: Tensor) -> Tensor:
    """Means of blocks of two along every axis, cut at the far border: (B, C, *S) -> (B, C, *halved(S)), 2-D or 3-D."""
    kernel = tuple(min(2, size) for size in x.shape[2:])
    if x.ndim == 4:
        return F.avg_pool2d(x, kernel, ceil_mode=True)
    return F.avg_pool3d(_wide(x), kernel, ceil_mode=True).to(x.dtype)  # a CPU has no bf16 kernel for it


def grow(x: Tensor, space: tuple[int, ...]) -> Tensor:
    """Every place twice along every axis, cropped to `space`: (B, C, *halved(S)) -> (B, C, *S)."""
    assert x.shape[2:] == halved(space), (x.shape, space)
    x = F.interpolate(x, [s if s == 1 else 2 * small for s, small in zip(space, x.shape[2:], strict=True)])
    return crop(x, space)


def crop(x: Tensor, space: tuple[int, ...]) -> Tensor:
    """The first places along every axis: (B, C, *larger) -> (B, C, *space), a view."""
    for axis, size in enumerate(space, 2):
        x = x.narrow(axis, 0, size)
    return x


def patchify(x: Tensor, patch: int) -> Tensor:
    """Blocks of p^N places as channels: (B, C, *S) -> (B, *S / p, p^N C); every S must be a multiple of p."""
    assert all(s % patch == 0 for s in x.shape[2:]), (x.shape, patch)
    n = x.ndim - 2
    for axis in range(n):
        x = x.unflatten(2 + 2 * axis, (-1, patch))
    grid, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.permute(0, *grid, *inner, 1).flatten(1 + n)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`: (B, *grid, p^N C) -> (B, C, *S)."""
    n = x.ndim - 2
    x = x.unflatten(-1, (*(patch,) * n, -1))  # (B, *grid, p, .., p, C)
    x = x.permute(0, 2 * n + 1, *(i for axis in range(n) for i in (1 + axis, 1 + n + axis)))
    for axis in range(n):
        x = x.flatten(2 + axis, 3 + axis)
    return x


def fourier_features(noise: Tensor, width: int) -> Tensor:
    """Sines and cosines of the noise level (B,) at geometric frequencies: (B, width), fp32 or wider."""
    assert noise.ndim == 1, noise.shape
    assert width % 2 == 0, width
    steps = torch.linspace(0, 1, width // 2, device=noise.device)
    frequency = LOWEST * (HIGHEST / LOWEST) ** steps
    angle = noise[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1) * math.sqrt(2)  # unit variance


class Noise(nn.Module):
    """The noise level through two linear layers: (B,) -> (B, E)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.inner, self.outer = nn.Linear(features, width), nn.Linear(width, width)

    def forward(self, noise: Tensor) -> Tensor:
        features = fourier_features(noise, self.features).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(features)))


def label_embedding(classes: int, width: int) -> nn.Embedding | None:
    """One row a class and a last one for "no label" (Ho & Salimans 2021); None where there are no classes."""
    return nn.Embedding(classes + 1, width) if classes else None


def embed_label(embedding: nn.Embedding | None, condition: dict[str, Tensor], like: Tensor) -> Tensor:
    """The rows of condition["label"] (B,) int64, of "no label" where it is missing: (B, E), or 0 without classes."""
    if embedding is None:
        return like.new_zeros(())
    if "label" in condition:
        return embedding(condition["label"])
    return embedding.weight[-1].expand(like.shape[0], -1)


def group_norm_silu(x: Tensor, gain: Tensor, shift: Tensor, groups: int, epsilon: float = 1e-5) -> Tensor:
    """silu(gain * group_norm(x) + shift), x (B, P, C), gain and shift (B, C).

    Computed and differentiated in fp32 or wider, keeping only x. In bf16 with channels last, torch's group_norm alone
    takes as long backward as a convolution does: 12 ms, 64 channels at 32 x 32 on one core, where all of this takes 4.
    """
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        y: Tensor = _GroupNormSilu.apply(x, gain, shift, groups, epsilon)  # type: ignore[no-untyped-call]
        return y
    wide = _wide(x)
    mean, scale = _moments(wide, groups, epsilon)
    factor = scale * gain
    return F.silu(torch.addcmul((shift - mean * factor)[:, None], wide, factor[:, None])).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over all places, with normalised queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_norm = LayerNorm(width // heads, gain=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:  # (B, P, C) -> (B, P, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, P, D)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attend_all(q, k, v, self.dropout if self.training else 0.0)  # (B, H, P, D)
        return self.out(y.transpose(1, 2).flatten(2))

    def flops(self, places: int) -> int:
        """Of the forward pass of one item."""
        width = self.out.in_features
        return 2 * places * 4 * width * width + 4 * places * places * width


def attend_all(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with no mask, each (B, H, P, D)."""
    half = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if half and q.shape[2] <= EXPLICIT_UP_TO:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, P, P)
        return F.dropout(scores.softmax(-1), dropout) @ v
    wide = torch.float32 if half and q.requires_grad else q.dtype
    return F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), dropout_p=dropout).to(q.dtype)


def axial_rotary(space: tuple[int, ...], width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors for `layers.rotate`, each (P, width) fp32: channel pairs take the axes of space in turn."""
    pairs, n = width // 2, len(space)
    axes = [torch.arange(s, device=device, dtype=torch.float32) for s in space]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, n)  # (P, N)
    pair = torch.arange(pairs, device=device)
    frequency = theta ** (-(pair // n) / math.ceil(pairs / n))
    angle = places[:, pair % n] * frequency  # (P, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group_mean(x: Tensor, groups: int) -> Tensor:  # (B, C) -> (B, C), alike within a group
    mean = x.unflatten(1, (groups, -1)).mean(2, keepdim=True)
    return mean.expand(-1, -1, x.shape[1] // groups).flatten(1)


def _moments(x: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each group, given to its channels: (B, P, C) -> (B, C), (B, C)."""
    places = x.shape[1]
    mean = _group_mean(x.sum(1) / places, groups)  # a sum over an outer axis is one pass; var_mean is 100 times slower
    square = _group_mean(x.square().sum(1) / places, groups)
    return mean, (square - mean * mean).clamp(min=0).add(epsilon).rsqrt()


class _GroupNormSilu(torch.autograd.Function):
    """y = silu(gain n + shift), n = (x - mean) r; Wu & He 2018, eq. 1 and 7, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, groups: int, epsilon: float) -> Tensor:
        wide = _wide(x)
        mean, r = _moments(wide, groups, epsilon)
        factor = r * gain  # (B, C)
        offset = shift - mean * factor  # (B, C)
        ctx.groups = groups
        ctx.save_for_backward(x, gain, mean, r, factor, offset)
        return F.silu(torch.addcmul(offset[:, None], wide, factor[:, None]), inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        x, gain, mean, r, factor, offset = ctx.saved_tensors
        wide, places = _wide(x), x.shape[1]
        h = torch.addcmul(offset[:, None], wide, factor[:, None])  # (B, P, C)
        g = torch.ops.aten.silu_backward(_wide(grad), h)  # d loss / d h
        shift_grad = g.sum(1)  # (B, C)
        gain_grad = r * (torch.mul(g, wide, out=h).sum(1) - mean * shift_grad)  # (B, C), sum of g n
        # d loss / d x = r (gain g - <gain g> - n <gain g n>), < > the mean over a group
        slope = -r * r * _group_mean(gain * gain_grad, ctx.groups) / places
        constant = -r * _group_mean(gain * shift_grad, ctx.groups) / places - mean * slope
        gradient = torch.addcmul(constant[:, None], wide, slope[:, None], out=h).addcmul_(g, factor[:, None])
        return gradient.to(x.dtype), gain_grad.to(gain.dtype), shift_grad.to(gain.dtype), None, None


def group_deviation(x: Tensor, group: int) -> Tensor:
    """The standard deviation over a group of neighbours in the batch, averaged over all else: (B, C, *S) -> (B,).

    Groups are of the largest divisor of B up to `group` (Karras et al. 2018, section 3).
    """
    size = max(n for n in range(1, group + 1) if x.shape[0] % n == 0)
    groups = x.unflatten(0, (-1, size))  # (B / size, size, C, *S)
    variance = (groups - groups.mean(1, keepdim=True)).square().mean(1)  # (B / size, C, *S)
    return (variance + 1e-8).sqrt().flatten(1).mean(1).repeat_interleave(size)  # the root of 0 has no slope
