"""The server of music over real sockets: what `generate` makes, in every form; refusals, limits, clients that leave."""

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import musical
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.folder import Model
from handmill.media import midi, music_words, performing, sound
from handmill.media.music_tokens import Asked, Events, EventSettings, Frames, FrameSettings
from handmill.media.scores import KEYS, Note, Score, from_grid, to_grid

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
mido = pytest.importorskip("mido")

from test_serve import running, until, waiting  # noqa: E402

from handmill.serving import music  # noqa: E402
from handmill.serving.engine import Limits  # noqa: E402
from handmill.verbs import compose as verb  # noqa: E402

LIMITS = Limits(samples=5, max_tokens=400, body=20_000)
CODEC = Frames(FrameSettings(voices=4, keys=True, tempos=(80.0, 120.0), names=("bach", "Bach", "de Falla")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    home = tmp_path_factory.mktemp("served")
    return {"chorales": musical.load(home / "chorales"),
            "carried": musical.load(home / "carried", network=musical.LSTM),
            "harmoniser": musical.load(home / "harmoniser", codec=musical.HARMONISER),
            "piano": musical.load(home / "piano", codec=musical.PIANO), "text": tiny.load(home / "text")}


@pytest.fixture(scope="module")
def address(models: dict[str, Model]) -> Iterator[str]:
    with running(models, limits=LIMITS) as url:
        yield url


def ask(address: str, **fields: Any) -> Any:
    return httpx.post(f"{address}/v1/music/generations", json={"model": "chorales"} | fields, timeout=60)


def data(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def file(datum: Any) -> bytes:
    return base64.b64decode(datum["b64_json"])


def sent(score: Score) -> str:
    return base64.b64encode(midi.to_bytes(score)).decode()


def steps_of(score: Score, count: int) -> list[tuple[int, ...]]:
    return [*to_grid(score, 4), *[()] * count][:count]


# what an answer holds

@pytest.mark.parametrize("kind", ["chorales", "carried", "piano"])
def test_the_pieces_are_those_that_generate_makes(address: str, models: dict[str, Model], kind: str) -> None:
    answer = ask(address, model=kind, n=3, seed=5, temperature=0.9)
    model = models[kind]
    scores = verb.compose(model, [verb.wish(model)] * 3, seed=5, temperature=0.9)
    for index, (datum, score) in enumerate(zip(data(answer), scores, strict=True)):
        assert file(datum) == midi.to_bytes(score, verb.told(model, verb.wish(model), 5, index,
                                                             {"temperature": 0.9, "max_tokens": 60}))
        assert (datum["index"], datum["seed"], datum["format"]) == (index, 5, "mid")
        assert datum["notes"] == len(score.notes)
        assert datum["seconds"] == pytest.approx(float(score.seconds(score.end)), abs=1e-3)
    whole = answer.json()
    assert (whole["seed"], whole["model"], whole["prompt"]) == (5, kind, "")
    assert whole["created"] > 1_700_000_000
    assert whole["system_fingerprint"].startswith("handmill-")
    assert data(ask(address, model=kind, seed=5, temperature=0.9))[0] == whole["data"][0]


def test_key_tempo_and_name_are_asked_for_in_words_or_fields(address: str, models: dict[str, Model]) -> None:
    words = {"prompt": "tempo=100 key=F# minor name=de Falla", "seed": 1}
    whole = ask(address, **words).json()
    assert whole["prompt"] == "key=F#m tempo=100 name=de Falla"
    for fields in ({"key": "f#m", "tempo": 100, "name": "De falla"}, {"prompt": "key=F#m", "key": "F♯ minor",
                                                                      "tempo": 100.0, "name": "de Falla"}):
        again = ask(address, seed=1, **fields).json()
        assert again["data"] == whole["data"]
    assert data(ask(address, seed=1)) != whole["data"]
    assert midi.from_bytes(file(whole["data"][0])).tempo == pytest.approx(100)
    text = [m.text for m in mido.MidiFile(file=io.BytesIO(file(whole["data"][0]))).tracks[0] if m.type == "text"]
    told = json.loads(text[0])
    assert told["asked"] == "key=F#m tempo=100 name=de Falla"
    assert told["Source"] == "made by a generative model"
    assert told["weights"] == models["chorales"].receipt["files"]["weights.safetensors"]["sha256"]


def test_the_same_piece_as_sound_and_as_notes(address: str) -> None:
    notes, wav = (data(ask(address, seed=3, steps=8, response_format=form))[0] for form in ("json", "wav"))
    score = midi.from_bytes(file(data(ask(address, seed=3, steps=8))[0]))
    heard = sorted((round(n.start, 4), round(n.end, 4), n.pitch) for n in performing.seconds(score))
    assert sorted((round(n["start"], 4), round(n["end"], 4), n["pitch"]) for n in notes["score"]) == heard
    assert "b64_json" not in notes
    assert notes["format"] == "json"
    made = sound.from_bytes(file(wav))
    assert made.seconds >= wav["seconds"] > 0
    assert abs(made.samples).max() > 0.05
    assert "cut" not in wav


def test_sound_is_cut_to_what_an_answer_may_hold(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music, "SOUND", 1.0)
    pieces = data(ask(address, seed=3, n=2, response_format="wav"))
    for piece in pieces:
        assert piece["cut"] == 0.5
        assert piece["seconds"] > 0.5
        assert sound.from_bytes(file(piece)).seconds < 2.0  # the last notes fade


def test_a_score_is_shortened_to_seconds() -> None:
    score = Score((Note(0, 960, 60), Note(480, 720, 64), Note(960, 1440, 67)), length=1440)  # 480 are half a second
    short = music.shortened(score, 0.6)
    assert [(note.start, note.end) for note in short.notes] == [(0, 576), (480, 576)]
    assert short.end == 576
    assert music.shortened(score, 1.5) is score


@pytest.mark.parametrize("form", ["list", "mid"])
@pytest.mark.parametrize("kind", ["chorales", "harmoniser"])
def test_a_melody_stays_on_top(address: str, form: Any, kind: str) -> None:
    pitches = [60, 62, -1, 64, 65, 64, 62, 60]
    melody = sent(from_grid([[p] if p >= 0 else [] for p in pitches], 4)) if form == "mid" else pitches
    score = midi.from_bytes(file(data(ask(address, model=kind, melody=melody, seed=2))[0]))
    steps = steps_of(score, 8)
    assert [max(step, default=-1) for step in steps] == pitches
    assert max(map(len, steps)) > 1


CHORDS = [[48, 60], [48, 62], [], [52, 55, 64]]


@pytest.mark.parametrize(("beginning", "chords"), [
    ([60, 62, -1, 64], [[60], [62], [], [64]]), (CHORDS, CHORDS), (sent(from_grid(CHORDS, 4)), CHORDS)])
def test_a_beginning_is_kept_and_continued(address: str, beginning: Any, chords: list[list[int]]) -> None:
    score = midi.from_bytes(file(data(ask(address, beginning=beginning, seed=4, steps=12))[0]))
    assert steps_of(score, 4) == [tuple(chord) for chord in chords]
    assert any(steps_of(score, 12)[4:])


def test_events_continue_a_midi_file(address: str, models: dict[str, Model]) -> None:
    opening = Score((Note(0, 480, 60), Note(480, 960, 64)))
    score = midi.from_bytes(file(data(ask(address, model="piano", beginning=sent(opening), seed=4))[0]))
    assert [note.pitch for note in sorted(score.notes)][:2] == [60, 64]


def test_steps_bound_a_piece(address: str) -> None:
    short = data(ask(address, steps=4, seed=1, temperature=2.0, n=4, response_format="json"))
    assert all(piece["seconds"] <= 4 * 60 / 100 / 4 + 1e-3 for piece in short)  # 100 quarter notes a minute
    assert any(piece["seconds"] > 0.4 for piece in short)


# refusals

NOTES = sent(Score((Note(0, 480, 60),)))


@pytest.mark.parametrize(("fields", "status", "param", "says"), [
    ({"response_format": "url"}, 400, "response_format", "'mid', 'wav' or 'json'"), ({"n": 0}, 400, "n", "n: "),
    ({"n": 6}, 400, "n", "n is above 5"), ({"max_tokens": 401}, 400, "max_tokens", "above 400"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens"), ({"stream": True}, 400, "stream", "not supported"),
    ({"soundfont": "/etc/passwd"}, 400, "soundfont", "not supported"),
    ({"temprature": 1}, 400, "temprature", "did you mean temperature"),
    ({"prompt": "G minor"}, 400, "prompt", "'G minor' is no wish"),
    ({"prompt": "kee=G"}, 400, "prompt", "is not known"),
    ({"prompt": "key=G key=C"}, 400, "prompt", "stands twice"), ({"prompt": "key="}, 400, "prompt", "has no value"),
    ({"prompt": "key=H"}, 400, "prompt", "choose one of C, Db"), ({"key": "H"}, 400, "key", "choose one of C, Db"),
    ({"prompt": "key=G", "key": "Gm"}, 400, "key", "prompt and key ask for two keys, 'G' and 'Gm'"),
    ({"name": "mozart"}, 400, "name", "choose one of bach, de Falla"),
    ({"name": "bahc"}, 400, "name", "did you mean 'bach'"),
    ({"tempo": 0}, 400, "tempo", "tempo"), ({"tempo": 20_000}, 400, "tempo", "quarter notes a minute"),
    ({"model": "piano", "key": "G"}, 400, "key", "was not told keys"),
    ({"model": "piano", "prompt": "name=bach"}, 400, "prompt", "was not told names"),
    ({"model": "piano", "melody": [60]}, 400, "melody", "free time"),
    ({"model": "piano", "melody": NOTES}, 400, "melody", "free time"),
    ({"model": "piano", "beginning": [60]}, 400, "beginning", "give it a MIDI file"),
    ({"model": "piano", "steps": 4}, 400, "steps", "set max_tokens"),
    ({"model": "piano", "voice_temperatures": [1.0]}, 400, None, "set temperature"),
    ({"model": "harmoniser"}, 400, "melody", "give it a melody"),
    ({"melody": []}, 400, "melody", "has no notes"), ({"melody": [-1, -1]}, 400, "melody", "has no notes"),
    ({"melody": [60, 90]}, 400, "melody", "from pitch 60 to 90"), ({"melody": [60.5]}, 400, "melody.str", "string"),
    ({"melody": "nonsense!"}, 400, "melody", "is no base64"), ({"melody": "AAAA"}, 400, "melody", "MIDI file"),
    ({"melody": [60] * 401}, 400, "melody", "401 tokens"),
    ({"melody": [60] * 90}, 400, None, "of 90 steps may take 450"),
    ({"beginning": [[60, 61, 62, 63, 64]]}, 400, "beginning", "5 pitches at once"),
    ({"beginning": [[20]]}, 400, "beginning", "from pitch 20 to 20"),
    ({"beginning": [-2]}, 400, "beginning", "pitch -2"),
    ({"beginning": [60, 62], "melody": [64, 65, 64]}, 400, None, "not those of the melody"),
    ({"beginning": [60, 62], "steps": 2}, 400, None, "fills all 2 steps"),
    ({"beginning": "x" * 21_000}, 413, None, "20000 bytes"),
    ({"voice_temperatures": [-1]}, 400, None, "voice_temperatures"),
    ({"top_p": 0}, 400, "top_p", "top_p"), ({"seed": -1}, 400, "seed", "seed"), ({"seed": 2**63}, 400, "seed", "seed"),
    ({"model": "text"}, 400, "model", "at /v1/completions"), ({"model": "x"}, 404, "model", "no model 'x'"),
])
def test_requests_are_refused_clearly(address: str, fields: dict[str, Any], status: int, param: str | None,
                                      says: str) -> None:
    answer = ask(address, **fields)
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"], error
    assert error["param"] == param, error


@pytest.mark.parametrize("model", ["chorales", "piano"])
def test_a_small_file_of_a_long_piece_is_refused_before_it_is_laid_out(address: str, model: str) -> None:
    days = sent(Score((Note(0, 480 * 90_000, 60),)))
    answer = ask(address, model=model, beginning=days)
    assert answer.status_code == 400
    assert "or more and a piece has at most 400" in answer.json()["error"]["message"]


def test_music_is_asked_for_where_music_is_made(address: str) -> None:
    answer = httpx.post(f"{address}/v1/completions", json={"model": "chorales", "prompt": "x"})
    assert "'chorales' makes music, which is asked for at /v1/music/generations" in answer.json()["error"]["message"]


# pages

def test_the_pages_say_what_can_be_asked(address: str) -> None:
    listed = {model["id"]: model for model in httpx.get(f"{address}/v1/models").json()["data"]}
    one = listed["chorales"]
    assert (one["medium"], one["endpoint"]) == ("music", "/v1/music/generations")
    assert (one["tokens"], one["steps_a_quarter"], one["voices"], one["melody"]) == ("frames", 4, 4, "can be given")
    assert one["keys"] == list(KEYS)
    assert one["tempos"] == ["..80", "80..120", "120.."]
    assert one["names"] == ["bach", "de Falla"]
    assert listed["harmoniser"]["melody"] == "needed"
    assert (listed["piano"]["grain_ms"], listed["piano"]["keys"]) == (10, [])
    page = httpx.get(f"{address}/docs").text
    fields = httpx.get(f"{address}/openapi.json").json()["paths"]["/v1/music/generations"]
    assert fields["post"]["summary"] == "Make music"
    for said in (f"curl -s {address}/v1/music/generations", "<code>voice_temperatures</code>", "<code>melody</code>",
                 "4 steps a quarter note", "names: bach, de Falla", "keys: C, Db", "it needs a melody", "to 10 ms"):
        assert said in page, said


def test_without_music_the_page_does_not_tell_of_it(models: dict[str, Model]) -> None:
    with running({"text": models["text"]}) as url:
        page = httpx.get(f"{url}/docs").text
        assert "/v1/music" not in page
        assert "/v1/completions" in page


# turns

def post(url: str, **fields: Any) -> socket.socket:
    """Send a request and keep the connection open."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "chorales"} | fields).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v1/music/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                       b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    return connection


def test_clients_that_go_away_free_the_queue_and_the_network(models: dict[str, Model]) -> None:
    network, permits, calls = models["chorales"].network, threading.Semaphore(0), []

    def wait(*_: Any) -> None:
        calls.append(1)
        permits.acquire()

    hook = network.register_forward_hook(wait)
    with running(models, limits=Limits(waiting=2)) as url:
        try:
            first = post(url, steps=200)
            until(lambda: len(calls) == 1)
            second, third = post(url, steps=200), post(url, n=4)
            until(lambda: waiting(url) == 2)
            assert ask(url).status_code == 429
            second.close()
            third.close()
            until(lambda: waiting(url) == 0)
            first.close()  # while its first token is being made: left before the second
            answer: list[Any] = []
            last = threading.Thread(target=lambda: answer.append(ask(url, seed=1, max_tokens=3)))
            last.start()
            until(lambda: waiting(url) == 1)
            permits.release(10_000)
            last.join()
            assert answer[0].status_code == 200
            assert len(calls) < 10
        finally:
            permits.release(10_000)
            hook.remove()
    assert not network._forward_pre_hooks  # nothing is left behind in the network


# words

@pytest.mark.parametrize(("prompt", "asked"), [
    ("", Asked()), ("key=G", Asked(7)), (" tempo=90.5  key=Bb major ", Asked(10, 90.5)), ("key=C♯m", Asked(13)),
    ("name=de Falla tempo=60", Asked(-1, 60.0, "de Falla")), ("name=Bach", Asked(name="Bach")), ("key = Cb", Asked(11)),
])
def test_words_become_a_wish(prompt: str, asked: Asked) -> None:
    assert music_words.asked_of_words(CODEC, prompt) == asked
    assert music_words.asked_of_words(CODEC, music_words.words(asked)) == asked


def test_a_name_of_other_capitals_is_taken_where_one_fits() -> None:
    assert music_words.name_of(CODEC, "DE FALLA") == "de Falla"
    with pytest.raises(UserError, match="'BACH' is not known"):
        music_words.name_of(CODEC, "BACH")


def test_every_key_is_read_as_it_is_written() -> None:
    assert [music_words.key_of(key) for key in KEYS] == list(range(24))
    assert [music_words.key_of(f"{key.removesuffix('m')} minor") for key in KEYS[12:]] == list(range(12, 24))


@given(st.text(max_size=40), st.sampled_from(["{}", "key={}", "name={} tempo=4"]))
def test_any_text_is_a_wish_or_refused(text: str, form: str) -> None:
    with contextlib.suppress(UserError):
        CODEC.header(music_words.asked_of_words(CODEC, form.replace("{}", text)))


def test_choices_are_those_of_the_codec() -> None:
    assert music_words.choices(CODEC) == {"key": [*KEYS], "tempo": ["..80", "80..120", "120.."],
                                          "name": ["bach", "Bach", "de Falla"]}
    assert music_words.choices(Events(EventSettings())) == {}


def test_a_beginning_has_no_header(tmp_path: Path) -> None:
    grid = ((60, 64), (), (62,))
    tokens = music_words.beginning(CODEC, grid)
    assert CODEC.decode(tokens) == grid
    assert len(tokens) == 3 + 3
    assert music_words.beginning(CODEC, from_grid(grid, 4)) == tokens
