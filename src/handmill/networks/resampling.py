"""Changing the size of maps by two with the binomial filter [1, 3, 3, 1], differentiable as often as one likes.

Zhang 2019 (a low-pass filter before every second place is dropped); Karras et al. 2019, 2020 (this filter around
StyleGAN's convolutions).

B batch, C channels, H x W space.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 4


def blur(x: Tensor, padding: int, gain: float = 1.0) -> Tensor:
    """[1, 3, 3, 1] / 8 along both axes, of x with `padding` zeros on every side, times `gain`.

    (B, C, H, W) -> (B, C, H + 2 padding - 3, W + 2 padding - 3). Its gradient is a blur of the gradient; with torch's
    gradient of a depthwise convolution StyleGAN2's R1 penalty takes 1.4 times as long on a CPU.
    """
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        y: Tensor = _Blur.apply(x, padding, gain)  # type: ignore[no-untyped-call]
        return y
    return _blur(x, padding, gain)


def upsample(x: Tensor) -> Tensor:
    """Twice the size, the edge continuing outside of x: (B, C, H, W) -> (B, C, 2 H, 2 W). This is bilinear.

    For images of few channels: two small matrix products, which every device differentiates deterministically.
    """
    rows, columns = (_bilinear(size, x) for size in x.shape[2:])
    return rows @ x @ columns.mT


def _blur(x: Tensor, padding: int, gain: float) -> Tensor:
    taps = 0.5 - (torch.arange(TAPS, dtype=x.dtype, device=x.device) - 1.5).abs() / 4  # [1, 3, 3, 1] / 8
    kernel = gain * taps[:, None] * taps  # (4, 4), exact in bf16 for gains that are powers of two
    return F.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), padding=padding, groups=x.shape[1])


def _bilinear(size: int, like: Tensor) -> Tensor:  # (2 size, size): [1, 3, 3, 1] / 4 between zeros, but at the edges
    near = torch.arange(size, device=like.device)
    source = ((torch.arange(2 * size, device=like.device) - 0.5) / 2).clamp(0, size - 1)
    return (1 - (source[:, None] - near).abs()).clamp(min=0).to(like.dtype)


class _Blur(torch.autograd.Function):
    """The filter is symmetric, so the adjoint filters too, with as many zeros as make up what the other pass lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int, gain: float) -> Tensor:
        ctx.padding, ctx.gain = padding, gain
        return _blur(x, padding, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return blur(grad, TAPS - 1 - ctx.padding, ctx.gain), None, None
