"""DCGAN: a convolutional generator and discriminator for 1, 2 or 3 space dimensions, alone or told a class.

Radford et al. 2016 (the architecture, and the start of its weights); Mirza & Osindero 2014 (a class for both);
Miyato et al. 2018 (spectral normalisation); Miyato & Koyama 2018 (the projection discriminator).

Every level halves or doubles the space with kernels 4 wide. `Settings(latent=100)` at 64 x 64 x 3 is the network as it
is usually built (3,576,704 and 2,765,568 parameters); width 128 and most 1024 give the generator of figure 1 (Radford).

B batch, Z width of the noise, E width of the label's embedding, C channels, *S space, *s the coarsest map, K classes;
in one convolution I channels of the finer map, O of the coarser.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.spatial import channels_last, group_deviation, rows
from handmill.recipe import not_negative, positive, within

DEVIATION = 0.02  # of the weights at the start (Radford et al. 2016, section 4)
SLOPE = 0.2  # of the leaky ReLU below 0
GAIN = 10.0  # of the deviation over a group: one number among thousands would be learned slowly
SMALLEST, LARGEST = 4, 7  # places a side of the first map, where the settings leave it open
KERNEL = 4  # places a side; with a stride of 2 and 1 place of padding, exactly half or twice the space
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Settings:
    """The [network] table of a DCGAN."""

    kind: Literal["dcgan"] = "dcgan"
    conditional: bool = False  # generator and discriminator are told the class
    latent: int = 128  # Z: normal numbers an image is made from
    width: int = 64  # channels of the finest maps; each coarser level has twice as many
    most: int = 512  # channels of any map, at most
    first: int = 0  # places on the shorter side of the generator's first map; 0: the halving of the image from 4 to 7
    norm: Literal["batch", "none"] = "batch"  # of the generator's maps
    discriminator_norm: Literal["batch", "spectral", "none"] = "batch"  # spectral: of its weights
    group: int = 0  # images over whose deviation the discriminator also judges, so that variety counts; 0: none
    momentum: float = 0.1  # share of a new batch in batch normalisation's running mean and variance
    label: Literal["projection", "embedding"] = "projection"  # to the discriminator: a term of the score, or an input
    label_width: int = 32  # E: numbers that a label becomes for the generator, and for an "embedding" discriminator

    def __post_init__(self) -> None:
        positive(self, "latent", "width", "most", "momentum", "label_width")
        not_negative(self, "first", "group")
        within(self, 0.0, 1.0, "momentum")
        if self.most < self.width:
            raise UserError(f"most = {self.most} is less than width = {self.width}: no map would be that wide")

    def halvings(self, space: Sequence[int]) -> int:
        """How often `space` is halved to come to the first map. Raises UserError where that does not come out."""
        short = min(space)
        ends = [self.first] if self.first else range(SMALLEST, LARGEST + 1)
        found = [n for n in range(1, short.bit_length()) for end in ends if end << n == short]
        if found and all(side % 2 ** found[0] == 0 for side in space):
            return found[0]
        shown, end = " x ".join(map(str, space)), self.first or f"{SMALLEST} to {LARGEST}"
        raise UserError(f"{shown} cannot be halved exactly until its shorter side is {end}: choose sides that are "
                        f"a power of two times {end}, for images by data.size, or a network.first that fits")

    def channels(self, halvings: int) -> list[int]:
        """Channels of the maps between image and code, the finest first."""
        return [min(self.most, self.width * 2**level) for level in range(halvings)]


class Convolution(nn.Module):
    """Half the space with O channels for I, or with `up` its transpose: twice the space with I channels for O.

    The weight (O, *4, I) has its channels last, as the maps do: no copy of it is turned around in every pass.
    """

    def __init__(self, fine: int, coarse: int, dims: int, bias: bool, up: bool = False) -> None:
        super().__init__()
        self.dims, self.up = dims, up
        self.weight = nn.Parameter(torch.empty(coarse, *[KERNEL] * dims, fine))
        self.bias = nn.Parameter(torch.zeros(fine if up else coarse)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (B, I, *S) -> (B, O, *S / 2), or back
        half = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if half and self.dims == 2 and not torch.compiler.is_compiling():
            parts = (0, self.weight, x) if self.up else (2, x, self.weight)
            y: Tensor = _Partial.apply(*parts)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias[:, None, None]
        convolve = (TRANSPOSED if self.up else CONVOLVE)[self.dims]
        return convolve(x, self.weight.movedim(-1, 1), self.bias, stride=2, padding=1)  # type: ignore[operator]


class BatchNorm(nn.Module):
    """Ioffe & Szegedy 2015, algorithms 1 and 2, over the batch and all places; weights and statistics in fp32."""

    def __init__(self, channels: int, momentum: float, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.momentum, self.epsilon = momentum, epsilon

    def forward(self, x: Tensor) -> Tensor:  # (B, C, *S) -> (B, C, *S)
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias,  # type: ignore[arg-type]
                            self.training, self.momentum, self.epsilon)


class Spectral(nn.Module):
    """A layer whose weight W is divided by its largest singular value sigma (Miyato et al. 2018, algorithm 1).

    One power iteration a training pass, in fp32; the gradient passes through sigma = u^T W v, not through u and v.
    """

    u: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("u", F.normalize(torch.randn(_weight(layer).shape[0]), dim=0))

    def sigma(self) -> Tensor:
        """The estimate () of W's largest singular value, W seen as outputs x all that an output reads."""
        matrix = _weight(self.layer).flatten(1)
        with torch.no_grad():
            u = self.u
            v = F.normalize(matrix.mT @ u, dim=0)
            if self.training:
                u = F.normalize(matrix @ v, dim=0)
                self.u.copy_(u)
        return u @ (matrix @ v)

    def forward(self, x: Tensor) -> Tensor:
        weight = _weight(self.layer) / self.sigma()
        if x.is_floating_point():
            weight = weight.to(x.dtype)
        return torch.func.functional_call(self.layer, {"weight": weight}, (x,))


class Generator(nn.Module):
    """Noise and a label to images, through `layers` = 1 style w: the noise with the label's embedding behind it.

    `shape` is (C, *S) of one image, with 1 to 3 space dimensions; `classes` K, 0 for data without labels. Every
    condition must then hold "label" (B,) int64 below K. Raises UserError for a space that the settings do not halve.
    """

    layers = 1
    noise_shape = (0,)
    exact = ("norms.",)  # HalfPrecision leaves these in fp32

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        assert 2 <= len(shape) <= 4, shape
        s, self.settings, self.shape, self.classes = settings, settings, tuple(shape), classes
        self.latent_shape = (s.latent,)
        halvings, bias = s.halvings(shape[1:]), s.norm == "none"
        channels = s.channels(halvings)[::-1]
        self.small = (channels[0], *(side >> halvings for side in shape[1:]))
        self.embedding = nn.Embedding(classes, s.label_width) if classes else None
        self.dense = nn.Linear(s.latent + (s.label_width if classes else 0), math.prod(self.small), bias=bias)
        self.norms = nn.ModuleList(_norm(s.norm, width, s.momentum) for width in channels)
        self.ups = nn.ModuleList(Convolution(b, a, len(shape) - 1, bias, up=True)
                                 for a, b in pairwise([*channels, shape[0]]))
        for layer in (self.dense, *self.ups):
            _start(layer, s.norm)

    def map(self, z: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """z (B, Z), standard normal, to the style w (B, 1, Z + E), fp32."""
        assert z.shape[1:] == self.latent_shape, (z.shape, self.latent_shape)
        if self.embedding is not None:
            z = torch.cat((z, self.embedding(condition["label"]).to(z.dtype)), 1)
        return z[:, None]

    def truncated(self, w: Tensor, condition: dict[str, Tensor], psi: float | Tensor) -> Tensor:
        """w (B, 1, Z + E) with its noise moved to psi times its distance from the centre, 0; the label stays."""
        z, label = w.split((self.settings.latent, w.shape[2] - self.settings.latent), 2)
        return torch.cat((psi * z, label), 2)

    def render(self, w: Tensor, noise: Tensor) -> Tensor:
        """The images (B, C, *S) of styles w (B, 1, Z + E), fp32, in [-1, 1]; noise (B, 0) is not used."""
        assert w.shape[1] == 1, w.shape
        x = self.dense(w[:, 0].to(self.dense.weight.dtype))
        x = channels_last(x.unflatten(1, self.small))  # (B, C', *s)
        for norm, up in zip(self.norms, self.ups, strict=True):
            x = up(F.relu_(norm(x)))
        return x.float().tanh()  # (B, C, *S)

    def forward(self, z: Tensor, condition: dict[str, Tensor], noise: Tensor, second: Tensor | None = None,
                cut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, *S) and the style (B, 1, Z + E) they were rendered from; one style is not mixed."""
        assert second is None
        w = self.map(z, condition)
        return self.render(w, noise), w

    def flops_per_item(self) -> float:
        """Floating-point operations of a forward and backward pass over one item: 6 a weight and position."""
        return _flops(self.dense, self.ups, self.small[1:])


class Discriminator(nn.Module):
    """Images (B, C, *S) in [-1, 1] to scores (B,), fp32, above 0 for what it takes for real.

    Arguments and errors as the Generator's. Where there are classes, `settings.label` says how it is told:
    "projection", score = head(h) + <embedding of the label, mean of h over places> (Miyato & Koyama 2018, eq. 4, with
    the mean for the sum, which Adam would learn as many times as fast as there are places), or
    "embedding", a linear map of the label's embedding added to every place of the first convolution's output
    (Mirza & Osindero 2014, section 3: inputs and label meet in one hidden representation).
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        assert 2 <= len(shape) <= 4, shape
        s, self.settings, self.shape, self.classes = settings, settings, tuple(shape), classes
        halvings, norm = s.halvings(shape[1:]), s.discriminator_norm
        channels, bias = s.channels(halvings), norm != "batch"
        self.small = tuple(side >> halvings for side in shape[1:])
        self.downs = nn.ModuleList(_layer(Convolution(a, b, len(shape) - 1, bias), norm)
                                   for a, b in pairwise([shape[0], *channels]))
        self.norms = nn.ModuleList(_norm(norm if level else "none", width, s.momentum)
                                   for level, width in enumerate(channels))
        self.head = _layer(nn.Linear(channels[-1] * math.prod(self.small) + bool(s.group), 1, bias=bias), norm)
        self.embedding = self.joint = self.projection = None
        if classes and s.label == "embedding":
            self.embedding = nn.Embedding(classes, s.label_width)
            self.joint = _layer(nn.Linear(s.label_width, channels[0], bias=False), norm)
        elif classes:
            self.projection = _layer(nn.Embedding(classes, channels[-1]), norm)
        self.exact = ("norms.", "head.", "embedding.", "joint.", "projection.",
                      *(f"downs.{level}.layer.weight" for level in range(halvings)))

    def forward(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x.shape[1:] == self.shape, (x.shape, self.shape)
        h = channels_last(x.to(self._dtype()))
        for level, (down, norm) in enumerate(zip(self.downs, self.norms, strict=True)):
            h = down(h)
            if level == 0 and self.joint is not None:
                label = self.joint(self.embedding(condition["label"]))  # type: ignore[misc]
                h = h + label.to(h.dtype)[(..., *[None] * len(self.small))]  # (B, C', *S / 2)
            h = F.leaky_relu_(norm(h), SLOPE)
        h = h.float()  # (B, C', *s)
        seen = h.flatten(1)
        if self.settings.group:
            seen = torch.cat((seen, GAIN * group_deviation(h, self.settings.group)[:, None]), 1)
        score = self.head(seen)[:, 0]
        if self.projection is None:
            return score
        return score + (self.projection(condition["label"]) * h.flatten(2).mean(2)).sum(1)

    def flops_per_item(self) -> float:
        """Floating-point operations of a forward and backward pass over one item: 6 a weight and position."""
        convolutions = [getattr(down, "layer", down) for down in self.downs]
        return _flops(getattr(self.head, "layer", self.head), convolutions[::-1], self.small)

    def _dtype(self) -> torch.dtype:
        """What the convolutions compute in: HalfPrecision casts their weights, or their biases where W is exact."""
        first = self.downs[0]
        return first.layer.bias.dtype if isinstance(first, Spectral) else first.weight.dtype  # type: ignore


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor), layer
    return layer.weight


def _norm(kind: str, channels: int, momentum: float) -> nn.Module:
    return BatchNorm(channels, momentum) if kind == "batch" else nn.Identity()


def _layer(layer: nn.Module, norm: str) -> nn.Module:
    """A layer of the discriminator at its start, and normalised where `norm` is of weights."""
    _start(layer, norm)
    return Spectral(layer) if norm == "spectral" else layer


def _start(layer: nn.Module, norm: str) -> None:
    """Deviation 0.02, or where nothing sets the scale of the maps He et al. 2015, eq. 10; biases 0."""
    weight, bias = _weight(layer), getattr(layer, "bias", None)
    up = isinstance(layer, Convolution) and layer.up
    read = weight.shape[0] * 2 ** (weight.ndim - 2) if up else weight[0].numel()  # numbers that an output is made of
    nn.init.normal_(weight, std=DEVIATION if norm != "none" else (2 / read) ** 0.5)
    if bias is not None:
        nn.init.zeros_(bias)


def _flops(dense: nn.Module, convolutions: Iterable[nn.Module], small: tuple[int, ...]) -> float:
    """6 a weight and position; the convolutions in order from the coarsest, between maps of twice the side each."""
    total, places = float(_weight(dense).numel()), math.prod(small)
    for convolution in convolutions:
        total += _weight(convolution).numel() * places
        places *= 2 ** len(small)
    return 6 * total


class _Partial(torch.autograd.Function):
    """The derivative of t = <down(x, W), y> by its `missing` argument, down the halving convolution of maps (H, W) in
    bf16 on a CPU: by y that convolution, by x its transpose, by W the gradient of the weight. t is linear in each, so
    the derivatives of these three are again these three.

    Two are matrix products: oneDNN's convolution takes twice as long for W (512 channels at 4 x 4, batch 16).
    """

    @staticmethod
    def forward(ctx: Any, missing: int, first: Tensor, second: Tensor) -> Tensor:
        ctx.missing = missing
        ctx.save_for_backward(first, second)
        return (_by_x, _by_weight, _by_y)[missing](first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = list(ctx.saved_tensors)
        parts.insert(ctx.missing, grad)  # x, W, y
        places = [i for i in range(3) if i != ctx.missing]
        return None, *(_Partial.apply(i, *parts[:i], *parts[i + 1:]) if needed else None  # type: ignore[no-untyped-call]
                       for i, needed in zip(places, ctx.needs_input_grad[1:], strict=True))


def _windows(x: Tensor) -> Tensor:
    """What each place of the coarser map reads: (B, I, H, W) -> (B * H / 2 * W / 2, 16 I)."""
    x = F.pad(x, (1, 1, 1, 1)).movedim(1, -1).unfold(1, KERNEL, 2).unfold(2, KERNEL, 2)  # (B, H / 2, W / 2, I, 4, 4)
    return x.movedim(3, -1).flatten(3).flatten(0, 2)


def _by_x(weight: Tensor, y: Tensor) -> Tensor:  # (O, 4, 4, I), (B, O, H / 2, W / 2) -> (B, I, H, W)
    return F.conv_transpose2d(y, weight.movedim(-1, 1), stride=2, padding=1)


def _by_weight(x: Tensor, y: Tensor) -> Tensor:  # (B, I, H, W), (B, O, H / 2, W / 2) -> (O, 4, 4, I)
    return (rows(y).flatten(0, 1).mT @ _windows(x)).unflatten(1, (KERNEL, KERNEL, -1))


def _by_y(x: Tensor, weight: Tensor) -> Tensor:  # (B, I, H, W), (O, 4, 4, I) -> (B, O, H / 2, W / 2)
    y = torch.empty(x.shape[0], weight.shape[0], x.shape[2] // 2, x.shape[3] // 2, dtype=x.dtype, device=x.device,
                    memory_format=torch.channels_last)  # not a view, which could not be changed in place
    torch.mm(_windows(x), weight.flatten(1).mT, out=rows(y).flatten(0, 1))
    return y
