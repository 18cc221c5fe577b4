"""Standard MIDI files: notes, tempos, keys and metres out of them, and files that every player opens.

MIDI Manufacturers Association 1996 (Standard MIDI Files 1.0, General MIDI level 1). The package mido reads and writes
the bytes; what the messages mean stands here:

- A key struck again before it was let go sounds twice, and what is let go first is what was struck first.
- What still sounds at the end of the file ends there; a note of no length lasts one tick.
- A note let go while the pedal is down (controller 64) sounds until the pedal comes up or the key is struck again.
- Channel 10 is drums. A program lasts on its channel until the next one, whatever track it came from.
- A voice is what one channel plays in one track, counted from the first track.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from handmill.errors import UserError, optional
from handmill.media.scores import DRUMS, KEYS, LONGEST, MODERATE, Note, Score

MOST_EVENTS = 1_000_000  # of a file; each takes some 600 bytes of memory
LARGEST = 32 << 20  # bytes of a file
LONGEST_QUARTERS = 100_000  # about 14 hours
_DRUM_CHANNEL = 9
_CHANNELS = [channel for channel in range(16) if channel != _DRUM_CHANNEL]
_PEDAL = 64  # the controller; down from the value 64 on
_ENDLESS = re.compile(rb"[\x80-\xff]{65536}")  # would be read as one number, in time that grows with its square
_ENHARMONIC = {"C#": "Db", "Gb": "F#", "Cb": "B", "D#m": "Ebm", "A#m": "Bbm", "Abm": "G#m"}

Place = tuple[int, int, int]  # track, channel, pitch


def read(path: Path | str, pedal: bool = True) -> Score:
    """The score of a MIDI file of type 0 or 1; `pedal` false leaves the sustain pedal out.

    Raises UserError for a file that is not there, is no MIDI file or a broken one, has no notes, counts time in
    frames, or is larger than MOST_EVENTS, LARGEST or LONGEST_QUARTERS.
    """
    try:
        if Path(path).stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB, which no piece of music is: leave it out")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    return from_bytes(data, str(path), pedal)


def from_bytes(data: bytes, name: str = "the MIDI file", pedal: bool = True) -> Score:
    """As `read`, of a file's content; `name` is what errors call it."""
    file = _messages(data, name)
    _playable(file, name)
    events = _in_order(file, name)
    heard = _Listener(pedal)
    for tick, track, message in events:
        heard.hear(tick, track, message)
    end = events[-1][0] if events else 0
    notes = heard.ended(end)
    if not notes:
        raise UserError(f"{name} has no notes: leave it out")
    return Score(notes, file.ticks_per_beat, _tempos(events, name), _keys(events), _metres(events), _title(events),
                 max(end, max(note.end for note in notes)))


def write(path: Path | str, score: Score, about: Mapping[str, str] | None = None) -> None:
    """Write `score.tidy()` as `to_bytes` has it. Raises UserError where it cannot be written."""
    beside = Path(path).with_name(f".{Path(path).name}.tmp-{os.getpid()}")
    data = to_bytes(score, about)
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None
    finally:
        beside.unlink(missing_ok=True)


def to_bytes(score: Score, about: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file of type 1: a track of tempos, keys and metres, then one for each voice.

    From the 16th voice on channels are shared, each note then being told its program. `about` stands as JSON in a text
    event at the beginning.
    """
    mido: Any = optional("mido", "music")
    score = score.tidy()
    parts: dict[int, list[Note]] = {}
    for note in score.notes:
        parts.setdefault(note.voice, []).append(note)
    melodic = [voice for voice, notes in sorted(parts.items()) if notes[0].program != DRUMS]
    channels = {voice: _CHANNELS[i % len(_CHANNELS)] for i, voice in enumerate(melodic)}
    shared = len(melodic) > len(_CHANNELS)
    tracks = [_conductor(score, about)]
    tracks += [_track(notes, channels.get(voice, _DRUM_CHANNEL), shared) for voice, notes in sorted(parts.items())]
    content = BytesIO()
    mido.MidiFile(type=1, ticks_per_beat=score.resolution, tracks=tracks).save(file=content)
    return content.getvalue()


def _messages(data: bytes, name: str) -> Any:
    """mido's file. Raises UserError saying what is wrong with the bytes."""
    mido: Any = optional("mido", "music")
    tracks = _Counted(_only_tracks(data, name), name)
    try:
        return mido.MidiFile(file=tracks)
    except UserError:
        raise
    except Exception as error:  # mido raises a dozen kinds, IndexError and struct.error among them
        raise UserError(f"{name} is a broken MIDI file ({str(error) or 'it ends too early'}): export it again, or "
                        "leave it out") from None


class _Counted(BytesIO):
    """The bytes of a file that stop before too many events have been read: mido asks where it is after each."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name, self.events = name, 0

    def tell(self) -> int:
        self.events += 1
        if self.events > MOST_EVENTS:
            raise UserError(f"{self.name} has more than {MOST_EVENTS} events: cut it into pieces, or leave it out")
        return super().tell()


def _only_tracks(data: bytes, name: str) -> bytes:
    """The header and the track chunks: others are allowed and skipped, and so is the RIFF around an .rmi file."""
    if data[:4] == b"RIFF" and data[8:16] == b"RMIDdata":
        data = data[20:]
    if data[:4] != b"MThd" or len(data) < 14:
        raise UserError(f"{name} is no MIDI file: it does not begin with MThd and a header")
    if _ENDLESS.search(data):
        raise UserError(f"{name} is a broken MIDI file (a number of it never ends): leave it out")
    tracks, place = [], 8 + int.from_bytes(data[4:8])
    while data[place:place + 4].isalnum() and place + 8 <= len(data):
        size = int.from_bytes(data[place + 4:place + 8])
        if place + 8 + size > len(data):
            raise UserError(f"{name} is a broken MIDI file: the chunk at byte {place} is to be {size} bytes long, but "
                            f"the file has {len(data) - place - 8} more; copy it again, or leave it out")
        if data[place:place + 4] == b"MTrk":
            tracks.append(data[place:place + 8 + size])
        place += 8 + size
    if len(tracks) >= 1 << 15:
        raise UserError(f"{name} has {len(tracks)} tracks: leave it out")
    return b"MThd" + (6).to_bytes(4) + data[8:10] + len(tracks).to_bytes(2) + data[12:14] + b"".join(tracks)


def _playable(file: Any, name: str) -> None:
    if file.type not in (0, 1):
        raise UserError(f"{name} holds pieces that are not played together (type {file.type}): save each as a file "
                        "of type 1")
    if file.ticks_per_beat <= 0:
        raise UserError(f"{name} counts time in frames of a film or not at all: save it with ticks a quarter note")


def _in_order(file: Any, name: str) -> list[tuple[int, int, Any]]:
    """Every message as tick, track and itself, tracks one after another where they meet."""
    longest = min(LONGEST - 1, LONGEST_QUARTERS * file.ticks_per_beat)
    events = []
    for track, messages in enumerate(file.tracks):
        tick = 0
        for message in messages:
            tick += message.time
            if tick > longest:
                raise UserError(f"{name} lasts longer than {longest // file.ticks_per_beat} quarter notes: cut it, or "
                                "leave it out")
            events.append((tick, track, message))
    return sorted(events, key=lambda event: event[0])


class _Struck(NamedTuple):
    start: int  # ticks
    velocity: int
    program: int


class _Listener:
    """Messages in order of time become notes."""

    def __init__(self, pedal: bool) -> None:
        self.pedal = pedal
        self.programs, self.down = [0] * 16, [False] * 16  # a channel
        self.struck: dict[Place, deque[_Struck]] = {}  # keys that are down
        self.held: dict[Place, list[_Struck]] = {}  # let go while the pedal was down
        self.notes: list[tuple[Place, int, _Struck]] = []  # with the tick they ended at

    def hear(self, tick: int, track: int, message: Any) -> None:
        kind = message.type
        if kind in ("note_on", "note_off"):
            place = track, message.channel, message.note
            if kind == "note_on" and message.velocity:
                self._strike(place, _Struck(tick, message.velocity, self.programs[message.channel]))
            else:
                self._let_go(place, tick)
        elif kind == "program_change":
            self.programs[message.channel] = message.program
        elif kind == "control_change" and message.control == _PEDAL and message.channel != _DRUM_CHANNEL:
            self.down[message.channel] = self.pedal and message.value >= 64
            if not self.down[message.channel]:
                self._end([place for place in self.held if place[1] == message.channel], tick)

    def ended(self, tick: int) -> tuple[Note, ...]:
        """All notes in order, with those that still sound ending at the tick."""
        self._end([*self.held], tick)
        for place, struck in self.struck.items():
            self.notes += [(place, tick, one) for one in struck]
        voices = {part: i for i, part in enumerate(sorted({place[:2] for place, _, _ in self.notes}))}
        return tuple(sorted(
            Note(one.start, max(end, one.start + 1), place[2], one.velocity,
                 DRUMS if place[1] == _DRUM_CHANNEL else one.program, voices[place[:2]])
            for place, end, one in self.notes))

    def _strike(self, place: Place, one: _Struck) -> None:
        self._end([place] if place in self.held else [], one.start)
        self.struck.setdefault(place, deque()).append(one)

    def _let_go(self, place: Place, tick: int) -> None:
        struck = self.struck.get(place)
        if not struck:
            return  # let go without having been struck
        one = struck.popleft()
        if self.down[place[1]]:
            self.held.setdefault(place, []).append(one)
        else:
            self.notes.append((place, tick, one))

    def _end(self, places: Iterable[Place], tick: int) -> None:
        for place in places:
            self.notes += [(place, tick, one) for one in self.held.pop(place)]


def _of(events: list[tuple[int, int, Any]], kind: str) -> dict[int, Any]:
    """Tick -> message of that type; of several at one tick the last."""
    return {tick: message for tick, _, message in events if message.type == kind}


def _tempos(events: list[tuple[int, int, Any]], name: str) -> tuple[tuple[int, int], ...]:
    tempos = {tick: int(message.tempo) for tick, message in _of(events, "set_tempo").items()}
    if 0 in tempos.values():
        raise UserError(f"{name} has a tempo of zero microseconds a quarter note: mend it in an editor, or leave it "
                        "out")
    return tuple(({0: MODERATE} | tempos).items())


def _keys(events: list[tuple[int, int, Any]]) -> tuple[tuple[int, int], ...]:
    return tuple((tick, KEYS.index(_ENHARMONIC.get(message.key, message.key)))
                 for tick, message in _of(events, "key_signature").items())


def _metres(events: list[tuple[int, int, Any]]) -> tuple[tuple[int, int, int], ...]:
    """Metres; those that no music has are left out, since nothing sounds otherwise for them."""
    return tuple((tick, message.numerator, message.denominator)
                 for tick, message in _of(events, "time_signature").items()
                 if message.numerator and message.denominator <= 64)


def _title(events: list[tuple[int, int, Any]]) -> str:
    """The first track's name, in UTF-8 or else Latin-1: the format does not say which."""
    names = [message.name for _, track, message in events if track == 0 and message.type == "track_name"]
    raw = names[0].encode("latin-1") if names else b""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _conductor(score: Score, about: Mapping[str, str] | None) -> Any:
    mido: Any = optional("mido", "music")
    events = [(0, mido.MetaMessage("track_name", name=score.title.encode("utf-8", "replace").decode("latin-1")))]
    events += [(0, mido.MetaMessage("text", text=json.dumps(dict(about))))] if about else []
    events += [(tick, mido.MetaMessage("set_tempo", tempo=tempo)) for tick, tempo in score.tempos]
    events += [(tick, mido.MetaMessage("time_signature", numerator=beats, denominator=of))
               for tick, beats, of in score.metres]
    events += [(tick, mido.MetaMessage("key_signature", key=KEYS[key])) for tick, key in score.keys]
    events.sort(key=lambda event: event[0])
    return _with_waits([*events, (max(score.end, events[-1][0]), mido.MetaMessage("end_of_track"))])


def _track(notes: list[Note], channel: int, shared: bool) -> Any:
    """The track of one voice: at every tick keys are let go before others are struck."""
    mido: Any = optional("mido", "music")
    events: list[tuple[int, int, Any]] = []
    program = None
    for note in notes:
        if channel != _DRUM_CHANNEL and (shared or note.program != program):
            at = 0 if program is None and not shared else note.start  # players set instruments before they begin
            program = note.program
            events.append((at, 1, mido.Message("program_change", channel=channel, program=program)))
        events.append((note.start, 1, mido.Message("note_on", channel=channel, note=note.pitch,
                                                   velocity=note.velocity)))
        events.append((note.end, 0, mido.Message("note_off", channel=channel, note=note.pitch, velocity=0)))
    events.sort(key=lambda event: event[:2])
    return _with_waits([(tick, message) for tick, _, message in events])


def _with_waits(events: list[tuple[int, Any]]) -> Any:
    mido: Any = optional("mido", "music")
    track, last = mido.MidiTrack(), 0
    for tick, message in events:
        message.time, last = tick - last, tick
        track.append(message)
    return track
