"""A note of a piece of music, as the synthesisers, the piano roll and the player take it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from handmill.errors import UserError

DRUMS = -1  # the program of percussion, whose pitch is the instrument (General MIDI level 1, channel 10)
MIDDLE_C = 60
FAMILIES = ("piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe",
            "synth lead", "synth pad", "synth effects", "ethnic", "percussive", "sound effects")  # of 8 programs each
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5aa8", "#6b7077")  # of voices
_NAMES = ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")


class Note(NamedTuple):
    """One key pressed and let go."""

    start: float  # seconds from the beginning of the piece
    end: float  # seconds, at or after the start
    pitch: int  # MIDI key, 0 to 127; 60 is middle C, 69 is A at 440 Hz
    velocity: int = 80  # 1 to 127
    program: int = 0  # General MIDI, 0 (grand piano) to 127; DRUMS for percussion
    voice: int = 0  # soprano 0, alto 1, ..., or the track


class Piece(NamedTuple):
    """Notes under a title."""

    title: str
    notes: Sequence[Note]


def ordered(notes: Iterable[Note], longest: float) -> list[Note]:
    """The notes by rising start, checked. Raises UserError for one out of range or beyond `longest` seconds."""
    notes = sorted(notes)
    for note in notes:
        if not 0 <= note.start <= note.end <= longest:  # also where one is not a number
            raise UserError(f"a note from {note.start:g} s to {note.end:g} s cannot be shown or played: notes lie "
                            f"between 0 and {longest:g} s and end after they start")
        if not (0 <= note.pitch <= 127 and 1 <= note.velocity <= 127 and DRUMS <= note.program <= 127):
            raise UserError(f"{note} is no MIDI note: pitch is 0 to 127, velocity 1 to 127, program -1 (drums) to 127")
    return notes


def frequency(pitch: float) -> float:
    """Hz of a MIDI key in equal temperament, A4 = 69 at 440 Hz."""
    hertz: float = 440.0 * 2.0 ** ((pitch - 69) / 12)
    return hertz


def pitch_name(pitch: int) -> str:
    """`C4` for middle C: the scientific name."""
    return f"{_NAMES[pitch % 12]}{pitch // 12 - 1}"


def duration(notes: Sequence[Note]) -> float:
    """Seconds to the end of the last note; 0.0 without notes."""
    return max((note.end for note in notes), default=0.0)


def family(program: int) -> str:
    """The General MIDI family of a program, or "drums"."""
    return "drums" if program == DRUMS else FAMILIES[program // 8]
