"""Packed tokens as Unicode characters, in NumPy and in pieces, so that a large corpus streams through.

A document's end is a symbol of its own. N tokens, M characters, W texts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int32]  # Unicode code points, and END

END = 0x110000  # a document's end: the first number that is no code point
_END_BYTE = 0xFF  # stands for it among bytes: it never occurs in UTF-8
CHUNK = 1 << 20  # tokens read at once


def _leaders() -> Codes:
    """What each byte brings to the character it begins; -1 for a byte that goes on with one (RFC 3629)."""
    values = np.full(256, -1, np.int32)
    for low, high, mask in ((0x00, 0x80, 0x7F), (0xC0, 0xE0, 0x1F), (0xE0, 0xF0, 0x0F), (0xF0, 0xFF, 0x07)):
        values[low:high] = np.arange(low, high) & mask
    values[_END_BYTE] = END
    return values


LEADERS = _leaders()


class Spelling:
    """What the tokens of a codec stand for: `bytes` and `characters` (V,) count it; the end token is none.

    A character belongs to the token that holds its first byte, so counts of tokens add up to counts of text.
    """

    def __init__(self, codec: Any) -> None:
        parts = list(codec.token_bytes)
        assert len(parts) == codec.size
        assert parts[codec.end] == b"", "the end token is no text"
        self.bytes = np.array([len(part) for part in parts], np.int64)
        self.characters = np.array([_first_bytes(part) for part in parts], np.int64)
        parts[codec.end] = bytes([_END_BYTE])
        self._flat = np.frombuffer(b"".join(parts), np.uint8)
        self._length = np.array([len(part) for part in parts], np.int64)
        self._offset = np.cumsum(self._length) - self._length

    def spell(self, tokens: NDArray[Any]) -> NDArray[np.uint8]:
        """Tokens (N,) as UTF-8, one byte 0xFF for every end token."""
        length = self._length[tokens]
        ends = np.cumsum(length)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
        spelled: NDArray[np.uint8] = self._flat[np.repeat(self._offset[tokens], length) + within]
        return spelled

    def stream(self, tokens: NDArray[Any]) -> Iterator[Codes]:
        """The characters of memmapped tokens (N,), in pieces, no character being cut."""
        rest = np.empty(0, np.uint8)
        for start in range(0, len(tokens), CHUNK):
            rest = np.concatenate((rest, self.spell(tokens[start:start + CHUNK])))
            firsts = np.flatnonzero(LEADERS[rest] >= 0)
            cut = int(firsts[-1]) if len(firsts) else 0
            yield characters(rest[:cut])
            rest = rest[cut:]
        yield characters(rest)

    def read(self, tokens: NDArray[Any]) -> Codes:
        """The characters of tokens (N,), all at once."""
        return np.concatenate(list(self.stream(tokens)))


def characters(text: NDArray[np.uint8]) -> Codes:
    """UTF-8 with 0xFF for END to one number a character; an unfinished character keeps the bits it has."""
    leader = LEADERS[text]
    firsts = np.flatnonzero(leader >= 0)
    codes, going = leader[firsts], leader[firsts] != END
    for k in (1, 2, 3):
        at = np.minimum(firsts + k, len(text) - 1)
        going = going & (firsts + k < len(text)) & (leader[at] < 0)
        codes = np.where(going, (codes << 6) | (text[at] & 0x3F), codes)
    return codes.astype(np.int32)


def of(text: str) -> Codes:
    """A string as code points (M,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.int32)


def string(codes: Codes) -> str:
    """Code points (M,) as a string."""
    return codes.astype("<i4").tobytes().decode("utf-32-le", "replace")


def documents(codes: Codes) -> list[Codes]:
    """The texts between the ends, empty ones left out."""
    pieces = (piece[piece != END] for piece in np.split(codes, np.flatnonzero(codes == END)))
    return [piece for piece in pieces if len(piece)]


def _first_bytes(part: bytes) -> int:
    return sum((byte & 0xC0) != 0x80 for byte in part)
