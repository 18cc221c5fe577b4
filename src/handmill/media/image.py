"""Images: the [data] table."""

from dataclasses import dataclass
from typing import Literal

from handmill.errors import UserError
from handmill.recipe import not_negative, positive, within

_BOMB = 178_956_970  # pixels, beyond which Pillow itself refuses a file
_DISTANCE = 10  # bits of 64; from here on most pairs of any drawings would have to be compared


@dataclass(frozen=True)
class Data:
    """The [data] table of an image model."""

    paths: tuple[str, ...] = ()  # folders, images, patterns, .zip, .npz (x and perhaps y), "scikit-learn:digits"
    test_paths: tuple[str, ...] = ()  # files that are the test split; `test` is then ignored
    licence: str = "unknown"  # of the sources, for the manifest
    size: tuple[int, int] = (32, 32)  # pixels: height, width
    colour: Literal["rgb", "grey"] = "rgb"
    fit: Literal["crop", "pad", "stretch"] = "crop"  # how another shape becomes `size`
    background: tuple[int, int, int] = (255, 255, 255)  # red, green, blue behind transparency and in padding
    label: str = "auto"  # auto: sub-folders or npz y; none; or a column of captions.csv or metadata.jsonl
    caption: str = "auto"  # column of the caption; auto: "caption" or "text"
    near_duplicates: int = 6  # bits of 64 in which the perceptual hashes of copies may differ; 0: exact copies only
    smallest: int = 8  # pixels a side; smaller images are left out
    largest: int = 100_000_000  # pixels; larger images are left out by what their header says
    validation: float = 0.05  # share of the images
    test: float = 0.05  # share of the images; 0: no test split
    flip: bool = False  # left to right, half of the time
    shift: int = 0  # pixels; a random crop after padding with the edge by as many
    rotation: float = 0.0  # degrees, either way
    colour_jitter: float = 0.0  # share by which brightness, contrast and saturation vary
    binarise: Literal["no", "threshold", "sampled"] = "no"  # sampled: each pixel drawn with its grey value, each visit

    def __post_init__(self) -> None:
        positive(self, "validation", "smallest")
        within(self, 0.0, 0.5, "validation", "test")
        within(self, 0.0, 180.0, "rotation")
        within(self, 0.0, 1.0, "colour_jitter")
        within(self, 1, _BOMB, "largest")
        not_negative(self, "shift")
        if not all(4 <= side <= 4096 for side in self.size):
            raise UserError(f"size = {list(self.size)} is height and width in pixels: each from 4 to 4096")
        if not all(0 <= value <= 255 for value in self.background):
            raise UserError(f"background = {list(self.background)} is red, green and blue: each from 0 to 255")
        if self.shift >= min(self.size):
            raise UserError(f"shift = {self.shift} would move the whole image out: choose less than {min(self.size)}")
        if self.validation + self.test >= 1:
            raise UserError("validation + test must leave a part to train on: lower them")
        if not 0 <= self.near_duplicates <= _DISTANCE:
            raise UserError(f"near_duplicates = {self.near_duplicates} is a distance in bits: choose 0 (exact copies "
                            f"only) to {_DISTANCE}")
        if not self.label or not self.caption:
            raise UserError('label and caption name a column, or are "auto" (label also "none"): give them a value')
        if self.binarise != "no" and self.colour == "rgb":
            raise UserError(f'binarise = "{self.binarise}" makes grey images black and white: set colour = "grey"')

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a prepared image."""
        return *self.size, 3 if self.colour == "rgb" else 1
