"""Fill in the middle: some texts are learnt with their middle last (Bavarian et al. 2022).

Two cuts between characters make a text into prefix, middle and suffix, which stand in one of the paper's two orders (of
"suffix first" its second variant, in which the middle follows the prefix):

    <prefix> prefix <suffix> suffix <middle> middle
    <prefix> <suffix> suffix <middle> prefix middle

It is done to training windows, not to whole documents, for a window would hold the prefix of a long one and seldom its
middle: the paper finds this context-level form the better. Cuts fall on characters, so that a prompt may stop within a
word, and the three parts are encoded apart, as sampling encodes them. Held-out text stays in its own order.

What is cut is the text from an evenly drawn token on; before it the text goes on in its own order. Else a middle would
always end as far from its prefix mark as the window is long, and a model waits for that. The middle's length is drawn
evenly on a logarithmic scale, from a character to all of it, and its place evenly. The paper draws both cuts evenly,
which makes most middles a third of the window: a model that seldom sees one end writes on where a line was asked for.
A share of the middles are whole lines instead, as many as the same draw says: a small model soon learns these ends.

The middle ends with `end`: that of the next document, or one put at the window's close. `end` stands in front only
where the document begins. The marks need room, which a window takes from the text that would outgrow it: from the end
of the suffix, then from the beginning of the prefix, never from the middle.

N windows, T context, P texts of a window at most, each with DRAWS numbers from [0, 1).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handmill.data.noise import uniform
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.media.tokenizers import Tokenizer

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # for codec.special; other programs know them too
DRAWS = 6  # whether, in which order, from which token on, how long, where, of lines or of characters
_WITHIN = tuple(bytes([byte]) for byte in range(0x80, 0xC0))  # bytes of UTF-8 that no character begins with
Ids = NDArray[Any]  # tokens, of any integer type


class Marks(NamedTuple):
    """The tokens before each part."""

    prefix: int
    suffix: int
    middle: int


class Parts(NamedTuple):
    """The tokens of a text in three."""

    prefix: Ids
    middle: Ids
    suffix: Ids


def marks(codec: Tokenizer) -> Marks:
    """The three marks of a codec. Raises UserError where it has none."""
    if missing := [name for name in NAMES if name not in codec.special]:
        raise UserError(f"the tokenizer has no token {missing[0]} to fill in the middle with: "
                        f"set codec.special = {list(NAMES)} and train anew")
    return Marks(*(codec.special[name] for name in NAMES))


class Middle:
    """Puts the middle last in a share `rate` of the texts in training windows, in `suffix_first` of these after the
    prefix and the suffix before both, in `lines` of these a middle of whole lines.

    What becomes of a window is a pure function of (seed, place, window). Raises UserError for a codec without marks.
    """

    def __init__(self, codec: Tokenizer, seed: int, rate: float, suffix_first: float = 0.0, lines: float = 0.0) -> None:
        assert all(0 <= share <= 1 for share in (rate, suffix_first, lines)), (rate, suffix_first, lines)
        self.codec, self.rate, self.suffix_first, self.lines = codec, rate, suffix_first, lines
        self.marks, self.key = marks(codec), draw(seed, "middle")

    def __call__(self, windows: Tensor, places: NDArray[np.int64]) -> Tensor:
        """Windows (N, T + 1) int64 on the CPU that stand at `places` (N,) of the endless order: (N, T + 1) int64."""
        rows = windows.numpy()
        texts = 1 + int((rows == self.codec.end).sum(1).max(initial=0))  # P
        chances = uniform(self.key, torch.from_numpy(places), DRAWS * texts).numpy().reshape(len(rows), texts, DRAWS)
        return torch.from_numpy(np.array([self._row(*pair) for pair in zip(rows, chances, strict=True)], np.int64)
                                .reshape(rows.shape))

    def _row(self, row: Ids, chances: NDArray[np.float32]) -> Ids:
        """A window (T + 1,), `chances` (P, DRAWS). One that would come out too short stays as it is, which is rare."""
        made, room = [row[:0]], len(row)
        for text, chance in zip(np.split(row, np.flatnonzero(row == self.codec.end) + 1), chances, strict=False):
            made.append(self._text(text, chance, room))
            room -= len(made[-1])
        return np.concatenate(made)[:len(row)] if room <= 0 else row

    def _text(self, text: Ids, chance: NDArray[np.float32], room: int) -> Ids:
        """A text with its middle last, and `end`; as it is where chance leaves it so, or the marks find no room."""
        if chance[0] >= self.rate:
            return text
        spelled = [self.codec.token_bytes[token] for token in text.tolist()]
        first = int(chance[2] * len(text))
        while first and spelled[first][:1] in _WITHIN:
            first -= 1
        for begin in {first: None, 0: None}:
            # a window may begin and end within a character, whose bytes are left out
            characters = b"".join(spelled[begin:]).decode("utf-8", "ignore")
            a, b = (line_cuts if chance[5] < self.lines else cuts)(characters, *chance[3:5].tolist())
            parts = Parts(*encoded(self.codec, (characters[:a], characters[a:b], characters[b:])))
            short = shortened(parts, begin + sum(map(len, parts)) + len(self.marks) + 1 - room)
            hole = begin and short is not None and len(short.prefix) < len(parts.prefix)
            if characters and short is not None and not hole:
                made = arranged(short, self.marks, bool(chance[1] < self.suffix_first))
                return np.concatenate((text[:begin], made, [self.codec.end]))
        return text


def cuts(text: Sequence[Any], scale: float, place: float) -> tuple[int, int]:
    """Where the middle of a text begins and ends, for two numbers drawn evenly from [0, 1)."""
    inside = min(len(text), int((len(text) + 1) ** scale))
    before = int(place * (len(text) - inside + 1))
    return before, before + inside


def line_cuts(text: str, scale: float, place: float) -> tuple[int, int]:
    """The same of a middle that is some of the text's whole lines; where it has none, as above."""
    ends = [found.end() for found in re.finditer("\n", text)]
    if len(ends) < 2:
        return cuts(text, scale, place)
    first, last = cuts(ends[1:], scale, place)
    return ends[first], ends[last]


def encoded(codec: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The tokens of each text, all found at once."""
    tokens = codec.pack(texts)
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == codec.end))[1:]]


def arranged(parts: Parts, marks: Marks, suffix_first: bool) -> Ids:
    """The parts after their marks, in one of the two orders: (tokens,)."""
    prefix, middle, suffix = parts
    if suffix_first:
        return np.concatenate((marks[:2], suffix, marks[2:], prefix, middle)).astype(np.int64)
    return np.concatenate((marks[:1], prefix, marks[1:2], suffix, marks[2:], middle)).astype(np.int64)


def shortened(parts: Parts, by: int) -> Parts | None:
    """The parts with `by` tokens fewer, or nothing where all that surrounds the middle is less than that."""
    prefix, middle, suffix = parts
    from_suffix = min(max(0, by), len(suffix))
    from_prefix = max(0, by) - from_suffix
    if from_prefix > len(prefix):
        return None
    return Parts(prefix[from_prefix:], middle, suffix[:len(suffix) - from_suffix])


def filled(codec: Tokenizer, before: str, after: str, context: int, new: int, suffix_first: bool = False) -> list[int]:
    """The prompt that a model goes on from with what stands between two texts, until it draws `end`.

    At most context - new tokens, so that `new` more fit. Of texts too long for that the end of `before` and the
    beginning of `after` are kept, half of the room for each or more where the other leaves some.
    Raises UserError for a codec without marks, an unknown character, and a context without room.
    """
    room = context - new - len(NAMES) - 1
    if room < 2:
        raise UserError(f"a context of {context} tokens leaves no room for text around a middle of {new}: "
                        f"set sampling.max_tokens to at most {max(1, context // 2)}")
    prefix, suffix = encoded(codec, (before, after))
    if codec.unknown is not None and codec.unknown in (*prefix, *suffix):
        raise UserError("the text around the middle holds characters that are not in the training text: "
                        "leave them out, or train with a byte or bpe codec")
    right = min(len(suffix), max(room // 2, room - len(prefix)))
    left = min(len(prefix), room - right)
    parts = Parts(prefix[len(prefix) - left:], prefix[:0], suffix[:right])
    front = [codec.end] if left == len(prefix) else []
    return [*front, *arranged(parts, marks(codec), suffix_first).tolist()]


def assembled(codec: Tokenizer, tokens: Sequence[int]) -> str:
    """The text, in its own order, of a prompt of `filled` and the tokens drawn after it."""
    row = np.asarray(tokens)
    places = [np.flatnonzero(row == mark) for mark in marks(codec)]
    assert all(len(place) == 1 for place in places), "there is one of each mark"
    (prefix,), (suffix,), (middle,) = places
    return "".join(codec.decode(part) for part in (row[:prefix], row[prefix:suffix], row[middle:], row[suffix:middle]))
