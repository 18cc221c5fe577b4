"""Music as a picture: time to the right, pitch upwards, a bar a note, its colour the voice and its shade the velocity.

N notes, H height, W width.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from handmill.errors import UserError
from handmill.media.notes import COLOURS, Note, Piece, duration, family, ordered, pitch_name
from handmill.media.pictures import Pixels, save_png
from handmill.media.synthesis import LONGEST

By = Literal["voice", "program"]
Colours = Mapping[str, str]  # what a note belongs to -> its colour

_MOST_PIECES = 64
_MOST_NOTES = 20_000  # of a piece
_BLACK = (1, 3, 6, 8, 10)  # keys of an octave
_PALEST = 0.3  # of the colour, at velocity 0; the rest is white
_SHORTEST = 0.004  # of the time axis, so that the shortest note is seen


def save(path: Path | str, pieces: Sequence[Piece], by: By = "voice",
         names: Sequence[str] = (), seconds: float = 60.0, metadata: Mapping[str, str] | None = None) -> None:
    """Write the picture as PNG, with `metadata` in its text chunks. Raises UserError as `draw` and `save_png` do."""
    save_png(path, draw(pieces, by, names, seconds), metadata)


def draw(pieces: Sequence[Piece], by: By = "voice", names: Sequence[str] = (),
         seconds: float = 60.0) -> Pixels:
    """The pieces under one another or in a grid, on one scale of pitch: (H, W, 3).

    Of each the first `seconds` are drawn, and its title says so. Colours are of voices, called `names[voice]` where
    there is such a name, or of families of programs. Raises UserError for a note out of range and for more than 64
    pieces.
    """
    assert pieces
    if len(pieces) > _MOST_PIECES:
        raise UserError(f"{len(pieces):,} pieces are too many for one picture: draw at most {_MOST_PIECES}")
    shown = [Piece(piece.title, ordered(piece.notes, LONGEST)) for piece in pieces]
    columns = 1 if len(pieces) < 4 else 2 if len(pieces) < 9 else 3
    rows = -(-len(pieces) // columns)
    figure = Figure(figsize=(12, 0.6 + max(2.6, 4.4 - 0.9 * columns) * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    colours = colours_of([note for piece in shown for note in piece.notes], by, names)
    for axes, piece in zip(panels, shown, strict=False):
        _roll(axes, piece, colours, by, names, seconds)
    for axes in panels[len(shown):]:
        axes.set_axis_off()
    _keys(panels[0], [note.pitch for piece in shown for note in piece.notes])
    if len(colours) > 1:
        figure.legend(handles=[Patch(color=colour, label=what) for what, colour in colours.items()],
                      loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _roll(axes: Axes, piece: Piece, colours: Colours, by: By, names: Sequence[str], seconds: float) -> None:
    """One piece: its bars over octave lines."""
    whole = duration(piece.notes)
    notes = [note for note in piece.notes if note.start < seconds][:_MOST_NOTES]
    span = min(whole, seconds) or 1.0
    axes.set_title(_title(piece, notes, whole, seconds), loc="left", fontsize=10, parse_math=False)
    axes.set_xlim(0, span)
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for octave in range(0, 128, 12):
        axes.axhline(octave - 0.5, color="#b9bec5", linewidth=0.7, zorder=0)
        for key in _BLACK:
            axes.axhspan(octave + key - 0.5, octave + key + 0.5, color="#f3f4f6", linewidth=0, zorder=-1)
    if notes:
        shades = [_shade(colours[group(note, by, names)], note.velocity) for note in notes]
        axes.add_collection(PolyCollection(list(_bars(notes, span)), facecolors=shades, edgecolors="white",
                                           linewidths=0.4), autolim=False)


def _title(piece: Piece, notes: Sequence[Note], whole: float, seconds: float) -> str:
    """The piece's title, and how much of it is seen."""
    title = " ".join("".join(c if c.isprintable() else " " for c in piece.title).split())[:100]
    if not piece.notes:
        return f"{title} (no notes)"
    some = f"first {seconds:g} of {whole:,.0f} s" if whole > seconds else f"{whole:,.1f} s"
    count = f"{len(notes):,} of {len(piece.notes):,}" if len(notes) < len(piece.notes) else f"{len(notes):,}"
    return f"{title} ({some}, {count} {'note' if len(piece.notes) == 1 else 'notes'})"


def _bars(notes: Sequence[Note], span: float) -> npt.NDArray[np.float64]:
    """The corners of the notes' rectangles: (N, 4, 2)."""
    start, end, pitch = (np.array(column, np.float64) for column in
                         zip(*((note.start, note.end, note.pitch) for note in notes), strict=True))
    end = np.maximum(end, start + _SHORTEST * span)
    low, high = pitch - 0.45, pitch + 0.45
    return np.stack([np.stack(corner, -1) for corner in ((start, low), (end, low), (end, high), (start, high))], 1)


def _keys(axes: Axes, pitches: Sequence[int]) -> None:
    """An octave or more about the pitches, each C by its name."""
    low, high = min(pitches, default=60), max(pitches, default=71)
    room = max(2, (12 - (high - low)) // 2)
    axes.set_ylim(low - room - 0.5, high + room + 0.5)
    marked = [pitch for pitch in range(0, 128, 12) if low - room <= pitch <= high + room]
    axes.set_yticks(marked, [pitch_name(pitch) for pitch in marked])


def colours_of(notes: Iterable[Note], by: By, names: Sequence[str]) -> dict[str, str]:
    """A colour for every group there is, in the order of voices or programs."""
    one_of_each = {_place(note, by): note for note in notes}
    groups = list(dict.fromkeys(group(one_of_each[place], by, names) for place in sorted(one_of_each)))
    return {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}


def _place(note: Note, by: By) -> int:
    return note.voice if by == "voice" else note.program


def group(note: Note, by: By, names: Sequence[str]) -> str:
    """The family of the note's program, or its voice by its name."""
    if by == "program":
        return family(note.program)
    return names[note.voice] if 0 <= note.voice < len(names) else f"voice {note.voice + 1}"


def _shade(colour: str, velocity: int) -> tuple[float, ...]:
    """The colour mixed with white: all of it at velocity 127."""
    share = _PALEST + (1 - _PALEST) * velocity / 127
    return tuple(1 - share + share * part for part in to_rgb(colour))

