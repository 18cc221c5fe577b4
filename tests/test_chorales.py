"""Chorales: sound files, broken ones, and the two that figures are published on."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handmill.checks import music_figures
from handmill.errors import UserError
from handmill.media import chorales
from handmill.media.scores import REST

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "music"
REAL = pytest.mark.skipif(not DATA.exists(), reason="the chorales are not on this machine")


def written(folder: Path, content: Any) -> Path:
    path = folder / "chorales.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_broken_pieces_and_unknown_splits_are_left_out_and_named(tmp_path: Path) -> None:
    good = [[60, 64], [64, 60, 60], []]
    path = written(tmp_path, {"train": [good, [[60, 128]], [[60], 7], [[True]], [[60.5]], "abc", []], "valid": 3,
                              "tests": [good], "test": [good, [[-1, 60]]]})
    found = chorales.read(path)
    assert found.voices == 0
    assert found.splits == {"train": (((60, 64), (60, 64), ()),), "test": (((60, 64), (60, 64), ()),)}
    assert found.report.skipped == 9
    assert found.report.faults == (
        "'tests' is no split: name them train, valid, test",
        "train, piece 1, step 0: 128 is no pitch from 0 to 127",
        "train, piece 2, step 1 is no list of pitches",
        "train, piece 3, step 0: True is no pitch from 0 to 127",
        "train, piece 4, step 0: 60.5 is no pitch from 0 to 127",
        "train, piece 5, is no list of steps",
        "train, piece 6, is no list of steps",
        "valid is no list of pieces",
        "test, piece 1, step 0: -1 is no pitch from 0 to 127")
    assert found.report.lines()[0] == "2 pieces (train 1, test 1), 9 skipped"


def test_many_faults_are_counted_and_the_first_are_told(tmp_path: Path) -> None:
    report = chorales.read(written(tmp_path, {"train": [[[60]], *[[[200]]] * 50]})).report
    assert (report.skipped, len(report.faults)) == (50, 20)
    assert report.lines()[-1] == "and 30 more"


def test_voices_are_told_from_what_sounds_by_their_order_and_by_hand(tmp_path: Path) -> None:
    voiced = {"train": [[[72, 67, 60, 48], [72, 67, REST, 48]], [[72, 67, 60]]]}
    found = chorales.read(written(tmp_path, {"train": voiced["train"][:1]}))
    assert (found.voices, found.splits["train"][0][1]) == (4, (72, 67, REST, 48))
    found = chorales.read(written(tmp_path, voiced), voices=4)
    assert found.report.faults == ("train, piece 1, step 0 has 3 entries where there are 4 voices",)
    assert chorales.read(written(tmp_path, {"train": [[[48, 60], [50, 62]]]})).voices == 0


@pytest.mark.parametrize(("content", "sentence"), [
    ("{", "no JSON"), ("[" * 200_000, "no JSON"), ("[]", "object with the splits"), ({}, "no piece"),
    ({"train": [[[300]]]}, "no piece that can be read: train, piece 0, step 0: 300"), ("\ud800".encode(
        "utf-8", "surrogatepass"), "no JSON")])
def test_a_file_without_pieces_is_a_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else (
        content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(UserError, match=f"a.json.*{sentence}"):
        chorales.read(path)


def test_a_file_that_is_missing_or_too_large_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        chorales.read(tmp_path / "none.json")
    monkeypatch.setattr(chorales, "LARGEST", 3)
    with pytest.raises(UserError, match="larger than"):
        chorales.read(written(tmp_path, {"train": []}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*chorales.SPLITS, "x"]), inner),
    max_leaves=20)


@given(json_values)
def test_any_json_is_chorales_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        found = chorales.read(path)
    except UserError:
        return
    assert any(found.splits.values())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    splits = {"train": (((60, 64), ()),), "valid": (((59,),),), "test": ()}
    chorales.write(tmp_path / "a.json", splits)
    assert chorales.read(tmp_path / "a.json").splits == splits
    with pytest.raises(UserError, match="cannot be written"):
        chorales.write(tmp_path / "no folder" / "a.json", splits)


@REAL
@pytest.mark.parametrize(("name", "voices", "per_quarter", "steps"), [
    ("jsb-chorales-quarter.json", 0, 1, {"train": 13_807, "valid": 4_602, "test": 4_725}),
    ("Jsb16thSeparated.json", 4, 4, {"train": 55_228, "valid": 18_408, "test": 18_900})])
def test_bachs_chorales_are_whole_and_come_back_from_their_scores(
        name: str, voices: int, per_quarter: int, steps: dict[str, int]) -> None:
    found = chorales.read(DATA / name)
    assert found.voices == voices
    assert found.report.pieces == {"train": 229, "valid": 76, "test": 77}
    assert not found.report.skipped
    assert {split: sum(map(len, pieces)) for split, pieces in found.splits.items()} == steps
    for piece in found.splits["valid"]:
        score = chorales.to_score(piece, per_quarter, found.voices)
        assert chorales.from_score(score, per_quarter, found.voices) == piece


@REAL
def test_bachs_chorales_lie_in_a_scale_as_tonal_music_does_and_the_held_out_ones_are_new() -> None:
    splits = chorales.read(DATA / "jsb-chorales-quarter.json").splits
    pitches = [[pitch for step in piece for pitch in step] for piece in splits["valid"]]
    shares = [music_figures.scale_consistency(piece) for piece in pitches]
    assert 0.85 < sum(shares) / len(shares) < 1
    novelty = music_figures.Novelty(splits["train"], n=4)
    assert novelty.share(splits["train"]) == 0
    assert novelty.share(splits["test"]) > 0.8
