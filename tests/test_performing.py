"""What a user says becomes wishes, and pieces become files that tell the same notes and how they were made."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handmill import cli, folder
from handmill.errors import UserError
from handmill.families.autoregressive import Objective, Sampling
from handmill.families.composing import Wish
from handmill.media import midi, performing, sound
from handmill.media.music_tokens import Asked, Events, EventSettings, Frames, FrameSettings
from handmill.media.scores import DRUMS, Note, Score, from_grid
from handmill.networks import decoder
from handmill.recipe import Recipe, Training
from handmill.verbs.compose import compose, save_music, wish
from handmill.verbs.generate import generate, pieces
from handmill.verbs.load import Loaded

CHORDS = FrameSettings(lowest=48, highest=72, voices=4, keys=True, tempos=(80.0,), names=("bach", "J S Bach"))
FREE = EventSettings(lowest=48, highest=72, velocities=4, drums=True)
TUNE = from_grid([(60,), (60,), (), (64, 50), (72,), (48,)], 4)
SCORE = Score((Note(0, 480, 60, 90), Note(0, 960, 64, 90, 40, 1), Note(480, 490, 36, 100, DRUMS, 2)),
              tempos=((0, 500_000), (480, 250_000)), length=1920)


@dataclass(frozen=True)
class Table:
    """A table of the recipe that says nothing here."""

    licence: str = "CC0-1.0"


def made(settings: Any, path: Path = Path("runs/tiny")) -> Loaded:
    """A model with random weights."""
    network = decoder.Settings(layers=1, width=16, heads=2, context=64)
    recipe = Recipe("tiny", "music", "autoregressive", 1, Table(), settings, network, Objective(), Training(),
                    Sampling(max_tokens=80), Table())
    codec = Frames(settings) if isinstance(settings, FrameSettings) else Events(settings)
    torch.manual_seed(3)
    weights: Any = decoder.Decoder(network, codec.size).eval()
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return Loaded(path, recipe, weights, codec, {"files": {"weights.safetensors": {"sha256": "0" * 64}}})


@pytest.fixture(scope="module")
def chords() -> Loaded:
    return made(CHORDS)


@pytest.fixture(scope="module")
def free() -> Loaded:
    return made(FREE)


# scores to files

def test_notes_in_seconds_follow_the_tempos_and_name_drums() -> None:
    notes = performing.seconds(SCORE)
    assert [(note.start, note.end) for note in notes] == [(0, 0.5), (0, 0.75), (0.5, pytest.approx(0.5 + 1 / 192))]
    assert [note.program for note in notes] == [0, 40, -1]
    assert [note.voice for note in notes] == [0, 1, 2]
    assert performing.seconds(Score(())) == []


def test_a_wav_is_heard_and_as_long_as_the_score() -> None:
    for score, channels in ((SCORE, 2), (TUNE, 1)):
        heard = sound.from_bytes(performing.wav(score, about={"seed": "3"}))
        assert heard.samples.ndim == channels
        assert heard.seconds >= score.seconds(score.end) - 1e-4
        assert heard.seconds < score.seconds(score.end) + 3
        assert np.abs(heard.samples[:heard.rate // 4]).max() > 0.02
    silent = sound.from_bytes(performing.wav(Score((), length=4800)))
    assert silent.seconds == pytest.approx(5.0)
    assert not silent.samples.any()


def test_a_midi_file_reads_back_to_the_same_notes_and_says_how_it_was_made(tmp_path: Path) -> None:
    mido = pytest.importorskip("mido")
    about = {"seed": "3", "recipe": 'name = "Größe"\n'}
    written = performing.save(SCORE, tmp_path / "a.b", about)
    assert [path.name for path in written] == ["a.b.mid", "a.b.wav"]
    assert midi.read(written[0]).tidy() == replace(SCORE, length=1920).tidy()
    texts = [message.text for message in mido.MidiFile(written[0]).tracks[0] if message.type == "text"]
    assert [json.loads(text) for text in texts] == [about]
    assert b"Gr\\u00f6\\u00dfe" in written[1].read_bytes()
    with pytest.raises(UserError, match=r"none\.sf2"):
        performing.wav(SCORE, str(tmp_path / "none.sf2"))


# what a user says

@pytest.mark.parametrize(("prompt", "asked"), [
    ("", Asked()), ("key=G tempo=90 name=bach", Asked(7, 90.0, "bach")), ("name=bach key=Gm", Asked(19, 0.0, "bach")),
    ("Gm", Asked(19)), ("bach", Asked(name="bach")), ("J S Bach", Asked(name="J S Bach")),
    ("j s bach tempo=90", Asked(-1, 90.0, "J S Bach")), ("F# minor tempo = 60", Asked(18, 60.0))])
def test_words_become_wishes(chords: Loaded, prompt: str, asked: Asked) -> None:
    assert wish(chords, prompt) == Wish(asked)


@pytest.mark.parametrize("prompt", ["liszt", "key=H", "tempo=fast", "name=liszt", "metre=3", "key=G key=C", "G name"])
def test_other_words_are_a_sentence(chords: Loaded, free: Loaded, prompt: str) -> None:
    with pytest.raises(UserError):
        wish(chords, prompt)
    with pytest.raises(UserError):
        wish(free, prompt)
    with pytest.raises(UserError, match="not told keys"):
        wish(free, "G")


def test_highest_notes_are_the_melody_and_steps_cut_it(chords: Loaded, free: Loaded, tmp_path: Path) -> None:
    midi.write(tmp_path / "tune.mid", TUNE)
    codec: Any = chords.codec
    whole = wish(chords, melody=TUNE)
    assert whole.melody == tuple(codec.melody([(60,), (60,), (), (64,), (72,), (48,)]).tolist())
    assert wish(chords, melody=tmp_path / "tune.mid") == wish(chords, melody=midi.to_bytes(TUNE)) == whole
    assert wish(chords, melody=TUNE, steps=2) == Wish(melody=whole.melody[:2], steps=2)
    begun = wish(chords, beginning=TUNE)
    assert codec.decode(begun.beginning) == tuple(tuple(sorted(step)) for step in codec.read(TUNE))
    assert free.codec.decode(wish(free, beginning=TUNE).beginning).array[:, 2].tolist() == TUNE.array[:, 2].tolist()


@pytest.mark.parametrize(("given", "sentence"), [
    ({"melody": Score((Note(0, 480, 90),))}, "transpose"), ({"beginning": Score((Note(0, 480, 20),))}, "transpose"),
    ({"melody": Score((Note(0, 480, 36, program=DRUMS),))}, "no notes"), ({"steps": 0}, "steps = 0"),
    ({"beginning": Score(tuple(Note(0, 480, 50 + i) for i in range(5)))}, "5 pitches"),
    ({"melody": b"not MIDI"}, "no MIDI file"), ({"melody": Path("none.mid")}, "none.mid")])
def test_music_that_does_not_fit_is_a_sentence(chords: Loaded, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        wish(chords, **given)


# scores from models

def test_a_prompt_makes_a_score_and_a_seed_the_same_one(chords: Loaded, free: Loaded) -> None:
    for model, prompt in ((chords, "key=G tempo=93"), (free, "")):
        made = model.generate(prompt, seed=4, max_tokens=40)
        assert isinstance(made, Score)
        assert made.notes
        assert made == model.generate(prompt, seed=4, max_tokens=40)
        assert made != model.generate(prompt, seed=5, max_tokens=40)
    assert chords.generate("tempo=93", seed=4).tempo == pytest.approx(93, abs=0.01)
    assert [chords.generate(seed=1)] != generate(chords, ["", ""], seed=1)
    with pytest.raises(UserError, match="makes music, not text"):
        pieces(chords, [""])
    with pytest.raises(UserError, match="free time"):
        free.generate(melody=TUNE)


def test_a_melody_makes_room_for_itself_unless_the_user_says_otherwise(chords: Loaded) -> None:
    long = from_grid([(60,)] * 50, 4)
    score = chords.generate(melody=long, seed=1)
    assert chords.codec.read(score)
    assert [max(step) for step in chords.codec.read(score)] == [60] * 50
    assert len(chords.codec.read(chords.generate(melody=long, steps=7))) == 7
    with pytest.raises(UserError, match="set max_tokens to 250"):
        chords.generate(melody=long, max_tokens=249)


def test_pieces_do_not_depend_on_the_turns_they_are_made_in(chords: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compose(chords, [Wish(steps=3)] * 5, seed=2)
    monkeypatch.setattr("handmill.verbs.compose.AT_ONCE", 2)
    assert compose(chords, [Wish(steps=3)] * 5, seed=2) == whole


def test_files_of_a_batch_say_how_to_make_them_again(chords: Loaded, tmp_path: Path) -> None:
    mido = pytest.importorskip("mido")
    wishes = [wish(chords, "key=G", TUNE), wish(chords, "bach", TUNE)]
    paths = save_music(chords, wishes, tmp_path / "out", 7, voice_temperatures=(0.0, 1.0))
    assert [path.name for path in paths] == ["7-000.mid", "7-000.wav", "7-001.mid", "7-001.wav",
                                              "rolls.png", "player.html"]
    again = compose(chords, wishes, seed=7, voice_temperatures=[0.0, 1.0])
    for path, score in zip(paths[::2], again, strict=False):
        assert midi.read(path).notes == score.tidy().notes
    texts = [message.text for message in mido.MidiFile(paths[2]).tracks[0] if message.type == "text"]
    about = json.loads(texts[0])
    assert (about["seed"], about["index"], about["asked"], about["melody"]) == ("7", "1", "name=bach", "6 steps")
    assert "voice_temperatures = [" in about["recipe"]
    assert "max_tokens = 30" in about["recipe"]
    assert "asked" in paths[1].read_bytes().decode("latin-1")
    with Image.open(paths[4]) as picture:
        assert picture.text["seed"] == "7"  # type: ignore[attr-defined]
    html = paths[5].read_text(encoding="utf-8")
    assert html.count('<figure class="notes">') == 2
    assert "max_tokens = 30" in html
    assert "tiny 1 name=bach" in html


# the command line

@pytest.fixture
def command(chords: Loaded, free: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "load", lambda path: chords if path.name == "chords" else free)


@pytest.mark.usefixtures("command")
def test_the_command_line_makes_music(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    midi.write(tmp_path / "tune.mid", TUNE)
    tune = str(tmp_path / "tune.mid")
    words = ["generate", "chords", "key=G", "bach", "-n", "2", "--melody", tune, "--steps", "4",
             "--voice-temperatures", "0.8,1", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--beginning", tune]) == 2
    assert "fills all 4 steps" in capsys.readouterr().err
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.split()
    assert len(printed) == 10
    assert all(Path(path).is_file() for path in printed)


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(("words", "sentence"), [
    (["chords", "--stop", "x"], "--stop is for text, and chords makes music"),
    (["chords", "--walk", "a.gif"], "--walk is for images, and"),
    (["chords", "--guidance", "2"], "--guidance is for images"),
    (["free", "--steps", "3"], "free time"), (["free", "--soundfont", "none.sf2"], "none.sf2"),
    (["chords", "--set", "temprature=3"], "did you mean sampling.temperature"),
    (["chords", "--runtime", "onnx"], "receipt")])
def test_what_does_not_belong_is_one_sentence(words: list[str], sentence: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_temperatures_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.temperatures("0.8,1,1") == (0.8, 1.0, 1.0)
    with pytest.raises(SystemExit):
        cli.main(["generate", "chords", "--voice-temperatures", "a,b"])
    assert "write for example 0.8,1,1,1" in capsys.readouterr().err
