"""Small images, files and recipes for tests of the image medium."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handmill.data.image_prepare import prepare
from handmill.data.images import Images
from handmill.media.image import Data
from handmill.recipe import Recipe

SHARED = Path(__file__).parents[2] / "shared" / "data" / "images"


def shared(name: str) -> Path:
    """A file of the shared development data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: development data are not part of the repository")
    return path


def recipe_of(*paths: Path | str, seed: int = 1, **data: Any) -> Recipe:
    empty = dict.fromkeys(field.name for field in dataclasses.fields(Recipe))
    return Recipe(**empty | {"seed": seed, "data": Data(paths=tuple(map(str, paths)), **data)})


def prepared(cache: Path, *paths: Path | str, **settings: Any) -> Images:
    return prepare(recipe_of(*paths, **settings), cache, progress=False)


def scene(seed: int, size: int = 48, channels: int = 3) -> np.ndarray[Any, Any]:
    """A smooth picture unlike that of another seed: (size, size, channels)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image if channels == 3 else image.convert("L"))
    return pixels.reshape(size, size, channels)


def save(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, **options)
    return path


def album(folder: Path, count: int = 12, classes: tuple[str, ...] = ("cat", "dog"), **options: Any) -> Path:
    """A folder of `count` PNG images, in turn in a sub-folder for each class (none: all at the top)."""
    for i in range(count):
        inner = folder / classes[i % len(classes)] if classes else folder
        save(inner / f"{i:03}.png", scene(i, **options))
    return folder
