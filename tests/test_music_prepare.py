"""Music from files to packed tokens: what is read, what is left out and said, what is kept on the disk."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data import music_files, music_report
from handmill.data.decoding import Refused
from handmill.data.image_files import Given
from handmill.data.music import Pieces
from handmill.data.music_fit import bare, fit, nearest, outer, shape
from handmill.data.music_prepare import fingerprint, prepare
from handmill.data.splits import NAMES
from handmill.errors import UserError
from handmill.media import chorales, midi
from handmill.media.keys import key_of_score, relative
from handmill.media.music import Data
from handmill.media.music_tokens import NOTHING, Events, EventSettings, FrameSettings
from handmill.media.scores import DRUMS, KEYS, MOST_STEPS, Grid, Note, Score, from_grid, to_grid

FRAMES = FrameSettings(steps=1)
EVENTS = EventSettings()
SHARES = {"validation": 0.2, "test": 0.2}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "roll" not in request.node.name:
        monkeypatch.setattr(music_report, "rolls", lambda path, *rest: path.write_bytes(b"drawn"))


def tune(seed: int, steps: int = 12, lowest: int = 50) -> Grid:
    """Chords of one to three pitches; the last step sounds."""
    random = np.random.default_rng(seed)
    return tuple(tuple(sorted({*random.integers(lowest, lowest + 20, 1 + step % 3).tolist()})) for step in range(steps))


def album(home: Path, count: int = 8, folder: str = "", **more: Any) -> Path:
    """`count` MIDI files, each a tune of its own on a grid of quarter notes."""
    (home / folder).mkdir(parents=True, exist_ok=True)
    first = int.from_bytes(folder.encode())
    for i in range(count):
        midi.write(home / folder / f"{i}.mid", replace(from_grid(tune(first + i), 1), **more))
    return home


def bach(path: Path, splits: dict[str, list[Grid]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    chorales.write(path, splits)
    return str(path)


def recipe_of(codec: Any, seed: int = 1, **data: Any) -> Any:
    return SimpleNamespace(medium="music", data=Data(**data), codec=codec, seed=seed)


def prepared(tmp_path: Path, *paths: Path | str, codec: Any = FRAMES, **data: Any) -> Pieces:
    recipe = recipe_of(codec, paths=tuple(map(str, paths)), **data)
    return prepare(recipe, tmp_path / ".prepared", progress=False)


def pieces_of(data: Pieces, split: str) -> list[Any]:
    """The tokens of each piece, END and header included."""
    return np.split(np.asarray(data.tokens(split)), data.starts(split)[1:])


def all_names(data: Pieces) -> list[str]:
    return sorted(itertools.chain(*(data.names(split) for split in NAMES)))


# What comes out


def test_chorales_keep_their_splits_and_are_packed_as_the_codec_packs_them(tmp_path: Path) -> None:
    splits = {"train": [tune(i) for i in range(4)], "valid": [tune(9)], "test": [tune(10), tune(11)]}
    data = prepared(tmp_path, bach(tmp_path / "bach.json", splits))
    for theirs, ours in music_files.SPLITS.items():
        expected = data.codec().pack([(grid, NOTHING) for grid in splits[theirs]])
        np.testing.assert_array_equal(data.tokens(ours), expected)
        np.testing.assert_array_equal(data.starts(ours), np.flatnonzero(expected == 0))
        assert data.names(ours) == [f"bach.json/{theirs}[{i}]" for i in range(len(splits[theirs]))]
        assert data.about["splits"][ours] == {
            "documents": len(splits[theirs]), "tokens": len(expected), "steps": 12 * len(splits[theirs]),
            "notes": sum(len(step) for grid in splits[theirs] for step in grid),
            "seconds": pytest.approx(12 * len(splits[theirs]) * 0.6)}  # at 100 quarter notes a minute
    assert data.report["sources"] == {"left_out": 0, "kinds": {}, "first_left_out": [], "other_files": 0}
    assert data.manifest["sources"][0] | {"modified": ""} == {
        "path": str(tmp_path / "bach.json"), "files": 1, "bytes": (tmp_path / "bach.json").stat().st_size,
        "modified": "", "licence": "unknown", "pieces": 7, "kept": 7,
        "sha256": hashlib.sha256((tmp_path / "bach.json").read_bytes()).hexdigest()}


def test_separated_voices_become_chords(tmp_path: Path) -> None:
    voiced = [tuple((70 - i, 65, -1, 50 + step) for step in range(9)) for i in range(3)]
    data = prepared(tmp_path, bach(tmp_path / "b.json", {"train": voiced[:1], "valid": voiced[1:2],
                                                         "test": voiced[2:]}))
    assert data.codec().decode(pieces_of(data, "validation")[0]) == tuple((50 + s, 65, 69) for s in range(9))


def test_chorales_of_another_grid_are_read_on_that_of_the_codec(tmp_path: Path) -> None:
    path = bach(tmp_path / "b.json", {"train": [tune(1), tune(2)], "valid": [tune(3)]})
    data = prepared(tmp_path, path, codec=FrameSettings(steps=4), grid=1)
    assert data.codec().decode(pieces_of(data, "validation")[0]) == tuple(s for s in tune(3) for _ in range(4))


def test_midi_files_become_the_chords_they_were_made_of(tmp_path: Path) -> None:
    album(tmp_path / "midi", 10)
    data = prepared(tmp_path, tmp_path / "midi", **SHARES)
    grids = {f"{i}.mid": tune(i) for i in range(10)}
    for split in NAMES:
        for name, tokens in zip(data.names(split), pieces_of(data, split), strict=True):
            assert data.codec().decode(tokens) == grids[name]
    assert all_names(data) == sorted(grids)
    assert [data.documents(split) for split in NAMES] == [6, 2, 2]
    assert data.report["pieces"] == {"read": 10, "kept": 10}


def test_silence_after_the_last_note_is_cut(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4, length=480 * 500)
    data = prepared(tmp_path, tmp_path / "midi", **SHARES)
    assert data.about["splits"]["train"]["steps"] == 12 * data.documents("train")


def test_key_tempo_and_name_stand_in_the_header(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4, "abel", keys=((0, KEYS.index("F#m")),), tempos=((0, 600_000),))
    album(tmp_path / "midi", 4, "zelter/late", tempos=((0, 300_000),))
    codec = FrameSettings(steps=1, keys=True, tempos=(150.0,))
    data = prepared(tmp_path, tmp_path / "midi", codec=codec, names="folder", **SHARES)
    assert data.codec().settings == replace(codec, names=("abel", "zelter"))
    for name, tokens in ((n, t) for split in NAMES
                         for n, t in zip(data.names(split), pieces_of(data, split), strict=True)):
        said, grid = data.codec().asked_of(tokens), data.codec().decode(tokens)
        assert said.name == name.partition("/")[0]
        assert (said.tempo > 150) == (said.name == "zelter")
        assert said.key == (KEYS.index("F#m") if said.name == "abel" else key_of_score(from_grid(grid, 1)).key)
    assert data.report["keys"]["by_signature"] == data.report["keys"]["estimated"] == 4
    assert data.report["names"] == {"abel": 4, "zelter": 4}
    assert data.report["tempos"] | {"unit": ""} == {"unit": "", "unknown": 0, "least": 100, "median": 200,
                                                    "greatest": 200}


def test_tempo_is_that_of_the_whole_piece(tmp_path: Path) -> None:
    album(tmp_path / "midi", 2, tempos=((0, 500_000), (6 * 480, 1_000_000)))  # 6 quarters at 120, 6 at 60
    data = prepared(tmp_path, tmp_path / "midi", codec=FrameSettings(steps=1, tempos=(79.0, 81.0)), test=0)
    assert data.report["tempos"]["median"] == pytest.approx(80)
    assert {pieces_of(data, "train")[0][1]} == {data.codec().first["tempo"] + 2}


def test_estimated_keys_take_the_place_of_signatures(tmp_path: Path) -> None:
    scale = tuple((60 + step,) for step in (0, 4, 7, 12, 5, 9, 12, 7, 11, 14, 7, 0))
    for i in range(2):
        midi.write(tmp_path / f"{i}.mid", replace(from_grid((*scale, *tune(i)[:i]), 1), keys=((0, 6),)))
    for key, expected in (("file", "F#"), ("estimate", "C")):
        data = prepared(tmp_path, *(tmp_path / f"{i}.mid" for i in range(2)), codec=replace(FRAMES, keys=True),
                        key=key, test=0)
        assert data.codec().asked_of(pieces_of(data, "train")[0]).key == KEYS.index(expected)
        assert data.report["keys"]["doubtful"] == 2


def test_relative_keys_have_one_signature() -> None:
    assert KEYS[relative(KEYS.index("C"))] == "Am"
    assert KEYS[relative(KEYS.index("Ebm"))] == "F#"
    assert [relative(relative(key)) for key in range(24)] == list(range(24))


def test_names_of_several_folders_and_patterns_are_theirs(tmp_path: Path) -> None:
    album(tmp_path / "abel", 3)
    album(tmp_path, 3, "zelter")
    both = prepared(tmp_path, tmp_path / "abel", tmp_path / "zelter", names="folder")
    assert both.codec().settings.names == ("abel", "zelter")
    pattern = prepared(tmp_path, tmp_path / "zelter" / "*.mid", names="folder")
    assert pattern.codec().settings.names == ("zelter",)


def test_names_of_the_recipe_are_kept_in_its_order(tmp_path: Path) -> None:
    for folder in ("abel", "bach", "zelter"):
        album(tmp_path / "midi", 3, folder)
    codec = FrameSettings(steps=1, names=("zelter", "abel"))
    data = prepared(tmp_path, tmp_path / "midi", codec=codec, names="folder")
    assert data.codec().settings == codec
    said = Counter(data.codec().asked_of(t).name for split in NAMES for t in pieces_of(data, split))
    assert said == {"zelter": 3, "abel": 3, "": 3}
    assert any("1 sub-folders are not in codec.names" in remark for remark in data.report["remarks"])


@pytest.mark.parametrize(("codec", "names", "said"), [
    (FrameSettings(names=("abel",)), "none", 'set data.names = "folder"'),
    (FRAMES, "folder", "no piece lies in a sub-folder of the folder in data.paths"),
    (FrameSettings(names=("abel",)), "folder", r"no piece lies in a sub-folder of codec.names = \['abel'\]"),
])
def test_names_that_cannot_be_are_an_error(tmp_path: Path, codec: Any, names: Any, said: str) -> None:
    album(tmp_path / "midi", 3)
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, tmp_path / "midi", codec=codec, names=names)


def test_events_are_those_of_the_codec(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4)
    data = prepared(tmp_path, tmp_path / "midi", codec=EVENTS, **SHARES)
    for split in NAMES:
        for name, tokens in zip(data.names(split), pieces_of(data, split), strict=True):
            expected = Events(EVENTS).encode(midi.read(tmp_path / "midi" / name))
            np.testing.assert_array_equal(tokens, [0, *expected])
            assert data.about["splits"][split]["steps"] == 0
    notes = sum(len(midi.read(file).notes) for file in (tmp_path / "midi").iterdir())
    assert data.report["totals"]["notes"] == notes


# What does not fit


def test_programs_go_to_the_nearest_of_their_family() -> None:
    assert nearest(42, (0, 40, 43, 73)) == 43
    assert nearest(41, (0, 40, 42)) == 40
    assert nearest(24, (0, 40)) == 0  # no guitar: the first


def test_other_programs_and_drums_are_counted(tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    for i in range(3):
        notes = [Note(480 * n, 480 * n + 400, 60 + n * n % (7 + i), program=program, voice=program)
                 for n in range(8) for program in (0, 42)]
        notes += [Note(480 * n, 480 * n + 100, 38, program=DRUMS, voice=200) for n in range(5)]
        midi.write(tmp_path / "midi" / f"{i}.mid", Score(tuple(sorted(notes))))
    codec = EventSettings(programs=(0, 40))
    data = prepared(tmp_path, tmp_path / "midi", codec=codec)
    assert data.report["changes"] == {"drum notes left out": {"pieces": 3, "times": 15},
                                      "notes played by another program": {"pieces": 3, "times": 24}}
    programs = {n.program for split in NAMES for t in pieces_of(data, split) for n in data.codec().decode(t).notes}
    assert programs == {0, 40}
    kept = prepared(tmp_path, tmp_path / "midi", codec=replace(codec, drums=True))
    assert "drum notes left out" not in kept.report["changes"]
    assert sum(n.program == DRUMS for n in kept.codec().decode(pieces_of(kept, "test")[0]).notes) == 5


@given(st.sets(st.integers(0, 127)), st.integers(1, 12))
def test_thinned_chords_keep_their_outer_pitches(chord: set[int], voices: int) -> None:
    step = tuple(sorted(chord))
    kept = outer(step, voices)
    assert len(kept) == min(voices, len(step))
    assert list(kept) == sorted({*kept} & chord)
    if kept:
        assert kept[-1] == step[-1]
        assert voices == 1 or kept[0] == step[0]


def test_steps_above_the_voices_are_thinned_and_counted(tmp_path: Path) -> None:
    album(tmp_path / "midi", 3)
    data = prepared(tmp_path, tmp_path / "midi", codec=replace(FRAMES, voices=2))
    wide = sum(len(step) > 2 for i in range(3) for step in tune(i))
    assert data.report["changes"]["steps thinned"] == {"pieces": 3, "times": wide}
    for split in NAMES:
        for name, tokens in zip(data.names(split), pieces_of(data, split), strict=True):
            assert data.codec().decode(tokens) == tuple(outer(step, 2) for step in tune(int(name[0])))


def test_pitches_out_of_range_leave_a_piece_out(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4)
    midi.write(tmp_path / "midi" / "high.mid", from_grid(tune(99, lowest=90), 1))
    data = prepared(tmp_path, tmp_path / "midi", codec=replace(FRAMES, highest=80))
    assert data.report["sources"]["kinds"] == {"out of range": 1}
    assert "high.mid: its pitches go from 9" in data.report["sources"]["first_left_out"][0]
    assert "high.mid" not in all_names(data)


# Copies


def test_copies_also_in_another_key_go_before_the_split(tmp_path: Path) -> None:
    album(tmp_path / "midi", 5)
    first = midi.read(tmp_path / "midi" / "0.mid")
    higher = first.transposed(3)
    assert higher
    midi.write(tmp_path / "midi" / "copy.mid", first)
    midi.write(tmp_path / "midi" / "higher.mid", higher)
    for codec in (FRAMES, EVENTS):
        data = prepared(tmp_path, tmp_path / "midi", codec=codec)
        assert all_names(data) == [f"{i}.mid" for i in range(5)]
        assert data.report["duplicates"] == {
            "exact": 1, "transposed": 1, "across_given_splits": 0,
            "first": [{"copy": "copy.mid", "of": "0.mid", "semitones": 0},
                      {"copy": "higher.mid", "of": "0.mid", "semitones": 3}]}


def test_given_splits_are_kept_and_copies_of_them_go(tmp_path: Path) -> None:
    album(tmp_path / "midi", 2)
    path = bach(tmp_path / "b.json", {"train": [tune(50), tune(51)], "valid": [tune(50), tune(1)], "test": [tune(52)]})
    data = prepared(tmp_path, tmp_path / "midi", path)
    assert data.names("train") == ["0.mid", "b.json/train[0]", "b.json/train[1]"]
    assert data.names("validation") == ["b.json/valid[0]", "b.json/valid[1]"]
    assert data.report["duplicates"]["exact"] == data.report["duplicates"]["across_given_splits"] == 1


@given(st.integers(-12, 12), st.integers(0, 1000), st.sampled_from([FRAMES, EVENTS, EventSettings(drums=True)]))
@settings(max_examples=40, deadline=None)
def test_a_shape_is_the_same_in_every_key_and_for_no_other_tune(by: int, seed: int, codec: Any) -> None:
    codec = bare(codec)
    score = from_grid(tune(seed), 1)
    score = replace(score, notes=tuple(sorted((*score.notes, Note(0, 9, 40, program=DRUMS)))))
    higher, other = score.transposed(by), from_grid(tune(seed + 1), 1)
    assert higher
    one, two, three = (shape(fit(s, codec).tokens, codec) for s in (score, higher, other))
    assert one.mark == two.mark != three.mark
    assert (two.lowest - one.lowest, two.highest - one.highest) == (by, by)


# Splits


def test_every_split_gets_a_piece_and_too_few_are_said(tmp_path: Path) -> None:
    album(tmp_path / "midi", 3)
    data = prepared(tmp_path, tmp_path / "midi", validation=0.01, test=0.01)
    assert [data.documents(split) for split in NAMES] == [1, 1, 1]
    (tmp_path / "midi" / "0.mid").unlink()
    with pytest.raises(UserError, match=r"2 pieces that are no copy are too few .* or set data.test = 0"):
        prepared(tmp_path, tmp_path / "midi")
    assert prepared(tmp_path, tmp_path / "midi", test=0).documents("test") == 0
    (tmp_path / "midi" / "1.mid").unlink()
    with pytest.raises(UserError, match=r"1 piece that is no copy is too few for train and validation: add pieces$"):
        prepared(tmp_path, tmp_path / "midi", test=0)


def test_a_piece_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    album(tmp_path / "midi", 20)
    before = prepared(tmp_path, tmp_path / "midi", **SHARES)
    album(tmp_path / "midi", 2, "more")
    after = prepared(tmp_path, tmp_path / "midi", **SHARES)
    moved = {*before.names("test")} - {*after.names("test")}
    assert len(moved) <= 2


@pytest.mark.parametrize(("brought", "expected"), [
    (["train"], [4, 1, 1]), (["train", "valid"], [6, 6, 0]), (["train", "test"], [5, 1, 6])])
def test_splits_that_chorales_lack_are_drawn(tmp_path: Path, brought: list[str], expected: list[int]) -> None:
    path = bach(tmp_path / "b.json", {name: [tune(10 * i + j) for j in range(6)] for i, name in enumerate(brought)})
    data = prepared(tmp_path, path, validation=0.1, test=0.1)
    assert [data.documents(split) for split in NAMES] == expected
    assert bool(data.report["remarks"]) == (brought == ["train", "valid"])


def test_chorales_without_training_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no piece in data.paths is for training"):
        prepared(tmp_path, bach(tmp_path / "b.json", {"valid": [tune(1)], "test": [tune(2)]}))


# Files


def broken_files(home: Path) -> dict[str, str]:
    """One file of each fault, and the kind that the report counts it under."""
    good = midi.to_bytes(from_grid(tune(77), 1))
    zero = mido.MidiFile(tracks=[mido.MidiTrack([
        mido.MetaMessage("set_tempo", tempo=0), mido.Message("note_on", note=60), mido.Message("note_off", note=60,
                                                                                               time=9)])])
    zero.save(home / "zero.mid")
    mido.MidiFile(tracks=[mido.MidiTrack()]).save(home / "silent.mid")
    midi.write(home / "short.mid", from_grid(tune(5, 2), 1))
    midi.write(home / "drums.mid", Score(tuple(Note(i, i + 1, 38, program=DRUMS) for i in range(20))))
    content = {"empty.mid": b"", "text.mid": b"not music at all", "cut.mid": good[:60],
               "chunk.mid": good[:18] + b"\xff" + good[19:], "score.mxl": b"PK", "song.mp3": b"ID3",
               "notes.json": b'{"composer": "x"}', "list.json": b"[1, 2]", "bad.zip": b"PK nothing", "readme.txt": b"-"}
    for name, data in content.items():
        (home / name).write_bytes(data)
    return {"zero.mid": "broken", "silent.mid": "broken", "short.mid": "too short", "drums.mid": "no notes",
            "empty.mid": "empty", "text.mid": "broken", "cut.mid": "broken", "chunk.mid": "broken",
            "score.mxl": "not MIDI", "song.mp3": "not MIDI", "notes.json": "not chorales",
            "list.json": "not chorales", "bad.zip": "damaged"}


def test_what_is_broken_is_counted_and_named_and_ends_nothing(tmp_path: Path, capsys: Any) -> None:
    album(tmp_path / "midi", 4)
    faults = broken_files(tmp_path / "midi")
    data = prepared(tmp_path, tmp_path / "midi")
    sources = data.report["sources"]
    assert sources["kinds"] == Counter(faults.values())
    assert sources["left_out"] == len(faults)
    assert sources["other_files"] == 1
    for name in faults:
        assert sum(f"/{name}: " in sentence for sentence in sources["first_left_out"]) == 1
    assert data.manifest["left_out"] == sources["first_left_out"]
    assert f"left out {len(faults)} files" in capsys.readouterr().err


def test_a_piece_of_too_many_steps_is_left_out(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4)
    notes = (*(Note(i, i + 1, 60) for i in range(9)), Note(96 * 50_000, 96 * 50_000 + 1, 60))
    midi.write(tmp_path / "midi" / "long.mid", Score(notes, resolution=96))
    data = prepared(tmp_path, tmp_path / "midi", codec=FrameSettings(steps=8))
    assert data.report["sources"]["kinds"] == {"too long": 1}


def test_a_file_of_too_many_events_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midi, "MOST_EVENTS", 500)
    album(tmp_path / "midi", 4)
    midi.write(tmp_path / "midi" / "huge.mid", from_grid(tune(8, 400), 1))
    data = prepared(tmp_path, tmp_path / "midi")
    assert "huge.mid: it has more than 500 events" in data.report["sources"]["first_left_out"][0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_left_out(tmp_path: Path) -> None:
    album(tmp_path / "midi", 5)
    (tmp_path / "midi" / "0.mid").chmod(0)
    assert prepared(tmp_path, tmp_path / "midi").report["sources"]["kinds"] == {"unreadable": 1}


def test_a_file_that_vanishes_is_left_out(tmp_path: Path) -> None:
    album(tmp_path / "midi", 1)
    found = music_files.find(Data(paths=(str(tmp_path / "midi"),)), tmp_path / "cache")
    (tmp_path / "midi" / "0.mid").unlink()
    notes = music_files.Notes()
    assert not list(music_files.items(found[0], Data(), 1, notes, lambda count: None))
    assert notes.kinds == {"unreadable": 1}


def test_broken_chorales_are_counted_and_named(tmp_path: Path) -> None:
    pieces: list[Any] = [[list(step) for step in tune(i)] for i in range(7)]
    pieces[2][5] = [60, 200]
    (tmp_path / "b.json").write_text(json.dumps({"train": pieces[:5], "valid": [pieces[5]], "test": [[[]] * 9],
                                                 "spare": []}))
    data = prepared(tmp_path, tmp_path / "b.json")
    assert data.report["sources"]["kinds"] == {"broken": 2, "no notes": 1}
    assert [f.partition("b.json")[2] for f in data.report["sources"]["first_left_out"]] == [
        ": 'spare' is no split: name them train, valid, test: mend it or leave it out",
        ": train, piece 2, step 5: 200 is no pitch from 0 to 127: mend it or leave it out",
        "/test[0]: it has no notes: leave it out"]


def test_a_chorale_of_too_many_steps_is_left_out(tmp_path: Path) -> None:
    long = tuple(() for _ in range(MOST_STEPS)) + tune(5)
    path = bach(tmp_path / "b.json", {"train": [tune(1), long], "valid": [tune(2)], "test": [tune(3)]})
    assert prepared(tmp_path, path).report["sources"]["kinds"] == {"too long": 1}


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.mid", b"", "a.mid in data.paths: it is empty"),
    ("a.mid", b"MThd", "a.mid in data.paths: it is no MIDI file"),
    ("a.json", b"{}", "a.json in data.paths: holds no piece"),
    ("a.musicxml", b"<xml/>", "a.musicxml in data.paths: .musicxml is not read: export it as MIDI"),
])
def test_a_broken_file_that_the_user_named_is_an_error(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, tmp_path / name)


def test_where_nothing_is_left_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    with pytest.raises(UserError, match="holds no files: name one that holds MIDI files"):
        prepared(tmp_path, tmp_path / "midi")
    album(tmp_path / "midi", 2)
    with pytest.raises(UserError, match=r"holds no pieces that can be used .*below data.shortest = 500.*name MIDI"):
        prepared(tmp_path, tmp_path / "midi", shortest=500)
    with pytest.raises(UserError, match=r"data.paths is empty: name MIDI files"):
        prepared(tmp_path)


def test_midi_in_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    album(tmp_path / "midi", 3, "abel")
    album(tmp_path / "midi", 3, "zelter")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted((tmp_path / "midi").rglob("*.mid")):
            archive.write(file, f"all/{file.relative_to(tmp_path / 'midi')}")
        archive.writestr("all/._0.mid", b"a Mac's")
        archive.writestr("all/notes.txt", b"-")
        archive.writestr("all/abel/bad.mid", b"-")
    data = prepared(tmp_path, tmp_path / "all.zip", names="folder")
    assert data.codec().settings.names == ("abel", "zelter")
    assert all_names(data)[0] == "all.zip/all/abel/0.mid"
    assert data.report["pieces"]["kept"] == 6
    assert data.report["sources"]["kinds"] == {"broken": 1}
    assert data.report["sources"]["other_files"] == 1


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_piece_or_left_out(noise: bytes, begin: int, end: int) -> None:
    good = midi.to_bytes(from_grid(tune(3), 1))
    content = good[:begin] + noise + good[begin + end:]
    source = SimpleNamespace(path=Path("x.mid"), name="x.mid")
    with contextlib.suppress(Refused):
        item = music_files._midi(source, Given("x.mid", None, (), False), "", content, "", Data())  # type: ignore[arg-type]
        for codec in (bare(FRAMES), bare(EVENTS)):
            assert len(fit(item.score, codec).tokens)


def test_file_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4)
    folder = os.fsencode(tmp_path / "midi") + b"/\xe9"
    os.mkdir(folder)
    shutil.copy(tmp_path / "midi" / "0.mid", folder + b"/0.mid")
    (tmp_path / "midi" / "0.mid").unlink()
    data = prepared(tmp_path, tmp_path / "midi", names="folder")
    assert data.codec().settings.names == ("\\xe9",)


# On the disk


def test_prepared_once_and_again_when_something_changed(tmp_path: Path) -> None:
    album(tmp_path / "midi", 5)
    first = prepared(tmp_path, tmp_path / "midi")
    stamp = (first.folder / "data.json").stat().st_mtime_ns
    again = prepared(tmp_path, tmp_path / "midi", transpose=5)  # of training windows only
    assert again.folder == first.folder
    assert (again.folder / "data.json").stat().st_mtime_ns == stamp
    (again.folder / "train.tokens").write_bytes(b"cut")
    whole = prepared(tmp_path, tmp_path / "midi")
    assert len(whole.tokens("train")) == whole.count("train") > 3

    def mark(seed: int = 1, codec: Any = FRAMES, **data: Any) -> str:
        recipe = recipe_of(codec, seed, paths=(str(tmp_path / "midi"),), **data)
        return fingerprint(recipe, music_files.find(recipe.data, tmp_path / ".prepared"))

    assert mark() == first.fingerprint
    marks = {mark(), mark(2), mark(codec=EVENTS), mark(validation=0.3), mark(pedal=False), mark(names="folder")}
    os.utime(tmp_path / "midi" / "0.mid", (1, 1))
    assert len(marks | {mark()}) == 7


def test_held_out_pieces_are_read_in_a_model_folder(tmp_path: Path) -> None:
    album(tmp_path / "midi", 6)
    data = prepared(tmp_path, tmp_path / "midi")
    model = tmp_path / "model"
    (model / "data").mkdir(parents=True)
    for name in data.held_out_files():
        shutil.copy(data.folder / name, model / "data")
    shutil.copytree(data.folder / "codec", model / "codec")
    kept = Pieces.open(model / "data")
    assert kept.codec().settings == data.codec().settings
    for split in ("validation", "test"):
        np.testing.assert_array_equal(kept.tokens(split), data.tokens(split))
        assert kept.names(split) == data.names(split)
    with pytest.raises(UserError, match=r"train.tokens is missing"):
        kept.tokens("train")
    assert not kept.complete()
    assert data.complete()


@pytest.mark.parametrize("name", ["train.names.json", "test.starts.npy", "codec/tokenizer.json", "manifest.json"])
def test_missing_files_are_noticed(tmp_path: Path, name: str) -> None:
    album(tmp_path / "midi", 4)
    data = prepared(tmp_path, tmp_path / "midi")
    assert Pieces.whole(data.folder)
    (data.folder / name).unlink()
    assert not Pieces.whole(data.folder)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"format": "handmill-data/1", "dtype": "uint16"}')
    with pytest.raises(UserError, match="is not of the format handmill-music/1"):
        Pieces.open(tmp_path)


# What is said


def test_the_report_is_told_and_a_roll_is_drawn(tmp_path: Path) -> None:
    album(tmp_path / "midi", 9)
    data = prepared(tmp_path, tmp_path / "midi", codec=replace(FRAMES, lowest=40, highest=80))
    low, high = (f(f(step) for i in range(9) for step in tune(i)) for f in (min, max))
    assert data.report["pitches"] == {"lowest": low, "highest": high}
    lines = music_report.report_lines(data.report)
    assert lines[0] == "pieces      9 read, 9 kept; 0 exact copies and 0 in another key removed"
    assert any(line.startswith("music       1 min 05 s, ") for line in lines)  # 9 times 12 steps at 0.6 s
    assert all(len(line) > 12 and line[11] == " " for line in lines)
    assert (data.folder / "roll.png").read_bytes().startswith(b"\x89PNG")


def test_one_piece_of_hours_is_remarked_on_and_its_roll_cut(tmp_path: Path) -> None:
    album(tmp_path / "midi", 12)
    notes = (Note(0, 480 * 15_000, 60), *(Note(480 * i, 480 * i + 1, 67) for i in range(14_600, 15_000)))
    midi.write(tmp_path / "midi" / "巴赫.mid", Score(notes))  # two hours and five minutes
    for seed in range(1, 9):
        data = prepare(recipe_of(FRAMES, seed, paths=(str(tmp_path / "midi"),)), tmp_path / "cache", progress=False)
        if "巴赫.mid" in data.names("train"):
            break
    assert "巴赫.mid alone holds more than 25% of the training tokens" in data.report["remarks"][-1]


def test_room_for_transposing_is_that_of_training(tmp_path: Path) -> None:
    album(tmp_path / "midi", 4)
    data = prepared(tmp_path, tmp_path / "midi", codec=replace(FRAMES, lowest=48, highest=71), transpose=4)
    train = [step for name in data.names("train") for step in tune(int(name[0]))]
    room = data.report["transposition"]
    assert room["down"] == min(map(min, train)) - 48
    assert room["up"] == 71 - max(map(max, train))
    assert room["pieces_with_room"] == 0
    assert any("2 of 2 training pieces have no room for data.transpose = 4" in said for said in data.report["remarks"])


@pytest.mark.parametrize(("codec", "data", "said"), [
    (FrameSettings(steps=4), {}, "set codec.steps = 1"),
    (FrameSettings(steps=4), {"grid": 4}, "set data.grid = 1"),
    (EVENTS, {}, "set data.grid = 1"),
    (FrameSettings(steps=1), {}, ""),
])
def test_a_grid_that_looks_like_another_is_remarked_on(tmp_path: Path, codec: Any, data: Any, said: str) -> None:
    path = bach(tmp_path / "b.json", {"train": [tune(1), tune(2)], "valid": [tune(3)], "test": [tune(4)]})
    remarks = prepared(tmp_path, path, codec=codec, **data).report["remarks"]
    assert (said in remarks[0]) if said else not remarks


def test_music_beside_the_grid_and_wrong_signatures_are_remarked_on(tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    random = np.random.default_rng(1)
    for i in range(12):
        starts = np.sort(random.integers(0, 480 * 20, 40)).tolist()
        notes = tuple(Note(s, s + 200, 60 + int(random.choice([1, 3, 6, 8, 10]))) for s in dict.fromkeys(starts))
        midi.write(tmp_path / "midi" / f"{i}.mid", Score(tuple(sorted(notes)), keys=((0, 0),)))
    data = prepared(tmp_path, tmp_path / "midi", codec=FrameSettings(steps=4))
    moved = data.report["changes"]["notes moved to the grid"]["times"]
    assert moved == pytest.approx(240, rel=0.2)  # half of those at any time
    assert 'codec.kind = "events"' in data.report["remarks"][0]
    assert '12 of 12 key signatures do not fit the notes' in data.report["remarks"][1]


def test_settings_are_checked() -> None:
    for wrong in ({"transpose": 25}, {"validation": 0.0}, {"test": 0.6}, {"validation": 0.5, "test": 0.5},
                  {"shortest": 0}, {"grid": 25}):
        with pytest.raises(UserError):
            Data(**wrong)  # type: ignore[arg-type]


def test_a_grid_round_trip_needs_no_voices() -> None:
    assert to_grid(from_grid(tune(4), 1), 1) == tune(4)
