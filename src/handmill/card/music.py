"""The sections of a card that only music has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handmill.card import facts
from handmill.card.facts import NOT_CHECKED, Row, number
from handmill.checks.music_verdict import compared_rows, likelihood_rows, longest_line
from handmill.checks.tables import percent
from handmill.checks.verdict import carried_lines
from handmill.disk import parsed
from handmill.media import music_tokens, music_words, performing, player, sound, synthesis
from handmill.media.music_tokens import Events, Frames, pitch_name
from handmill.media.notes import Note, Piece, duration
from handmill.media.player import Recording
from handmill.media.scores import KEYS
from handmill.page import Block, Points, Raw, Section, Table, Text
from handmill.recipe import Recipe
from handmill.training.monitor import duration as lasting

DATA, SEEN = "music", "Beside pieces it has not seen"
_ROLL, _DATA_ROLL = "samples/check.png", "data/roll.png"
_PIECES, _LONGEST = 6, 600.0  # shown; seconds of each
_HEARD, _RATE = 12.0, 22_050  # seconds and Hz of the recording: half a megabyte
_NAMED = 20  # names, keys


def head(path: Path, recipe: Recipe) -> list[Row]:
    """Rows of the first table."""
    codec = music_tokens.load(None, path / "codec")
    asked = [f"{word} ({len(values):,})" for word, values in music_words.choices(codec).items()]
    memory = getattr(recipe.network, "memory", 0)
    return [("context", f"{recipe.network.context:,} tokens" + (f", {memory:,} remembered" if memory else "")),
            *_vocabulary(codec), ("can be asked for", ", ".join(asked) or "nothing"),
            ("sampling", facts.sampling(recipe.table()["sampling"]))]


def limits(path: Path, recipe: Recipe, report: dict[str, Any], check: dict[str, Any]) -> list[str]:
    """What it is for, and what it cannot do."""
    codec = music_tokens.load(None, path / "codec")
    return ["It makes music like its training pieces and nothing else; what is rare among them it makes badly or "
            "never.", _asked(codec), _unheard(codec),
            "It may repeat its training pieces, and music that is under copyright stays so when a model repeats it: "
            "look at the copying below, and at the licence of the data, before sharing or selling what it makes.",
            "What it makes was composed by nobody and is not to be passed off as a person's work: the MIDI and wav "
            "files that `handmill generate` writes say inside that a model made them, and which."]


def data(path: Path, report: dict[str, Any]) -> list[Block]:
    """What was read, kept and held out, and some of the pieces as piano rolls."""
    if not report:
        return [Text("Not recorded: how the pieces were chosen and split.")]
    pieces, copies, total = report.get("pieces", {}), report.get("duplicates", {}), report.get("totals", {})
    rows: list[Row] = [
        ("pieces read", number(pieces.get("read"))), ("pieces kept", number(pieces.get("kept"))),
        ("left out", _left_out(report.get("sources", {}))),
        ("exact copies removed", number(copies.get("exact"))),
        ("copies in another key removed", number(copies.get("transposed"))),
        ("music", facts.seconds(total.get("seconds"))),
        (f"notes{' (in each step that they sound in)' if total.get('steps') else ''}", number(total.get("notes"))),
        ("pitches", _pitches(report.get("pitches", {}))), ("keys", _keys(report.get("keys", {}))),
        ("tempos", _tempos(report.get("tempos", {}))), ("names", _counted(report.get("names", {})) or "none"),
        ("moved in training", _moved(report.get("transposition", {}))),
        ("changed to fit", "; ".join(f"{count.get('times', 0):,} {what} ({count.get('pieces', 0):,} pieces)"
                                     for what, count in report.get("changes", {}).items()) or "nothing")]
    splits: list[Row] = [("split", "pieces", "tokens", "notes", "time"), *(
        (name, *(number(part.get(key)) for key in ("documents", "tokens", "notes")), facts.seconds(part.get("seconds")))
        for name, part in report.get("splits", {}).items())]
    remarks = [facts.public(remark) for remark in report.get("remarks", [])]
    return [Table([("", ""), *rows]), Table(splits), *([Points(remarks)] if remarks else []),
            facts.picture(path, _DATA_ROLL, "Some of the training pieces as piano rolls", "Not drawn: some pieces.")]


def measured(path: Path, recipe: Recipe, check: dict[str, Any]) -> list[Section]:
    """What the check found."""
    return [Section("Quality on held-out pieces", _quality(check) if check else [Text(NOT_CHECKED)]),
            Section("Samples beside held-out pieces", _likeness(check) if check else [Text(NOT_CHECKED)]),
            Section("Copying from the training pieces", _copying(check) if check else [Text(NOT_CHECKED)]),
            Section("Samples", _samples(path, check))]


def _vocabulary(codec: Frames | Events) -> list[Row]:
    s = codec.settings
    pitches = ("pitches", f"{pitch_name(s.lowest)} to {pitch_name(s.highest)} (MIDI {s.lowest} to {s.highest})")
    if isinstance(codec, Frames):
        top = "; the highest one is given, and it puts the others under it" if codec.settings.melody else ""
        return [("vocabulary", f"chords on a grid, {codec.size:,} tokens"),
                ("grid", f"{codec.settings.steps} steps a quarter note"), pitches,
                ("voices", f"{codec.settings.voices} at once{top}")]
    programs = ", ".join(map(str, codec.settings.programs[:_NAMED])) + (" and drums" if codec.settings.drums else "")
    return [("vocabulary", f"events in free time, {codec.size:,} tokens"),
            ("grain", f"{codec.settings.grain} ms, {codec.settings.velocities} velocities"), pitches,
            ("programs", f"{programs} (General MIDI, from 0)")]


def _asked(codec: Frames | Events) -> str:
    can = music_words.choices(codec)
    if not can:
        return "It was not told keys, tempos or names and cannot be asked for any."
    classes = ", ".join(can.get("tempo", []))
    told = {"key": "a key", "tempo": f"a tempo, in classes of quarter notes a minute ({classes})",
            "name": f"a name ({_some(can.get('name', []))})"}
    return f"It can be asked for {'; '.join(told[word] for word in can)}. It obeys as far as its pieces taught it to."


def _unheard(codec: Frames | Events) -> str:
    """What its tokens cannot say."""
    if isinstance(codec, Frames):
        return (f"Its grid knows neither loudness nor what is shorter than 1/{codec.settings.steps} of a quarter note, "
                "and does not tell a note that is held from one that is struck again.")
    return (f"Its notes begin and end to {codec.settings.grain} ms, in {codec.settings.velocities} degrees of "
            "loudness; it knows no beats, bars or voices but its programs.")


def _left_out(sources: dict[str, Any]) -> str:
    if "left_out" not in sources:
        return "not recorded"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sources.get("kinds", {}).items())
    return f"{sources['left_out']:,}{f' ({kinds})' if kinds else ''}, {sources.get('other_files', 0):,} other files"


def _pitches(pitches: dict[str, Any]) -> str:
    low, high = pitches.get("lowest"), pitches.get("highest")
    if low is None or high is None:
        return "not recorded"
    return f"{pitch_name(low)} to {pitch_name(high)} (MIDI {low} to {high})" if low <= high else "none but drums"


def _keys(keys: dict[str, Any]) -> str:
    counts = _counted(keys.get("pieces", {}))
    return (f"{counts}; {number(keys.get('by_signature'))} by their files, {number(keys.get('estimated'))} estimated"
            if counts else "not recorded")


def _tempos(tempos: dict[str, Any]) -> str:
    if "median" not in tempos:
        return "not recorded"
    return (f"{tempos['median']:.0f} quarter notes a minute in the middle, {tempos['least']:.0f} to "
            f"{tempos['greatest']:.0f}; {number(tempos.get('unknown'))} unknown")


def _moved(room: dict[str, Any]) -> str:
    if not room.get("wanted"):
        return "no" if "wanted" in room else "not recorded"
    return (f"up to {room['wanted']} semitones up and down; {number(room.get('pieces_with_room'))} pieces have room "
            "for all of that")


def _counted(counts: dict[str, int]) -> str:
    """ "G 12, C 9 and 3 more" """
    return _some([f"{name} {count:,}" for name, count in counts.items()])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _quality(check: dict[str, Any]) -> list[Block]:
    verdict = Text(f"Verdict: {check.get('verdict', {}).get('text', 'not recorded')}.")
    if not {"held_out", "likelihood", "baselines"} <= check.keys():
        return [Text("Not measured: likelihood."), verdict]
    held, found = check["held_out"], check["likelihood"]
    unit = found["nats_per_token"]
    told = (f"Measured on {held['pieces']:,} of {held['pieces_in_split']:,} pieces of the {held['split']} split: "
            f"{held['tokens']:,} tokens, {held['notes']:,} notes. Lower is better; in brackets intervals of 95 % "
            f"({unit['method']}, n = {unit['n']:,}). A figure compares only with others of the same unit and grid.")
    return [Text(told), Table([*likelihood_rows(check)]),
            Text(f"Counted: {found['counted']}. Read in {found['read']}."), *map(Text, carried_lines(check)), verdict]


def _likeness(check: dict[str, Any]) -> list[Block]:
    if missing := _missing(check, "style", "pitch_classes", "samples"):
        return [missing]
    samples, classes = check["samples"], check["pitch_classes"]
    cut = check["style"].get("cut", 0)
    told = f"{samples['count']:,} samples, asked for {samples.get('asked', '?')}; in brackets intervals of 95 %."
    return [Text(told + (f" {cut:,} of them are as long as the check lets them be." if cut else "")),
            Table([*compared_rows(check | {"novelty": {"found": {}}})]),  # which has a section of its own
            Text(f"Share of the sounding time of each pitch class, counted from {classes['from']}:"),
            Table([("", *(KEYS[:12] if classes["from"] == "C" else map(str, range(12)))),
                   *((name, *(f"{share:.1%}" for share in classes[key]))
                     for name, key in (("samples", "generated"), ("held-out pieces", "held_out")))])]


def _copying(check: dict[str, Any]) -> list[Block]:
    novelty = check.get("novelty", {})
    if missing := _missing(novelty, "found"):
        return [missing]
    rows: list[Row] = [("steps in a row", "samples", "held-out pieces")]
    for n, row in novelty["found"].get("steps_in_a_row", {}).items():
        cells = (row[side] for side in ("generated", "held_out"))
        rows.append((n, *(cell["missing"] if "missing" in cell else percent(cell) for cell in cells)))
    key = ", in any key" if novelty.get("any_key") else ""
    return [Text(f"The share of chords in a row that stand in no training piece{key}, of samples and of held-out "
                 "pieces: where samples have far fewer new ones, they are copied. In brackets intervals of 95 % over "
                 "pieces."), Table(rows), Text(f"{_capital(longest_line(check))}.")]


def _samples(path: Path, check: dict[str, Any]) -> list[Block]:
    about = check.get("samples", {})
    pieces = _pieces(path, about.get("file", ""))
    if not pieces:
        return [Text("None recorded: `handmill check` makes them.")]
    files = ", ".join(name for name in about.get("files", []) if name.endswith(".mid"))
    told = (f"The first {len(pieces)} of {about.get('count', 0):,}, not chosen, asked for {about.get('asked', '?')} "
            f"with seed {check.get('seed', '?')} ({facts.sampling(about.get('sampling', {}))}).")
    instead = "A player of them is in card.html" + (f"; as MIDI files they are {files}." if files else ".")
    return [Text(told), Raw(player.fragment([_recorded(pieces[0]), *pieces]), instead),
            facts.picture(path, _ROLL, "The first samples as piano rolls", "Not there any more: the piano rolls.")]


def _pieces(path: Path, file: str) -> list[Piece]:
    """The first samples of the check; none where its file is not there or no list of tokens."""
    whole = path / file
    if not whole.resolve().is_relative_to(path.resolve()):
        return []
    try:
        lines = whole.read_text(encoding="utf-8").split("\n")[:_PIECES]
        tokens = [[int(token) for token in parsed(line)["tokens"]] for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    codec = music_tokens.load(None, path / "codec")
    made = [performing.seconds(performing.of_tokens(codec, piece)) for piece in tokens]
    return [_within(f"Sample {i}", notes, _LONGEST) for i, notes in enumerate(made)]


def _within(title: str, notes: Sequence[Note], most: float) -> Piece:
    """The piece's first `most` seconds, its title saying so where there are more."""
    if duration(notes) <= most:
        return Piece(title, notes)
    return Piece(f"{title}, the first {lasting(most)}",
                 [note._replace(end=min(note.end, most)) for note in notes if note.start < most])


def _recorded(piece: Piece) -> Recording:
    """The beginning of a piece as the built-in synthesiser plays it, for where no script runs."""
    heard = _within(f"{piece.title} as a recording", piece.notes, _HEARD)
    samples = synthesis.render(heard.notes, _RATE)
    return Recording(heard.title, sound.wav_bytes(sound.Sound(samples, _RATE)))


def _missing(part: dict[str, Any], *names: str) -> Block | None:
    """The sentence that a part of the check was not measured, or nothing."""
    for name in names:
        if "missing" in part.get(name, {"missing": ""}):
            said = part.get(name, {}).get("missing") or f"not measured: {name.replace('_', ' ')}"
            return Text(f"{_capital(said)}.")
    return None


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
