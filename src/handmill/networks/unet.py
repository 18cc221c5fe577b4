"""A U-Net for audio, images, video and voxels: residual blocks with FiLM, and self-attention where maps are small.

Ronneberger et al. 2015 (U-Net); Ho et al. 2020 (as a denoiser); Nichol & Dhariwal 2021, Dhariwal & Nichol 2021
(scale-shift conditioning, attention by head width); Wu & He 2018 (group normalisation).

Two things differ from those papers, both for speed: a skip is merged by a 1 x 1 convolution back to the level's width
before its block, not carried through the block at double width; channels change by 1 x 1 convolutions on the smaller
map. One-dimensional data runs as maps of height 1.

B batch, C channels, *S space (H, W in comments), P places (product of S), E embedding width.
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
    channels_last,
    crop,
    embed_label,
    group_norm_silu,
    grow,
    halved,
    label_embedding,
    patchify,
    rows,
    shrink,
    unpatchify,
    unrows,
)
from handmill.recipe import positive, within


@dataclass(frozen=True)
class Settings:
    """The [network] table of a U-Net."""

    kind: Literal["unet"] = "unet"
    patch: int = 1  # places a side that become the channels of one: small images train faster by 2
    width: int = 64  # channels of the first level
    multipliers: tuple[int, ...] = (1, 2, 3)  # channels of each level in widths; each level halves the space
    blocks: int = 2  # residual blocks a level, down and up each
    attention: tuple[int, ...] = ()  # levels with self-attention after each block; 0 is the finest
    middle: bool = True  # self-attention between the two middle blocks, on the smallest map
    head_width: int = 64  # channels of an attention head
    groups: int = 16  # of group normalisation
    dropout: float = 0.0  # of features inside residual blocks; its random mask costs half a convolution on a CPU

    def __post_init__(self) -> None:
        positive(self, "patch", "width", "blocks", "head_width", "groups")
        within(self, 0.0, 0.99, "dropout")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers = {list(self.multipliers)} must be one whole number above 0 for each level")
        if self.width % self.groups:
            raise UserError(f"width = {self.width} is not divisible by groups = {self.groups}: "
                            f"choose a multiple of {self.groups}")
        last = len(self.multipliers) - 1
        for level in self.attention:
            if not 0 <= level <= last:
                raise UserError(f"attention = {list(self.attention)} names level {level}: the levels are 0 to {last}")
        for level in {*self.attention, *([last] if self.middle else [])}:
            if self.channels[level] % self.head_width:
                raise UserError(f"level {level} has {self.channels[level]} channels, which head_width = "
                                f"{self.head_width} does not divide: attention needs whole heads")

    @property
    def channels(self) -> list[int]:
        return [self.width * m for m in self.multipliers]

    @property
    def embedding(self) -> int:  # E
        return 4 * self.width


class Convolution(nn.Module):
    """3 wide along every axis longer than 1, or 1 wide; keeps the space."""

    def __init__(self, inputs: int, outputs: int, space: tuple[int, ...], wide: bool = True,
                 bias: bool = False) -> None:
        super().__init__()
        kernel = tuple(3 if wide and size > 1 else 1 for size in space)
        self.padding = tuple(k // 2 for k in kernel)
        self.places = math.prod(space)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=(inputs * math.prod(kernel)) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        convolve = F.conv2d if x.ndim == 4 else F.conv3d
        return convolve(x, self.weight, self.bias, padding=self.padding)

    def flops(self) -> int:
        return 2 * self.weight.numel() * self.places


class GroupNormSilu(nn.Module):
    """silu(gain * group_norm(x) + shift), gain and shift learned."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gain, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return normalised(x, self.gain.expand(x.shape[0], -1), self.shift.expand(x.shape[0], -1), self.groups)


class Block(nn.Module):
    """x + conv(drop(norm(conv(norm(x))))), the second norm's gain and shift from the embedding; then attention."""

    def __init__(self, settings: Settings, channels: int, space: tuple[int, ...], attention: bool) -> None:
        super().__init__()
        self.groups = settings.groups
        self.norm = GroupNormSilu(channels, settings.groups)
        self.inner = Convolution(channels, channels, space)
        self.film = nn.Linear(settings.embedding, 2 * channels)
        self.dropout = nn.Dropout(settings.dropout)
        self.outer = Convolution(channels, channels, space)
        nn.init.zeros_(self.outer.weight)
        self.attention = MapAttention(settings, channels, space) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        scale, shift = self.film(embedding).chunk(2, -1)  # (B, C) each
        h = normalised(self.inner(self.norm(x)), 1 + scale, shift, self.groups)
        return self.attention(x + self.outer(self.dropout(h)))


class MapAttention(nn.Module):
    """x + attention(norm(x)) over all places of a map."""

    def __init__(self, settings: Settings, channels: int, space: tuple[int, ...]) -> None:
        super().__init__()
        self.places = math.prod(space)
        self.norm = LayerNorm(channels)
        self.attention = Attention(channels, channels // settings.head_width)
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        table = rows(x)  # (B, P, C)
        return unrows(table + self.attention(self.norm(table)), x.shape[2:])

    def flops(self) -> int:
        return self.attention.flops(self.places)


class Level(nn.Module):
    """Blocks at one size of map, all smaller levels (or the two middle blocks), and as many blocks again, each of which
    also sees the output of its twin on the way down (the skip)."""

    def __init__(self, settings: Settings, level: int, space: tuple[int, ...]) -> None:
        super().__init__()
        s, channels, attention = settings, settings.channels[level], level in settings.attention
        self.down = nn.ModuleList(Block(s, channels, space, attention) for _ in range(s.blocks))
        if level + 1 < len(s.channels):
            self.below: nn.Module = Below(s, level + 1, space)
        else:
            self.below = Middle(s, channels, space)
        self.merge = nn.ModuleList(Convolution(2 * channels, channels, space, wide=False) for _ in range(s.blocks))
        self.up = nn.ModuleList(Block(s, channels, space, attention) for _ in range(s.blocks))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        skips = []
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        x = self.below(x, embedding)
        for merge, block in zip(self.merge, self.up, strict=True):
            x = block(merge(torch.cat((x, skips.pop()), 1)), embedding)
        return x


class Below(nn.Module):
    """The next level, on a map of half the size."""

    def __init__(self, settings: Settings, level: int, space: tuple[int, ...]) -> None:
        super().__init__()
        above, channels, smaller = settings.channels[level - 1], settings.channels[level], halved(space)
        self.narrow = Convolution(above, channels, smaller, wide=False)
        self.level = Level(settings, level, smaller)
        self.widen = Convolution(channels, above, smaller, wide=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        y = self.level(self.narrow(shrink(x)), embedding)  # (B, C', H / 2, W / 2)
        return grow(self.widen(y), x.shape[2:])


class Middle(nn.Module):
    """Two blocks on the smallest map, with attention between them."""

    def __init__(self, settings: Settings, channels: int, space: tuple[int, ...]) -> None:
        super().__init__()
        self.first = Block(settings, channels, space, settings.middle)
        self.second = Block(settings, channels, space, False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        return self.second(self.first(x, embedding), embedding)


class UNet(nn.Module):
    """(B, C, *S) and the noise level (B,) to (B, C, *S), in the dtype of the input; 0 everywhere before training.

    `shape` is (C, *S) of one item, with 1 to 3 space dimensions of any size. `condition["label"]` (B,) int64 counts
    from 0; `classes`, or no such key, means no label.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        assert 2 <= len(shape) <= 4, shape
        self.settings, self.shape, self.classes = settings, tuple(shape), classes
        s, self.grid = settings, tuple(-(-size // settings.patch) for size in shape[1:])
        space, channels = self.grid if len(shape) > 2 else (1, *self.grid), shape[0] * s.patch ** (len(shape) - 1)
        self.embedding = label_embedding(classes, s.embedding)
        self.noise = Noise(s.width, s.embedding)
        self.first = Convolution(channels, s.width, space)
        self.levels = Level(s, 0, space)
        self.norm = GroupNormSilu(s.width, s.groups)
        self.last = Convolution(s.width, channels, space, bias=True)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x.shape[1:] == self.shape, (x.shape, self.shape)
        e = self.noise(noise)  # (B, E)
        e = F.silu(e + embed_label(self.embedding, condition, e))
        h = patches(x.to(self.first.weight.dtype), self.settings.patch)
        h = self.first(channels_last(h.unsqueeze(2) if h.ndim == 3 else h))  # (B, C, H, W)
        h = self.last(self.norm(self.levels(h, e)))
        return whole(h.reshape(x.shape[0], -1, *self.grid), self.settings.patch, x.shape[2:]).to(x.dtype)

    def flops_per_item(self) -> float:
        """Floating-point operations of training on one item: three forward passes' worth (Kaplan et al. 2020, 2.1)."""
        maps = sum(m.flops() for m in self.modules() if isinstance(m, Convolution | MapAttention))
        vectors = [m for b in self.modules() if isinstance(b, Block | Noise) for m in b.children()]
        return 3.0 * (maps + sum(2 * m.weight.numel() for m in vectors if isinstance(m, nn.Linear)))


def patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, *S) to (B, p^N C, *S / p), zeros standing in where a size is not divisible."""
    if patch == 1:
        return x
    extra = [part for size in reversed(x.shape[2:]) for part in (0, -size % patch)]
    return patchify(F.pad(x, extra), patch).movedim(-1, 1)


def whole(x: Tensor, patch: int, space: torch.Size) -> Tensor:
    """The inverse of `patches`: (B, p^N C, *S / p) to (B, C, *S)."""
    return x if patch == 1 else crop(unpatchify(x.movedim(1, -1), patch), space)


def normalised(x: Tensor, gain: Tensor, shift: Tensor, groups: int) -> Tensor:
    """silu(gain * group_norm(x) + shift): x (B, C, H, W), gain and shift (B, C) -> (B, C, H, W)."""
    return unrows(group_norm_silu(rows(x), gain, shift, groups), x.shape[2:])
