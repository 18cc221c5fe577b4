"""Bytes of any length as pieces of about a megabyte, cut where no token spans the cut."""

from collections.abc import Iterable, Iterator

PIECE = 1 << 20  # bytes
_TRIES = 1000


def pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces that joined are the blocks joined: cut after a line end that no white space follows.

    Text without such a line end for a MiB is cut between two UTF-8 characters.
    """
    held = b""
    for block in blocks:
        held += block
        cut = _after_line(held)
        if not cut and len(held) >= PIECE:
            cut = _between_characters(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def lines(blocks: Iterable[bytes], longest: int = 1 << 28) -> Iterator[bytes]:
    """The lines of the blocks joined, without line feeds. Raises ValueError at one above `longest` bytes."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        first, *rest = block.split(b"\n")
        held.append(first)
        size += len(first)
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held, size = [rest[-1]], len(rest[-1])
        if size > longest:
            raise ValueError(f"a line is longer than {longest >> 20} MiB")
    if size:
        yield b"".join(held)


def _after_line(held: bytes) -> int:
    end = len(held) - 1
    for _ in range(_TRIES):
        end = held.rfind(b"\n", 0, end)
        if end < 0 or not held[end + 1:end + 2].isspace():
            return end + 1
    return 0


def _between_characters(held: bytes) -> int:
    cut = len(held) - 1
    while cut > len(held) - 4 and held[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
