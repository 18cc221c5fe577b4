"""The feature space of the image check: a small convolutional network trained on the user's own images.

With labels it is a classifier. Without, it learns by contrast that two distorted views of one image belong
together (SimCLR: Chen et al. 2020). Its penultimate layer is normalised (batch normalisation without gain or bias:
Ioffe and Szegedy 2015), so every feature has about mean 0 and variance 1 over the training images and a
distance between features has a scale.

N images, B batch, H height, W width, C channels, D features, K classes.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from handmill.checks.fidelity import label_agreement
from handmill.checks.intervals import Figure
from handmill.data.order import draw, permute
from handmill.disk import flush, parsed
from handmill.errors import UserError
from handmill.recipe import not_negative, positive, within
from handmill.training.optimizers import AdamW

FORMAT = "handmill-features/1"
FILE = "features.safetensors"
FEATURES = "features"  # the folder of a network, beside the prepared images it is of and in model folders
SEED = 0  # of the network of prepared images: the same for all models of the data, which are compared in its features
FEWEST = 16  # training images
_BATCH = 500  # images at once where nothing is learned

Images = NDArray[np.uint8]  # (N, H, W, C)
Labels = NDArray[np.int64]  # (N,)


@dataclass(frozen=True)
class Settings:
    """How the network of the feature space is made and trained."""

    features: int = 64  # D
    side: int = 64  # pixels; larger images are first reduced to it, each pixel the mean of those it stands for
    images: int = 128_000  # seen in training, every repeat and every view counted
    batch: int = 128  # images per step
    learning_rate: float = 3e-3  # AdamW's peak rate
    weight_decay: float = 0.02  # decoupled, on matrices only
    warmup: int = 100  # steps of linear warm-up; then linearly down to 0
    angle: float = 12.0  # degrees; largest rotation of a training image
    scale: float = 0.1  # largest enlargement or reduction, a share of the size
    shift: float = 0.08  # largest shift, a share of the size
    tint: float = 0.2  # largest change of a channel's gain and offset; without labels only
    temperature: float = 0.2  # of the contrastive loss; without labels only

    def __post_init__(self) -> None:
        positive(self, "features", "side", "images", "batch", "learning_rate", "temperature")
        not_negative(self, "weight_decay", "warmup", "angle")
        within(self, 0.0, 0.5, "scale", "shift", "tint")


class Network(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to features (B, D) and, from their positive part, outputs (B, K).

    The stem's stride makes maps of about 16 by 16 whatever the size of the images, so the work is the same for all.
    """

    def __init__(self, shape: tuple[int, ...], features: int, outputs: int) -> None:
        super().__init__()
        stride = max(1, round(max(shape[:2]) / 16))
        self.body = nn.Sequential(
            _convolution(shape[2], 32, 2 * stride + 1, stride), _convolution(32, 64, 3, 2), _convolution(64, 64, 3, 1),
            _convolution(64, 128, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),  # (B, 512)
            nn.Linear(512, features), nn.BatchNorm1d(features, affine=False))
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W) -> (B, D), (B, K)
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(F.relu(features))


class Classifier:
    """A trained network with what it was trained on; `name` changes with every weight."""

    def __init__(self, network: Network, facts: dict[str, Any]) -> None:
        self.network, self.facts = network.eval(), facts
        self.classes, self.shape = int(facts["classes"]), tuple(facts["shape"])
        self.settings = Settings(**facts["settings"])
        kind = "cnn" if self.classes else "simclr"
        self.name = f"{kind}{self.settings.features}-{_digest(network)}"

    def features(self, images: Images) -> NDArray[np.float32]:
        """The normalised penultimate activations (N, D) of uint8 images (N, H, W, C)."""
        return self._run(images, lambda x: self.network(x)[0])

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """The classes' probabilities (N, K)."""
        assert self.classes, "trained without labels"
        return self._run(images, lambda x: self.network(x)[1].softmax(-1))

    def measure(self, images: Images, labels: Labels) -> Figure:
        """Accuracy on images it was not trained on, with Wilson's interval."""
        return label_agreement(self.probabilities(images), labels)

    def save(self, folder: Path) -> None:
        """Write one file, facts and weights, which is there whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{FILE}.tmp-", delete=False) as file:
            staged = Path(file.name)
        try:
            save_file(weights, staged, {"format": FORMAT, "name": self.name, "facts": json.dumps(self.facts)})
            staged.chmod(0o644)
            flush(staged)
            os.replace(staged, folder / FILE)
        finally:
            staged.unlink(missing_ok=True)
        flush(folder)

    @torch.inference_mode()
    def _run(self, images: Images, function: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        assert images.shape[1:] == self.shape, (images.shape, self.shape)
        pieces = [function(prepare(images[i:i + _BATCH], self.settings.side)).numpy()
                  for i in range(0, len(images), _BATCH)]
        return np.concatenate(pieces)


def train(images: Images, labels: Labels | None, classes: int, seed: int, settings: Settings | None = None,
          fingerprint: str = "", progress: bool = False) -> Classifier:
    """Train on uint8 images (N, H, W, C) with labels (N,) below `classes`; no labels or one class: by contrast.

    The same arguments give the same weights on the same machine. `fingerprint` names the data for `for_data`.
    Raises UserError for fewer than 16 images.
    """
    s = settings or Settings()
    classes = 0 if labels is None or classes < 2 else classes
    _accept(images, labels if classes else None, classes)
    height, width = reduced(images.shape[1:3], s.side)
    facts = {"fingerprint": fingerprint, "seed": seed, "classes": classes, "shape": list(images.shape[1:]),
             "settings": asdict(s)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seed, "feature network"))
        network = Network((height, width, images.shape[3]), s.features, classes or s.features)
    optimizer = _optimizer(network, s)
    batch = min(s.batch, len(images))
    steps = max(1, s.images // (batch if classes else 2 * batch))
    for step in tqdm(range(steps), desc="feature network", unit=" steps", disable=not progress):
        generator = torch.Generator().manual_seed(draw(seed, "distortion", step))
        chosen = np.sort(_chosen(step, batch, len(images), seed))
        x = prepare(images[chosen], s.side)  # (B, C, H, W)
        _loss(network, x, labels[chosen] if labels is not None and classes else None, s, generator).backward()
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * min((step + 1) / max(1, s.warmup), 1 - step / steps)
        optimizer.step()
        network.zero_grad()
    return Classifier(network, facts)


def for_data(folder: Path, images: Images, labels: Labels | None, classes: int, fingerprint: str, seed: int,
             progress: bool = False, settings: Settings | None = None) -> Classifier:
    """The network kept in `folder` where it is whole and was trained on this data, or else a new one, kept there."""
    wanted = {"fingerprint": fingerprint, "seed": seed, "shape": list(images.shape[1:]),
              "classes": 0 if labels is None or classes < 2 else classes, "settings": asdict(settings or Settings())}
    try:
        kept = load(folder)
        if kept.facts == wanted:
            return kept
    except UserError:
        pass  # absent or damaged: made anew
    made = train(images, labels, classes, seed, settings, fingerprint, progress)
    made.save(folder)
    return made


def of(prepared: Any, progress: bool = False) -> Classifier:
    """The network of prepared images, kept beside them; trained on the classes where every image has one."""
    labels = np.asarray(prepared.labels("train"))
    classes = len(prepared.classes) if (labels >= 0).all() else 0
    return for_data(prepared.folder / FEATURES, np.asarray(prepared.images("train")), labels if classes else None,
                    classes, prepared.fingerprint, SEED, progress)


def load(folder: Path) -> Classifier:
    """Read what `save` wrote. Raises UserError naming the file where it is absent or not as it was written."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        facts, weights = parsed(header["facts"]), load_file(path)
        s, shape = Settings(**facts["settings"]), facts["shape"]
        network = Network((*reduced(shape[:2], s.side), shape[2]), s.features, facts["classes"] or s.features)
        network.load_state_dict(weights)
        found = Classifier(network, facts)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a feature network ({error}): delete it and check again") from None
    if header.get("format") != FORMAT or header.get("name") != found.name:
        raise UserError(f"{path} is not as it was written: delete it and check again")
    return found


def reduced(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width with the longer one at most `side`."""
    factor = min(1.0, side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def prepare(images: Images, side: int) -> Tensor:
    """uint8 (B, H, W, C) to (B, C, h, w) in [-1, 1], reduced by area to at most `side` pixels."""
    assert images.dtype == np.uint8, images.dtype
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, C, H, W)
    size = reduced(images.shape[1:3], side)
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="area")


def distort(x: Tensor, settings: Settings, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Each image (B, C, H, W) turned, scaled and shifted a little, its border pixels repeated; never mirrored."""
    angle, scale, right, down = (torch.rand(4, len(x), generator=generator) * 2 - 1) * strength  # (B,) each
    angle, scale = angle * settings.angle * math.pi / 180, 1 + scale * settings.scale
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, 2 * settings.shift
    rows = torch.stack((cos, -sin, right * shift, sin, cos, down * shift), 1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def tint(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each channel of each image (B, C, H, W) with a gain and an offset of its own."""
    gain, offset = (torch.rand(2, *x.shape[:2], 1, 1, generator=generator) * 2 - 1) * strength  # (B, C, 1, 1) each
    return x * (1 + gain) + offset


def contrast(outputs: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross-entropy of two views' outputs (2B, K), view after view, in nats.

    Each output must single out the other view of its image among the 2B - 1 others (Chen et al. 2020, eq. 1).
    """
    z = F.normalize(outputs, dim=1)
    likeness = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # (2B, 2B)
    return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(z) // 2))


def _loss(network: Network, x: Tensor, labels: Labels | None, settings: Settings,
          generator: torch.Generator) -> Tensor:
    if labels is not None:
        return F.cross_entropy(network(distort(x, settings, generator))[1], torch.from_numpy(labels))
    views = torch.cat([tint(distort(x, settings, generator, 2.0), settings.tint, generator) for _ in range(2)])
    return contrast(network(views)[1], settings.temperature)  # of (2B, C, H, W)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)  # kernels read it so
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _optimizer(network: nn.Module, settings: Settings) -> AdamW:
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": settings.weight_decay},
                                    {"params": vectors}]
    return AdamW(groups, settings.learning_rate, (0.9, 0.99))


def _chosen(step: int, batch: int, size: int, seed: int) -> NDArray[np.int64]:
    """The images of a step (B,): every epoch visits each once, and the rest of it that fills no batch is left out."""
    epoch, place = divmod(step, size // batch)
    return permute(np.arange(place * batch, (place + 1) * batch), size, draw(seed, "epoch", epoch))


def _accept(images: Images, labels: Labels | None, classes: int) -> None:
    assert images.ndim == 4, images.shape
    assert images.dtype == np.uint8, images.dtype
    if len(images) < FEWEST:
        raise UserError(f"the image check learns its features from the training images and needs {FEWEST} of them, "
                        f"not {len(images)}: add images")
    if labels is not None:
        assert labels.shape == (len(images),), labels.shape
        assert labels.min() >= 0, labels.min()
        assert labels.max() < classes, labels.max()


def _digest(network: nn.Module) -> str:
    hashed = hashlib.blake2b(digest_size=4)
    for name, tensor in sorted(network.state_dict().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()
