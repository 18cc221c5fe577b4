"""Prepared images as batches of what the network models. B items, C channels, H height, W width, *S of the codes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handmill.data.order import items_at
from handmill.errors import UserError

HELD_IN_MEMORY = 1 << 31  # bytes of codes that are made once and kept
AT_ONCE = 256  # images through a codec

Batch = dict[str, Tensor]


class Items:
    """The images of one split, in codes: {"x" (B, C, *S) fp32, "label" (B,), "place" (B,) int64} a batch.

    `batch(places)` takes places in the endless stateless order, each visit with its own augmentation; `first(n)` takes
    the split's images in turn, as they are. The label of an image without one is the number of classes.
    """

    def __init__(self, prepared: Any, split: str, codec: Any, data: Any, seed: int) -> None:
        self.images, self.codec, self.data, self.seed = prepared.images(split), codec, data, seed
        labels = np.asarray(prepared.labels(split))
        self.labels = torch.from_numpy(np.where(labels < 0, len(codec.classes), labels).astype(np.int64))
        self.kept: Tensor | None = None  # the codes of all images, where they are the same at every visit

    def __len__(self) -> int:
        return len(self.images)

    def keep(self) -> None:
        """Encode every image once, where no augmentation changes them and the codes fit into memory."""
        plain = not hasattr(self.codec, "model")
        if varies(self.data) or plain or len(self) * 4 * int(np.prod(self.codec.shape)) > HELD_IN_MEMORY:
            return
        self.kept = torch.cat([self.encode(np.arange(i, min(i + AT_ONCE, len(self)))) for i in
                               range(0, len(self), AT_ONCE)])

    def encode(self, numbers: NDArray[np.int64], places: NDArray[np.int64] | None = None) -> Tensor:
        """Codes (B, C, *S) of the images `numbers`; with `places`, as augmented for that visit."""
        from handmill.data.augment import augment

        pixels = torch.from_numpy(np.ascontiguousarray(self.images[numbers].transpose(0, 3, 1, 2)))
        turn = torch.from_numpy(numbers if places is None else places)
        codes: Tensor = self.codec.encode(augment(pixels, turn, self.data, self.seed, training=places is not None))
        return codes

    def batch(self, places: NDArray[np.int64]) -> Batch:
        numbers = items_at(places, len(self), self.seed)
        x = self.encode(numbers, places) if self.kept is None else self.kept[numbers]
        return {"x": x, "label": self.labels[numbers], "place": torch.from_numpy(places)}

    def first(self, count: int) -> Batch:
        """The first `count` images (0: all) as one batch."""
        return self.some(np.arange(min(count or len(self), len(self))))

    def some(self, numbers: NDArray[np.int64]) -> Batch:
        """The images `numbers` (N,) as one batch, as they are; their places are their numbers."""
        x = torch.cat([self.encode(part) for part in np.array_split(numbers, -(-len(numbers) // AT_ONCE))])
        return {"x": x, "label": self.labels[numbers], "place": torch.from_numpy(numbers)}


def enough(prepared: Any, batch: int) -> None:
    """Raise UserError when there are fewer training images than a batch takes."""
    if prepared.count("train") < batch:
        raise UserError(f"there are {prepared.count('train')} training images, fewer than training.batch = {batch}: "
                        "add images, or set a smaller training.batch")


def varies(data: Any) -> bool:
    """Whether an image is another one at every visit."""
    return bool(data.flip or data.shift or data.rotation or data.colour_jitter or data.binarise == "sampled")
