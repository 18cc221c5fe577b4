"""Prepared music on disk: pieces packed one after another as documents of text are (data/packed.py).

Every piece is END, its header (what is said of it: key, tempo class, name) and its tokens. Beside what every packed
corpus has:

    codec/tokenizer.json        the tokens (media/music_tokens.py), with the names that were found
    {train,...}.names.json      the file of each piece
    roll.png                    some of the pieces

data.json says of each split: documents, tokens, notes (tokens that strike a pitch: on a grid, a pitch once for each
step that it sounds in), steps (0 for events), seconds.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data.packed import Packed
from handmill.data.prepared import read_json, write_json
from handmill.data.splits import NAMES
from handmill.errors import UserError
from handmill.media.music_tokens import Events, Frames, Tokens, load

FORMAT = "handmill-music/1"


class Pieces(Packed):
    """Prepared pieces. Opening them reads data.json and nothing else."""

    form = FORMAT

    def names(self, split: str) -> list[str]:
        """The file of each piece. Raises UserError when they are missing."""
        file = self.folder / f"{split}.names.json"
        names = read_json(file).get("names")
        if not isinstance(names, list) or len(names) != self.documents(split):
            raise UserError(f"{file} does not hold {self.documents(split):,} names: prepare the data again")
        return names

    def codec(self) -> Any:
        """The Frames or Events, here or beside this folder as in a model folder. Raises UserError."""
        return load(None, self._codec_folder())

    def held_out_files(self) -> list[str]:
        """What a model folder keeps, to be checked anywhere: all but the codec and the training split."""
        names = ["roll.png", *(f"{split}.names.json" for split in NAMES if split != "train")]
        return super().held_out_files() + [name for name in names if (self.folder / name).exists()]

    def complete(self) -> bool:
        """Whether every file is there in its size."""
        try:
            named = all(self.names(split) is not None for split in NAMES)
            return named and super().complete() and (self.folder / "roll.png").is_file()
        except UserError:
            return False


def write_split(folder: Path, split: str, codec: Frames | Events, names: list[str], pieces: Iterable[Tokens]) -> int:
    """Write the names of pieces and their tokens (T,), given without END; returns how many tokens that are."""
    places = [0]
    with (folder / f"{split}.tokens").open("wb") as file:
        for tokens in pieces:
            file.write(np.concatenate([[codec.end], tokens]).astype("<u2").data)
            places.append(places[-1] + 1 + len(tokens))
    assert len(places) == 1 + len(names), "every piece has a name"
    np.save(folder / f"{split}.starts.npy", np.array(places[:-1], np.int64))
    write_json(folder / f"{split}.names.json", {"names": names})
    return places[-1]
