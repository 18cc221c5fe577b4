"""Music: the [data] table."""

from dataclasses import dataclass
from typing import Literal

from handmill.errors import UserError
from handmill.media.music_words import key_of
from handmill.recipe import positive, within


@dataclass(frozen=True)
class Data:
    """The [data] table of a music model."""

    paths: tuple[str, ...] = ()  # MIDI files, folders and .zip of them, patterns, chorales in .json with their splits
    licence: str = "unknown"  # of the sources, for the manifest
    names: Literal["none", "folder"] = "none"  # folder: a piece is named by its sub-folder, a composer or a genre
    key: str = "file"  # file: by its key signature, where it has none, or "estimate": from its notes; or the key, such
    # as C, that all pieces are said to be in because they were moved there: a training window moved again then says so
    pedal: bool = True  # notes let go while the sustain pedal is down sound on
    grid: int = 0  # steps a quarter note in .json chorales, which do not say; 0: as codec.steps, of events 4
    shortest: int = 8  # notes; pieces with fewer are left out
    transpose: int = 0  # semitones up and down that training windows are drawn from; 0: none
    transpose_share: float = 1.0  # of the training windows that are drawn so; the others stay as they are
    validation: float = 0.05  # share of the pieces; without effect where .json chorales bring the split
    test: float = 0.05  # share of the pieces; 0: no test split

    def __post_init__(self) -> None:
        positive(self, "validation", "shortest")
        within(self, 0.0, 0.5, "validation", "test")
        within(self, 0, 24, "grid", "transpose")
        within(self, 0.0, 1.0, "transpose_share")
        if self.key not in ("file", "estimate"):
            key_of(self.key)
        if self.validation + self.test >= 1:
            raise UserError("validation + test must leave a part to train on: lower them")
