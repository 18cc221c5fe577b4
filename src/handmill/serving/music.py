"""POST /v1/music/generations: pieces of music as MIDI or wav files in base64, or as notes, in the shape of images'."""

import base64
import binascii
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from torch import nn

from handmill.errors import UserError
from handmill.families.autoregressive import SEEDS
from handmill.families.composing import Wish, check
from handmill.folder import Model
from handmill.media import midi, music_words, performing
from handmill.media.music_tokens import Asked, Events, Frames
from handmill.media.scores import Grid, Score
from handmill.serving.answers import Refusal, no_others, weights
from handmill.serving.engine import Dropped, Limits
from handmill.verbs.compose import compose, told
from handmill.verbs.making import sampling

SOUND = 300.0  # seconds of wav in one answer, of all pieces together; what is longer is cut
NEUTRAL: dict[str, tuple[Any, ...]] = {"stream": (False,), "safety_identifier": ()}  # what asks for nothing
SAMPLING = ("temperature", "voice_temperatures", "top_k", "top_p", "min_p", "max_tokens")
Words = Annotated[StrictStr, Field(max_length=1000)]


class Composition(BaseModel):
    """A request for music. What is left out is as in the model's recipe, under [sampling]."""

    model_config = ConfigDict(extra="allow")  # `no_others` says which
    model: str = Field(description="a name that /v1/models lists, with what it can be asked for")
    prompt: Words = Field("", description='key, tempo and name in words, "key=G tempo=90 name=bach"; empty: any')
    key: Words | None = Field(None, description="the same by itself: G, F#m, ...")
    tempo: float | None = Field(None, gt=0, description="the same by itself: quarter notes a minute")
    name: Words | None = Field(None, description="the same by itself: a composer or genre that the model was told")
    melody: StrictStr | list[StrictInt] | None = Field(
        None, description="of a model of chords, as long as the piece is to be: a MIDI file in base64, of which the "
        "highest notes are taken, or a pitch a step, -1 for silence")
    beginning: StrictStr | list[StrictInt] | list[list[StrictInt]] | None = Field(
        None, description="what the piece begins with: a MIDI file in base64, or of a model of chords a pitch (-1 for "
        "silence) or the pitches of each step")
    steps: int | None = Field(None, ge=1, description="of a model of chords: the piece ends after so many at most")
    n: int = Field(1, ge=1, description="pieces")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="the same seed gives the same pieces")
    response_format: Literal["mid", "wav", "json"] = Field(
        "mid", description="a MIDI file or a wav file in base64, or the notes")
    temperature: float | None = Field(None, ge=0, description="0: always the likeliest token")
    voice_temperatures: list[float] | None = Field(
        None, max_length=128, description="of a model of chords: of a chord's notes from the highest down, the last "
        "one of all below it")
    top_k: int | None = Field(None, ge=0, description="tokens to choose from; 0: all")
    top_p: float | None = Field(None, gt=0, le=1, description="probability mass to choose from")
    min_p: float | None = Field(None, ge=0, le=1, description="least share of the best token's probability")
    max_tokens: int | None = Field(None, ge=1, description="of a piece")
    user: str | None = Field(None, description="ignored")


class Answer:
    """One request on its way: its checked settings, its work, and the answer made of its pieces.

    Reading a MIDI file may take a second: not on the server's loop.
    """

    def __init__(self, asked: Composition, model: Model, limits: Limits) -> None:
        no_others(asked, NEUTRAL)
        if asked.n > limits.samples:
            raise Refusal(400, f"n is above {limits.samples}, the most allowed", "n")
        if (asked.max_tokens or 0) > limits.max_tokens:
            raise Refusal(400, f"max_tokens is above {limits.max_tokens}, the most allowed", "max_tokens")
        self.asked, self.model = asked, model
        self.wish = _wish(asked, model.codec, asked.max_tokens or limits.max_tokens)
        self.values = _values(asked, model, self.wish, limits)
        check(model.codec, [self.wish], sampling(model, **self.values))
        self.seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        self.head = {"created": int(time.time()), "model": asked.model, "system_fingerprint": weights(model),
                     "seed": self.seed, "prompt": music_words.words(self.wish.asked)}

    def work(self, dropped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The pieces one by one, as the answer's data."""
        with leaving(self.model.network, dropped):
            scores = compose(self.model, [self.wish] * self.asked.n, seed=self.seed, **self.values)
        for index, score in enumerate(scores):
            yield self.datum(index, score)

    def datum(self, index: int, score: Score) -> dict[str, Any]:
        form, about = self.asked.response_format, told(self.model, self.wish, self.seed, index, self.values)
        return {"index": index, "seed": self.seed, "format": form, "notes": len(score.notes),
                "seconds": round(float(score.seconds(score.end)), 3),
                **contents(score, form, SOUND / self.asked.n, about)}

    async def whole(self, data: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        """The answer in one object."""
        return self.head | {"data": [datum async for datum in data]}


def contents(score: Score, form: str, most: float, about: Mapping[str, str]) -> dict[str, Any]:
    """A score as MIDI ("mid"), as at most `most` seconds of sound ("wav"), or as its notes in seconds ("json")."""
    if form == "json":
        return {"score": [note._asdict() for note in performing.seconds(score)]}
    if form == "mid":
        return {"b64_json": base64.b64encode(midi.to_bytes(score, about)).decode()}
    heard = shortened(score, most)
    cut = {"cut": round(most, 3)} if heard is not score else {}  # seconds that are left
    return {"b64_json": base64.b64encode(performing.wav(heard, about=about)).decode(), **cut}


def shortened(score: Score, most: float) -> Score:
    """The score, or its first `most` seconds where it is longer."""
    last = int(score.ticks(most))
    if score.end <= last:
        return score
    notes = tuple(note._replace(end=min(note.end, last)) for note in score.notes if note.start < last)
    return replace(score, notes=notes, length=last)


@contextmanager
def leaving(network: nn.Module, dropped: Callable[[], bool]) -> Iterator[None]:
    """Within, the network raises Dropped at its next call once nobody waits for its answer."""
    def look(*_: Any) -> None:
        if dropped():
            raise Dropped

    hook = network.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def about(model: Model) -> dict[str, Any]:
    """What a list of models says of one that makes music."""
    codec, s, can = model.codec, model.codec.settings, music_words.choices(model.codec)
    grid = ({"steps_a_quarter": s.steps, "voices": s.voices, "melody": "needed" if s.melody else "can be given"}
            if isinstance(codec, Frames) else {"grain_ms": s.grain, "programs": list(s.programs), "drums": s.drums})
    return {"tokens": codec.kind, **grid, "pitches": [s.lowest, s.highest], "keys": can.get("key", []),
            "tempos": can.get("tempo", []), "names": can.get("name", [])}


def takes(model: Model) -> str:
    """The same as a sentence of the page at /docs."""
    s = model.codec.settings
    kind = (f"chords of up to {s.voices} notes, {s.steps} steps a quarter note" if isinstance(model.codec, Frames)
            else f"events in free time, to {s.grain} ms")
    wants = {"key": "keys", "tempo": "tempos, quarter notes a minute", "name": "names"}
    asks = [f"{wants[word]}: {', '.join(values)}" for word, values in music_words.choices(model.codec).items()]
    needs = ["it needs a melody"] if getattr(s, "melody", False) else []
    return f"makes {'; '.join([kind, f'pitches {s.lowest} to {s.highest}', *needs, *asks])}"


def _values(asked: Composition, model: Model, wish: Wish, limits: Limits) -> dict[str, Any]:
    """What the request says in the place of the recipe's [sampling] table, always with max_tokens.

    These are what is asked for, or enough for as many steps as the piece is to have, or the recipe's.
    """
    values = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
    most, steps = model.recipe.sampling.max_tokens, wish.steps or len(wish.melody)
    if steps:
        most = steps * (model.codec.settings.voices + 1)
    return {"max_tokens": min(most, limits.max_tokens)} | values


def _wish(asked: Composition, codec: Frames | Events, most: int) -> Wish:
    """What the piece is asked to be, melody and beginning at most `most` tokens. Raises Refusal."""
    if asked.steps is not None and not isinstance(codec, Frames):
        raise Refusal(400, "this model makes events in free time, not in steps: set max_tokens", "steps")
    melody, beginning = _melody(asked, codec, most), _beginning(asked, codec, most)
    for name, tokens in (("melody", melody), ("beginning", beginning)):
        if len(tokens) > most:
            raise Refusal(400, f"the {name} has {len(tokens)} tokens and a piece at most {most}: shorten it, or raise "
                          "max_tokens", name)
    return Wish(_asked(asked, codec), beginning, melody, asked.steps or 0)


def _asked(asked: Composition, codec: Frames | Events) -> Asked:
    """Key, tempo and name, of the prompt or of fields of their own. Raises Refusal where both are given and differ."""
    with _refusing("prompt"):
        said = music_words.parts(asked.prompt)
        prompted = music_words.asked_of(codec, said)
    fields: dict[str, Any] = {}
    for word in music_words.WORDS:
        value = getattr(asked, word)
        if value is None:
            continue
        with _refusing(word):
            fields[word] = getattr(music_words.asked_of(codec, {word: str(value)}), word)
        if word in said and getattr(prompted, word) != fields[word]:
            raise Refusal(400, f"prompt and {word} ask for two {word}s, {said[word]!r} and {value!r}: keep one", word)
    return replace(prompted, **fields)


def _melody(asked: Composition, codec: Frames | Events, most: int) -> tuple[int, ...]:
    if asked.melody is None:
        if getattr(codec.settings, "melody", False):
            raise Refusal(400, "this model puts chords under melodies: give it a melody", "melody")
        return ()
    with _refusing("melody"):
        if isinstance(asked.melody, str) and isinstance(codec, Frames):
            pitches = music_words.top(codec, _score(asked.melody, "melody", codec, most))
        else:
            pitches = [] if isinstance(asked.melody, str) else asked.melody
        return music_words.melody(codec, pitches)[:asked.steps]


def _beginning(asked: Composition, codec: Frames | Events, most: int) -> tuple[int, ...]:
    if asked.beginning is None:
        return ()
    with _refusing("beginning"):
        given = asked.beginning
        return music_words.beginning(codec, _score(given, "beginning", codec, most) if isinstance(given, str)
                                     else _grid(given))


def _grid(steps: Sequence[int | list[int]]) -> Grid:
    return tuple((step,) if isinstance(step, int) else tuple(step) for step in steps)


def _score(value: str, name: str, codec: Frames | Events, most: int) -> Score:
    """The score of a MIDI file in base64. Raises UserError for what is none, and for more than `most` tokens of time.

    Before it is put on a grid, because a few bytes may say that a piece lasts for days.
    """
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"the {name} is no base64: give a MIDI file in base64, or a list of pitches") from None
    score = midi.from_bytes(data, f"the {name}")
    if isinstance(codec, Frames):
        least = score.end / score.resolution * codec.settings.steps
    else:
        least = float(score.seconds(score.end)) * 1000 / codec.settings.longest
    if least > most:
        raise UserError(f"the {name} takes {least:,.0f} tokens or more and a piece has at most {most}: shorten it, or "
                        "raise max_tokens")
    return score


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """What the user can mend, as a refusal of the field."""
    try:
        yield
    except UserError as fault:
        raise Refusal(400, str(fault), param) from None
