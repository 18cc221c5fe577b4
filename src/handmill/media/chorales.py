"""Bach's chorales as JSON: {"train": [piece, ...], "valid": [...], "test": [...]}, a piece being a list of steps.

Boulanger-Lewandowski et al. 2012 (the splits, quarter notes, a step the list of sounding pitches); Huang et al. 2017
(CoCoNet: sixteenth notes, a step one pitch for each of four voices, -1 where it is silent). Figures on the first are
nats a frame, on the second nats a note: they are not to be compared.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from handmill.disk import parsed, write_text
from handmill.errors import UserError
from handmill.media.scores import PITCHES, REST, Grid, Score, from_grid, to_grid

SPLITS = ("train", "valid", "test")
LARGEST = 256 << 20  # bytes of a file
_NAMED = 20  # faults that a report tells in full


@dataclass(frozen=True)
class Report:
    """What was read and what was not."""

    pieces: Mapping[str, int]  # of each split, kept
    skipped: int  # pieces, and splits of unknown name
    faults: tuple[str, ...]  # one sentence with the place for each skipped thing, the first _NAMED

    def lines(self) -> list[str]:
        """For the screen."""
        kept = ", ".join(f"{split} {count}" for split, count in self.pieces.items())
        more = self.skipped - len(self.faults)
        return [f"{sum(self.pieces.values())} pieces ({kept}), {self.skipped} skipped", *self.faults,
                *([f"and {more} more"] if more else [])]


@dataclass(frozen=True)
class Chorales:
    """The pieces of each split; a step has `voices` entries, pitches or REST, or if 0 lists what sounds, ascending."""

    splits: Mapping[str, tuple[Grid, ...]]
    voices: int
    report: Report


def read(path: Path | str, voices: int | None = None) -> Chorales:
    """The chorales of a JSON file; broken pieces are left out and told in the report.

    `voices`: how many a step has, 0 for lists of what sounds; None: as many as the steps have entries where that is
    one number and they do not ascend, as lists of what sounds do and voices from the soprano down do not.
    Raises UserError for a file that is missing, too large or no JSON object, and when no piece is left.
    """
    content = _content(Path(path))
    faults = [f"{name!r} is no split: name them {', '.join(SPLITS)}" for name in content if name not in SPLITS]
    if voices is None:
        voices = _voices(content)
    splits: dict[str, tuple[Grid, ...]] = {}
    for split in SPLITS:
        pieces = content.get(split, [])
        if not isinstance(pieces, list):
            faults.append(f"{split} is no list of pieces")
            continue
        found = [_fault(piece, voices) for piece in pieces]
        faults += [f"{split}, piece {i}, {fault}" for i, fault in enumerate(found) if fault]
        splits[split] = tuple(_grid(piece, voices) for piece, fault in zip(pieces, found, strict=True) if not fault)
    if not any(splits.values()):
        raise UserError(f"{path} holds no piece that can be read{': ' if faults else ''}{'; '.join(faults[:1])}")
    counts = {split: len(pieces) for split, pieces in splits.items()}
    return Chorales(splits, voices, Report(counts, len(faults), tuple(faults[:_NAMED])))


def write(path: Path | str, splits: Mapping[str, Sequence[Grid]]) -> None:
    """Write pieces as `read` reads them. Raises UserError where the file cannot be written."""
    assert all(split in SPLITS for split in splits), list(splits)
    try:
        write_text(Path(path), json.dumps(splits) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None


def to_score(piece: Grid, per_quarter: int, voices: int = 0, held: bool = True, tempo: float = 100.0) -> Score:
    """The score of a piece with `per_quarter` steps a quarter note: 1 for the quarter grid, 4 for sixteenths.

    The grid does not tell a note held from one struck again: they are held, unless `held` is false (see from_grid).
    """
    return from_grid(piece, per_quarter, separated=voices > 0, held=held, tempo=tempo)


def from_score(score: Score, per_quarter: int, voices: int = 0) -> Grid:
    """A piece of a score (see to_grid); the inverse of `to_score`."""
    return to_grid(score, per_quarter, voices)


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB: split it")
        content = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is to hold an object with the splits {', '.join(SPLITS)}")
    return content


def _voices(content: Mapping[str, Any]) -> int:
    """How many voices a step has, or 0; a few broken steps do not change the answer."""
    pieces = [piece for split in SPLITS for piece in _list(content.get(split))]
    steps = [step for piece in pieces for step in _list(piece) if isinstance(step, list)]
    (entries, times), = Counter(map(len, steps)).most_common(1) or [(0, 0)]
    ascending = sum(all(low < high for low, high in pairwise(step)) for step in steps if _numbers(step))
    return entries if times > 0.95 * len(steps) and ascending < 0.5 * len(steps) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(step: list[Any]) -> bool:
    return all(type(pitch) is int for pitch in step)


def _fault(piece: Any, voices: int) -> str:
    """What is wrong with a piece and where; nothing where it is sound."""
    if not isinstance(piece, list) or not piece:
        return "is no list of steps"
    for number, step in enumerate(piece):
        if not isinstance(step, list):
            return f"step {number} is no list of pitches"
        if voices and len(step) != voices:
            return f"step {number} has {len(step)} entries where there are {voices} voices"
        for pitch in step:
            if type(pitch) is not int or not (0 <= pitch < PITCHES or (voices and pitch == REST)):
                return f"step {number}: {str(pitch)[:20]} is no pitch from 0 to {PITCHES - 1}"
    return ""


def _grid(piece: Sequence[Sequence[int]], voices: int) -> Grid:
    return tuple(tuple(step) if voices else tuple(sorted(set(step))) for step in piece)
