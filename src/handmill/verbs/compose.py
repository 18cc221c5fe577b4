"""`handmill generate` for music: what a user says becomes wishes, and the pieces become files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from handmill.errors import UserError
from handmill.families import composing
from handmill.families.composing import Wish
from handmill.folder import Model
from handmill.media import midi, music_words, performing
from handmill.media.music_tokens import Asked, Events, Frames
from handmill.media.scores import DRUMS, Score
from handmill.verbs.making import AT_ONCE, about, checked, network_of, sampling

Music = Path | str | bytes | Score  # a MIDI file, its content, or what it says


def wish(model: Model, prompt: str = "", melody: Music | None = None, beginning: Music | None = None,
         steps: int | None = None) -> Wish:
    """What a piece is asked to be.

    `prompt` is words as media/music_words.py reads them, "key=G tempo=90 name=bach" in any order, before which a key or
    a name may stand by itself. `melody` is music whose highest notes are the melody, `beginning` music that the piece
    begins with, and after `steps` steps of the grid the piece ends. Raises UserError for what the model cannot obey.
    """
    codec = model.codec
    if steps is not None and steps < 1:
        raise UserError(f"steps = {steps} must be 1 or more: a piece ends after so many at most")
    asked = _asked(codec, prompt)
    openings = _melody(codec, melody)[:steps] if melody is not None else ()
    return Wish(asked, _beginning(codec, beginning) if beginning is not None else (), openings, steps or 0)


def compose(model: Model, wishes: Sequence[Wish], runtime: str = "torch", seed: int | None = None,
            progress: bool = False, **overrides: Any) -> list[Score]:
    """A score for each wish. `overrides` replace values of the recipe's [sampling] table.

    Where a melody or steps say how long a piece is and no override says `max_tokens`, that is as many as these take.
    The same seed gives the same pieces, on either `runtime`. Raises UserError before anything is made.
    """
    settings, seed = sampling(model, **_lengthened(model.codec, wishes, overrides)), checked(seed)
    composing.check(model.codec, wishes, settings)
    network, made = network_of(model, runtime), []
    for first in range(0, len(wishes), AT_ONCE):
        made += composing.compose(network, model.codec, wishes[first:first + AT_ONCE], settings, seed, first, progress)
    return [_score(model.codec, tokens, wish.asked) for tokens, wish in zip(made, wishes, strict=True)]


def save_music(model: Model, wishes: Sequence[Wish], out: Path, seed: int | None = None, runtime: str = "torch",
               soundfont: str = "", progress: bool = False, **overrides: Any) -> list[Path]:
    """Write each piece of `compose` as SEED-NNN.mid and .wav, and of all rolls.png and player.html, last in the list.

    Every file says how it was made. `soundfont` is an SF2 file to play with, "" the built-in synthesiser. Raises
    UserError.
    """
    seed = checked(seed)
    if soundfont:
        performing.font(soundfont)  # refused before anything is made
    scores, paths, name = compose(model, wishes, runtime, seed, progress, **overrides), [], model.recipe.name
    said = _lengthened(model.codec, wishes, overrides)
    titles = [" ".join(filter(None, (name, str(i), music_words.words(wish.asked)))) for i, wish in enumerate(wishes)]
    out.mkdir(parents=True, exist_ok=True)
    for i, (score, wish, title) in enumerate(zip(scores, wishes, titles, strict=True)):
        notes = told(model, wish, seed, i, said)
        paths += performing.save(replace(score, title=title), out / f"{seed}-{i:03d}", notes, soundfont)
    notes, shown = told(model, Wish(), seed, 0, said), performing.pieces(scores, titles)
    return [*paths, performing.save_rolls(out / "rolls.png", shown, notes),
            performing.save_player(out / "player.html", shown, f"{name}: made music", notes)]


def told(model: Model, wish: Wish, seed: int, index: int, overrides: dict[str, Any]) -> dict[str, str]:
    """What a piece's file says of itself: enough to make it again, with the same melody and beginning."""
    given = {"melody": f"{len(wish.melody)} steps" if wish.melody else "", "steps": str(wish.steps or ""),
             "beginning": f"{len(wish.beginning)} tokens" if wish.beginning else ""}
    notes = about(model, "", seed, index, overrides) | {"asked": music_words.words(wish.asked)} | given
    return {key: value for key, value in notes.items() if value}


def _asked(codec: Frames | Events, prompt: str) -> Asked:
    """Raises UserError for words that are no wish."""
    bare, equals, _ = prompt.partition("=")
    word = " ".join(bare.split()[:-1]) if equals else bare.strip()
    if not word:
        return music_words.asked_of_words(codec, prompt)
    return music_words.asked_of_words(codec, f"{_kind(codec, word)}={prompt.strip()}")


def _kind(codec: Frames | Events, word: str) -> str:
    """Whether a word by itself is a name or a key. Raises UserError for neither."""
    names = codec.settings.names
    if word.casefold() in map(str.casefold, names):
        return "name"
    try:
        music_words.key_of(word)
    except UserError:
        examples = {"key": "key=G", "tempo": "tempo=90", "name": f"name= and one of {', '.join(names[:20])}"}
        ways = " or ".join(examples[section] for section in codec.asked)
        raise UserError(f"{word[:100]!r} is no key and no name that this model knows: "
                        + (f"write {ways}" if ways else "it was told none, so leave it out")) from None
    return "key"


def _melody(codec: Frames | Events, music: Music) -> tuple[int, ...]:
    if isinstance(codec, Events):
        return music_words.melody(codec, ())  # which refuses it
    return music_words.melody(codec, music_words.top(codec, _read(music, "the melody")))


def _beginning(codec: Frames | Events, music: Music) -> tuple[int, ...]:
    score = _read(music, "the beginning")
    pitches = [note.pitch for note in score.notes if note.program != DRUMS]
    s = codec.settings
    if pitches and not s.lowest <= min(pitches) <= max(pitches) <= s.highest:
        raise UserError(f"the beginning goes from pitch {min(pitches)} to {max(pitches)} and this model from "
                        f"{s.lowest} to {s.highest}: transpose it")
    try:
        return music_words.beginning(codec, score)
    except UserError as error:
        raise UserError(f"the beginning does not fit this model, whose codec is fixed: {error}") from None


def _read(music: Music, name: str) -> Score:
    if isinstance(music, Score):
        return music
    return midi.from_bytes(music, name) if isinstance(music, bytes) else midi.read(music)


def _lengthened(codec: Frames | Events, wishes: Sequence[Wish], overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, with room for as many steps as all pieces are to have."""
    steps = [max(len(wish.melody), wish.steps) for wish in wishes]
    if "max_tokens" in overrides or not steps or not all(steps) or not isinstance(codec, Frames):
        return overrides
    return overrides | {"max_tokens": max(steps) * (codec.settings.voices + 1)}


def _score(codec: Frames | Events, tokens: Sequence[int], asked: Asked) -> Score:
    """The score of a piece; one of chords at the very tempo that was asked for."""
    score = performing.of_tokens(codec, tokens)
    if not asked.tempo or isinstance(codec, Events):
        return score
    return replace(score, tempos=((0, round(60e6 / max(4.0, asked.tempo))),))
