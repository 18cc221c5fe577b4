"""From scores to files that ordinary programs open: MIDI and sound, a picture of piano rolls, a page that plays.

N notes.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from handmill import page
from handmill.disk import write_text
from handmill.media import midi, notes, piano_roll, player, scores, sound, synthesis
from handmill.media import soundfont as soundfonts
from handmill.media.music_tokens import Events, Frames
from handmill.media.scores import Score
from handmill.media.soundfont import Font

RATE = 44_100  # Hz
ROLLS = 64  # pieces in a picture


def of_tokens(codec: Frames | Events, tokens: Iterable[int]) -> Score:
    """The score of any tokens of a codec."""
    return codec.score(tokens) if isinstance(codec, Frames) else codec.decode(tokens)


def seconds(score: Score) -> list[notes.Note]:
    """The notes (N) in seconds, as the synthesisers, the picture and the page take them."""
    times = score.seconds(score.array[:, :2]).tolist()  # (N, 2)
    return [notes.Note(start, end, note.pitch, note.velocity,
                       notes.DRUMS if note.program == scores.DRUMS else note.program, note.voice)
            for note, (start, end) in zip(score.notes, times, strict=True)]


def played(score: Score, soundfont: str = "") -> sound.Sound:
    """The score as it sounds with a soundfont, or the built-in synthesiser; at least as long as the score.

    Stereo where there are several voices. Raises UserError for a file that is no soundfont or lacks what the score
    asks for, and for a piece of more than two hours.
    """
    heard = seconds(score)
    stereo = len({note.voice for note in heard}) > 1
    samples = (soundfonts.render(heard, font(soundfont), RATE, stereo) if soundfont
               else synthesis.render(heard, RATE, stereo))
    missing = round(float(score.seconds(score.end)) * RATE) - len(samples)
    silence = ((0, max(0, missing)), (0, 0))[:samples.ndim]
    return sound.Sound(np.pad(samples, silence), RATE)


def wav(score: Score, soundfont: str = "", about: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a wav file of `played`, with `about` in its comment. Raises UserError as that does."""
    return sound.wav_bytes(played(score, soundfont), about)


def save(score: Score, path: Path, about: Mapping[str, str] | None = None, soundfont: str = "") -> list[Path]:
    """Write `path`.mid and `path`.wav, both with `about` inside. Raises UserError where they cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(f"{path.name}{suffix}") for suffix in (".mid", ".wav")]
    midi.write(written[0], score, about)
    sound.save_wav(written[1], played(score, soundfont), about)
    return written


def pieces(made: Sequence[Score], titles: Sequence[str]) -> list[notes.Piece]:
    """The scores under their titles, as rolls and players take them."""
    return [notes.Piece(title, seconds(score)) for score, title in zip(made, titles, strict=True)]


def save_rolls(path: Path, shown: Sequence[notes.Piece], about: Mapping[str, str] | None = None) -> Path:
    """Write the piano rolls of the first pieces as one PNG."""
    several = any(note.voice for piece in shown for note in piece.notes)
    piano_roll.save(path, shown[:ROLLS], "voice" if several else "program", metadata=about)
    return path


def save_player(path: Path, shown: Sequence[notes.Piece], title: str, about: Mapping[str, str]) -> Path:
    """Write a page of HTML that plays the pieces without the network and says how they were made."""
    recipe = about.get("recipe", "")
    said: list[tuple[str, ...]] = [("", "")]
    said += [(key, value) for key, value in about.items() if value and key != "recipe"]
    sections = [page.Section(title, [page.Raw(player.fragment(shown), "Pieces to play.")]),
                page.Section("How they were made", [page.Table(said), *([page.Code(recipe)] if recipe else [])])]
    write_text(path, page.html(sections, path.parent))
    return path


def font(path: str) -> Font:
    """The soundfont in a file, read once for all pieces of a batch. Raises UserError."""
    return _font(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


@lru_cache(maxsize=1)  # a font may be hundreds of megabytes
def _font(path: str, _changed: int) -> Font:
    return soundfonts.read(path)
