"""What was read of the user's music, before any of it is decided on."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from handmill.data.music_fit import Shape
from handmill.media.music_tokens import Asked, Events, Frames, Tokens


@dataclass(frozen=True)
class Piece:
    """A piece that was read, but for its tokens."""

    name: str
    given: int  # number of the path
    split: str  # that its file brings; "": none
    asked: Asked  # what is said of it; the name is that of its folder
    signature: int  # the key that its file names, UNKNOWN where it names none
    estimate: int  # the key that its notes are in
    shape: Shape
    start: int  # place of its tokens in the temporary file
    tokens: int
    notes: int
    steps: int
    seconds: float


@dataclass
class Read:
    """What was read, in order; the tokens without headers are in a file."""

    file: Path
    bare: Frames | Events  # their codec
    pieces: list[Piece] = field(default_factory=list)
    changes: dict[str, Counter[str]] = field(default_factory=dict)  # change -> {"pieces": n, "times": n}

    def tokens(self, piece: Piece) -> Tokens:
        """The tokens (T,) of a piece in the bare codec."""
        return np.fromfile(self.file, "<u2", piece.tokens, offset=2 * piece.start)


@dataclass(frozen=True)
class Copies:
    """Which pieces are copies of another that is kept, perhaps in another key."""

    of: dict[int, int]  # copy -> that one
    across: int  # copies that stay, because their files bring them in two splits
