"""What can be done in the latent space of a trained generator: mix styles, walk, and look for an image in it.

Karras et al. 2019, "A Style-Based Generator Architecture" (style mixing, figure 3); Karras et al. 2020, "Analyzing and
Improving the Image Quality of StyleGAN" (projection, appendix D); Shoemake 1985 and White 2016 (walking on a sphere).

`generator` is an adversarial one in evaluation mode: it maps z to styles w and renders images of w and noise.

B batch, C channels, *S space, Z latent, L styles an image, W width of a style, P noise, K keys, F frames, R rows,
Q columns, N candidates.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.families.variational import slerp
from handmill.training.optimizers import AdamW

AT_ONCE = 64  # images rendered in one pass
GROUPS = ("coarse", "middle", "fine")  # thirds of the layers
FINE = 32  # places on each stretch between two keys that its length is measured by

# projection; shares are of the steps, and those that end in D are Karras et al. 2020, appendix D
CANDIDATES = 10_000  # w whose mean and deviation measure the space (D)
TRIED = 256  # of them rendered, to start near the image
STARTS = 4  # of these, the nearest; the best of what becomes of them is the result
RATE = 0.1  # Adam's largest step, in deviations of w (D)
RISE, FALL = 0.05, 0.25  # share of the steps in which the rate rises and falls (D)
UNREST, CALM = 0.05, 0.75  # deviation of the noise on w, in those of w, and the share in which it falls to 0 (D)
LIKENESS = 0.1  # weight of the features' squared distance beside that of pixels in [-1, 1]
COARSEST = 4  # places a side of the coarsest scale that pixels are compared at
POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Condition = dict[str, Tensor]


class Projection(NamedTuple):
    """The nearest image that was found, and the way there."""

    w: Tensor  # (L, W)
    image: Tensor  # (C, *S) in [-1, 1]
    error: float  # root mean square difference of the pixels, in levels of 0..255
    history: list[float]  # distance before each step, of the start that came out best


@torch.no_grad()
def styles(generator: Any, z: Tensor, condition: Condition, psi: float = 1.0) -> Tensor:
    """The styles w (B, L, W) of z (B, Z), moved to psi times their distance from the centre."""
    w: Tensor = generator.map(z, condition)
    return w if psi == 1.0 else generator.truncated(w, condition, psi)


@torch.no_grad()
def rendered(generator: Any, w: Tensor, noise: Tensor) -> Tensor:
    """The images (B, C, *S) of w (B, L, W) and noise (B, P) or (1, P)."""
    noise = noise.expand(len(w), -1)
    return torch.cat([generator.render(*part) for part in zip(w.split(AT_ONCE), noise.split(AT_ONCE), strict=True)])


def taken(cut: int | str, layers: int) -> slice:
    """Which of L layers a column of `mixed` gives: from `cut` on, or the "coarse", "middle" or "fine" third.

    Raises UserError for what is neither, and where there are too few layers.
    """
    if layers < 2:
        raise UserError("styles cannot be mixed in a network that has one for the whole image, as a dcgan has: mix "
                        'those of a model with network.kind = "stylegan2"')
    if cut in GROUPS:
        place = GROUPS.index(str(cut))
        return slice(round(layers * place / len(GROUPS)), round(layers * (place + 1) / len(GROUPS)))
    if not isinstance(cut, int) or not 0 < cut < layers:
        raise UserError(f"cut = {cut!r} must be the first layer that a column gives, 1 to {layers - 1}, or the part of "
                        f"them that it gives: {', '.join(GROUPS)}")
    return slice(cut, layers)


def mixed(generator: Any, w_rows: Tensor, w_columns: Tensor, cut: int | str, noise: Tensor) -> Tensor:
    """Images (R, Q, C, *S) of w_rows (R, L, W) with some layers' styles from w_columns (Q, L, W) (figure 3).

    `cut` is the first layer that comes from the column, or "coarse", "middle" or "fine" for that third of them.
    noise (R, P) belongs to the rows. Raises UserError for another cut, and for a generator of one style.
    """
    layers = taken(cut, generator.layers)
    w = w_rows[:, None].repeat(1, len(w_columns), 1, 1)  # (R, Q, L, W)
    w[:, :, layers] = w_columns[:, layers]
    images = rendered(generator, w.flatten(0, 1), noise.repeat_interleave(len(w_columns), 0))
    return images.unflatten(0, w.shape[:2])


def travel(generator: Any, z_keys: Tensor, condition: Condition, between: int, psi: float = 1.0,
           closed: bool = True) -> Tensor:
    """Styles w (F, L, W) on a way through z_keys (K, Z), each of its own condition, `between` steps from key to key.

    With more than one style an image, `walk` in w. With one, w is made of z and the label: z goes as `walk_z` does, and
    what the labels give changes in proportion.
    """
    if generator.layers > 1:
        return walk(styles(generator, z_keys, condition, psi), between, closed)
    z = walk_z(z_keys, between, closed)  # (F, Z)
    key = torch.arange(len(z), device=z.device) // between
    share = (torch.arange(len(z), device=z.device) % between / between)[:, None, None]
    here, there = ({name: value[place % len(z_keys)] for name, value in condition.items()} for place in (key, key + 1))
    return torch.lerp(styles(generator, z, here, psi), styles(generator, z, there, psi), share)


def walk(w_keys: Tensor, between: int, closed: bool = True) -> Tensor:
    """A smooth way (F, *) through w_keys (K, *), `between` equal steps from each to the next.

    The cubic spline through the keys, periodic or with natural ends, walked at constant speed. Closed, F = K * between
    and the step after the last leads to the first; open, F = (K - 1) * between + 1.
    """
    assert len(w_keys) > 1, w_keys.shape
    keys = w_keys.flatten(1).cpu().double()  # (K, n); not every device has float64
    curve = _spline(keys, torch.arange(FINE).double() / FINE, closed)  # (K or K - 1, FINE, n)
    curve = torch.cat((curve, (keys.roll(-1, 0) if closed else keys[1:])[:, None]), 1)  # (.., FINE + 1, n)
    lengths = F.pad(curve.diff(dim=1).norm(dim=2).cumsum(1), (1, 0))  # (.., FINE + 1)
    wanted = lengths[:, -1:] * torch.arange(between) / between  # (.., between)
    place = torch.searchsorted(lengths, wanted.contiguous(), right=True).clamp(1, FINE)
    low, high = lengths.gather(1, place - 1), lengths.gather(1, place)
    share = ((wanted - low) / (high - low).clamp(min=1e-12))[..., None]
    row = torch.arange(len(curve))[:, None]
    frames = torch.lerp(curve[row, place - 1], curve[row, place], share).flatten(0, 1)  # (F, n)
    frames = frames if closed else torch.cat((frames, keys[-1:]))
    return frames.to(w_keys).unflatten(1, w_keys.shape[1:])


def walk_z(z_keys: Tensor, between: int, closed: bool = True) -> Tensor:
    """A way (F, Z) through z_keys (K, Z) along great circles, so that z stays as long as the generator knows it.

    F as in `walk`.
    """
    assert len(z_keys) > 1, z_keys.shape
    start, end = (z_keys, z_keys.roll(-1, 0)) if closed else (z_keys[:-1], z_keys[1:])
    arcs = torch.stack([slerp(start, end, i / between) for i in range(between)], 1)  # (K or K - 1, between, Z)
    return arcs.flatten(0, 1) if closed else torch.cat((arcs.flatten(0, 1), z_keys[-1:]))


def _spline(keys: Tensor, t: Tensor, closed: bool) -> Tensor:
    """The cubic spline (K or K - 1, T, n) through keys (K, n) at t (T,) in [0, 1) of each stretch.

    Its second derivatives m at the keys satisfy m_(i-1) + 4 m_i + m_(i+1) = 6 (k_(i-1) - 2 k_i + k_(i+1)).
    """
    count = len(keys)
    unit = torch.eye(count, dtype=keys.dtype)
    around = unit.roll(1, 1) + unit.roll(-1, 1)
    system, bend = around + 4 * unit, 6 * (around - 2 * unit) @ keys
    if not closed:
        system[[0, -1]], bend[[0, -1]] = unit[[0, -1]], torch.zeros_like(bend[[0, -1]])
    m = torch.linalg.solve(system, bend)  # (K, n)
    stretches = count if closed else count - 1
    a, b, m_a, m_b = (x[:stretches, None] for x in (keys, keys.roll(-1, 0), m, m.roll(-1, 0)))  # (.., 1, n)
    t, s = t[:, None], 1 - t[:, None]
    return s * a + t * b + ((s**3 - s) * m_a + (t**3 - t) * m_b) / 6


def project(generator: Any, image: Tensor, condition: Condition, steps: int = 500, seed: int = 0,
            features: Callable[[Tensor], Tensor] | None = None, each: bool = False,
            progress: bool = False) -> Projection:
    """The w whose image is nearest to `image` (C, *S) in [-1, 1], by Adam from the nearest of many samples.

    `condition` holds one row, "label" (1,), or nothing: any class. Near is by pixels on every scale, and by `features`,
    (B, C, *S) -> (B, D) of about unit variance, where given. The noise of the layers is 0. All layers share one style,
    as in samples, so that the error tells what the generator makes from what it does not; with `each`, every layer has
    its own, and images come near that no z makes.
    """
    assert image.shape == generator.shape, (image.shape, generator.shape)
    assert not generator.training
    image, distance = image.clone(), _distance(image.clone()[None], features)
    w = _candidates(generator, condition, seed)  # (N, L, W)
    centre, deviation = w.mean(0), w.std(0).clamp(min=1e-6)
    quiet = w.new_zeros(1, *generator.noise_shape)
    far = distance(rendered(generator, w[:TRIED], quiet))  # (TRIED,)
    w = w[far.topk(STARTS, largest=False).indices]  # (STARTS, L, W)
    u = ((w - centre) / deviation)[:, :generator.layers if each else 1].requires_grad_()  # (STARTS, 1 or L, W)
    quiet, history = quiet.expand(STARTS, -1), []
    optimizer = AdamW([{"params": [u]}], RATE)
    for step in tqdm(range(steps), desc="projection", disable=not progress):
        noise = normal(draw(seed, "projection", step), torch.arange(STARTS, device=u.device), tuple(u.shape[1:]))
        unrest = UNREST * max(0.0, 1 - step / steps / CALM) ** 2
        far = distance(generator.render(centre + deviation * (u + unrest * noise), quiet))  # (STARTS,)
        u.grad, = torch.autograd.grad(far.sum(), u)
        optimizer.param_groups[0]["lr"] = RATE * _ramp((step + 1) / steps)
        optimizer.step()
        history.append(far.detach())
    w = centre + deviation * u.detach()
    made = rendered(generator, w, quiet).clamp(-1, 1)
    best = int(distance(made).argmin())
    error = 127.5 * float((made[best] - image).square().mean().sqrt())
    return Projection(w[best], made[best], error, [float(far[best]) for far in history])


@torch.no_grad()
def _candidates(generator: Any, condition: Condition, seed: int) -> Tensor:
    """The styles (CANDIDATES, L, W) of the first samples of a seed; without a class asked for, of all in turn."""
    device = next(generator.parameters()).device
    places = torch.arange(CANDIDATES, device=device)
    if generator.classes:
        label = condition.get("label", places % generator.classes)
        condition = {"label": label.to(device).expand(CANDIDATES)}
    z = normal(draw(seed, "sample", 0), places, generator.latent_shape)
    return generator.map(z, condition)  # (N, L, W)


def _distance(target: Tensor, features: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """What tells how far images (B, C, *S) are from `target` (1, C, *S), (B,)."""
    scales, seen = _scales(target), features(target).detach() if features else None

    def distance(x: Tensor) -> Tensor:
        far = torch.stack([_squared(a, b) for a, b in zip(_scales(x), scales, strict=True)]).mean(0)
        return far if features is None or seen is None else far + LIKENESS * _squared(features(x), seen)

    return distance


def _scales(x: Tensor) -> list[Tensor]:
    """x (B, C, *S), and averaged over 2, 4, ... places a side."""
    scales = [x]
    while min(scales[-1].shape[2:]) >= 2 * COARSEST:
        scales.append(POOLS[x.ndim - 2](scales[-1], 2))
    return scales


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _ramp(share: float) -> float:
    """The share of RATE after a share of the steps: up in a line, down by a cosine (Karras et al. 2020, appendix D)."""
    return min(1.0, share / RISE) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - share) / FALL)))
