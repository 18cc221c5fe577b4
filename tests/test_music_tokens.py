"""Music tokens: there and back, any tokens at all, the grammar against what is encoded, transposition, files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.media.music_tokens import (
    END,
    Asked,
    Events,
    EventSettings,
    Frames,
    FrameSettings,
    load,
)
from handmill.media.scores import DRUMS, KEYS, LONGEST, MOST_STEPS, REST, Note, Score, in_voices

CONDITIONS: dict[str, Any] = {"keys": True, "tempos": (80.0, 120.0), "names": ("bach", "handel")}
PLAIN = FrameSettings(lowest=40, highest=51, voices=3)
FRAMES = [Frames(PLAIN), Frames(replace(PLAIN, melody=True, **CONDITIONS))]
BAND = EventSettings(lowest=40, highest=51, programs=(0, 40), drums=True, velocities=4, longest=500)
EVENTS = [Events(replace(BAND, shifts="doubling", **CONDITIONS)), Events(BAND),
          Events(replace(BAND, programs=(0,), drums=False, lowest=45, highest=46))]
BOTH: list[Frames | Events] = [*FRAMES, *EVENTS]

chords = st.lists(st.frozensets(st.integers(40, 51), max_size=3).map(lambda chord: tuple(sorted(chord))), max_size=12)
asked = st.builds(Asked, st.integers(-1, 23), st.sampled_from([0.0, 60.0, 100.0, 200.0]),
                  st.sampled_from(["", "bach", "handel"]))


@st.composite
def notes(draw: st.DrawFn) -> Note:
    start, program = draw(st.integers(0, 4000)), draw(st.sampled_from([0, 40, DRUMS]))
    return Note(start, start + draw(st.integers(1, 3000)), draw(st.integers(40, 51)), draw(st.integers(1, 127)),
                program, (0, 40, DRUMS).index(program))


scores = st.lists(notes(), max_size=20).map(lambda found: Score(tuple(found), 480, ((0, 600_000), (1000, 400_000))))


def words(codec: Frames | Events, tokens: Any) -> list[str]:
    return [codec.names[token] for token in tokens]


def test_a_chord_is_written_from_the_top_and_every_token_has_a_name() -> None:
    codec = Frames(FrameSettings(**CONDITIONS))
    tokens = codec.encode(((48, 64, 60), (), (REST, 59)), Asked(key=21, tempo=100, name="handel"))
    assert words(codec, tokens) == ["key Am", "tempo 80..120", "name handel", "pitch E4", "pitch C4", "pitch C3",
                                    "step", "step", "pitch B3", "step"]
    assert words(codec, codec.header()) == ["key unknown", "tempo unknown", "name unknown"]
    assert len(set(codec.names)) == codec.size == 1 + 25 + 4 + 3 + 1 + 88


@given(chords, asked)
def test_chords_and_what_was_asked_come_back(grid: list[tuple[int, ...]], wish: Asked) -> None:
    for codec in FRAMES:
        tokens = codec.encode(tuple(grid), wish)
        assert codec.decode(tokens) == tuple(grid)
        assert codec.steps(tokens) == len(grid)
    found = FRAMES[1].asked_of(tokens)
    assert (found.key, found.name) == (wish.key, wish.name)
    assert FRAMES[1].header(found) == FRAMES[1].header(wish)


def test_a_step_with_too_much_in_it_is_a_sentence_with_its_number() -> None:
    with pytest.raises(UserError, match=r"step 1 has 4 pitches.*codec\.voices = 3"):
        FRAMES[0].encode(((), (40, 41, 42, 43)))
    with pytest.raises(UserError, match=r"step 0 has the pitches \[60\]"):
        FRAMES[0].encode(((60,),))
    with pytest.raises(UserError, match="'liszt' is not known"):
        FRAMES[1].encode((), Asked(name="liszt"))


def test_pieces_are_packed_behind_end_and_the_first_is_decoded() -> None:
    tokens = FRAMES[0].pack([(((40,),), Asked()), (((41,), ()), Asked())])
    assert words(FRAMES[0], tokens) == ["end", "pitch E2", "step", "end", "pitch F2", "step", "step"]
    assert tokens.dtype == FRAMES[0].dtype
    assert FRAMES[0].decode(tokens) == ((40,),)
    assert not len(FRAMES[0].pack([]))


def test_the_loss_leaves_out_conditions_and_with_a_melody_what_opens_a_step() -> None:
    tokens = FRAMES[1].pack([(((40, 50), (), (41,)), Asked()), (((42,),), Asked())])
    given_ = [FRAMES[1].names[token] for token, known in zip(tokens, FRAMES[1].given(tokens), strict=True) if known]
    header = ["key unknown", "tempo unknown", "name unknown"]
    assert given_ == ["end", *header, "pitch D3", "step", "pitch F2", "end", *header, "pitch F#2"]
    assert words(FRAMES[1], FRAMES[1].melody(((40, 50), (), (41,)))) == ["pitch D3", "step", "pitch F2"]
    plain = Frames(replace(FRAMES[1].settings, melody=False))
    assert plain.given(tokens).sum() == 6  # twice three conditions


@given(chords, st.integers(-13, 13))
def test_transposing_tokens_is_transposing_pitches(grid: list[tuple[int, ...]], semitones: int) -> None:
    tokens = FRAMES[1].encode(tuple(grid), Asked(key=21))
    moved = FRAMES[1].transpose(tokens, semitones)
    wanted = tuple(tuple(pitch + semitones for pitch in step) for step in grid)
    if all(40 <= pitch <= 51 for step in wanted for pitch in step):
        assert moved is not None
        np.testing.assert_array_equal(moved, FRAMES[1].encode(wanted, Asked(key=12 + (9 + semitones) % 12)))
    else:
        assert moved is None


def test_transposing_leaves_unknown_keys_and_drums_where_they_are() -> None:
    codec = EVENTS[0]
    tokens = codec.encode(Score((Note(0, 480, 45), Note(0, 480, 127, program=DRUMS))))
    moved = codec.transpose(tokens, 2)
    assert moved is not None
    changed = [(a, b) for a, b in zip(words(codec, tokens), words(codec, moved), strict=True) if a != b]
    assert changed == [("on A2", "on B2"), ("off A2", "off B2")]


def test_a_little_music_in_events() -> None:
    codec = Events(EventSettings(programs=(0, 40), drums=True, velocities=127))
    score = Score((Note(0, 1250, 60, 90), Note(0, 1000, 64, 90, 40), Note(1000, 1001, 36, 100, DRUMS)), 500)
    assert words(codec, codec.encode(score)) == [
        "velocity 90", "on C4", "program 40", "on E4", "shift 1000 ms", "off E4", "velocity 100", "drum 36",
        "shift 250 ms", "program 0", "off C4"]
    doubling = Events(EventSettings(shifts="doubling"))
    assert doubling.durations == [1, 2, 4, 8, 16, 32, 64]
    assert words(doubling, doubling.encode(Score((Note(0, 790, 60),), 500)))[2:-1] == [
        "shift 640 ms", "shift 80 ms", "shift 40 ms", "shift 20 ms", "shift 10 ms"]


@given(scores)
def test_what_is_decoded_is_encoded_to_the_same_tokens(score: Score) -> None:
    for codec in EVENTS[:2]:
        tokens = codec.encode(score)
        decoded = codec.decode(tokens)
        np.testing.assert_array_equal(codec.encode(decoded), tokens)


@given(scores)
def test_events_come_back_to_half_a_grain_and_a_bin(score: Score) -> None:
    spread = [note._replace(start=5000 * i, end=5000 * i + note.end - note.start)  # far apart: none cuts another
              for i, note in enumerate(score.notes)]
    score = replace(score, notes=tuple(spread))
    decoded = EVENTS[1].decode(EVENTS[1].encode(score))
    assert len(decoded.notes) == len(score.notes)
    before, after = score.array, decoded.array
    np.testing.assert_array_equal(after[:, [2, 4, 5]], before[:, [2, 4, 5]])
    assert (abs(after[:, 3] - before[:, 3]) <= 127 / 4 / 2 + 1).all()
    wanted, found = score.seconds(before[:, :2]), decoded.seconds(after[:, :2])
    assert (abs(found[:, 0] - wanted[:, 0]) <= 0.005 + 1e-9).all()
    melodic = before[:, 4] != DRUMS
    short = wanted[:, 1] - wanted[:, 0] < 0.01
    assert (abs(found[:, 1] - wanted[:, 1])[melodic & ~short] <= 0.005 + 1e-9).all()
    assert (abs(found[:, 1] - found[:, 0] - 0.01)[~melodic] < 1e-9).all()


@pytest.mark.parametrize(("note", "sentence"), [
    (Note(0, 1, 60, program=7), r"program 7 .*codec\.programs"), (Note(0, 1, 60, program=DRUMS), "drums"),
    (Note(0, 1, 20), r"pitch 20.*codec\.lowest"), (Note(1 << 27, (1 << 27) + 1, 60), "time shifts")])
def test_events_that_the_settings_have_no_room_for_are_a_sentence(note: Note, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Events(EventSettings()).encode(Score((note,), 1))


@given(st.lists(st.integers(-5, 300), max_size=40))
def test_any_tokens_are_music_and_allow_a_next_one(tokens: list[int]) -> None:
    for codec in BOTH:
        score = codec.score(tokens) if isinstance(codec, Frames) else codec.decode(tokens)
        assert isinstance(score, Score)
        assert codec.grammar(tokens).shape == (codec.size,)
        assert codec.grammar(tokens).any()
        assert codec.given(tokens).shape == (len(tokens),)
        codec.asked_of(tokens)


def test_what_goes_on_for_days_is_cut_to_what_a_file_can_hold() -> None:
    codec = Events(EventSettings(grain=1000, longest=1_000_000))
    assert codec.decode([codec.first["on"]] + [codec.first["velocity"] - 1] * 300).end <= LONGEST
    assert FRAMES[0].score([FRAMES[0].first["pitch"], *[FRAMES[0].step] * (MOST_STEPS + 5)]).end == MOST_STEPS * 120


def obeys(codec: Frames | Events, tokens: Any) -> bool:
    return all(codec.grammar(tokens[:i])[token] for i, token in enumerate(tokens))


@given(chords, asked)
@settings(max_examples=30)
def test_encoded_chords_obey_the_grammar(grid: list[tuple[int, ...]], wish: Asked) -> None:
    for codec in FRAMES:
        assert obeys(codec, [*codec.encode((*grid, ()), wish), END])


@given(scores, asked)
@settings(max_examples=30)
def test_encoded_events_obey_the_grammar(score: Score, wish: Asked) -> None:
    for codec in EVENTS[:2]:
        tokens = codec.encode(score, wish)
        assert obeys(codec, [*tokens, END][:len(tokens) + bool(score.notes)])


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: f"{codec.kind}-{codec.size}")
@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_the_grammar_never_stick_and_are_what_is_encoded(codec: Frames | Events, seed: int) -> None:
    random, tokens = np.random.default_rng(seed), [END]
    for _ in range(200):
        token = int(random.choice(np.flatnonzero(codec.grammar(tokens))))
        tokens.append(token)
        if token == END:
            break
    if isinstance(codec, Frames):
        whole = tokens[1:len(tokens) - tokens[::-1].index(codec.step)]  # up to the last whole step
        np.testing.assert_array_equal(codec.encode(codec.decode(whole), codec.asked_of(whole)), whole)
    else:
        ons = sum(codec.section(token)[0] in ("on", "drum") for token in tokens)
        assert len(codec.decode(tokens).notes) == ons  # no note of no length


def test_the_grammar_of_chords_by_hand() -> None:
    codec = FRAMES[0]

    def allowed(*tokens: int) -> list[str]:
        return words(codec, np.flatnonzero(codec.grammar(tokens)))

    every = ["step", *codec.names[codec.first["pitch"]:]]
    low = codec.first["pitch"]
    assert allowed() == every  # no piece is empty
    assert allowed(END, codec.step) == ["end", *every]
    assert allowed(END, low + 2) == ["step", "pitch E2", "pitch F2"]
    assert allowed(END, low + 5, low + 4, low + 3) == ["step"]  # three voices
    assert allowed(END, low) == ["step"]
    assert words(FRAMES[1], np.flatnonzero(FRAMES[1].grammar([END])))[:2] == ["key unknown", "key C"]


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: f"{codec.kind}-{codec.size}")
def test_a_codec_comes_back_from_its_file(codec: Frames | Events, tmp_path: Path) -> None:
    codec.save(tmp_path)
    found = load(codec.settings, tmp_path)
    assert type(found) is type(codec)
    assert found.settings == codec.settings
    assert found.names == load(None, tmp_path).names == codec.names
    with pytest.raises(UserError, match="holds other"):
        load(replace(codec.settings, highest=60), tmp_path)


@pytest.mark.parametrize("change", [
    {"format": "handmill-music-tokens/0"}, {"size": 5}, {"end": 3}, {"settings": 7}, {"settings": {"kind": "text"}},
    {"settings": {"kind": "frames", "lowest": "a"}}, {"settings": {"kind": "frames", "lowest": 500}},
    {"settings": {"kind": "frames", "low": 5}}, {"settings": {"kind": "events", "programs": [200]}}])
def test_a_broken_file_is_a_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load(None, tmp_path)
    FRAMES[0].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"tokenizer\.json is no description of music tokens"):
        load(None, tmp_path)
    for text in ("", "[" * 100_000, "\0"):
        file.write_text(text)
        with pytest.raises(UserError, match="no description"):
            load(None, tmp_path)


@pytest.mark.parametrize(("settings_", "wrong"), [
    (FrameSettings, {"lowest": 60, "highest": 50}), (FrameSettings, {"highest": 128}), (FrameSettings, {"voices": 0}),
    (FrameSettings, {"steps": 25}), (FrameSettings, {"tempos": (120.0, 80.0)}), (FrameSettings, {"names": ("a", "a")}),
    (FrameSettings, {"names": ("",)}), (EventSettings, {"grain": 0}), (EventSettings, {"longest": 5}),
    (EventSettings, {"longest": 10_001}), (EventSettings, {"velocities": 128}), (EventSettings, {"programs": ()}),
    (EventSettings, {"programs": (3, 1)}), (EventSettings, {"tempos": (0.0,)})])
def test_settings_say_what_is_wrong_with_them(settings_: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        settings_(**wrong)


@given(st.integers(0, 23), st.integers(-24, 24))
def test_keys_move_round_the_circle_and_keep_their_mode(key: int, semitones: int) -> None:
    codec = FRAMES[1]
    moved = codec.transpose(codec.header(Asked(key=key)), semitones)
    assert moved is not None
    found = codec.asked_of(moved).key
    assert KEYS[found].endswith("m") == KEYS[key].endswith("m")
    assert (found - key - semitones) % 12 == 0


def test_voices_move_least() -> None:
    """A unison of two voices, which a set of pitches shows once, leaves the others where they are."""
    steps = ((67, 64, 60, 48), (67, 64, 48), (67, 60, 48), (48,), (72,), ())
    assert in_voices(steps, 4) == ((67, 64, 60, 48), (67, 64, -1, 48), (67, -1, 60, 48), (-1, -1, -1, 48),
                                   (72, -1, -1, -1), (-1, -1, -1, -1))
    score = Frames(FrameSettings(voices=4, steps=1)).score([0])
    assert score.notes == ()
