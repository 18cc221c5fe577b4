"""Making music: tokens drawn one at a time, as texts are, where the grammar of the codec leaves a choice.

A melody takes that choice away at the beginning of each step: what opens a step is its highest note, so the notes
drawn after it are the voices below (harmonising as in Liang 2016, BachBot, section 5.4, with the soprano first).

B rows (pieces made at once), V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from handmill.errors import UserError
from handmill.families.autoregressive import SEEDS, Sampling, following, limit
from handmill.families.sampling import draw, filtered
from handmill.media.music_tokens import END, NOTHING, Asked, Events, Frames, Mask

_LEAST = torch.finfo(torch.float32).min  # of a logit; the filters want finite ones


class Wish(NamedTuple):
    """What a piece is asked to be."""

    asked: Asked = NOTHING
    beginning: tuple[int, ...] = ()  # tokens after the header, to be continued
    melody: tuple[int, ...] = ()  # Frames only: the token that opens each step; the piece is as long as it
    steps: int = 0  # Frames only: the piece ends after so many at most; 0: where the network or the melody ends it


@torch.inference_mode()
def compose(network: Any, codec: Frames | Events, wishes: Sequence[Wish], sampling: Sampling, seed: int,
            first: int = 0, progress: bool = False) -> list[list[int]]:
    """The tokens of a piece for each wish, with END and the header in front and without END behind.

    A piece ends where the network ends it, with its melody, after its steps, or after `max_tokens` new tokens; then an
    unfinished step is left out, or what still sounds is let go. The draws of piece i depend on (seed, first + i) alone,
    so a batch may be cut anywhere without changing the pieces. The repetition penalty is of notes.

    `network` is as in autoregressive.generate. Raises UserError as `check` does, before anything is made.
    """
    assert 0 <= seed < SEEDS, seed
    assert not getattr(network, "training", False), "call network.eval() first: dropout disturbs samples"
    check(codec, wishes, sampling)
    rows = [_Row(codec, first + i, wish, limit(network)) for i, wish in enumerate(wishes)]
    on, reading = rows, None
    for step in tqdm(range(sampling.max_tokens if on else 0), desc="composing", unit=" tokens", delay=1, leave=False,
                     disable=not progress):
        logits, reading = following(network, [row.window for row in on], reading)  # (B, V)
        tokens = draw(_choices(logits, on, sampling, network.settings.context), seed, [row.number for row in on], step)
        for row, token in zip(on, tokens.tolist(), strict=True):
            row.take(token)
        left = [i for i, row in enumerate(on) if not row.finished]
        if not left:
            break
        if len(left) < len(on):
            on, reading = [on[i] for i in left], reading.rows(left)
    return [_closed(codec, row.tokens) for row in rows]


def check(codec: Frames | Events, wishes: Sequence[Wish], sampling: Sampling) -> None:
    """Raise UserError for a wish that cannot come true, and for voices of events.

    That is a melody or steps of events, no melody where the codec needs one, one that max_tokens may cut, and a
    beginning that does not fit the melody or leaves nothing to make.
    """
    for wish in wishes:
        if isinstance(codec, Frames):
            _check_steps(codec, wish, sampling.max_tokens)
        elif wish.melody or wish.steps:
            raise UserError("this model makes events in free time, which melodies and steps do not fit: leave them "
                            "out, or take a model of chords on a grid")
    if sampling.voice_temperatures and not isinstance(codec, Frames):
        raise UserError("voice_temperatures are of the notes of a step, and this model makes events in free time: set "
                        "temperature")


def _check_steps(codec: Frames, wish: Wish, most: int) -> None:
    assert wish.steps >= 0, wish.steps
    assert all(codec.step <= token < codec.size for token in wish.melody), wish.melody
    if codec.settings.melody and not wish.melody:
        raise UserError("this model was trained to harmonise and makes no melody of its own: give it one")
    openings = [token for before, token in pairwise((codec.step, *wish.beginning)) if before == codec.step]
    length = _length(wish)
    if length and wish.beginning.count(codec.step) >= length:
        raise UserError(f"the beginning fills all {length} steps of the piece: shorten it, or ask for more")
    if wish.melody and tuple(openings) != wish.melody[:len(openings)]:
        raise UserError(f"the highest notes of the beginning, of {len(openings)} steps, are not those of the melody, "
                        f"of {len(wish.melody)}: leave one of the two out")
    needed = codec.settings.voices * (len(openings) > wish.beginning.count(codec.step)) + sum(
        1 + min(codec.settings.voices, token - codec.step) for token in wish.melody[len(openings):length])
    if needed > most:
        raise UserError(f"a melody of {length} steps may take {needed} tokens and max_tokens = {most}: set max_tokens "
                        f"to {needed}, or cut the melody")


def _length(wish: Wish) -> int:
    """The steps that a piece has at most; 0: any number."""
    return min((steps for steps in (len(wish.melody), wish.steps) if steps), default=0)


class _Row:
    """One piece in the making."""

    def __init__(self, codec: Frames | Events, number: int, wish: Wish, longest: int) -> None:
        self.codec, self.number, self.melody, self.longest = codec, number, wish.melody, longest
        self.header = codec.header(wish.asked)  # what a sliding window begins with, as windows in training do
        self.tokens: list[int] = []
        self.window: list[int] = []  # the tokens that the next one is drawn from
        self.recent: list[int] = []  # tokens that the grammar makes the same of as of all
        self.steps, self.length, self.finished = 0, _length(wish), False
        for token in (END, *self.header, *wish.beginning):
            assert 0 <= token < codec.size, token
            assert not self.tokens or token != END, "a beginning is of one piece"
            self.take(token)

    def take(self, token: int) -> None:
        """Add a token to the piece, or end it."""
        if token == END and self.tokens:
            self.finished = True
            return
        self.tokens.append(token)
        self.window.append(token)
        if len(self.window) > self.longest:
            self.window = self.header + self.window[-max(1, (self.longest - len(self.header)) // 2):]
        self.recent = shortened(self.codec, [*self.recent, token])
        if isinstance(self.codec, Frames) and token == self.codec.step:
            self.steps += 1
            self.finished = self.steps == self.length  # never where that is 0, since a step is done

    def allowed(self) -> Mask:
        """Which tokens (V,) may come next."""
        mask = self.codec.grammar(self.recent)
        if self.melody:
            if not self.voice:
                mask[:] = False
                mask[self.melody[self.steps]] = True
            mask[END] = False
        return mask

    @property
    def voice(self) -> int:
        """Of chords the voice that is next: how many pitches the step has."""
        lowest = self.codec.first.get("pitch", self.codec.size)
        return sum(token >= lowest for token in self.recent)

    def temperature(self, sampling: Sampling) -> float:
        """Of the next token."""
        voices = sampling.voice_temperatures
        return voices[min(self.voice, len(voices) - 1)] if voices else sampling.temperature


def _choices(logits: Tensor, rows: Sequence[_Row], sampling: Sampling, context: int) -> Tensor:
    """The logits (B, V) float64 to draw from, -inf where the grammar or the melody says no."""
    allowed = torch.from_numpy(np.stack([row.allowed() for row in rows])).to(logits.device)  # (B, V)
    logits, seen = logits.masked_fill(~allowed, _LEAST), torch.zeros_like(allowed)
    if sampling.repetition_penalty != 1:
        for i, row in enumerate(rows):
            seen[i, [token for token in row.window[-context:] if token >= _struck(row.codec)]] = True
    temperatures = [row.temperature(sampling) for row in rows]
    kept = torch.empty_like(logits, dtype=torch.float64)
    for temperature in set(temperatures):
        some = [i for i, one in enumerate(temperatures) if one == temperature]
        kept[some] = filtered(logits[some], seen[some], temperature=temperature, k=sampling.top_k, p=sampling.top_p,
                              least=sampling.min_p, penalty=sampling.repetition_penalty)
    return kept.masked_fill(~allowed, -torch.inf)


def _struck(codec: Frames | Events) -> int:
    """The first of the tokens that strike a note, which are the last of the vocabulary."""
    return codec.first["pitch" if isinstance(codec, Frames) else "on"]


def shortened(codec: Frames | Events, tokens: list[int]) -> list[int]:
    """Few tokens that codec.grammar allows the same after as after `tokens`, so that its work does not grow.

    Of chords all but the last step go, and of events all before the last time shift but what sounds since. `tokens`
    begin with END and the header, and only their last token is new.
    """
    head = 1 + len(codec.asked)
    if len(tokens) <= head or codec.section(tokens[-1])[0] not in ("step", "shift"):
        return tokens
    if isinstance(codec, Frames):
        return [*tokens[:head], tokens[-1]]
    first, (sounding, program) = codec.first, _sounding(codec, tokens)
    struck = [token for of, pitch in sounding for token in (first["program"] + of, first["on"] + pitch)]
    return [*tokens[:head], *struck, first["program"] + program, tokens[-1]]


def _sounding(codec: Events, tokens: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """What sounds after the tokens, as places of program and pitch, and the place of the program that is set."""
    sounding: set[tuple[int, int]] = set()
    program = 0
    for section, place in map(codec.section, tokens):
        if section == "program":
            program = place
        elif section == "on":
            sounding.add((program, place))
        elif section == "off":
            sounding.discard((program, place))
    return sorted(sounding), program


def _closed(codec: Frames | Events, tokens: list[int]) -> list[int]:
    """The piece without what is unfinished at its end, so that END may follow unless there is nothing else."""
    tokens, head = [*tokens], 1 + len(codec.asked)
    if isinstance(codec, Frames):
        while tokens[-1] >= codec.first["pitch"]:
            tokens.pop()
        return tokens
    sounding, _ = _sounding(codec, tokens)
    idle = ("velocity", "program") if sounding else ("velocity", "program", "shift")
    while len(tokens) > head and codec.section(tokens[-1])[0] in idle:
        tokens.pop()
    return tokens + _let_go(codec, tokens)


def _let_go(codec: Events, tokens: Sequence[int]) -> list[int]:
    """The tokens that end what sounds: offs, after a grain where something was just struck."""
    sounding, program = _sounding(codec, tokens)
    last = next((section for section, _ in map(codec.section, reversed(tokens)) if section in ("shift", "on", "drum")),
                "")
    closing = [codec.first["shift"]] if sounding and last in ("on", "drum") else []
    for of, pitch in sounding:
        if of != program:
            closing.append(codec.first["program"] + of)
            program = of
        closing.append(codec.first["off"] + pitch)
    return closing
