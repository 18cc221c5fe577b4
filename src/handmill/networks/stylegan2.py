"""StyleGAN2: a generator steered by styles at every layer, and a residual discriminator, for 2-D images.

Karras et al. 2019 (mapping network, styles, noise at every layer, style mixing, truncation); Karras et al. 2020a
(StyleGAN2: modulation and demodulation of weights, skip generator, residual discriminator); Karras et al. 2020b (ADA:
conditioning on labels); Karras et al. 2018 (equalised learning rates, minibatch standard deviation); Miyato & Koyama
2018 (projection).

A convolution whose weights differ for every item is computed as one with shared weights: the style scales its input
channels, the demodulation its output channels (2020a, end of section 2.2). Maps keep their channels last in memory.

B batch, C channels, H x W space, Z latent, W style, L styles an image, P numbers of noise, K classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.errors import UserError
from handmill.networks.resampling import blur, upsample
from handmill.networks.spatial import channels_last, group_deviation
from handmill.recipe import not_negative, positive, within

SLOPE = 0.2  # of the leaky ReLU below 0
GAIN = math.sqrt(2)  # keeps the variance through the leaky ReLU, about
LARGEST_FIRST = 7  # side of the coarsest map when it is chosen from the image's; the smallest is 4
TINY = 1e-8


@dataclass(frozen=True)
class Settings:
    """The [network] table of a StyleGAN2: its generator and its discriminator."""

    kind: Literal["stylegan2"] = "stylegan2"
    conditional: bool = False  # generator and discriminator are told the class
    latent: int = 128  # Z: numbers that an image is made from
    style: int = 128  # W: width of a style and of the mapping network
    mapping: int = 4  # layers from latent to style
    mapping_rate: float = 0.01  # learning rate of the mapping network as a share of everything else's
    width: int = 32  # channels of the generator at the image's size, doubling whenever the size halves
    most: int = 256  # channels of any layer, at most
    first: int = 0  # places along the shorter side of the coarsest map; 0: 4 to 7, as the image's side has it
    noise: bool = True  # fresh noise at every layer, for detail that no style should have to carry
    style_average: float = 0.995  # decay, a step, of the average style that truncation pulls towards
    discriminator_width: int = 32  # channels of the discriminator at the image's size
    group: int = 4  # images whose standard deviation the discriminator sees, at most

    def __post_init__(self) -> None:
        positive(self, "latent", "style", "mapping", "mapping_rate", "width", "most", "discriminator_width", "group")
        not_negative(self, "first")
        within(self, 0.0, 1.0, "style_average")


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, up: bool = False,
                   gain: float = 1.0) -> Tensor:
    """Convolution with weights of its own for every item (Karras et al. 2020a, eq. 1 and 3), times `gain`.

    x (B, C, H, W), weight (C', C, k, k) with odd k, style (B, C) -> (B, C', H, W) in x's dtype; with `up` (B, C', 2 H,
    2 W), by a transposed convolution of stride 2 and the [1, 3, 3, 1] filter (k = 3). The item's weights are weight *
    style, scaled to a norm of 1 for every output channel where `demodulate`.
    """
    if demodulate:
        square = wide(weight).square().sum((2, 3))  # (C', C)
        scale = gain * torch.rsqrt(style.square() @ square.T + TINY)  # (B, C')
    else:
        style = gain * style
    x = x * spread(style, x)
    if up:
        assert weight.shape[2] == 3, weight.shape
        x = blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, gain=4.0)  # (B, C', 2 H, 2 W)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    return x * spread(scale, x) if demodulate else x


class Dense(nn.Module):
    """weight x + bias with an equalised learning rate: weights start as N(0, 1), scaled as they are used.

    With `rate` they learn at that share of the others' rate.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.rate, self.scale = rate, rate * inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:  # (B, C) -> (B, C')
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)

    def flops(self) -> int:
        return 2 * self.weight.numel()


class Mapping(nn.Module):
    """The latent, and the label's embedding beside it, both normalised, through dense layers: a style (B, W)."""

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        s = settings
        self.embedding = nn.Embedding(classes, s.style) if classes else None
        inputs = [s.latent + (s.style if classes else 0), *[s.style] * (s.mapping - 1)]
        self.dense = nn.ModuleList(Dense(n, s.style, rate=s.mapping_rate) for n in inputs)

    def forward(self, z: Tensor, condition: dict[str, Tensor]) -> Tensor:  # (B, Z) -> (B, W)
        x = normalised(wide(z))
        if self.embedding is not None:
            x = torch.cat((x, normalised(self.embedding(condition["label"]))), -1)
        for dense in self.dense:
            x = GAIN * F.leaky_relu(dense(x), SLOPE)
        return x


class Modulated(nn.Module):
    """A modulated convolution whose input channels a style scales, with a bias.

    The scale of the equalised learning rate rides on the style: the same product on far fewer numbers.
    """

    def __init__(self, settings: Settings, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.style = Dense(settings.style, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = (inputs * kernel * kernel) ** -0.5


class Layer(Modulated):
    """Modulated convolution, noise, leaky ReLU; with `up`, to twice the size. `space` is that of its output."""

    def __init__(self, settings: Settings, inputs: int, outputs: int, space: tuple[int, int], up: bool) -> None:
        super().__init__(settings, inputs, outputs, 3)
        self.space, self.up = space, up
        self.strength = nn.Parameter(torch.zeros(())) if settings.noise else None

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:  # (B, C, H, W), (B, W), (B, H' W')
        y = modulated_conv(x, self.weight, self.style(w) * self.scale, up=self.up, gain=GAIN)  # (B, C', H', W')
        if self.strength is not None:
            y = y + noise.to(y.dtype).view(-1, 1, *self.space) * (GAIN * self.strength)
        return F.leaky_relu(y + (GAIN * self.bias)[:, None, None], SLOPE)

    def flops(self) -> int:
        return 2 * self.weight.numel() * math.prod(self.space) // (4 if self.up else 1)


class Colours(Modulated):
    """A map to what it adds to the image, in fp32: 1 x 1, not demodulated."""

    def __init__(self, settings: Settings, inputs: int, channels: int, space: tuple[int, int]) -> None:
        super().__init__(settings, inputs, channels, 1)
        self.places = math.prod(space)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # (B, C, H, W), (B, W) -> (B, channels, H, W)
        y = modulated_conv(x, self.weight, self.style(w) * self.scale, demodulate=False)
        return wide(y + self.bias[:, None, None])

    def flops(self) -> int:
        return 2 * self.weight.numel() * self.places


class Generator(nn.Module):
    """Latents (B, Z), labels and noise (B, P) to images (B, C, H, W), about [-1, 1].

    `shape` is (C, H, W); `condition["label"]` (B,) int64 in 0..classes-1 where there are classes. Raises UserError
    where the shape does not fit the settings.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.settings, self.shape, self.classes = settings, tuple(shape), classes
        spaces = pyramid(shape, settings.first)
        channels = widths(settings.width, settings.most, len(spaces))
        self.mapping = Mapping(settings, classes)
        self.constant = nn.Parameter(torch.randn(1, channels[0], *spaces[0]))
        self.convolutions, self.colours = nn.ModuleList(), nn.ModuleList()
        for level, (space, outputs) in enumerate(zip(spaces, channels, strict=True)):
            if level:
                self.convolutions.append(Layer(settings, channels[level - 1], outputs, space, up=True))
            self.convolutions.append(Layer(settings, outputs, outputs, space, up=False))
            self.colours.append(Colours(settings, outputs, shape[0], space))
        self.layers = len(self.convolutions) + 1  # L: a colour takes the style of the convolution after it
        self.latent_shape = (settings.latent,)
        self.places = [math.prod(m.space) for m in self.convolutions if isinstance(m, Layer) and settings.noise]
        self.noise_shape = (sum(self.places),)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(max(1, classes), settings.style))  # (K, W)
        self.exact = ("mapping.", *(f"{n}.style." for n, m in self.named_modules() if isinstance(m, Modulated)))

    def map(self, z: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The same style for every layer: (B, Z) -> (B, L, W)."""
        assert z.shape[1:] == self.latent_shape, (z.shape, self.latent_shape)
        return self.mapping(z, condition)[:, None].expand(-1, self.layers, -1)

    def truncated(self, w: Tensor, condition: dict[str, Tensor], psi: float | Tensor) -> Tensor:
        """centre + psi (w - centre), the centre of the item's class: (B, L, W). psi: one number, or one an item."""
        centre = self.centre[condition["label"]] if self.classes else self.centre  # (B, W) or (1, W)
        psi = psi.reshape(-1, 1, 1) if isinstance(psi, Tensor) else psi
        return centre[:, None] + psi * (w - centre[:, None])

    def render(self, w: Tensor, noise: Tensor) -> Tensor:
        """Styles (B, L, W) and noise (B, P) to images (B, C, H, W) in fp32."""
        assert w.shape[1:] == (self.layers, self.settings.style), w.shape
        assert noise.shape[1:] == self.noise_shape, (noise.shape, self.noise_shape)
        noises = noise.split(self.places, 1) if self.places else [noise] * len(self.convolutions)
        x = channels_last(self.constant.expand(w.shape[0], -1, -1, -1))  # (B, C, h, w)
        x = self.convolutions[0](x, w[:, 0], noises[0])
        image = self.colours[0](x, w[:, 1])
        for level in range(1, len(self.colours)):
            for i in (2 * level - 1, 2 * level):
                x = self.convolutions[i](x, w[:, i], noises[i])
            image = upsample(image) + self.colours[level](x, w[:, 2 * level + 1])
        return image

    def forward(self, z: Tensor, condition: dict[str, Tensor], noise: Tensor, second: Tensor | None = None,
                cut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and the styles (B, L, W) they were made from; layers from `cut` (B,) int64 on take those of `second`.

        In training mode the centre follows the styles.
        """
        w = self.map(z, condition)
        if self.training:
            self._follow(w[:, 0].detach(), condition)
        if second is not None:
            assert cut is not None
            later = torch.arange(self.layers, device=w.device) >= cut[:, None]  # (B, L)
            w = torch.where(later[..., None], self.map(second, condition), w)
        return self.render(w, noise), w

    def flops_per_item(self) -> float:
        """Floating-point operations of training on one image: three forward passes' worth."""
        return 3.0 * sum(m.flops() for m in self.modules() if isinstance(m, Dense | Layer | Colours))

    @torch.no_grad()
    def _follow(self, w: Tensor, condition: dict[str, Tensor]) -> None:  # (B, W)
        """centre += (1 - decay) (mean style of the batch's items of the class - centre)."""
        label = condition["label"] if self.classes else torch.zeros_like(w[:, 0], dtype=torch.int64)
        member = (label[:, None] == torch.arange(len(self.centre), device=w.device)).to(w.dtype)  # (B, K)
        count = member.sum(0)[:, None]  # (K, 1)
        mean = member.T @ w / count.clamp(min=1)  # (K, W)
        self.centre.lerp_(mean.to(self.centre.dtype), (1 - self.settings.style_average) * count.clamp(max=1))


class Convolution(nn.Module):
    """Convolution with an equalised learning rate; with `down` the [1, 3, 3, 1] filter and stride 2. Times `gain`.

    `space` is that of its output.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, space: tuple[int, int], bias: bool = True,
                 down: bool = False, gain: float = GAIN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.gain = gain * (inputs * kernel * kernel) ** -0.5, gain
        self.down, self.places = down, math.prod(space)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W) or (B, C', H / 2, W / 2)
        weight, bias = self.weight * self.scale, None if self.bias is None else self.bias * self.gain
        half = weight.shape[2] // 2
        if self.down:
            return F.conv2d(blur(x, 1 + half), weight, bias, stride=2)
        return F.conv2d(x, weight, bias, padding=half)

    def flops(self) -> int:
        return 2 * self.weight.numel() * self.places


class Block(nn.Module):
    """Two convolutions, the second to half the size, beside a 1 x 1 convolution to half the size; `space` is half."""

    def __init__(self, inputs: int, outputs: int, space: tuple[int, int]) -> None:
        super().__init__()
        self.same = Convolution(inputs, inputs, 3, (2 * space[0], 2 * space[1]))
        self.smaller = Convolution(inputs, outputs, 3, space, down=True, gain=1.0)  # sqrt(2), by the sum's 1 / sqrt(2)
        self.skip = Convolution(inputs, outputs, 1, space, bias=False, down=True, gain=1 / math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / 2, W / 2)
        y = F.leaky_relu(self.same(x), SLOPE)
        return self.skip(x) + F.leaky_relu(self.smaller(y), SLOPE)


class Discriminator(nn.Module):
    """Images (B, C, H, W) and labels to scores (B,) fp32, above 0 where an image is taken for real.

    `shape` is (C, H, W). Raises UserError where it does not fit the settings.
    """

    exact = ("embedding.", "score.")

    def __init__(self, settings: Settings, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.settings, self.shape, self.classes = settings, tuple(shape), classes
        spaces = pyramid(shape, settings.first)[::-1]
        channels = widths(settings.discriminator_width, settings.most, len(spaces))[::-1]
        last = channels[-1]
        self.colours = Convolution(shape[0], channels[0], 1, spaces[0])
        self.blocks = nn.ModuleList(map(Block, channels, channels[1:], spaces[1:]))
        self.last = Convolution(last + 1, last, 3, spaces[-1])
        self.dense = Dense(last * math.prod(spaces[-1]), last)
        self.score = Dense(last, last if classes else 1)
        self.embedding = nn.Embedding(classes, last) if classes else None

    def forward(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:  # (B, C, H, W) -> (B,)
        assert x.shape[1:] == self.shape, (x.shape, self.shape)
        h = channels_last(x.to(self.colours.weight.dtype))
        h = F.leaky_relu(self.colours(h), SLOPE)
        for block in self.blocks:
            h = block(h)
        h = with_deviation(h, self.settings.group)
        h = F.leaky_relu(self.last(h), SLOPE)
        h = GAIN * F.leaky_relu(self.dense(h.flatten(1)), SLOPE)  # (B, C)
        scores = self.score(h.to(self.score.weight.dtype))
        if self.embedding is None:
            return scores[:, 0]
        label = normalised(self.embedding(condition["label"]))  # (B, C)
        return (scores * label).sum(1) * label.shape[1] ** -0.5

    def flops_per_item(self) -> float:
        """Floating-point operations of training on one image: three forward passes' worth."""
        return 3.0 * sum(m.flops() for m in self.modules() if isinstance(m, Dense | Convolution))


def pyramid(shape: tuple[int, ...], first: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of the maps, coarse to fine, each twice the one before, the last that of the image (C, H, W).

    The coarsest is `first` along its shorter side; with 0, as many halvings as leave 4 or more. Raises UserError where
    no such sizes exist.
    """
    if len(shape) != 3:
        raise UserError(f"the network stylegan2 makes pictures of (channels, height, width), not {tuple(shape)}: "
                        'choose another network, such as network.kind = "dcgan"')
    spaces, remedy = [(shape[1], shape[2])], f"prepare images whose sides are {first or '4 to 7'} times 2, 4, 8, ..."
    while not any(side % 2 for side in spaces[0]) and min(spaces[0]) // 2 >= (first or 4):
        spaces.insert(0, (spaces[0][0] // 2, spaces[0][1] // 2))
    side = min(spaces[0])
    if len(spaces) == 1:
        raise UserError(f"images of {shape[1]} x {shape[2]} cannot be halved for network.first = {first}: {remedy}")
    if side != first if first else side > LARGEST_FIRST:
        raise UserError(f"images of {shape[1]} x {shape[2]} halve to {side} and do not fit network.first = {first}: "
                        f"{remedy}, or set network.first = {side}")
    return spaces


def widths(width: int, most: int, levels: int) -> list[int]:
    """Channels of each level, coarse to fine."""
    return [min(most, width << level) for level in reversed(range(levels))]


def with_deviation(x: Tensor, group: int) -> Tensor:
    """A channel more: the standard deviation over a group of neighbours in the batch, averaged over channels and places
    (Karras et al. 2018, section 3). (B, C, H, W) -> (B, C + 1, H, W), groups of the largest divisor of B up to `group`.
    """
    column = group_deviation(wide(x), group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat((x, column.to(x.dtype)), 1)


def normalised(x: Tensor) -> Tensor:
    """x over the root of its mean square: (B, C) -> (B, C)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + TINY)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """One number a channel over space, in the dtype of `like`: (B, C) -> (B, C, 1, 1)."""
    return x.to(like.dtype)[:, :, None, None]


def wide(x: Tensor) -> Tensor:
    """In fp32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
