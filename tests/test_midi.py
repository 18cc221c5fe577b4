"""MIDI files, scores and grids: written and read back, read by mido alone, and broken in every way."""

import tracemalloc
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.media import midi
from handmill.media.scores import DRUMS, KEYS, MOST_STEPS, REST, Note, Score, disjoint, from_grid, to_grid

ticks = st.integers(0, 5000)


@st.composite
def notes(draw: st.DrawFn) -> Note:
    start = draw(ticks)
    return Note(start, start + draw(st.integers(1, 2000)), draw(st.integers(0, 127)), draw(st.integers(1, 127)),
                draw(st.sampled_from([0, 24, 127, DRUMS])), draw(st.integers(0, 20)))


def changes(*values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    return st.lists(st.tuples(ticks, *values), max_size=4, unique_by=lambda change: change[0]).map(
        lambda found: tuple(sorted(found)))


scores = st.builds(
    Score, st.lists(notes(), min_size=1, max_size=40).map(tuple), st.sampled_from([1, 96, 480, 32767]),
    changes(st.integers(1, (1 << 24) - 1)).map(lambda found: ((0, 400_000), *(one for one in found if one[0]))),
    changes(st.integers(0, 23)), changes(st.integers(1, 255), st.sampled_from([1, 2, 4, 8, 16, 32, 64])),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(0, 20_000))


@given(scores)
def test_a_score_comes_back_from_its_midi_file_to_the_tick(score: Score) -> None:
    assert midi.from_bytes(midi.to_bytes(score)) == score.tidy()


@given(scores)
def test_tidying_twice_is_tidying_once_and_takes_no_onset_but_double_ones(score: Score) -> None:
    tidy = score.tidy()
    assert tidy.tidy() == tidy
    strikes = {(note.start, note.pitch, note.program == DRUMS, note.voice) for note in score.notes}
    assert len(tidy.notes) == len(strikes)


def of_messages(*tracks: list[mido.Message | mido.MetaMessage], kind: int = 1, resolution: int = 480) -> bytes:
    content = BytesIO()
    mido.MidiFile(type=kind, ticks_per_beat=resolution, tracks=list(map(mido.MidiTrack, tracks))).save(file=content)
    return content.getvalue()


def on(pitch: int, wait: int = 0, velocity: int = 80, channel: int = 0) -> mido.Message:
    return mido.Message("note_on", note=pitch, velocity=velocity, time=wait, channel=channel)


def off(pitch: int, wait: int = 0, channel: int = 0) -> mido.Message:
    return mido.Message("note_off", note=pitch, time=wait, channel=channel)


def pedal(value: int, wait: int = 0) -> mido.Message:
    return mido.Message("control_change", control=64, value=value, time=wait)


def spans(data: bytes, **options: bool) -> list[tuple[int, int, int]]:
    return [note[:3] for note in midi.from_bytes(data, **options).notes]


def test_first_struck_is_first_let_go_and_what_sounds_at_the_end_ends_there() -> None:
    assert spans(of_messages([on(60), on(60, 5), off(60, 5), off(60, 5)])) == [(0, 10, 60), (5, 15, 60)]
    assert spans(of_messages([on(60), on(62, 5), off(62, 5), on(64, 3, velocity=0)])) == [(0, 13, 60), (5, 10, 62)]
    assert spans(of_messages([off(61), on(60), off(60, 0)])) == [(0, 1, 60)]  # a note of no length, an off of none


def test_the_pedal_holds_until_it_comes_up_or_the_key_is_struck_again() -> None:
    data = of_messages([pedal(127), on(60), off(60, 10), on(62), off(62, 10), on(60, 10), off(60, 5), pedal(0, 5)])
    assert spans(data) == [(0, 30, 60), (10, 40, 62), (30, 40, 60)]
    assert spans(data, pedal=False) == [(0, 10, 60), (10, 20, 62), (30, 35, 60)]


def test_programs_last_on_their_channel_and_channel_ten_is_drums() -> None:
    program = mido.Message("program_change", program=40, channel=0)
    data = of_messages([program], [on(60), off(60, 10), on(36, channel=9), off(36, 5, channel=9)])
    first, drum = midi.from_bytes(data).notes
    assert (first.program, first.voice) == (40, 0)
    assert (drum.program, drum.voice, drum.pitch) == (DRUMS, 1, 36)


def test_keys_metres_tempos_and_a_latin_title() -> None:
    meta = [mido.MetaMessage("track_name", name="Präludium"), mido.MetaMessage("key_signature", key="Cb"),
            mido.MetaMessage("time_signature", numerator=3, denominator=8),
            mido.MetaMessage("set_tempo", tempo=250_000, time=480)]
    score = midi.from_bytes(of_messages(meta, [on(60), off(60, 960)]))
    assert score.title == "Präludium"
    assert [KEYS[key] for _, key in score.keys] == ["B"]
    assert score.metres == ((0, 3, 8),)
    np.testing.assert_allclose(score.seconds([0, 240, 480, 960]), [0, 0.25, 0.5, 0.75])
    np.testing.assert_array_equal(score.ticks([0, 0.25, 0.5, 0.75]), [0, 240, 480, 960])


@given(scores)
def test_mido_alone_finds_the_same_length_in_seconds(score: Score) -> None:
    file = mido.MidiFile(file=BytesIO(midi.to_bytes(score)))
    assert file.type == 1
    assert file.length == pytest.approx(float(score.seconds(score.tidy().length)), rel=1e-6)


@given(scores.filter(lambda score: score.resolution == 480))
def test_seconds_turn_back_into_ticks(score: Score) -> None:
    times = score.array[:, :2]
    fast = min(tempo for _, tempo in score.tempos)
    if fast >= 1000:  # a tick of less than some ns drowns in the rounding
        np.testing.assert_array_equal(score.ticks(score.seconds(times)), times)


def test_instruments_beyond_the_channels_share_them_and_keep_their_programs(tmp_path: Path) -> None:
    score = Score(tuple(sorted(Note(start, start + 480, 60, program=i, voice=i) for i in range(40)
                               for start in (0, 960))), length=1440)
    midi.write(tmp_path / "many.mid", score)
    assert midi.read(tmp_path / "many.mid") == score
    assert [path.name for path in tmp_path.iterdir()] == ["many.mid"]


GOOD = of_messages([on(60), off(60, 10)])


@pytest.mark.parametrize(("data", "sentence"), [
    (b"", "no MIDI file"),
    (b"PK\x03\x04" + bytes(100), "no MIDI file"),
    (GOOD[:-3], r"chunk at byte 14 .* has \d+ more"),
    (GOOD[:14] + b"MTrk\0\0\0\4\0\xf5\0\0", "broken MIDI file .*undefined status byte"),
    (GOOD[:14] + b"MTrk\0\0\0\1\0", "ends too early"),
    (GOOD[:14] + b"MTrk" + (70_000).to_bytes(4) + b"\x80" * 70_000, "never ends"),
    (of_messages([mido.Message("program_change")]), "no notes"),
    (of_messages(), "no notes"),
    (of_messages([mido.MetaMessage("set_tempo", tempo=0), on(60), off(60, 1)]), "tempo of zero"),
    (of_messages([on(60), off(60, 1)], kind=2), "type 2"),
    (of_messages([on(60), off(60, 1)], resolution=-25 * 256 + 40), "frames"),
    (of_messages([on(60), off(60, 1)], resolution=0), "frames"),
    (of_messages([on(60), off(60, 100_000 * 480 + 1)]), "longer than 100000 quarter notes"),
])
def test_what_is_no_music_is_a_sentence_with_the_name(data: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=f"bad.mid.*{sentence}"):
        midi.from_bytes(data, "bad.mid")


def test_foreign_chunks_a_riff_around_and_bytes_behind_are_skipped() -> None:
    foreign = b"XFIH" + (3).to_bytes(4) + b"abc"
    assert spans(GOOD[:14] + foreign + GOOD[14:] + foreign + b"\0\0") == spans(GOOD)
    assert spans(b"RIFF" + bytes(4) + b"RMIDdata" + bytes(4) + GOOD) == spans(GOOD)


def test_too_many_events_stop_the_reading_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midi, "MOST_EVENTS", 100)
    body = b"\0\xc0\0" + b"\0\0" * 200_000  # program changes in running status
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 100 events"):
        midi.from_bytes(GOOD[:14] + b"MTrk" + len(body).to_bytes(4) + body)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 10 * len(body)  # of the bytes themselves; 200 000 messages take over 50 MB


def test_a_file_that_is_missing_or_too_large_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        midi.read(tmp_path / "none.mid")
    (tmp_path / "large.mid").write_bytes(GOOD)
    monkeypatch.setattr(midi, "LARGEST", 10)
    with pytest.raises(UserError, match="larger than"):
        midi.read(tmp_path / "large.mid")
    with pytest.raises(UserError, match="cannot be written"):
        midi.write(tmp_path / "no folder" / "a.mid", midi.from_bytes(GOOD))


@given(st.binary(max_size=60), st.integers(0, len(GOOD)), st.integers(0, 60))
@settings(max_examples=300)
def test_any_bytes_are_a_score_or_a_sentence(junk: bytes, place: int, gone: int) -> None:
    for data in (GOOD[:place] + junk + GOOD[place + gone:], GOOD[:14] + b"MTrk" + len(junk).to_bytes(4) + junk):
        with suppress(UserError):
            assert midi.from_bytes(data).notes


def test_of_overlapping_notes_on_one_string_each_ends_where_the_next_begins() -> None:
    found = disjoint([Note(0, 9, 60), Note(4, 6, 60), Note(4, 8, 60), Note(4, 5, 61)], lambda note: note.pitch)
    assert [note[:3] for note in found] == [(0, 4, 60), (4, 5, 61), (4, 8, 60)]


def test_transposing_moves_notes_and_keys_but_no_drums() -> None:
    score = Score((Note(0, 1, 60), Note(0, 1, 36, program=DRUMS)), keys=((0, 21),))
    moved = score.transposed(3)
    assert moved is not None
    assert [note.pitch for note in moved.notes] == [63, 36]
    assert KEYS[moved.keys[0][1]] == "Cm"
    assert score.transposed(68) is None


steps = st.lists(st.frozensets(st.integers(0, 127), max_size=5).map(lambda step: tuple(sorted(step))), max_size=12)
voiced = st.lists(st.tuples(*[st.integers(REST, 127)] * 3), max_size=12)


@given(steps, st.booleans(), st.sampled_from([1, 3, 4, 24]))
def test_a_grid_comes_back_from_its_score_and_from_its_midi_file(
        grid: list[tuple[int, ...]], held: bool, per_quarter: int) -> None:
    score = from_grid(grid, per_quarter, held=held)
    assert to_grid(score, per_quarter) == tuple(grid)
    if score.notes:
        assert to_grid(midi.from_bytes(midi.to_bytes(score)), per_quarter) == tuple(grid)


@given(voiced, st.booleans())
def test_separated_voices_come_back_from_their_score(grid: list[tuple[int, ...]], held: bool) -> None:
    assert to_grid(from_grid(grid, 4, separated=True, held=held), 4, voices=3) == tuple(grid)


def test_a_pitch_that_goes_on_is_one_held_note_unless_asked_otherwise() -> None:
    grid = ((60, 64), (60,), (60,), (), (60,))
    assert [note[:3] for note in from_grid(grid, 1).notes] == [(0, 480, 64), (0, 1440, 60), (1920, 2400, 60)]
    assert len(from_grid(grid, 1, held=False).notes) == 5


def test_notes_between_steps_go_to_the_nearest_and_last_one_at_least() -> None:
    score = Score((Note(59, 61, 60), Note(60, 61, 62)), 480)  # a step of 120 ticks: half a step rounds up
    assert to_grid(score, 4) == ((60,), (62,))


def test_a_grid_without_end_or_with_too_few_voices_is_a_sentence() -> None:
    with pytest.raises(UserError, match="steps"):
        to_grid(Score((Note(0, MOST_STEPS + 1, 60),), resolution=1), 1)
    with pytest.raises(UserError, match="2 voices and the grid 1"):
        to_grid(Score((Note(0, 1, 60), Note(0, 1, 60, voice=1))), 4, voices=1)
