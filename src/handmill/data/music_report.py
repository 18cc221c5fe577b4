"""What the user is told of the music: the values of report.json, a few lines for the screen, piano rolls."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data.corpus import Ints
from handmill.data.music_files import Notes
from handmill.data.music_read import Copies, Piece, Read
from handmill.data.splits import Parts
from handmill.media.keys import relative
from handmill.media.music_tokens import UNKNOWN, Events, Frames, pitch_name
from handmill.media.scores import KEYS
from handmill.recipe import Recipe

_EXAMPLES = 20  # copies named in the report
_SHOWN = 8  # keys and names on the screen
_ROLLS = 6  # pieces drawn
_FEW = 3  # pieces of a name in training, below which it is remarked on
_DOUBTFUL = 0.5  # of the key signatures, that do not fit the notes
_SOME = 10  # pieces, below which nothing is said of the share of some
_LARGE = 0.25  # of the training tokens in one piece
_FREE = 0.2  # of the notes: more of them beside the grid were not played to it
_QUARTERS, _FINER = 0.3, 0.5  # of the steps repeat the one before: Bach's chorales have 0.12 and, in sixteenths, 0.64


def compose(recipe: Recipe, notes: Notes, read: Read, copies: Copies, parts: Parts,
            about: dict[str, dict[str, Any]], codec: Frames | Events) -> dict[str, Any]:
    """The report, but for the time taken."""
    kept = [read.pieces[i] for name in parts for i in parts[name]]
    train = [read.pieces[i] for i in parts["train"]]
    assert len(kept) == len(read.pieces) - len(copies.of), "every kept piece is in one split"
    report: dict[str, Any] = {
        "sources": {"left_out": notes.skipped.files, "kinds": dict(notes.kinds.most_common()),
                    "first_left_out": notes.skipped.first, "other_files": notes.other},
        "pieces": {"read": len(read.pieces), "kept": len(kept)},
        "duplicates": _copies(copies, read.pieces),
        "splits": about,
        "codec": {"kind": codec.kind, "size": codec.size},
        "totals": {key: sum(split[key] for split in about.values()) for key in ("tokens", "notes", "steps", "seconds")},
        "lengths": {"unit": "tokens", **_marks([piece.tokens for piece in kept])},
        "pitches": {"lowest": min(piece.shape.lowest for piece in kept),
                    "highest": max(piece.shape.highest for piece in kept)},
        "transposition": _room(train, codec, recipe.data.transpose),
        "changes": {change: dict(counts) for change, counts in read.changes.items()},
        "keys": _keys(kept, recipe.data.key),
        "tempos": {"unit": "quarter notes a minute", "unknown": sum(not piece.asked.tempo for piece in kept),
                   **_marks([piece.asked.tempo for piece in kept if piece.asked.tempo])},
        "names": dict(Counter(piece.asked.name for piece in kept if piece.asked.name).most_common())
        if recipe.data.names != "none" else {},
        "chorales": notes.repeated,
    }
    return report | {"remarks": _remarks(recipe, report, kept, train, codec)}


def _copies(copies: Copies, pieces: list[Piece]) -> dict[str, Any]:
    pairs = [(pieces[a], pieces[b], pieces[a].shape.lowest - pieces[b].shape.lowest) for a, b in copies.of.items()]
    moved = sum(higher != 0 for _, _, higher in pairs)
    return {"exact": len(pairs) - moved, "transposed": moved, "across_given_splits": copies.across,
            "first": [{"copy": a.name, "of": b.name, "semitones": higher} for a, b, higher in pairs[:_EXAMPLES]]}


def _marks(values: list[Any]) -> dict[str, float]:
    """The least, the median and the greatest, none of nothing."""
    if not values:
        return {}
    least, median, greatest = np.percentile(values, [0, 50, 100], method="nearest").tolist()
    return {"least": round(least, 3), "median": round(median, 3), "greatest": round(greatest, 3)}


def _room(train: list[Piece], codec: Frames | Events, wanted: int) -> dict[str, Any]:
    """Semitones that every training piece can be moved by, and how many can go as far as data.transpose both ways."""
    down = [piece.shape.lowest - codec.settings.lowest for piece in train]
    up = [codec.settings.highest - piece.shape.highest for piece in train]
    return {"down": min(down), "up": min(up), "wanted": wanted,
            "pieces_with_room": sum(min(room) >= wanted for room in zip(down, up, strict=True))}


def _keys(kept: list[Piece], by: str) -> dict[str, Any]:
    """Which keys the pieces are said to be in; a signature is doubtful that the notes fit neither mode of."""
    signed = [piece for piece in kept if piece.signature != UNKNOWN and piece.estimate != UNKNOWN]
    doubtful = sum(piece.estimate not in (piece.signature, relative(piece.signature)) for piece in signed)
    counts = Counter(KEYS[piece.asked.key] for piece in kept if piece.asked.key != UNKNOWN)
    used = sum(piece.signature != UNKNOWN for piece in kept) if by == "file" else 0
    given = 0 if by in ("file", "estimate") else len(kept)
    return {"signatures": len(signed), "doubtful": doubtful, "pieces": dict(counts.most_common()),
            "by_signature": used, "estimated": counts.total() - used - given, "given": given,
            "unknown": len(kept) - counts.total()}


def _remarks(recipe: Recipe, report: dict[str, Any], kept: list[Piece], train: list[Piece],
             codec: Frames | Events) -> list[str]:
    remarks = [*_of_grid(recipe, report), *_of_names(report, train, codec), *_of_splits(recipe, report)]
    keys, room = report["keys"], report["transposition"]
    if recipe.data.key == "file" and keys["signatures"] >= _SOME and keys["doubtful"] > _DOUBTFUL * keys["signatures"]:
        remarks.append(f"{keys['doubtful']:,} of {keys['signatures']:,} key signatures do not fit the notes, as where "
                       'a program writes C for every piece: set data.key = "estimate"')
    if room["pieces_with_room"] < len(train):
        remarks.append(f"{len(train) - room['pieces_with_room']:,} of {len(train):,} training pieces have no room for "
                       f"data.transpose = {room['wanted']} both ways: widen codec.lowest and codec.highest by that")
    largest = max(train, key=lambda piece: piece.tokens)
    if len(train) >= _SOME and largest.tokens > _LARGE * sum(piece.tokens for piece in train):
        remarks.append(f"{largest.name} alone holds more than {_LARGE:.0%} of the training tokens: look at it, cut it "
                       "or leave it out")
    if codec.settings.tempos and report["tempos"]["unknown"] == len(kept):
        remarks.append("no piece says its tempo, so that codec.tempos teaches nothing: leave it out")
    return remarks


def _of_grid(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    remarks = []
    moved = report["changes"].get("notes moved to the grid", {}).get("times", 0)
    if moved > _FREE * report["totals"]["notes"]:
        remarks.append(f"{moved:,} notes begin off the grid of codec.steps = {recipe.codec.steps}: raise it (12 has "
                       'triplets too), or set codec.kind = "events" for music that was played freely')
    steps = recipe.data.grid or getattr(recipe.codec, "steps", 4)
    for name, share in report["chorales"].items():
        key = "data.grid" if recipe.data.grid or recipe.codec.kind == "events" else "codec.steps"
        looks, right = ("quarter notes", 1) if steps > 1 else ("sixteenths", 4)
        if (steps > 1 and share < _QUARTERS) or (steps == 1 and share > _FINER):
            remarks.append(f"in {name} {share:.0%} of the steps repeat the one before, as on a grid of {looks}, but "
                           f"{key} makes a quarter note of {steps}, so that it plays too "
                           f"{'fast' if steps > 1 else 'slowly'}: set {key} = {right}")
    return remarks


def _of_names(report: dict[str, Any], train: list[Piece], codec: Frames | Events) -> list[str]:
    remarks = []
    counts = Counter(piece.asked.name for piece in train)
    few = [name for name in codec.settings.names if counts[name] < _FEW]
    if few:
        remarks.append(f"{len(few):,} of {len(codec.settings.names):,} names have fewer than {_FEW} pieces to train "
                       f"on, such as {few[0]!r}: add pieces")
    if others := sorted({*report["names"]} - {*codec.settings.names}):
        remarks.append(f"{len(others):,} sub-folders are not in codec.names, such as {others[0]!r}: their pieces have "
                       "no name")
    return remarks


def _of_splits(recipe: Recipe, report: dict[str, Any]) -> list[str]:
    remarks = []
    if across := report["duplicates"]["across_given_splits"]:
        remarks.append(f"{across:,} pieces are copies of others of another split; they stay, because the file brings "
                       "its splits")
    if recipe.data.test and not report["splits"]["test"]["documents"]:
        remarks.append("there is no test split, because the chorales bring a validation split and none for the test")
    return remarks


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for the screen."""
    pieces, copies, total, lengths = (report[key] for key in ("pieces", "duplicates", "totals", "lengths"))
    left_out, room, pitches = report["sources"], report["transposition"], report["pitches"]
    lines = [
        f"pieces      {pieces['read']:,} read, {pieces['kept']:,} kept; {copies['exact']:,} exact copies and "
        f"{copies['transposed']:,} in another key removed",
        "splits      " + ", ".join(f"{name} {split['documents']:,} pieces, {split['tokens']:,} tokens"
                                   for name, split in report["splits"].items() if split["documents"]),
        f"music       {_clock(total['seconds'])}, {total['notes']:,} notes"
        + (f" in {total['steps']:,} steps (a note counts in each that it sounds in)" if total["steps"] else ""),
        f"tokens      {report['codec']['kind']}, {report['codec']['size']:,} of them; {lengths['median']:,} a piece in "
        f"the middle, {lengths['least']:,} to {lengths['greatest']:,}",
        f"pitches     {_pitches(pitches)}; in training room for {room['down']} semitones down and {room['up']} up",
        f"keys        {_counted(report['keys']['pieces'])}; {report['keys']['by_signature']:,} by their files, "
        f"{report['keys']['estimated']:,} estimated, {report['keys']['given']:,} as the recipe says",
    ]
    if "median" in report["tempos"]:
        tempos = report["tempos"]
        lines.append(f"tempos      {tempos['median']:.0f} quarter notes a minute in the middle, {tempos['least']:.0f} "
                     f"to {tempos['greatest']:.0f}")
    if report["names"]:
        lines.append(f"names       {_counted(report['names'])}")
    if report["changes"]:
        lines.append("changed     " + ", ".join(f"{counts['times']:,} {change} ({counts['pieces']:,} pieces)"
                                                for change, counts in report["changes"].items()))
    if copies["first"]:
        lines.append("copies      " + "; ".join(f"{pair['copy']} of {pair['of']}" for pair in copies["first"][:2]))
    if left_out["first_left_out"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out["kinds"].items())
        lines.append(f"left out    {left_out['left_out']:,} ({kinds}), first {left_out['first_left_out'][0]}")
    return lines + [f"note        {remark}" for remark in report["remarks"]]


def _clock(seconds: float) -> str:
    """ "2 h 03 min" or "3 min 20 s" """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _pitches(pitches: dict[str, int]) -> str:
    low, high = pitches["lowest"], pitches["highest"]
    return f"{pitch_name(low)} to {pitch_name(high)} ({low} to {high})" if low <= high else "none but drums"


def _counted(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in [*counts.items()][:_SHOWN])
    return f"{shown} and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else shown or "none"


def rolls(path: Path, read: Read, train: Ints) -> None:
    """Draw a few training pieces, evenly spread, as the codec has them."""
    from handmill.media import performing
    from handmill.media.notes import Piece as Drawn
    from handmill.media.synthesis import LONGEST

    numbers = train[np.unique(np.linspace(0, len(train) - 1, _ROLLS).astype(np.int64))]
    shown = []
    for piece in (read.pieces[number] for number in numbers):
        heard = performing.seconds(performing.of_tokens(read.bare, read.tokens(piece)))
        shown.append(Drawn(piece.name, [note._replace(end=min(note.end, LONGEST)) for note in heard
                                        if note.start < LONGEST]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names in letters that the font lacks
        performing.save_rolls(path, shown)
