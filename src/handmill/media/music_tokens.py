"""Music to tokens and back: chords on a grid (`Frames`) and free MIDI (`Events`).

    Frames   for every step its pitches from the highest down, then STEP. From the top, because then a given melody is
             the first token of each step and one order of notes serves both making and harmonising: the sorted
             chords of Liang 2016 (BachBot) with the soprano first.
    Events   on, off, time shift, velocity: the performance events of Oore et al. 2018, with programs and drums as
             Gardner et al. 2022 (MT3) have them. Velocity and program hold until the next one; a drum has no end.

END stands in front of every piece, as in media/tokenizers.py, and is what a model ends one with. What is asked for
(key, tempo class, name: those that the settings have, each with "unknown") stands after it, always in that order.
Any tokens can be decoded: what does not fit is passed over. `grammar` says what fits.

T tokens, V vocabulary, S steps.
"""

import dataclasses
import json
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from handmill.disk import parsed, write_text
from handmill.errors import UserError
from handmill.media.scores import (
    DRUMS,
    KEYS,
    LONGEST,
    MOST_STEPS,
    PITCHES,
    REST,
    Grid,
    Note,
    Score,
    disjoint,
    from_grid,
    in_voices,
    to_grid,
)
from handmill.recipe import build, positive, within

FORMAT = "handmill-music-tokens/1"
END = 0
UNKNOWN = -1  # key
_MOST_SHIFTS = 1 << 20
_TICK = 500  # ticks a quarter note of decoded events: with the moderate tempo a tick is a millisecond

Tokens = NDArray[np.uint16]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class FrameSettings:
    """The [codec] table of chords on a grid."""

    kind: Literal["frames"] = "frames"
    lowest: int = 21  # MIDI pitch, the piano's lowest
    highest: int = 108  # MIDI pitch
    voices: int = 8  # pitches at once, at most
    steps: int = 4  # a quarter note: 4 is a grid of sixteenths
    melody: bool = False  # the highest pitch of each step is given and no part of the loss
    keys: bool = False  # a key is given or "unknown"
    tempos: tuple[float, ...] = ()  # quarter notes a minute that part slow from fast; none: no tempo is given
    names: tuple[str, ...] = ()  # of composers or genres; none: no name is given

    def __post_init__(self) -> None:
        positive(self, "voices")
        within(self, 1, 24, "steps")
        _check(self)


@dataclass(frozen=True)
class EventSettings:
    """The [codec] table of free MIDI."""

    kind: Literal["events"] = "events"
    lowest: int = 21  # MIDI pitch, the piano's lowest
    highest: int = 108  # MIDI pitch
    grain: int = 10  # ms, the finest time
    longest: int = 1000  # ms, the longest time shift of one token
    shifts: Literal["every", "doubling"] = "every"  # a token for every grain up to the longest, or for 1, 2, 4, ...
    velocities: int = 32  # bins of loudness
    programs: tuple[int, ...] = (0,)  # of General MIDI; notes of others are an error
    drums: bool = False
    keys: bool = False  # a key is given or "unknown"
    tempos: tuple[float, ...] = ()  # quarter notes a minute that part slow from fast; none: no tempo is given
    names: tuple[str, ...] = ()  # of composers or genres; none: no name is given

    def __post_init__(self) -> None:
        within(self, 1, 1000, "grain")
        within(self, self.grain, 1000 * self.grain, "longest")
        within(self, 1, 127, "velocities")
        if not self.programs or list(self.programs) != sorted(set(self.programs) & set(range(DRUMS))):
            raise UserError(f"programs = {list(self.programs)} must be one or more of 0 to 127, ascending")
        _check(self)

    @property
    def durations(self) -> list[int]:
        """Grains of each time shift, ascending."""
        most = self.longest // self.grain
        if self.shifts == "every":
            return list(range(1, most + 1))
        return [1 << power for power in range(most.bit_length())]


def _check(settings: FrameSettings | EventSettings) -> None:
    within(settings, 0, PITCHES - 1, "lowest", "highest")
    if settings.lowest > settings.highest:
        raise UserError(f"lowest = {settings.lowest} is above highest = {settings.highest}: exchange them")
    if list(settings.tempos) != sorted(set(settings.tempos)) or not all(0 < t < 10_000 for t in settings.tempos):
        raise UserError(f"tempos = {list(settings.tempos)} must be quarter notes a minute, ascending")
    if len(set(settings.names)) < len(settings.names) or "" in settings.names or len(settings.names) > 10_000:
        raise UserError("names must differ and none be empty, and be at most 10000")


@dataclass(frozen=True)
class Asked:
    """What a piece is asked to be, or is said to be: the condition tokens."""

    key: int = UNKNOWN  # 0..23, see media/scores.py
    tempo: float = 0.0  # quarter notes a minute; 0: unknown
    name: str = ""  # "": unknown


NOTHING = Asked()


class Vocabulary:
    """Tokens in sections, one after another: END, the conditions, then what a kind of tokens adds.

    `first[section]` is a section's first token and `count[section]` how many it has; `size` is V. `names` says what
    each token means, for printing.
    """

    end = END
    unknown: int | None = None
    dtype = np.dtype(np.uint16)

    def __init__(self, settings: FrameSettings | EventSettings, sections: Mapping[str, Sequence[str]]) -> None:
        asked = {section: ["unknown", *labels] for section, labels in _conditions(settings).items() if labels}
        sections = {"end": [""], **asked, **sections}
        self.asked = [*asked]
        self.kind: str = settings.kind
        self.names = [f"{section} {label}".strip() for section, labels in sections.items() for label in labels]
        self.size = len(self.names)
        assert self.size <= 1 << 16, self.size
        self.count = {section: len(labels) for section, labels in sections.items()}
        self.first = dict(zip(sections, np.cumsum([0, *self.count.values()]).tolist(), strict=False))
        self._settings = settings
        self._section = [section for section, labels in sections.items() for _ in labels]  # (V,)

    def section(self, token: int) -> tuple[str, int]:
        """The section of a token and its place there."""
        section = self._section[token]
        return section, token - self.first[section]

    def header(self, asked: Asked = NOTHING) -> list[int]:
        """The condition tokens. Raises UserError for a name that the settings lack."""
        s = self._settings
        if asked.name and asked.name not in s.names and "name" in self.asked:
            raise UserError(f"{asked.name!r} is not known: choose one of {', '.join(s.names)}")
        places = {"key": asked.key + 1, "tempo": bisect(s.tempos, asked.tempo) + 1 if asked.tempo else 0,
                  "name": s.names.index(asked.name) + 1 if asked.name in s.names else 0}
        assert -1 <= asked.key < len(KEYS), asked.key
        return [self.first[section] + places[section] for section in self.asked]

    def asked_of(self, tokens: Iterable[int]) -> Asked:
        """What the first condition tokens of each kind say; of a tempo class, its middle."""
        found: dict[str, int] = {}
        for token in self._known(tokens):
            section, place = self.section(token)
            if section in self.asked:
                found.setdefault(section, place)
        s, tempo = self._settings, found.get("tempo", 0)
        bounds = [s.tempos[0] * 0.8, *s.tempos, s.tempos[-1] * 1.25] if tempo else []
        return Asked(found.get("key", 0) - 1, (bounds[tempo - 1] * bounds[tempo]) ** 0.5 if tempo else 0.0,
                     s.names[found["name"] - 1] if found.get("name") else "")

    def transpose(self, tokens: Iterable[int], semitones: int) -> Tokens | None:
        """The tokens (T,) in another key: pitches and key move. None where a pitch would leave the vocabulary."""
        moved = self._transposed(semitones)[_array(tokens)]
        return None if (moved < 0).any() else moved.astype(self.dtype)

    def save(self, folder: Path) -> None:
        """Write `folder`/tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "size": self.size, "end": END, "settings": dataclasses.asdict(self._settings)}
        write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False) + "\n")

    def _transposed(self, semitones: int) -> NDArray[np.int64]:
        """Token -> token (V,), -1 where it has left the vocabulary."""
        table = np.arange(self.size)
        for section in ("pitch", "on", "off"):
            if section in self.count:
                first, count = self.first[section], self.count[section]
                moved = table[first:first + count] + semitones
                table[first:first + count] = np.where((moved >= first) & (moved < first + count), moved, -1)
        if "key" in self.count:
            keys = np.arange(len(KEYS))
            first = self.first["key"] + 1
            table[first:first + len(KEYS)] = first + keys // 12 * 12 + (keys + semitones) % 12
        return table

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """The tokens of the first piece that are in the vocabulary, without END."""
        piece: list[int] = []
        for token in tokens:
            if token == END and piece:
                break
            if 0 < token < self.size:
                piece.append(int(token))
        return piece

    def _since_end(self, tokens: Iterable[int]) -> NDArray[np.int64]:
        """The tokens after the last END that are in the vocabulary."""
        values = _array(tokens)
        ends = np.flatnonzero(values == END)
        values = values[ends[-1] + 1:] if len(ends) else values
        return values[(values > 0) & (values < self.size)]

    def _at(self, section: str, allowed: Mask) -> Mask:  # (section's tokens,) -> (V,)
        mask = np.zeros(self.size, np.bool_)
        mask[self.first[section]:self.first[section] + self.count[section]] = allowed
        return mask

    def _allow(self, *sections: str) -> Mask:  # (V,)
        mask = np.zeros(self.size, np.bool_)
        for section in sections:
            mask[self.first[section]:self.first[section] + self.count[section]] = True
        return mask


class Frames(Vocabulary):
    """Chords on a grid."""

    def __init__(self, settings: FrameSettings) -> None:
        super().__init__(settings, {"step": [""], "pitch": _pitches(settings)})
        self.settings = settings
        self.step = self.first["step"]
        self._lowest = self.first["pitch"] - settings.lowest  # token of a pitch less the pitch

    def encode(self, grid: Grid, asked: Asked = NOTHING) -> Tokens:
        """The tokens (T,) of a piece, without END. Raises UserError for what the settings have no room for."""
        tokens = self.header(asked)
        for number, step in enumerate(grid):
            tokens += [self._lowest + pitch for pitch in self._chord(step, number)] + [self.step]
        return np.array(tokens, self.dtype)

    def pack(self, pieces: Iterable[tuple[Grid, Asked]]) -> Tokens:
        """Every piece as END and its tokens, one after another."""
        return _packed(self.encode(grid, asked) for grid, asked in pieces)

    def decode(self, tokens: Iterable[int]) -> Grid:
        """The first piece of any tokens, pitches ascending; a last step without its STEP counts too."""
        grid: list[tuple[int, ...]] = []
        chord: set[int] = set()
        for token in self._known(tokens):
            if token >= self.first["pitch"]:
                chord.add(token - self._lowest)
            elif token == self.step:
                grid.append(tuple(sorted(chord)))
                chord = set()
        return (*grid, tuple(sorted(chord))) if chord else tuple(grid)

    def read(self, score: Score) -> Grid:
        """The grid of a score as these settings have it, ascending pitches a step."""
        return to_grid(score, self.settings.steps)

    def score(self, tokens: Iterable[int], program: int = 0) -> Score:
        """The score of any tokens, at the tempo that they name, or 100 quarter notes a minute.

        Its voices are those that let chords of at most `voices` pitches move least; of fuller ones there is one voice.
        """
        tokens = _array(tokens)
        tempo = self.asked_of(tokens).tempo or 100.0
        grid = self.decode(tokens)[:MOST_STEPS]
        separated = max(map(len, grid), default=0) <= self.settings.voices
        return from_grid(in_voices(grid, self.settings.voices) if separated else grid, self.settings.steps, separated,
                         tempo=max(4.0, tempo), program=program)

    def steps(self, tokens: Iterable[int]) -> int:
        """How many steps the tokens hold: what nats a frame are divided by."""
        return int((_array(tokens) == self.step).sum())

    def melody(self, grid: Grid) -> Tokens:
        """The token that opens each step (S,): its highest pitch, or STEP where it is silent."""
        return np.array([self._lowest + max(step) if step else self.step for step in grid], self.dtype)

    def given(self, tokens: Iterable[int]) -> Mask:
        """Which tokens (T,) are given and no part of the loss: conditions, and with `melody` what opens each step.

        The length of a melody is given too, and so END is.
        """
        values = _array(tokens)
        given = (values > END) & (values < self.step)
        if not self.settings.melody:
            return given
        before = np.concatenate([[END], values[:-1]])
        return given | (values == END) | (before <= self.step)

    def grammar(self, tokens: Iterable[int]) -> Mask:
        """Which tokens (V,) may come next: conditions in order, then pitches that fall, at most `voices` a step."""
        values = self._since_end(tokens)
        asked = int((values < self.step).sum())
        if asked < len(self.asked):
            return self._allow(self.asked[asked])
        chord = values[_after(values, END, self.first["pitch"]):]
        mask = self._allow("step", "pitch")
        mask[END] = not len(chord) and (values == self.step).any()
        if len(chord):
            mask[chord.min():] = False
        if len(chord) >= self.settings.voices:
            mask[self.first["pitch"]:] = False
        return mask

    def _chord(self, step: Sequence[int], number: int) -> list[int]:
        s = self.settings
        chord = sorted({pitch for pitch in step if pitch != REST}, reverse=True)
        if len(chord) > s.voices:
            raise UserError(f"step {number} has {len(chord)} pitches at once: raise codec.voices = {s.voices}")
        if chord and not s.lowest <= chord[-1] <= chord[0] <= s.highest:
            raise UserError(f"step {number} has the pitches {chord}: widen codec.lowest = {s.lowest} and "
                            f"codec.highest = {s.highest}")
        return chord


class Events(Vocabulary):
    """Free MIDI."""

    def __init__(self, settings: EventSettings) -> None:
        s = self.settings = settings
        self.durations = s.durations  # grains of each shift
        super().__init__(s, {
            "shift": [f"{grains * s.grain} ms" for grains in self.durations],
            "velocity": [str(self._velocity(place)) for place in range(s.velocities)],
            "program": [str(program) for program in s.programs],
            "off": _pitches(s), "on": _pitches(s), "drum": [str(drum) for drum in range(PITCHES * s.drums)]})

    def encode(self, score: Score, asked: Asked = NOTHING) -> Tokens:
        """The tokens (T,) of a score, without END: at one time offs, then ons, each by program and pitch.

        Times go to the nearest grain, a note lasts one at least, and ends where its program strikes the pitch again.
        Raises UserError for pitches, programs and drums that the settings have no room for.
        """
        events = sorted(event for note in self._quantised(score) for event in self._ends(note))
        if events and events[-1][0] > _MOST_SHIFTS * self.durations[-1]:
            raise UserError(f"the piece {score.title!r} takes more than {_MOST_SHIFTS} time shifts: cut it, or raise "
                            "codec.longest")
        tokens, now, velocity, program = self.header(asked), 0, -1, 0
        for time, on, of, place, loud in events:
            tokens += self._wait(time - now)
            if of != program and of < self.count["program"]:
                tokens.append(self.first["program"] + of)
                program = of
            if on and loud != velocity:
                tokens.append(self.first["velocity"] + loud)
                velocity = loud
            section = "drum" if of == self.count["program"] else ("off", "on")[on]
            tokens.append(self.first[section] + place)
            now = time
        return np.array(tokens, self.dtype)

    def pack(self, pieces: Iterable[tuple[Score, Asked]]) -> Tokens:
        """Every piece as END and its tokens, one after another."""
        return _packed(self.encode(score, asked) for score, asked in pieces)

    def decode(self, tokens: Iterable[int]) -> Score:
        """The score of the first piece of any tokens, at a tick a millisecond; the voices are the programs.

        A note that is struck again ends there, one without an off at the end, and a drum after a grain; what is let go
        when it is struck is left out.
        """
        s, now, velocity, program = self.settings, 0, self.settings.velocities // 2, 0
        begun: dict[tuple[int, int], tuple[int, int]] = {}  # program's place and pitch -> time and velocity's bin
        notes: list[tuple[int, int, int, int, int]] = []  # start, end, pitch, velocity's bin, program's place
        for token in self._known(tokens):
            section, place = self.section(token)
            if section == "shift":
                now = min(now + self.durations[place], LONGEST // s.grain - 1)
            elif section == "velocity":
                velocity = place
            elif section == "program":
                program = place
            elif section == "drum":
                notes.append((now, now + 1, place, velocity, len(s.programs)))
            elif section in ("on", "off"):
                key = program, s.lowest + place
                if (struck := begun.pop(key, None)) and now > struck[0]:
                    notes.append((struck[0], now, key[1], struck[1], program))
                if section == "on":
                    begun[key] = now, velocity
        notes += [(start, max(now, start + 1), pitch, loud, of) for (of, pitch), (start, loud) in begun.items()]
        return self._score(notes)

    def given(self, tokens: Iterable[int]) -> Mask:
        """Which tokens (T,) are given and no part of the loss: the conditions."""
        values = _array(tokens)
        return (values > END) & (values < self.first["shift"])

    def grammar(self, tokens: Iterable[int]) -> Mask:
        """Which tokens (V,) may come next: conditions in order, ons of what is silent, offs of what sounds.

        At one time offs come before ons; a velocity is followed by what it is for; a piece ends when all is let go.
        """
        values = self._since_end(tokens)
        asked = int((values < self.first["shift"]).sum())
        if asked < len(self.asked):
            return self._allow(self.asked[asked])
        sounding, program = self._sounding(values)  # (programs, pitches)
        last = self._section[values[-1]] if len(values) else "end"
        if last == "velocity":
            return self._allow("drum") | self._at("on", ~sounding[program])
        mask = self._allow("shift", "drum") | self._at("on", ~sounding[program])
        if self.settings.drums or not sounding[program].all():
            mask |= self._allow("velocity")
        if last != "program":
            mask |= self._allow("program")
        if not (values[_after(values, self.first["shift"], self.first["velocity"]):] >= self.first["on"]).any():
            mask |= self._at("off", sounding[program])
        mask[END] = last in ("off", "drum") and not sounding.any()
        return mask

    def _velocity(self, place: int) -> int:
        """The middle of a bin; 1..127 are parted evenly."""
        return 1 + (2 * place + 1) * 127 // (2 * self.settings.velocities)

    def _quantised(self, score: Score) -> list[Note]:
        """The notes in grains, with the places of their velocity and program in the place of these."""
        s = self.settings
        of = {program: place for place, program in enumerate(s.programs)}
        if s.drums:
            of[DRUMS] = len(s.programs)
        times = np.rint(score.seconds(score.array[:, :2]) * 1000 / s.grain).astype(np.int64)  # (N, 2)
        notes = []
        for note, (start, end) in zip(score.notes, times.tolist(), strict=True):
            if note.program not in of:
                raise UserError(f"a note has the program {note.program} ({DRUMS}: drums): add it to codec.programs, "
                                "set codec.drums, or leave the piece out")
            if not s.lowest <= note.pitch <= s.highest and note.program != DRUMS:
                raise UserError(f"a note has the pitch {note.pitch}: widen codec.lowest = {s.lowest} and "
                                f"codec.highest = {s.highest}")
            bin_ = (note.velocity - 1) * s.velocities // 127
            end = start + 1 if note.program == DRUMS else max(end, start + 1)
            notes.append(Note(start, end, note.pitch, bin_, of[note.program]))
        return disjoint(notes, lambda note: (note.program, note.pitch))

    def _ends(self, note: Note) -> list[tuple[int, int, int, int, int]]:
        """On and off as time in grains, whether on, place of the program, place of the pitch, bin of the velocity."""
        if note.program == self.count["program"]:
            return [(note.start, 1, note.program, note.pitch, note.velocity)]
        place = note.pitch - self.settings.lowest
        return [(note.start, 1, note.program, place, note.velocity), (note.end, 0, note.program, place, 0)]

    def _wait(self, grains: int) -> list[int]:
        """The shifts that make up so many grains, the longest first."""
        tokens: list[int] = []
        while grains:
            place = bisect(self.durations, grains) - 1
            times, grains = divmod(grains, self.durations[place])
            tokens += [self.first["shift"] + place] * times
        return tokens

    def _sounding(self, values: NDArray[np.int64]) -> tuple[Mask, int]:
        """What sounds after the tokens, (programs, pitches), and the place of the program that is set."""
        first, count = self.first, self.count
        changes = (values >= first["program"]) & (values < first["off"])
        since = np.maximum.accumulate(np.where(changes, np.arange(len(values)), -1))
        program = np.where(since >= 0, values[since] - first["program"], 0) if len(values) else values
        notes = (values >= first["off"]) & (values < first["drum"])
        on, pitch = np.divmod(values[notes] - first["off"], count["on"])
        sounding = np.zeros((count["program"], count["on"]), np.bool_)
        sounding[program[notes], pitch] = on  # of a pitch's several values the last one stays
        return sounding, int(program[-1]) if len(values) else 0

    def _score(self, notes: Iterable[tuple[int, int, int, int, int]]) -> Score:
        s = self.settings
        programs = [*s.programs, DRUMS]
        return Score(tuple(sorted(
            Note(start * s.grain, end * s.grain, pitch, self._velocity(velocity), programs[of], of)
            for start, end, pitch, velocity, of in notes)), _TICK)


def _conditions(settings: FrameSettings | EventSettings) -> dict[str, list[str]]:
    """Each kind of condition and what it can be; of one that is never given nothing."""
    bounds = [f"{tempo:g}" for tempo in settings.tempos]
    classes = [f"{low}..{high}" for low, high in pairwise(["", *bounds, ""])] if bounds else []
    return {"key": [*KEYS] * settings.keys, "tempo": classes, "name": [*settings.names]}


def _pitches(settings: FrameSettings | EventSettings) -> list[str]:
    return [pitch_name(pitch) for pitch in range(settings.lowest, settings.highest + 1)]


def _after(values: NDArray[np.int64], first: int, bound: int) -> int:
    """Where what follows the last of the tokens from `first` to before `bound` begins."""
    found = np.flatnonzero((values >= first) & (values < bound))
    return int(found[-1]) + 1 if len(found) else 0


def load(settings: Any, folder: Path) -> Frames | Events:
    """The tokens in `folder`/tokenizer.json; `settings` is the [codec] table, or None to take it as it is.

    Raises UserError when the file is missing, broken, or of other settings.
    """
    file = folder / "tokenizer.json"
    try:
        content = parsed(file.read_text(encoding="utf-8"))
        codec = _checked(content)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: copy the folder again from where it was made") from None
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{file} is no description of music tokens ({error}): "
                        "copy the folder again from where it was made") from None
    if settings is not None and settings != codec.settings:
        raise UserError(f"{file} holds other {codec.kind} tokens than the recipe's [codec]: take the recipe that the "
                        "model was trained with")
    return codec


def pitch_name(pitch: int) -> str:
    """60 is C4."""
    return f"{KEYS[pitch % 12]}{pitch // 12 - 1}"


def _checked(content: Any) -> Frames | Events:
    """The codec that a tokenizer.json describes. Raises ValueError or UserError saying what is wrong."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    table = content.get("settings")
    kind = table.get("kind") if isinstance(table, dict) else None
    if kind not in ("frames", "events"):
        raise ValueError(f"kind {kind!r} is not known")
    codec = (Frames(build(FrameSettings, table, "settings")) if kind == "frames"
             else Events(build(EventSettings, table, "settings")))
    if content.get("size") != codec.size or content.get("end") != END:
        raise ValueError("its size is not that of its settings")
    return codec


def _packed(pieces: Iterable[Tokens]) -> Tokens:
    end = np.zeros(1, np.uint16)
    return np.concatenate([end[:0], *(part for piece in pieces for part in (end, piece))])


def _array(tokens: Iterable[int]) -> NDArray[np.int64]:  # (T,)
    values = tokens if isinstance(tokens, np.ndarray) else np.fromiter(map(int, tokens), np.int64)
    return values.astype(np.int64)
