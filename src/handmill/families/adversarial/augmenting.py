"""Adaptive discriminator augmentation: the discriminator sees real and generated images only after random changes.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (section 2 and appendix C). Each
change meets an image with probability p. A mixture of changed and unchanged images tells which distribution the
unchanged ones had, so that the generator learns clean images; p follows how surely the discriminator knows real ones.

Blits and geometry compose into one affine matrix an image and one bilinear reading with mirrored edges; an image that
only blits meet is copied pixel by pixel. Colours compose into one 4 x 4 matrix.

B batch, C channels, H height, W width, n numbers of one change.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from handmill.errors import UserError

BLIT = ("flip", "rotate90", "shift")
GEOMETRY = ("scale", "rotate", "stretch", "slide")
COLOUR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
OPERATIONS = BLIT + GEOMETRY + COLOUR
GREY = ("brightness", "contrast")  # the colours that mean something to other than three channels

SHIFT = 1 / 8  # of the side: the farthest whole-pixel shift
SLIDE = 1 / 8  # of the side: standard deviation
SCALE = 0.2  # standard deviation of a scale's log2; of a stretch's too
BRIGHTNESS = 0.2  # standard deviation, pixels in [-1, 1]
CONTRAST = 0.5  # standard deviation of the log2
SATURATION = 1.0  # standard deviation of the log2
EVERY = 4  # calls between two adaptations of p
TURNS = ("rotate", "rotate again")  # before and after the stretch: together they make any direction of it

Entries = dict[tuple[int, int], Tensor]  # what differs from the unit matrix, each (B,)
Size = tuple[int, int]  # height and width


def _flip(u: Tensor, size: Size) -> Entries:
    return {(0, 0): torch.where(u[:, 0] < 0.5, 1.0, -1.0)}


def _rotate90(u: Tensor, size: Size) -> Entries:
    quarters = (4 * u[:, 0]).floor()
    return _turned((quarters - 2).abs() - 1, 1 - (quarters - 1).abs())


def _shift(u: Tensor, size: Size) -> Entries:
    height, width = size
    x, y = (SHIFT * (2 * u - 1)).unbind(1)
    return {(0, 2): (width * x).round(), (1, 2): (height * y).round()}


def _scale(u: Tensor, size: Size) -> Entries:
    s = _log_normal(u[:, 0], SCALE)
    return {(0, 0): s, (1, 1): s}


def _rotate(u: Tensor, size: Size) -> Entries:
    angle = math.pi * (2 * u[:, 0] - 1)
    return _turned(angle.cos(), angle.sin())


def _stretch(u: Tensor, size: Size) -> Entries:
    s = _log_normal(u[:, 0], SCALE)
    return {(0, 0): s, (1, 1): 1 / s}


def _slide(u: Tensor, size: Size) -> Entries:
    height, width = size
    x, y = (SLIDE * _normal(u)).unbind(1)
    return {(0, 2): width * x, (1, 2): height * y}


def _turned(cos: Tensor, sin: Tensor) -> Entries:
    """Anticlockwise as seen: x points right and y down."""
    return {(0, 0): cos, (0, 1): sin, (1, 0): -sin, (1, 1): cos}


def _brightness(u: Tensor, size: Size) -> Entries:
    b = BRIGHTNESS * _normal(u[:, 0])
    return {(0, 3): b, (1, 3): b, (2, 3): b}


def _contrast(u: Tensor, size: Size) -> Entries:
    c = _log_normal(u[:, 0], CONTRAST)
    return {(0, 0): c, (1, 1): c, (2, 2): c}


def _luma_flip(u: Tensor, size: Size) -> Entries:
    """I - 2 v v^T or I, v the unit vector of grey."""
    third = torch.where(u[:, 0] < 0.5, 0.0, -2 / 3)
    return _circulant(1 + third, third, third)


def _hue(u: Tensor, size: Size) -> Entries:
    """Any turn about grey (Rodrigues)."""
    angle = math.pi * (2 * u[:, 0] - 1)
    grey, side = (1 - angle.cos()) / 3, angle.sin() / math.sqrt(3)
    return _circulant(angle.cos() + grey, grey - side, grey + side)


def _saturation(u: Tensor, size: Size) -> Entries:
    """v v^T + s (I - v v^T): grey stays, what differs from it is multiplied by s."""
    s = _log_normal(u[:, 0], SATURATION)
    return _circulant(s + (1 - s) / 3, (1 - s) / 3, (1 - s) / 3)


def _circulant(*row: Tensor) -> Entries:
    """The 3 x 3 matrix whose every row is the one above moved right: what treats red, green and blue alike."""
    return {(i, (i + j) % 3): row[j] for i in range(3) for j in range(3)}


def _log_normal(u: Tensor, sigma: float) -> Tensor:
    return torch.exp2(sigma * _normal(u))


def _normal(u: Tensor) -> Tensor:
    """The normal quantile of u in [0, 1); the clamp keeps u = 0 finite (5.2 standard deviations)."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 2**-22, 1 - 2**-22))


# name: (numbers it takes beside its gate, its matrix), in the order of application (appendix C)
STEPS: dict[str, tuple[int, Callable[[Tensor, Size], Entries]]] = {
    "flip": (1, _flip), "rotate90": (1, _rotate90), "shift": (2, _shift),
    "scale": (1, _scale), "rotate": (1, _rotate), "stretch": (1, _stretch), "rotate again": (1, _rotate),
    "slide": (2, _slide),
    "brightness": (1, _brightness), "contrast": (1, _contrast), "luma_flip": (1, _luma_flip), "hue": (1, _hue),
    "saturation": (1, _saturation),
}
DRAWS: int = sum(1 + n for n, _ in STEPS.values())  # uniform numbers an image
# an image's numbers keep their place whatever operations are asked for
PLACES = {name: sum(1 + n for n, _ in list(STEPS.values())[:i]) for i, name in enumerate(STEPS)}


def steps(operations: tuple[str, ...], group: tuple[str, ...]) -> list[str]:
    """The steps of those `operations` that are in `group`, in order; "rotate" is two.

    Raises UserError for an operation there is not.
    """
    if unknown := [name for name in operations if name not in OPERATIONS]:
        raise UserError(f"augmentation {unknown[0]!r} is not known: take from {', '.join(OPERATIONS)}")
    wanted = [name for name in operations if name in group]
    return [name for name in STEPS if name in wanted or (name == TURNS[1] and TURNS[0] in wanted)]


def drawn(p: Tensor, draws: Tensor, step: str) -> tuple[Tensor, Tensor]:
    """Whether `step` meets each image (B,), and its numbers (B, n). Either turn alone has p_rot = 1 - sqrt(1 - p)."""
    first, count = PLACES[step], STEPS[step][0]
    chance = 1 - (1 - p).sqrt() if step in TURNS else p
    return draws[:, first] < chance, draws[:, first + 1:first + 1 + count]


def matrices(p: Tensor, draws: Tensor, operations: tuple[str, ...], size: Size) -> tuple[Tensor, Tensor]:
    """The affine matrices (B, 3, 3) and the colour matrices (B, 4, 4) that p () and draws (B, DRAWS) choose.

    An affine matrix takes (x, y, 1), pixels right and down from the centre, to where that place goes; a colour matrix
    takes (red, green, blue, 1). `size` is (H, W).
    """
    return (_composed(p, draws, steps(operations, BLIT + GEOMETRY), size, 3),
            _composed(p, draws, steps(operations, COLOUR), size, 4))


def augmented(x: Tensor, p: Tensor, draws: Tensor, operations: tuple[str, ...]) -> Tensor:
    """x (B, C, H, W), pixels in [-1, 1], after those `operations` that p () and draws (B, DRAWS) in [0, 1) choose.

    Differentiable in x any number of times. An image that nothing meets comes back bit for bit. Colours other than
    brightness and contrast are left out unless C = 3.
    Raises UserError for an unknown operation, and for rotate90 of images that are not square.
    """
    assert x.dtype in (torch.float32, torch.float64), f"{x.dtype} is too coarse for places"
    assert draws.shape == (x.shape[0], DRAWS), draws.shape
    p, draws = p.to(x.dtype), draws.to(x.dtype)
    if steps(operations, BLIT + GEOMETRY):
        x = _moved(x, p, draws, operations)
    if steps(operations, COLOUR if x.shape[1] == 3 else GREY):
        x = _coloured(x, p, draws, operations)
    return x


def adapted(p: Tensor, sign_mean: Tensor, images: Tensor | float, horizon: float, target: float = 0.6,
            ceiling: float = 0.8) -> Tensor:
    """The next p after `images` more real images, of whose scores r_t = E[sign D] is `sign_mean` (section 3, eq. 1).

    It moves by images / horizon towards r_t = target, within [0, ceiling]; `horizon`: images for p to go from 0 to 1.
    """
    return (p + (sign_mean - target).sign() * images / horizon).clamp(0, ceiling)


class Augment(nn.Module):
    """Augmentation with its p, which `watch` adapts; the buffers make it part of a checkpoint.

    Raises UserError for an unknown operation.
    """

    p: Tensor
    signs: Tensor
    seen: Tensor
    calls: Tensor

    def __init__(self, operations: tuple[str, ...] = OPERATIONS, target: float = 0.6, horizon: float = 500_000,
                 ceiling: float = 0.8) -> None:
        super().__init__()
        steps(operations, OPERATIONS)
        self.operations, self.target, self.horizon, self.ceiling = operations, target, horizon, ceiling
        for name in ("p", "signs", "seen", "calls"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor, draws: Tensor) -> Tensor:  # (B, C, H, W), (B, DRAWS) -> (B, C, H, W)
        return augmented(x, self.p, draws, self.operations)

    @torch.no_grad()
    def watch(self, sign: float, images: int) -> None:
        """Count the mean sign of the discriminator's scores of so many real images; every EVERY calls p moves."""
        signs, seen, calls = self.signs + sign * images, self.seen + images, self.calls + 1
        due = calls >= EVERY
        moved = adapted(self.p, signs / seen.clamp(min=1), seen, self.horizon, self.target, self.ceiling)
        self.p.copy_(torch.where(due, moved, self.p))
        for buffer, value in ((self.signs, signs), (self.seen, seen), (self.calls, calls)):
            buffer.copy_(torch.where(due, 0.0, value))


def _composed(p: Tensor, draws: Tensor, chosen: list[str], size: Size, n: int) -> Tensor:
    unit = torch.eye(n, dtype=draws.dtype, device=draws.device).repeat(draws.shape[0], 1, 1)  # (B, n, n)
    result = unit
    for step in chosen:
        meets, numbers = drawn(p, draws, step)
        matrix = unit.clone()
        for (row, column), value in STEPS[step][1](numbers, size).items():
            matrix[:, row, column] = value
        # not @: TensorFloat-32 has ten bits, too few for the place of a pixel
        product = (matrix[..., None] * result[:, None]).sum(2)
        result = torch.where(meets[:, None, None], product, result)
    return result


def _met(p: Tensor, draws: Tensor, chosen: list[str]) -> Tensor:
    """Whether any of these steps meets each image, (B, 1, 1)."""
    return torch.stack([drawn(p, draws, step)[0] for step in chosen]).any(0)[:, None, None]


def _moved(x: Tensor, p: Tensor, draws: Tensor, operations: tuple[str, ...]) -> Tensor:
    height, width = size = (x.shape[2], x.shape[3])
    if "rotate90" in operations and height != width:
        raise UserError(f"augmentation 'rotate90' needs square images, these are {height} x {width}: leave it out")
    geometry = steps(operations, GEOMETRY)
    across, down = _sources(_composed(p, draws, steps(operations, BLIT) + geometry, size, 3), size)
    if not geometry:
        return _read(x, _mirrored(across.round(), width), _mirrored(down.round(), height))
    met = _met(p, draws, geometry)
    across = _mirrored(torch.where(met, across, across.round()), width)  # (B, H, W)
    down = _mirrored(torch.where(met, down, down.round()), height)
    left, top = across.floor(), down.floor()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    across, down = (across - left)[:, None], (down - top)[:, None]
    corner = _read(x, left, top)  # (B, C, H, W), all of the pixel where the place is whole
    upper = torch.lerp(corner, _read(x, right, top), across)
    lower = torch.lerp(_read(x, left, bottom), _read(x, right, bottom), across)
    return torch.where(met[:, None], torch.lerp(upper, lower, down), corner)


def _sources(matrix: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Where each pixel comes from: column and row, each (B, H, W), under the inverse of `matrix` (B, 3, 3)."""
    height, width = size
    a, b, x, c, d, y = matrix[:, :2].flatten(1)[:, :, None].unbind(1)  # (B, 1)
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    across = torch.arange(width, device=matrix.device) - middle_x - x  # (B, W)
    down = torch.arange(height, device=matrix.device) - middle_y - y  # (B, H)
    det = a * d - b * c
    return ((d / det * across + middle_x)[:, None] - (b / det * down)[:, :, None],
            (a / det * down + middle_y)[:, :, None] - (c / det * across)[:, None])


def _mirrored(place: Tensor, side: int) -> Tensor:
    """Places folded into [0, side - 1] about the outer edges of the first and last pixel."""
    folded = (place + 0.5) % (2 * side)
    return (torch.minimum(folded, 2 * side - folded) - 0.5).clamp(0, side - 1)


def _read(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """The pixels of x (B, C, H, W) at whole places (B, H, W).

    By gathering, whose second derivative every torch knows.
    """
    place = (row * x.shape[3] + column).long().flatten(1)[:, None].expand(-1, x.shape[1], -1)  # (B, C, H W)
    return x.flatten(2).gather(2, place).unflatten(2, x.shape[2:])


def _coloured(x: Tensor, p: Tensor, draws: Tensor, operations: tuple[str, ...]) -> Tensor:
    channels = x.shape[1]
    chosen = steps(operations, COLOUR if channels == 3 else GREY)
    matrix = _composed(p, draws, chosen, (x.shape[2], x.shape[3]), 4)
    if channels == 3:
        changed = torch.baddbmm(matrix[:, :3, 3:], matrix[:, :3, :3], x.flatten(2)).unflatten(2, x.shape[2:])
    else:
        changed = x * matrix[:, :1, :1, None] + matrix[:, :1, 3:, None]
    return torch.where(_met(p, draws, chosen)[..., None], changed, x)
