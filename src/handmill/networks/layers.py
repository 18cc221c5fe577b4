"""Layers that several networks share, and the forms of them that are fast on a CPU.

B batch, T time, S positions to look at, C channels, H heads, K key/value heads, D head width,
V vocabulary, N positions of a batch in one row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS_AT_ONCE = 256  # of logits, in the loss
UNCOUNTED = -100  # a target that is no part of the loss, as torch's own losses have it
EXPLICIT_UP_TO = 512  # positions for which plain bf16 products train faster on a CPU than its flash kernel


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # (*, C) -> (*, C)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


class LayerNorm(nn.Module):
    """Layer normalisation with optional gain and bias (Ba et al. 2016); one fused kernel each way on a CPU."""

    def __init__(self, width: int, epsilon: float = 1e-5, gain: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if gain and bias else None
        self.width, self.epsilon = width, epsilon

    def forward(self, x: Tensor) -> Tensor:  # (*, C) -> (*, C)
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.epsilon)


def rotary_table(positions: Tensor, width: int, theta: float,
                 dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The rotary embedding's factors (Su et al. 2021, eq. 34), each (*positions, width), in `dtype`.

    `rotate` pairs channel i with i + width / 2, so the cosines are doubled and the sines carry the sign.
    """
    angle = _angles(positions, width, theta, dtype)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs of x (B, H, T, D) by the table's angles, (T, D) or (B, 1, T, D)."""
    if torch.is_grad_enabled() and x.requires_grad:
        turned: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return turned
    return _turn(x, cos, sin)


def sinusoids(distances: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The fixed encoding R of distances (Vaswani et al. 2017, 3.5): sines, then cosines, (*distances, width)."""
    angle = _angles(distances, width, theta, dtype)
    return torch.cat((angle.sin(), angle.cos()), -1)


def relu_squared(x: Tensor) -> Tensor:
    """max(0, x)^2 (So et al. 2021)."""
    if torch.is_grad_enabled() and x.requires_grad:
        squared: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return F.relu(x).square()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over N of -log softmax(weight x)[target]: x (N, C), weight (V, C), targets (N,) int64; in nats, fp32.

    A target of UNCOUNTED adds nothing. The logits are made and turned into their own gradient a few rows at a time, so
    no (N, V) tensor in fp32 exists.
    """
    if torch.compiler.is_compiling():
        return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T) v for q (B, H, T, D) and k, v (B, K, S, D); causal where no mask is given.

    A mask that broadcasts to (B, H, T, S) is True where a query may look, or is added to its scores.

    On a CPU the flash kernel's backward pass is slow in bf16 (7 ms where plain products take 0.8 at T = 64; a whole
    step of a small decoder took 1.4 times as long at T = 256 and 1.6 times at 512), so sequences up to EXPLICIT_UP_TO
    take plain products and longer ones train through fp32. With dropout there is no flash kernel at all.
    """
    causal = mask is None and q.shape[2] > 1
    half = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if half and q.shape[2] > 1 and (dropout or k.shape[2] <= EXPLICIT_UP_TO):
        return _attend_explicitly(q, k, v, mask, scale, dropout)
    wide = torch.float32 if half and torch.is_grad_enabled() and q.requires_grad else q.dtype
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide)
    y = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), mask, dropout, causal,
                                       scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return y.to(q.dtype)  # (B, H, T, D)


def aligned(scores: Tensor) -> Tensor:
    """Scores (B, H, T, S) by distance, S - 1 in the first column and 0 in the last, as scores by key.

    Query i is the position S - T + i, so its row moves left by T - 1 - i (Dai et al. 2019, appendix B). Rows of
    S + 1, with one more column on the left, do just that when they are read as rows of S from the T-th number on.
    What a row gets beyond its own last score is the next row's, and for the mask to hide.
    """
    t, s = scores.shape[2:]
    return F.pad(scores, (1, 0)).flatten(2)[:, :, t:].unflatten(2, (t, s))


def _attend_explicitly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    b, h, t, d = q.shape
    s = k.shape[2]
    if k.shape[1] != h:
        k, v = (y.repeat_interleave(h // k.shape[1], 1) for y in (k, v))
    if mask is None:
        hidden = torch.full((t, t), float("-inf"), dtype=q.dtype, device=q.device).triu(1).expand(b * h, t, t)
    else:
        hidden = mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -1e9)
        hidden = hidden.to(q.dtype).expand(b, h, t, s).reshape(b * h, t, s)
    q, k, v = (y.reshape(b * h, -1, d) for y in (q, k, v))
    scores = torch.baddbmm(hidden, q, k.mT, alpha=scale)  # (B*H, T, S)
    return (F.dropout(scores.softmax(-1), dropout) @ v).view(b, h, t, d)


def _angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    frequency = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width)
    return positions[..., None].to(dtype) * frequency  # (*positions, width / 2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle: three kernels in place of nine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - onehot(targets), known as soon as the logits are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = x.new_zeros((), dtype=torch.float32)
        gradient = x.new_empty(x.shape[0] if wanted else 0, weight.shape[0])  # (N, V)
        for start in range(0, x.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = (x[rows] @ weight.T).float()  # (R, V); from here on in place
            top, right = logits.amax(-1, keepdim=True), targets[rows, None].clamp(min=0)  # (R, 1)
            counted = (targets[rows, None] >= 0).float()  # (R, 1)
            loss -= ((logits.gather(1, right) - top) * counted).sum()
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)  # (R, 1)
            loss += (total.log() * counted).sum()
            if wanted:
                gradient[rows] = logits.div_(total / counted).scatter_add_(1, right, -counted)
        if wanted:
            ctx.save_for_backward(x, weight, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, gradient = ctx.saved_tensors  # (N, C), (V, C), (N, V)
        return (gradient @ weight).mul_(grad.to(x.dtype)), (gradient.T @ x).mul_(grad.to(x.dtype)), None


class _ReluSquared(torch.autograd.Function):
    """Keeps only max(0, x), half of what autograd would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        hidden = F.relu(x)
        ctx.save_for_backward(hidden)
        return hidden * hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        gradient: Tensor = (grad * hidden).mul_(2)
        return gradient
