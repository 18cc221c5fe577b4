"""A convolutional autoencoder for 1, 2 or 3 space dimensions: a classical VAE, or the first stage of a latent model.

Kingma & Welling 2014 (Gaussian bottleneck); van den Oord et al. 2017 and Mentzer et al. 2023 (quantised, see
quantisers.py); Rombach et al. 2022 (latent maps for a second model). Residual blocks normalise over channels at each
position (Liu et al. 2022, ConvNeXt): with channels last that is one fused kernel, where group normalisation's
backward pass in bf16 takes longer on a CPU than the convolutions.

B batch, C channels, S space (1 to 3 dimensions), s = S / factor, D channels of the latent (or its units), E width of
the label's embedding.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.layers import LayerNorm
from handmill.networks.quantisers import FSQ, Codebook, Quantised
from handmill.recipe import positive, within

CONVOLUTION: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a batch
SCALE_SPEED = 10.0  # Adam moves a parameter by its rate a step; the scale must follow the error sooner than that
LOG_VARIANCE = 20.0  # largest size of a posterior's log variance


@dataclass(frozen=True)
class Settings:
    """The [network] table of an autoencoder."""

    kind: Literal["autoencoder"] = "autoencoder"
    patch: int = 4  # pixels a side that the first convolution merges
    width: int = 64  # channels of the first level
    multipliers: tuple[int, ...] = (1,)  # width of each level, in `width`; each after the first halves the space
    blocks: int = 1  # residual blocks a level
    latent: int = 16  # D: units where flat, else channels; with "fsq" the number of fsq_levels instead
    flat: bool = True  # one vector for the whole item; false: a map over space, for a second model
    bottleneck: Literal["gaussian", "vq", "fsq"] = "gaussian"
    codes: int = 512  # of the codebook (vq)
    decay: float = 0.99  # of the codebook's moving averages, a step (vq)
    revival: float = 0.1  # codes used less than this share of the mean are replaced (vq); 0: none
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)  # of each channel (fsq)
    conditional: bool = False  # encoder and decoder are told the label
    dropout: float = 0.0  # inside the residual blocks

    def __post_init__(self) -> None:
        positive(self, "patch", "width", "latent")
        within(self, 0.0, 0.99, "dropout", "decay", "revival")
        within(self, 2, 1 << 20, "codes")
        within(self, 0, 64, "blocks")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers = {list(self.multipliers)} must be whole numbers above 0, one a level")
        if not self.fsq_levels or min(self.fsq_levels) < 2 or math.prod(self.fsq_levels) > 1 << 20:
            raise UserError(f"fsq_levels = {list(self.fsq_levels)} must each be 2 or more, their product at most 2^20")
        if self.flat and self.bottleneck != "gaussian":
            raise UserError(f"bottleneck = {self.bottleneck!r} needs flat = false: its codes stand on a map")

    @property
    def factor(self) -> int:
        """Pixels a side of one position of the latent map."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.width * m for m in self.multipliers]


class ChannelNorm(LayerNorm):
    """Layer normalisation over the channels of each position."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, *S) -> (B, C, *S)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """x + conv(silu(conv(silu(norm(x))) + label)); it starts as the identity."""

    def __init__(self, width: int, dims: int, label: int, dropout: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.inner = CONVOLUTION[dims](width, width, 3, padding=1)
        self.outer = CONVOLUTION[dims](width, width, 3, padding=1)
        self.label = nn.Linear(label, width, bias=False) if label else None
        self.dropout = nn.Dropout(dropout)
        for p in self.outer.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:  # (B, C, *S), (B, E) -> (B, C, *S)
        hidden = self.inner(F.silu(self.norm(x)))
        if self.label is not None and label is not None:
            hidden = hidden + self.label(label)[(..., *[None] * (x.ndim - 2))]
        return x + self.outer(self.dropout(F.silu(hidden)))


class Encoder(nn.Module):
    """(B, C, *S) to (B, out, *s), or to (B, out) where flat."""

    def __init__(self, settings: Settings, channels: int, small: tuple[int, ...], out: int, label: int) -> None:
        super().__init__()
        s, dims, widths = settings, len(small), settings.widths
        self.stem = CONVOLUTION[dims](channels, widths[0], *_overlapping(s.patch))
        self.downs = nn.ModuleList(CONVOLUTION[dims](a, b, 2, 2) for a, b in pairwise(widths))
        self.levels = nn.ModuleList(_level(s, w, dims, label) for w in widths)
        self.norm = ChannelNorm(widths[-1])
        self.out = (nn.Linear(widths[-1] * math.prod(small), out) if s.flat
                    else CONVOLUTION[dims](widths[-1], out, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        x = self.stem(x)  # (B, C, *S / patch)
        for i, level in enumerate(self.levels):
            x = self.downs[i - 1](x) if i else x
            for block in level:  # type: ignore[attr-defined]
                x = block(x, label)
        x = F.silu(self.norm(x))  # (B, C, *s)
        return self.out(x.flatten(1) if isinstance(self.out, nn.Linear) else x)


class Decoder(nn.Module):
    """(B, D, *s), or (B, D) where flat, to (B, C, *S)."""

    def __init__(self, settings: Settings, channels: int, small: tuple[int, ...], latent: int, label: int) -> None:
        super().__init__()
        s, dims, widths = settings, len(small), settings.widths[::-1]
        self.small = (widths[0], *small)
        self.inner = (nn.Linear(latent, math.prod(self.small)) if s.flat
                      else CONVOLUTION[dims](latent, widths[0], 3, padding=1))
        self.levels = nn.ModuleList(_level(s, w, dims, label) for w in widths)
        self.ups = nn.ModuleList(TRANSPOSED[dims](a, b, 2, 2) for a, b in pairwise(widths))
        self.norm = ChannelNorm(widths[-1])
        self.head = TRANSPOSED[dims](widths[-1], channels, *_overlapping(s.patch))

    def forward(self, z: Tensor, label: Tensor | None) -> Tensor:
        x = self.inner(z)
        x = _channels_last(x.unflatten(1, self.small)) if isinstance(self.inner, nn.Linear) else x  # (B, C, *s)
        for i, level in enumerate(self.levels):
            x = self.ups[i - 1](x) if i else x
            for block in level:  # type: ignore[attr-defined]
                x = block(x, label)
        return self.head(F.silu(self.norm(x)))  # (B, C, *S)


class Autoencoder(nn.Module):
    """x (B, C, *S) to a latent of `latent_shape` per item, and back; S need not be a multiple of `factor`.

    `classes` is the number of labels where settings.conditional; the value `classes` itself says "no label".
    Raises UserError for a conditional network without labels.
    """

    exact = ("codebook.",)  # HalfPrecision leaves it alone: its gradients are sums of many vectors

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        assert 2 <= len(shape) <= 4, shape
        if settings.conditional and not classes:
            raise UserError("conditional = true needs data with labels: set it to false, or label the data")
        s = self.settings = settings
        self.shape, self.classes, self.factor = shape, classes, s.factor
        small = tuple(math.ceil(n / s.factor) for n in shape[1:])
        self.codebook = Codebook(s.codes, s.latent) if s.bottleneck == "vq" else None
        self.grid = FSQ(s.fsq_levels) if s.bottleneck == "fsq" else None
        width = len(s.fsq_levels) if s.bottleneck == "fsq" else s.latent
        self.latent_shape = (width,) if s.flat else (width, *small)
        label = s.width if s.conditional else 0
        self.embedding = nn.Embedding(classes + 1, label) if s.conditional else None
        self.encoder = Encoder(s, shape[0], small, width * (2 if s.bottleneck == "gaussian" else 1), label)
        self.decoder = Decoder(s, shape[0], small, width, label)
        self.scale = nn.Parameter(torch.zeros(()))  # of the pixels' distribution, see log_scale

    @property
    def log_scale(self) -> Tensor:
        """Log of the scale () of the pixels' distribution, for a likelihood that learns it; fp32."""
        return SCALE_SPEED * self.scale.float()

    @property
    def quantiser(self) -> Codebook | FSQ | None:
        return self.codebook or self.grid

    @property
    def vocabulary(self) -> int:
        """K, the number of codes; 0 with a Gaussian bottleneck."""
        return self.quantiser.size if self.quantiser is not None else 0

    def encode(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """x (B, C, *S) to the bottleneck's parameters, fp32: mean and log variance (B, 2, *latent_shape) of a
        Gaussian, or what is to be quantised (B, D, *s)."""
        assert x.shape[1:] == self.shape, (x.shape, self.shape)
        x = _channels_last(self._padded(x.to(self.scale.dtype)))
        z = self.encoder(x, self._label(x, condition)).float()
        if self.quantiser is not None:
            return z
        mean, log_variance = z.chunk(2, 1)
        return torch.stack((mean, log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)), 1)

    def decode(self, z: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """z (B, *latent_shape) to (B, C, *S), fp32: logits, or means of the pixels, as the likelihood reads them."""
        assert z.shape[1:] == self.latent_shape, (z.shape, self.latent_shape)
        z = _channels_last(z.to(self.scale.dtype))
        return self._cropped(self.decoder(z, self._label(z, condition))).float()

    def mean(self, x: Tensor, condition: dict[str, Tensor] | None = None) -> Tensor:
        """The latent (B, *latent_shape) that x is reconstructed from: the posterior's mean, or its codes' vectors."""
        z = self.encode(x, condition or {})
        return z[:, 0] if self.quantiser is None else self.quantise(z).vectors

    def images(self, z: Tensor, likelihood: str, condition: dict[str, Tensor] | None = None) -> Tensor:
        """The mean of the pixels (B, C, *S), in [-1, 1], that z (B, *latent_shape) says under `likelihood`."""
        output = self.decode(z, condition or {})
        return (output / 2).tanh() if likelihood == "bernoulli" else output.clamp(-1, 1)  # 2 sigmoid - 1 = tanh(. / 2)

    def quantise(self, z: Tensor) -> Quantised:
        """What the bottleneck makes of `encode`'s z (B, D, *s)."""
        assert self.quantiser is not None
        return self.quantiser(z)

    def lookup(self, codes: Tensor) -> Tensor:
        """The latent (B, D, *s) of codes (B, *s) int64."""
        assert self.quantiser is not None
        return self.quantiser.lookup(codes)

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that the loss needs, in one call. x (B, C, *S), noise (B, *latent_shape) standard normal.

        "output" (B, C, *S), "log_scale" (B,), and of a Gaussian "mean" and "log_variance" (B, *latent_shape), of codes
        "codes" (B, *s), "commitment" (B,) and "statistics" (B,), see Quantised.
        """
        z = self.encode(x, condition)
        if self.quantiser is not None:
            q = self.quantise(z)
            parts = {"codes": q.codes, "commitment": q.commitment, "statistics": q.statistics}
            z = q.vectors
        else:
            mean, log_variance = z.unbind(1)
            parts = {"mean": mean, "log_variance": log_variance}
            z = mean + (log_variance / 2).exp() * noise
        return parts | {"output": self.decode(z, condition), "log_scale": self.log_scale.expand(x.shape[0])}

    def flops_per_item(self) -> float:
        """Floating-point operations of a forward and backward pass over one item: 6 a weight and position."""
        total = 0.0

        def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            wide = inputs[0] if any(isinstance(module, kind) for kind in TRANSPOSED.values()) else output
            positions = wide[0, 0].numel() if wide.ndim > 2 else 1
            total += (4 if module is self.encoder.stem else 6) * module.weight.numel() * positions  # no grad x

        counted: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTION.values(), *TRANSPOSED.values())
        hooks = [m.register_forward_hook(count) for m in self.modules() if isinstance(m, counted)]
        with torch.no_grad():
            nothing = {name: torch.empty_like(p, device="meta") for name, p in [*self.named_parameters(),
                                                                                *self.named_buffers()]}
            x, noise = (torch.empty(1, *shape, device="meta") for shape in (self.shape, self.latent_shape))
            torch.func.functional_call(self, nothing, (x, noise, {}))
        for hook in hooks:
            hook.remove()
        search = 2 * self.vocabulary * math.prod(self.latent_shape) if self.codebook is not None else 0
        return total + search

    def _label(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor | None:  # (B, E)
        if self.embedding is None:
            return None
        label = condition.get("label")
        return self.embedding(x.new_full((x.shape[0],), self.classes, dtype=torch.int64) if label is None else label)

    def _margins(self) -> list[tuple[int, int]]:
        """Pixels before and after each dimension that make it a multiple of `factor`."""
        extra = [-n % self.factor for n in self.shape[1:]]
        return [(e // 2, e - e // 2) for e in extra]

    def _padded(self, x: Tensor) -> Tensor:
        margins = [m for pair in reversed(self._margins()) for m in pair]
        return F.pad(x, margins, mode="replicate") if any(margins) else x

    def _cropped(self, x: Tensor) -> Tensor:
        for dim, ((before, _), size) in enumerate(zip(self._margins(), self.shape[1:], strict=True), 2):
            x = x.narrow(dim, before, size)
        return x


def _level(settings: Settings, width: int, dims: int, label: int) -> nn.ModuleList:
    return nn.ModuleList(Block(width, dims, label, settings.dropout) for _ in range(settings.blocks))


def _overlapping(patch: int) -> tuple[int, int, int]:
    """Kernel, stride and padding that take n pixels to n / patch, each seeing past its own patch."""
    padding = max(1, patch // 2)
    return patch + 2 * padding, patch, padding


def _channels_last(x: Tensor) -> Tensor:
    """The same values with the channels of a position side by side in memory, as CPU convolutions like them."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if x.ndim in CHANNELS_LAST else x
