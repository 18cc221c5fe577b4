"""Piano rolls: where bars stand in the picture, and what the picture says."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from handmill.errors import UserError
from handmill.media import piano_roll, pictures
from handmill.media.notes import COLOURS, DRUMS, Note, Piece

SCALE = [Note(i, i + 1, 60 + i, 127, 8 * i, i % 4) for i in range(12)]


def coloured(picture: pictures.Pixels, colour: str) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Where the picture has just that colour: (H, W)."""
    rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(picture.astype(int) - rgb) <= 2).all(-1)


def test_a_rising_scale_rises_to_the_right() -> None:
    picture = piano_roll.draw([Piece("scale", [note._replace(voice=0) for note in SCALE])])
    assert picture.dtype == np.uint8
    rows, columns = np.nonzero(coloured(picture, COLOURS[0]))
    places = [(rows[columns == x].mean(), x) for x in np.unique(columns)]
    heights = np.array([row for row, _ in places])
    assert (np.diff(heights) <= 0).all()
    assert len(np.unique(heights.round())) == 12
    widths = np.diff([x for _, x in places])
    assert widths.max() <= 4  # one bar ends where the next begins


def test_voices_have_colours_and_programs_families() -> None:
    picture = piano_roll.draw([Piece("scale", SCALE)])
    assert all(coloured(picture, colour).sum() > 50 for colour in COLOURS[:4])
    assert not coloured(picture, COLOURS[5]).any()
    assert piano_roll.colours_of(SCALE, "voice", ("soprano", "alto")) == dict(
        zip(("soprano", "alto", "voice 3", "voice 4"), COLOURS, strict=False))
    some = [Note(0, 1, 60, program=p) for p in (DRUMS, 3, 0, 40)]
    assert list(piano_roll.colours_of(some, "program", ())) == ["drums", "piano", "strings"]
    assert len(piano_roll.colours_of([Note(0, 1, 60, voice=v) for v in range(30)], "voice", ())) == 30


def test_the_louder_is_darker() -> None:
    picture = piano_roll.draw([Piece("two", [Note(0, 1, 60, 127), Note(1, 2, 60, 20)])])
    blue = coloured(picture, COLOURS[0])
    row = picture[np.nonzero(blue.any(1))[0].mean().astype(int)]
    assert blue[:, :600].sum() > 500 > blue[:, 620:].sum()
    assert 120 < row[900].mean() < 250  # the same bar goes on paler


def test_only_the_beginning_is_drawn_and_the_title_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def kept(self: Figure, *args: object, **settings: object) -> object:
        figures.append(self)
        return subplots(self, *args, **settings)  # type: ignore[arg-type]

    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", kept)
    piano_roll.draw([Piece("long\n$x^2$ \x00piece", SCALE), Piece("none", []), Piece("drums", [Note(0, 0, 36)])],
                    seconds=5)
    titles = [axes.get_title("left") for axes in figures[0].axes]
    assert titles == ["long $x^2$ piece (first 5 of 12 s, 5 of 12 notes)", "none (no notes)", "drums (0.0 s, 1 note)"]
    marks = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert marks == ["C2", "C3", "C4", "C5"]
    assert figures[0].axes[0].get_xlim() == (0, 5)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_pieces_make_a_grid(count: int) -> None:
    picture = piano_roll.draw([Piece(f"piece {i}", SCALE) for i in range(count)])
    assert picture.shape[1:] == (1200, 3)
    assert picture.shape[0] < 350 * count + 200


def test_the_file_says_what_made_it(tmp_path: Path) -> None:
    piano_roll.save(tmp_path / "a.png", [Piece("scale", SCALE)], metadata={"seed": "7"})
    assert pictures.read_metadata(tmp_path / "a.png") == {"seed": "7"}
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_too_many_pieces_and_notes_that_are_none() -> None:
    with pytest.raises(UserError, match="at most 64"):
        piano_roll.draw([Piece("", SCALE)] * 65)
    with pytest.raises(UserError, match="no MIDI note"):
        piano_roll.draw([Piece("", [Note(0, 1, 200)])])
