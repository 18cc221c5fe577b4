"""A piece as a codec can write it: what it has no room for is left out, moved or thinned, and counted.

T tokens, S steps.
"""

from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handmill.data.decoding import Refused
from handmill.errors import UserError
from handmill.media.music_tokens import Events, EventSettings, Frames, FrameSettings, Tokens
from handmill.media.scores import DRUMS, Grid, Score, Step

_STRUCK = ("pitch", "on", "drum")  # sections of tokens that are notes


class Fitted(NamedTuple):
    """A piece in tokens, and what was changed for that."""

    tokens: Tokens  # (T,) of the music alone
    changes: Counter[str]  # what was changed -> how many notes or steps


class Shape(NamedTuple):
    """What a piece is whatever its key, and the pitches that it spans."""

    mark: bytes  # the same for pieces of the same intervals
    lowest: int  # pitch; above `highest` where drums are all
    highest: int


def bare(settings: FrameSettings | EventSettings) -> Frames | Events:
    """The codec of the music alone: no key, tempo or name stands before a piece."""
    return codec_of(replace(settings, keys=False, tempos=(), names=()))


def codec_of(settings: FrameSettings | EventSettings) -> Frames | Events:
    """The codec of the [codec] table."""
    return Frames(settings) if isinstance(settings, FrameSettings) else Events(settings)


def fit(score: Score, codec: Frames | Events) -> Fitted:
    """The tokens of a score in a bare codec. Raises Refused for pitches out of range and a piece that is too long."""
    changes: Counter[str] = Counter()
    score = _played(score, codec, changes)
    _check_range(score, codec.settings)
    try:
        if isinstance(codec, Events):
            return Fitted(codec.encode(score), changes)
        _check_grid(score, codec.settings.steps, changes)
        grid = _thinned(codec.read(score), codec.settings.voices, changes)
        return Fitted(codec.encode(grid), changes)
    except UserError as error:
        raise Refused("too long", str(error)) from None


def _played(score: Score, codec: Frames | Events, changes: Counter[str]) -> Score:
    """The score without drums where the codec has none, in the codec's programs."""
    notes = score.notes
    if isinstance(codec, Frames) or not codec.settings.drums:
        notes = tuple(note for note in notes if note.program != DRUMS)
        changes["drum notes left out"] = len(score.notes) - len(notes)
    if not notes:
        raise Refused("no notes", "it has drums alone, which the codec has no tokens for: leave it out")
    if isinstance(codec, Events):
        programs = {note.program for note in notes} - {DRUMS}
        moved = {program: nearest(program, codec.settings.programs) for program in programs}
        changes["notes played by another program"] = sum(moved.get(n.program, n.program) != n.program for n in notes)
        notes = tuple(note._replace(program=moved.get(note.program, note.program)) for note in notes)
    return replace(score, notes=notes)


def nearest(program: int, programs: tuple[int, ...]) -> int:
    """The nearest of `programs` in the program's General MIDI family of eight, or else the first of them."""
    family = [one for one in programs if one // 8 == program // 8]
    return min(family, key=lambda one: abs(one - program)) if family else programs[0]


def _check_range(score: Score, s: FrameSettings | EventSettings) -> None:
    pitches = [note.pitch for note in score.notes if note.program != DRUMS]
    if pitches and not s.lowest <= min(pitches) <= max(pitches) <= s.highest:
        raise Refused("out of range", f"its pitches go from {min(pitches)} to {max(pitches)}: widen codec.lowest = "
                      f"{s.lowest} and codec.highest = {s.highest}, or leave it out")


def _check_grid(score: Score, steps: int, changes: Counter[str]) -> None:
    """Count the notes that begin more than a quarter of a step beside the grid: of notes at any time, half."""
    place = score.array[:, 0] * steps % score.resolution  # of a step, in 1 / resolution
    beside = np.minimum(place, score.resolution - place)
    changes["notes moved to the grid"] = int((4 * beside > score.resolution).sum())


def _thinned(grid: Grid, voices: int, changes: Counter[str]) -> Grid:
    """The grid with at most so many pitches a step: the outer ones stay."""
    changes["steps thinned"] = sum(len(step) > voices for step in grid)
    return tuple(outer(step, voices) for step in grid)


def outer(step: Step, voices: int) -> Step:
    """Of ascending pitches the highest and the lowest, `voices` in all; of an odd number one more from the top."""
    low, high = voices // 2, voices - voices // 2
    return step if len(step) <= voices else (*step[:low], *step[len(step) - high:])


def shape(tokens: Tokens, codec: Frames | Events) -> Shape:
    """The shape of a piece (T,) in a bare codec."""
    pitch = np.full(codec.size, -1)
    for section in {"pitch", "on", "off"} & {*codec.count}:
        pitch[codec.first[section]:codec.first[section] + codec.count[section]] = np.arange(codec.count[section])
    place, s = pitch[tokens], codec.settings  # (T,)
    pitched = place >= 0
    lowest, highest = s.highest, s.lowest
    if pitched.any():
        lowest, highest = s.lowest + int(place[pitched].min()), s.lowest + int(place.max())
    moved = tokens.astype("<i8") - np.where(pitched, lowest, 0)
    return Shape(blake2b(moved.tobytes(), digest_size=16).digest(), lowest, highest)


def struck(codec: Frames | Events) -> NDArray[np.bool_]:
    """Which tokens (V,) are notes: on a grid, a pitch that sounds in a step."""
    return np.array([codec.section(token)[0] in _STRUCK for token in range(codec.size)])
