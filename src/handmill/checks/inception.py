"""The standard network of the FID: Inception-v3 as its TensorFlow weights of 2015 have it, 2048 features an image.

Szegedy et al. 2016, figures 5 to 7 and 10; Fréchet Inception distance: Heusel et al. 2017. Those weights differ
from the paper's network in three places: 1008 classes, averages that leave the padding out, and a maximum in place
of the average in the last block. Handmill brings no weights: they are the user's file, as safetensors.

B batch, H height, W width, C channels, N images.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.checks.features import Images
from handmill.errors import UserError

SIDE = 299  # pixels
FEATURES = 2048
CLASSES = 1008
_BATCH = 25  # images at once
_CONVERT = ("python -c \"import torch, safetensors.torch as s; "
            "s.save_file(torch.load('weights.pth', weights_only=True), 'weights.safetensors')\"")

Kernel = int | tuple[int, int]
Stage = dict[str, tuple[int, Kernel]]  # layers that read the same and are joined: name -> output channels, kernel
Branch = list[Stage]

_ROW, _COLUMN = (1, 7), (7, 1)
# name -> output channels, kernel, stride, padding; then whether a maximum over 3 x 3, stride 2, follows
_STEM = {"Conv2d_1a_3x3": (32, 3, 2, 0, False), "Conv2d_2a_3x3": (32, 3, 1, 0, False),
         "Conv2d_2b_3x3": (64, 3, 1, 1, True), "Conv2d_3b_1x1": (80, 1, 1, 0, False),
         "Conv2d_4a_3x3": (192, 3, 1, 0, True)}


def _figure5(pooled: int) -> list[Branch]:
    """35 x 35 maps."""
    return [[{"branch1x1": (64, 1)}], [{"branch5x5_1": (48, 1)}, {"branch5x5_2": (64, 5)}],
            [{"branch3x3dbl_1": (64, 1)}, {"branch3x3dbl_2": (96, 3)}, {"branch3x3dbl_3": (96, 3)}],
            [{"branch_pool": (pooled, 1)}]]


def _figure6(c: int) -> list[Branch]:
    """17 x 17 maps; 7 x 7 kernels are a row and a column."""
    return [[{"branch1x1": (192, 1)}],
            [{"branch7x7_1": (c, 1)}, {"branch7x7_2": (c, _ROW)}, {"branch7x7_3": (192, _COLUMN)}],
            [{"branch7x7dbl_1": (c, 1)}, {"branch7x7dbl_2": (c, _COLUMN)}, {"branch7x7dbl_3": (c, _ROW)},
             {"branch7x7dbl_4": (c, _COLUMN)}, {"branch7x7dbl_5": (192, _ROW)}],
            [{"branch_pool": (192, 1)}]]


# 8 x 8 maps; 3 x 3 kernels are a row beside a column
_FIGURE7: list[Branch] = [
    [{"branch1x1": (320, 1)}],
    [{"branch3x3_1": (384, 1)}, {"branch3x3_2a": (384, (1, 3)), "branch3x3_2b": (384, (3, 1))}],
    [{"branch3x3dbl_1": (448, 1)}, {"branch3x3dbl_2": (384, 3)},
     {"branch3x3dbl_3a": (384, (1, 3)), "branch3x3dbl_3b": (384, (3, 1))}],
    [{"branch_pool": (192, 1)}]]
# figure 10: from 35 x 35 to 17 x 17 and from there to 8 x 8
_TO_17: list[Branch] = [
    [{"branch3x3": (384, 3)}],
    [{"branch3x3dbl_1": (64, 1)}, {"branch3x3dbl_2": (96, 3)}, {"branch3x3dbl_3": (96, 3)}]]
_TO_8: list[Branch] = [
    [{"branch3x3_1": (192, 1)}, {"branch3x3_2": (320, 3)}],
    [{"branch7x7x3_1": (192, 1)}, {"branch7x7x3_2": (192, _ROW)}, {"branch7x7x3_3": (192, _COLUMN)},
     {"branch7x7x3_4": (192, 3)}]]
# how a block pools: before its last branch; "stride": as a branch of its own, and every branch ends with stride 2
_BLOCKS: dict[str, tuple[list[Branch], str]] = {
    "Mixed_5b": (_figure5(32), "mean"), "Mixed_5c": (_figure5(64), "mean"), "Mixed_5d": (_figure5(64), "mean"),
    "Mixed_6a": (_TO_17, "stride"), "Mixed_6b": (_figure6(128), "mean"), "Mixed_6c": (_figure6(160), "mean"),
    "Mixed_6d": (_figure6(160), "mean"), "Mixed_6e": (_figure6(192), "mean"), "Mixed_7a": (_TO_8, "stride"),
    "Mixed_7b": (_FIGURE7, "mean"), "Mixed_7c": (_FIGURE7, "maximum")}


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches side by side, their channels joined: (B, C, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, branches: list[Branch], pooling: str) -> None:
        super().__init__()
        self.branches, self.pooling = branches, pooling
        self.outputs = inputs if pooling == "stride" else 0
        for branch in branches:
            width = inputs
            for stage in branch:
                shrinks = pooling == "stride" and stage is branch[-1]
                for name, (outputs, kernel) in stage.items():
                    layer = Convolution(width, outputs, kernel, 1 + shrinks, 0 if shrinks else _padding(kernel))
                    self.add_module(name, layer)
                width = sum(outputs for outputs, _ in stage.values())
            self.outputs += width

    def forward(self, x: Tensor) -> Tensor:
        found = [self._follow(branch, x) for branch in self.branches]
        return torch.cat(found + ([F.max_pool2d(x, 3, 2)] if self.pooling == "stride" else []), 1)

    def _follow(self, branch: Branch, x: Tensor) -> Tensor:
        if "branch_pool" in branch[0]:
            x = (F.max_pool2d(x, 3, 1, 1) if self.pooling == "maximum" else
                 F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        for stage in branch:
            x = torch.cat([self.get_submodule(name)(x) for name in stage], 1)
        return x


class Inception(nn.Module):
    """Images (B, 3, 299, 299) in [-1, 1] to the features (B, 2048) before the classes."""

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, (outputs, kernel, stride, padding, _) in _STEM.items():
            self.add_module(name, Convolution(width, outputs, kernel, stride, padding))
            width = outputs
        for name, (branches, pooling) in _BLOCKS.items():
            block = Block(width, branches, pooling)
            self.add_module(name, block)
            width = block.outputs
        assert width == FEATURES, width
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name, (*_, pooled) in _STEM.items():
            x = self.get_submodule(name)(x)
            x = F.max_pool2d(x, 3, 2) if pooled else x
        for name in _BLOCKS:  # (B, 192, 35, 35), from 6a (B, 768, 17, 17), from 7a (B, 1280, 8, 8)
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))  # (B, 2048)

    @torch.inference_mode()
    def features(self, images: Images) -> NDArray[np.float32]:
        """Features (N, 2048) of uint8 images (N, H, W, C), C = 1 or 3, resized bilinearly without antialiasing."""
        pieces = [self(prepare(images[i:i + _BATCH])).numpy() for i in range(0, len(images), _BATCH)]
        return np.concatenate(pieces)


def load(path: Path) -> Inception:
    """The network with the weights of the standard FID from a safetensors file, in evaluation mode.

    Raises UserError where the file is absent, of another format, or of another network.
    """
    if not path.is_file():
        raise UserError(f"{path}, the weights of the Inception network, is not there: give their safetensors file")
    try:
        weights = load_file(path)
    except SafetensorError:
        raise UserError(f"{path} is not a safetensors file, and other formats can run code when they are read: "
                        f"where you trust the file, convert it with {_CONVERT}") from None
    network = Inception()
    _match(path, network, weights)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    return network.eval()


def prepare(images: Images) -> Tensor:
    """uint8 (B, H, W, C) to (B, 3, 299, 299) in [-1, 1]; grey is repeated to three channels."""
    assert images.dtype == np.uint8, images.dtype
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255  # (B, C, H, W)
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x.expand(-1, 3, -1, -1) - 1


def _match(path: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise UserError at the first tensor that is missing, misshapen or unknown; counts of batches do not matter."""
    wanted = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != tuple(tensor.shape):
            what = "is missing" if found is None else f"has shape {found} where {tuple(tensor.shape)} belongs"
            raise UserError(f"{path} is not the Inception network of the FID: {name} {what}; "
                            "give the weights that the FID is defined by")
    unknown = sorted(set(weights) - set(network.state_dict()))
    if unknown:
        raise UserError(f"{path} is not the Inception network of the FID: it also holds {unknown[0]}; "
                        "give the weights that the FID is defined by")


def _padding(kernel: Kernel) -> Kernel:
    """As much as keeps the size at stride 1."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
