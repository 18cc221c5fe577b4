"""A diffusion transformer for audio, images, video and voxels: patches as tokens, every block steered by adaLN-Zero.

Peebles & Xie 2023 (DiT, adaLN-Zero); Dosovitskiy et al. 2021 (patches, learned positions); Su et al. 2021 (rotary
positions, here along each axis of space); Dehghani et al. 2023 (query-key norm).

B batch, C channels, *S space, p patch, T tokens (patches), W width, N space dimensions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.layers import LayerNorm
from handmill.networks.spatial import (
    Attention,
    Noise,
    axial_rotary,
    crop,
    embed_label,
    label_embedding,
    patchify,
    unpatchify,
)
from handmill.recipe import positive, within


@dataclass(frozen=True)
class Settings:
    """The [network] table of a diffusion transformer."""

    kind: Literal["dit"] = "dit"
    patch: int = 2  # p, places along each axis that make one token
    layers: int = 6
    width: int = 256  # W, channels of the residual stream
    heads: int = 4  # of attention
    ratio: int = 4  # units of the MLP, in widths
    theta: float = 100.0  # base of the rotary wavelengths, in patches
    dropout: float = 0.0  # of attention weights and of what each block adds

    def __post_init__(self) -> None:
        positive(self, "patch", "layers", "width", "heads", "ratio", "theta")
        within(self, 0.0, 0.99, "dropout")
        if self.width % (2 * self.heads):
            raise UserError(f"width = {self.width} is not divisible by twice heads = {self.heads}: rotary positions "
                            "turn pairs of channels of each head")


class Block(nn.Module):
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)); shifts, scales and gates come from the embedding and
    start at 0, so that the block starts as the identity."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.norm = LayerNorm(s.width, 1e-6, gain=False)
        self.modulation = nn.Linear(s.width, 6 * s.width)
        self.attention = Attention(s.width, s.heads, s.dropout)
        self.up, self.down = nn.Linear(s.width, s.ratio * s.width), nn.Linear(s.ratio * s.width, s.width)
        self.dropout = nn.Dropout(s.dropout)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # (B, T, W) -> (B, T, W)
        steer = self.modulation(embedding)[:, None].chunk(6, -1)  # each (B, 1, W)
        y = self.attention(modulate(self.norm(x), *steer[:2]), rotary)
        x = torch.addcmul(x, steer[2], self.dropout(y))
        hidden = self.up(modulate(self.norm(x), *steer[3:5]))  # (B, T, ratio W)
        y = self.down(F.gelu(hidden))  # the exact form: on a CPU in bf16 the tanh form takes three times as long
        return torch.addcmul(x, steer[5], self.dropout(y))


class DiT(nn.Module):
    """(B, C, *S) and the noise level (B,) to (B, C, *S), in the dtype of the input; 0 everywhere before training.

    `shape` is (C, *S) of one item, with 1 to 3 space dimensions of any size; what is missing to whole patches is
    filled with zeros inside. `condition["label"]` (B,) int64 counts from 0; `classes`, or no such key, means no label.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        assert 2 <= len(shape) <= 4, shape
        self.settings, self.shape, self.classes = settings, tuple(shape), classes
        s = settings
        self.grid = tuple(-(-size // s.patch) for size in shape[1:])  # tokens along each axis
        inputs = shape[0] * s.patch ** len(self.grid)  # p^N C
        self.embedding = label_embedding(classes, s.width)
        self.embedding_patch = nn.Linear(inputs, s.width)
        self.position = nn.Parameter(0.02 * torch.randn(math.prod(self.grid), s.width))
        self.noise = Noise(s.width, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = LayerNorm(s.width, 1e-6, gain=False)
        self.modulation = nn.Linear(s.width, 2 * s.width)
        self.head = nn.Linear(s.width, inputs)
        for zero in (self.modulation, self.head):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x.shape[1:] == self.shape, (x.shape, self.shape)
        s, space = self.settings, self.shape[1:]
        e = self.noise(noise)
        e = F.silu(e + embed_label(self.embedding, condition, e))  # (B, W)
        missing = [n * s.patch - size for n, size in zip(self.grid, space, strict=True)]
        padded = F.pad(x, [side for short in reversed(missing) for side in (0, short)])
        tokens = patchify(padded.to(self.position.dtype), s.patch).flatten(1, -2)  # (B, T, p^N C)
        h = self.embedding_patch(tokens) + self.position  # (B, T, W)
        cos, sin = axial_rotary(self.grid, s.width // s.heads, s.theta, x.device)
        rotary = cos.to(h.dtype), sin.to(h.dtype)
        for block in self.blocks:
            h = block(h, e, rotary)
        h = self.head(modulate(self.norm(h), *self.modulation(e)[:, None].chunk(2, -1)))  # (B, T, p^N C)
        y = unpatchify(h.unflatten(1, self.grid), s.patch)
        return crop(y, space).to(x.dtype)

    def flops_per_item(self) -> float:
        """Floating-point operations of training on one item: three forward passes' worth (Kaplan et al. 2020, 2.1)."""
        tokens, blocks = math.prod(self.grid), [m for m in self.modules() if isinstance(m, Block)]
        once = self.noise.inner, self.noise.outer, self.modulation, *(b.modulation for b in blocks)
        every = self.embedding_patch, self.head, *(m for b in blocks for m in (b.up, b.down))
        attention = sum(b.attention.flops(tokens) for b in blocks)
        return 3.0 * (attention + 2 * sum(m.weight.numel() for m in once)
                      + 2 * tokens * sum(m.weight.numel() for m in every))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift every token: (B, T, W), (B, 1, W), (B, 1, W) -> (B, T, W)."""
    return torch.addcmul(shift, x, 1 + scale)
