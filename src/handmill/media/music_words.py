"""What a piece of music is asked to be, in words: "key=G tempo=90 name=bach"; and what it is to begin with, as tokens.

Words and fields that a model was never told are refused, so that nobody believes they were obeyed.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from handmill.errors import UserError
from handmill.media.music_tokens import NOTHING, UNKNOWN, Asked, Events, Frames, Tokens
from handmill.media.scores import DRUMS, KEYS, REST, Grid, Score

WORDS = ("key", "tempo", "name")
_FASTEST = 10_000  # quarter notes a minute
_SHOWN = 20  # names in an error
_KEY = re.compile(r"([A-G])([#♯b♭]?)[ -]?(m|min|minor|maj|major)?", re.IGNORECASE)
_NATURALS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


def asked_of_words(codec: Frames | Events, prompt: str) -> Asked:
    """What "key=G tempo=90 name=bach" asks for, in any order; "" asks for nothing.

    A value goes on to the next word with "=", so that names may hold spaces. Raises UserError for what cannot be
    asked of this codec, naming what can.
    """
    return asked_of(codec, parts(prompt))


def asked_of(codec: Frames | Events, said: Mapping[str, str]) -> Asked:
    """The same of values by their words, such as {"key": "G"}. Raises UserError."""
    for word in said:
        if word not in codec.asked:
            known = " and ".join(codec.asked)
            raise UserError(f"this model was not told {word}s, so it cannot be asked for one: leave {word} out"
                            + (f", or ask for {known}" if known else ""))
    return Asked(key_of(said["key"]) if "key" in said else UNKNOWN,
                 tempo_of(said["tempo"]) if "tempo" in said else NOTHING.tempo,
                 name_of(codec, said["name"]) if "name" in said else NOTHING.name)


def parts(prompt: str) -> dict[str, str]:
    """The values in a prompt by their words. Raises UserError for other words, and for one that stands twice."""
    before, *pairs = re.split(r"(\w+)\s*=", prompt)
    said: dict[str, str] = {}
    for word, value in zip(pairs[::2], pairs[1::2], strict=True):
        if word not in WORDS or word in said or not value.strip():
            reason = "stands twice" if word in said else "has no value" if word in WORDS else "is not known"
            raise UserError(f"{word!r} {reason} in {prompt[:100]!r}: write key=G, tempo=90 or name=NAME, each once")
        said[word] = value.strip()
    if before.strip():
        raise UserError(f"{before.strip()[:100]!r} is no wish: write key=G, tempo=90 or name=NAME")
    return said


def words(asked: Asked) -> str:
    """The prompt that asks for the same; "" for nothing."""
    said = {"key": KEYS[asked.key] if asked.key != UNKNOWN else "",
            "tempo": f"{asked.tempo:g}" if asked.tempo else "", "name": asked.name}
    return " ".join(f"{word}={value}" for word, value in said.items() if value)


def choices(codec: Frames | Events) -> dict[str, list[str]]:
    """What can be asked for by each word: keys, bounds of the tempo classes such as "80..120", names."""
    return {word: [codec.names[codec.first[word] + place].removeprefix(f"{word} ")
                   for place in range(1, codec.count[word])] for word in codec.asked}


def is_key(word: str) -> bool:
    """Whether the word is a key, as `key_of` reads it."""
    return _KEY.fullmatch(word.strip()) is not None


def key_of(name: str) -> int:
    """0..23 of "G", "Gm", "F# minor", "B♭ major" and the like. Raises UserError."""
    found = _KEY.fullmatch(name.strip())
    if found is None:
        raise UserError(f"key = {name[:100]!r} is not known: choose one of {', '.join(KEYS)}")
    letter, accidental, mode = found.groups()
    # "m" is minor and "M" major
    minor = mode is not None and (mode == "m" or mode.lower().startswith("min"))
    semitones = {"": 0, "#": 1, "♯": 1}.get(accidental, -1)
    return 12 * minor + (_NATURALS[letter.upper()] + semitones) % 12


def tempo_of(value: str) -> float:
    """Quarter notes a minute. Raises UserError."""
    try:
        tempo = float(value)
    except ValueError:
        tempo = 0.0
    if not 0 < tempo < _FASTEST:
        raise UserError(f"tempo = {value[:100]!r} must be quarter notes a minute: write a number such as 90")
    return tempo


def name_of(codec: Frames | Events, name: str) -> str:
    """The name as the codec has it; capitals do not matter where only one name fits. Raises UserError."""
    known = codec.settings.names
    alike = [one for one in known if one.casefold() == name.casefold()]
    if name in known or len(alike) == 1:
        return name if name in known else alike[0]
    hint = get_close_matches(name, known, 1)
    more = f" and {len(known) - _SHOWN:,} more" if len(known) > _SHOWN else ""
    raise UserError(f"name = {name[:100]!r} is not known: "
                    + (f"did you mean {hint[0]!r}?" if hint else f"choose one of {', '.join(known[:_SHOWN])}{more}"))


def top(codec: Frames, score: Score) -> list[int]:
    """The highest pitch of each step (S,) of a score, -1 for silence: its melody."""
    return [max(step, default=REST) for step in codec.read(score)]


def melody(codec: Frames | Events, pitches: Sequence[int]) -> tuple[int, ...]:
    """The tokens (S,) of a melody, a pitch a step and -1 for silence.

    Raises UserError for what the codec has no room for, and where it is of events, which have no steps.
    """
    if not isinstance(codec, Frames):
        raise UserError("this model makes events in free time and cannot be given a melody: take a model of chords on "
                        "a grid, or give it a beginning")
    if all(pitch == REST for pitch in pitches):
        raise UserError("the melody has no notes: give a pitch for some steps, -1 for silence in others")
    _check_range(codec, pitches, "melody")
    return tuple(codec.melody(tuple(() if pitch == REST else (pitch,) for pitch in pitches)).tolist())


def beginning(codec: Frames | Events, music: Score | Grid) -> tuple[int, ...]:
    """The tokens after the header of a piece's beginning: a score, or a grid where the codec is of chords.

    Raises UserError for what the codec has no room for.
    """
    if isinstance(music, Score):
        _check_range(codec, [note.pitch for note in music.notes if note.program != DRUMS], "beginning")
    elif isinstance(codec, Frames):
        _check_range(codec, [pitch for step in music for pitch in step], "beginning")
    else:
        raise UserError("this model makes events in free time, which steps do not tell: give it a MIDI file")
    try:
        tokens = _encoded(codec, music)
    except UserError as error:
        raise UserError(f"the beginning does not fit this model, whose codec is fixed: {error}") from None
    return tuple(tokens[len(codec.asked):].tolist())


def _encoded(codec: Frames | Events, music: Score | Grid) -> Tokens:
    if isinstance(codec, Frames):
        return codec.encode(codec.read(music) if isinstance(music, Score) else music)
    assert isinstance(music, Score)
    return codec.encode(music)


def _check_range(codec: Frames | Events, pitches: Sequence[int], name: str) -> None:
    s, heard = codec.settings, [pitch for pitch in pitches if pitch != REST]
    if heard and not s.lowest <= min(heard) <= max(heard) <= s.highest:
        raise UserError(f"the {name} goes from pitch {min(heard)} to {max(heard)} and this model from {s.lowest} to "
                        f"{s.highest}: transpose it")
