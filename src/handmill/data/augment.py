"""What training does to images on their way in: flip, shift, rotate, jitter the colours, binarise.

Every draw is a pure function of (seed, place of the item in the endless order), so a batch may be cut anywhere and a
run resumed anywhere. It is computed where the images are.

B batch, C channels (1 or 3), H height, W width.
"""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from handmill.data.noise import uniform
from handmill.data.order import draw
from handmill.media.image import Data

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augment(images: Tensor, places: "Tensor | NDArray[Any]", data: Data, seed: int, training: bool = True) -> Tensor:
    """Images (B, C, H, W) uint8 as the network gets them: float32 in [-1, 1].

    `places` (B,) are the items' places in the order of training, or with `training=False` the numbers of held-out
    images, which are only binarised, always alike.
    """
    assert images.ndim == 4, images.shape
    assert images.dtype == torch.uint8, images.dtype
    places = torch.as_tensor(places, dtype=torch.int64, device=images.device)  # (B,)
    assert places.shape == images.shape[:1], (places.shape, images.shape)
    x = images.float() / 255
    if training:
        if data.flip:
            turned = uniform(draw(seed, "flip"), places, 1) < 0.5  # (B, 1)
            x = torch.where(turned[:, :, None, None], x.flip(3), x)
        if data.shift or data.rotation:
            x = _moved(x, places, data, seed)
        if data.colour_jitter:
            x = jitter(x, data.colour_jitter * (2 * uniform(draw(seed, "colour"), places, 3) - 1))
    if data.binarise == "threshold":
        x = (x >= 0.5).float()
    elif data.binarise == "sampled":
        levels = uniform(draw(seed, "binarise"), places, x[0].numel())  # (B, C H W)
        x = (levels.view_as(x) < x).float()
    return x * 2 - 1


def _moved(x: Tensor, places: Tensor, data: Data, seed: int) -> Tensor:
    u = uniform(draw(seed, "move"), places, 3)  # (B, 3)
    shifts = torch.floor(u[:, :2] * (2 * data.shift + 1)) - data.shift  # (B, 2) whole pixels
    angles = (2 * u[:, 2] - 1) * math.radians(data.rotation)  # (B,)
    return move(x, shifts, angles if data.rotation else None)


def move(x: Tensor, shifts: Tensor, angles: Tensor | None = None) -> Tensor:
    """Turn (B, C, H, W) by `angles` (B,) radians, anticlockwise about the centre, then shift by `shifts` (B, 2) pixels
    (right, down); what comes in is the edge repeated. Without angles pixels are moved and not interpolated.
    """
    size = torch.tensor([x.shape[3], x.shape[2]], device=x.device)  # W, H
    turn = torch.zeros_like(shifts[:, 0]) if angles is None else angles
    cos, sin = torch.cos(turn), torch.sin(turn)
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (B, 2, 2)
    offset = -(rotation @ shifts[:, :, None])  # (B, 2, 1) where the centre comes from, pixels
    theta = torch.cat([rotation * size / size[:, None], 2 * offset / size[:, None]], 2)  # (B, 2, 3), in half sides
    where = F.affine_grid(theta, list(x.shape), align_corners=False)
    mode = "nearest" if angles is None else "bilinear"
    return F.grid_sample(x, where, mode, "border", align_corners=False)


def jitter(x: Tensor, amounts: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of (B, C, H, W) in [0, 1] by 1 + `amounts` (B, 3), and cut off."""
    brightness, contrast, saturation = (1 + amounts)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
    x = (x * brightness).clamp(0, 1)
    luma = _luma(x)  # (B, 1, H, W)
    mean = luma.mean((2, 3), keepdim=True)
    x, luma = mean + contrast * (x - mean), mean + contrast * (luma - mean)
    return (luma + saturation * (x - luma)).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA if x.shape[1] == 3 else [1.0], device=x.device)
    return (x * weights[:, None, None]).sum(1, keepdim=True)
