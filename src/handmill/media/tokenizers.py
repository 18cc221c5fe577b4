"""Text to tokens and back: characters, bytes, or byte pairs learnt from the data (Sennrich et al. 2016).

    character  0 = end, 1 = unknown, then the characters of the training text in order of code point
    byte       0..255 = the byte, 256 = end
    bpe        0..255 = the byte, then one token a merge in the order learnt, the last = end

After these come the `special` tokens by name, if any: marks that programs put, such as those of data/middle.py.
Text never encodes to `end` or to a special token, whatever it says: only `pack` puts `end`, in front of every document.
A BPE here is a standard byte-level one: PATTERN and `merges` are all that a tokenizer.json needs.
"""

import json
import re
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from handmill.disk import parsed
from handmill.errors import UserError
from handmill.recipe import positive

if TYPE_CHECKING:
    from handmill.data.merges import Learnt

FORMAT = "handmill-tokenizer/1"
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# Where words end: GPT-4's pattern with two digits a number token and contractions in one case, valid in the
# `regex` package and in Hugging Face's Split(Regex(...)) alike. Every character falls in some branch.
PATTERN = (r"'(?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The same language on ASCII text, for the standard library's engine, which is twice as fast.
_ASCII = re.compile(r"'(?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,2}"
                    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", re.ASCII)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_WORDS_KEPT = 1 << 19  # distinct words whose tokens are remembered
_LONG = 64  # bytes; longer words are merged with a heap
_NEVER = 1 << 62
_HALVES = frozenset(map(chr, range(0xD800, 0xE000)))  # of surrogate pairs


@dataclass(frozen=True)
class CharacterSettings:
    """The [codec] table of a character tokenizer."""

    kind: Literal["character"] = "character"
    special: tuple[str, ...] = ()  # names of tokens that no text encodes to, after all others

    def __post_init__(self) -> None:
        _names(self.special)


@dataclass(frozen=True)
class ByteSettings:
    """The [codec] table of a byte tokenizer."""

    kind: Literal["byte"] = "byte"
    special: tuple[str, ...] = ()  # names of tokens that no text encodes to, after all others

    def __post_init__(self) -> None:
        _names(self.special)


@dataclass(frozen=True)
class BPESettings:
    """The [codec] table of a byte-pair encoding."""

    kind: Literal["bpe"] = "bpe"
    vocabulary: int = 4096  # tokens: 256 bytes, the merges, end, and the special ones
    sample: int = 100  # MB of the training split that the merges are learnt from
    special: tuple[str, ...] = ()  # names of tokens that no text encodes to, after all others

    def __post_init__(self) -> None:
        positive(self, "sample")
        _names(self.special)
        least = 257 + len(self.special)
        if not least <= self.vocabulary <= 1_000_000:
            raise UserError(f"vocabulary = {self.vocabulary} must lie between {least} and 1000000")


class Tokenizer:
    """Text to tokens and back.

    `token_bytes[t]` are the UTF-8 bytes of token t, b"" those of `end` and of the `special` tokens: name -> token.
    """

    def __init__(self, kind: str, alphabet: str = "", merges: Sequence[tuple[int, int]] = (),
                 special: Sequence[str] = ()) -> None:
        self.kind, self.alphabet, self.merges = kind, alphabet, list(merges)
        self.token_bytes = _token_bytes(kind, alphabet, self.merges)
        self.end = 0 if kind == "character" else len(self.token_bytes) - 1
        self.special = {name: token for token, name in enumerate(special, len(self.token_bytes))}
        self.token_bytes += [b""] * len(self.special)
        self.size = len(self.token_bytes)
        self.unknown = 1 if kind == "character" else None
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
        assert self.token_bytes[self.end] == b""
        self._lengths = np.array([_characters(piece) for piece in self.token_bytes])  # (V,)
        self._table = _code_points(alphabet, self.dtype) if kind == "character" else np.zeros(0, self.dtype)
        self._words = _Words(self.merges, self.end)
        self._lock = threading.Lock()

    def encode(self, text: str) -> Tokens:
        """The tokens of a text; no token of it is `end`. Lone surrogates become "?"."""
        return self.pack([text])[1:]

    def pack(self, texts: Sequence[str]) -> Tokens:
        """Every text as `end` and its tokens, one after another."""
        if self.kind == "character":
            return self._pack_characters(texts)
        if self.kind == "byte":
            joined = b"".join(b"\xff" + text.encode("utf-8", "replace") for text in texts)
            values = np.frombuffer(joined, np.uint8).astype(self.dtype)
            return np.where(values == 0xFF, self.dtype.type(self.end), values)  # no UTF-8 text holds byte 255
        with self._lock:  # the table of words grows while it is used
            return self._words.pack(texts).astype(self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens. `end` and the special ones are no text; what is unknown or not UTF-8 is U+FFFD."""
        return b"".join([self.token_bytes[int(token)] for token in tokens]).decode("utf-8", "replace")

    def characters(self, tokens: Iterable[int]) -> int:
        """How many characters the tokens stand for: the bytes that begin one."""
        values = tokens if isinstance(tokens, np.ndarray) else np.fromiter(map(int, tokens), np.int64)
        return int(self._lengths[values].sum())

    def know(self, learnt: "Learnt") -> None:
        """Take over the tokens of the words that the merges were learnt from, which would be found again."""
        assert learnt.merges == self.merges
        self._words.tokens, self._words.bounds = learnt.tokens, learnt.bounds
        self._words.update({word.decode(): number for number, word in enumerate(learnt.words)})

    def save(self, folder: Path) -> None:
        """Write `folder`/tokenizer.json."""
        content: dict[str, Any] = {"format": FORMAT, "kind": self.kind, "size": self.size, "end": self.end}
        if self.kind == "character":
            content["alphabet"] = self.alphabet
        if self.kind == "bpe":
            content |= {"pattern": PATTERN, "merges": self.merges}
        if self.special:
            content["special"] = list(self.special)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False) + "\n"
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")

    def _pack_characters(self, texts: Sequence[str]) -> Tokens:
        # a lone surrogate cannot be in a clean text, so U+D800 marks the ends
        whole = "".join(["\ud800" + _without_surrogates(text) for text in texts])
        points = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._table[np.minimum(points, len(self._table) - 1)]


def load(settings: Any, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`/tokenizer.json; `settings` is the [codec] table, or None to take it as it is.

    Raises UserError when the file is missing, broken, or not of the kind and special tokens of the settings.
    """
    file = folder / "tokenizer.json"
    try:
        content = parsed(file.read_text(encoding="utf-8"))
        kind, alphabet, merges = _checked(content)
        special = _checked_special(content)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: copy the folder again from where it was made") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a tokenizer ({error}): "
                        "copy the folder again from where it was made") from None
    if settings is not None and settings.kind != kind:
        raise UserError(f"{file} holds a {kind} tokenizer but the recipe says codec.kind = {settings.kind!r}")
    if settings is not None and list(settings.special) != special:
        raise UserError(f"{file} has the special tokens {special} but the recipe says codec.special = "
                        f"{list(settings.special)}: set these, or prepare the data again")
    return Tokenizer(kind, alphabet, merges, special)


def train(settings: Any, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that [codec] `settings` describe, learnt from the texts where it is learnt at all."""
    if settings.kind == "character":
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return Tokenizer("character", "".join(sorted(alphabet)), special=settings.special)
    if settings.kind == "byte":
        return Tokenizer("byte", special=settings.special)
    from handmill.data.merges import learn

    learnt = learn(count_words(texts), settings.vocabulary - 257 - len(settings.special))
    codec = Tokenizer("bpe", merges=learnt.merges, special=settings.special)
    codec.know(learnt)
    return codec


def split(text: str) -> list[str]:
    """The words that PATTERN cuts a text into; joined they are the text again."""
    if text.isascii():
        return _ASCII.findall(text)
    import regex

    words: list[str] = regex.findall(PATTERN, text)
    return words


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """How often each word occurs. The rarest are forgotten when there are too many: memory stays bounded."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
        if len(counts) > _WORDS_KEPT:
            counts = Counter(dict(counts.most_common(_WORDS_KEPT // 2)))
    kept = counts.most_common(_WORDS_KEPT // 2)
    return Counter({word.encode("utf-8", "replace"): count for word, count in kept})


class _Words(dict[str | None, int]):
    """Word -> its number in a table of the tokens of every word met so far; None is the end of a document."""

    def __init__(self, merges: Sequence[tuple[int, int]], end: int) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.end = end
        self._forget()

    def __missing__(self, word: str | None) -> int:
        ids = [self.end] if word is None else merge(word.encode("utf-8", "replace"), self.ranks)
        self.tokens.extend(ids)
        self.bounds.append(len(self.tokens))
        self[word] = number = len(self.bounds) - 2
        return number

    def pack(self, texts: Sequence[str]) -> npt.NDArray[np.uint32]:
        if len(self) > _WORDS_KEPT:
            self._forget()
        words: list[str | None] = []
        for text in texts:
            words.append(None)
            words += split(text)
        numbers = np.fromiter(map(self.__getitem__, words), np.int64, len(words))  # (W,)
        bounds = np.frombuffer(self.bounds, np.int64)
        begins, lengths = bounds[numbers], np.diff(bounds)[numbers]
        before = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(begins - before, lengths)  # (T,)
        tokens: npt.NDArray[np.uint32] = np.frombuffer(self.tokens, np.uint32)[places]
        return tokens

    def _forget(self) -> None:
        self.clear()
        self.tokens, self.bounds = array("I"), array("q", [0])


def merge(word: bytes, ranks: dict[tuple[int, int], int]) -> list[int]:
    """The tokens of one word: again and again the neighbours merged first in training become one."""
    if len(word) > _LONG:
        return _merge_long(word, ranks)
    ids = list(word)
    while len(ids) > 1:
        found = [ranks.get(pair, _NEVER) for pair in pairwise(ids)]
        rank = min(found)
        if rank == _NEVER:
            break
        place = found.index(rank)
        ids[place:place + 2] = [256 + rank]
    return ids


def _merge_long(word: bytes, ranks: dict[tuple[int, int], int]) -> list[int]:
    """As `merge` in O(n log n): a heap of pairs over a linked list, stale pairs passed over."""
    from heapq import heapify, heappop, heappush

    ids, after, before = list(word), list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, left = heappop(heap)
        right = after[left]
        if ids[left] < 0 or right == len(ids) or ranks.get((ids[left], ids[right])) != rank:
            continue
        ids[left], ids[right], after[left] = 256 + rank, -1, after[right]
        if after[left] < len(ids):
            before[after[left]] = left
        for i in (before[left], left):
            if i >= 0 and after[i] < len(ids) and (pair := (ids[i], ids[after[i]])) in ranks:
                heappush(heap, (ranks[pair], i))
    return [token for token in ids if token >= 0]


def _token_bytes(kind: str, alphabet: str, merges: Iterable[tuple[int, int]]) -> list[bytes]:
    if kind == "character":
        return [b"", _REPLACEMENT, *(character.encode() for character in alphabet)]
    pieces = [bytes([value]) for value in range(256)]
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    return [*pieces, b""]


def _characters(piece: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def _code_points(alphabet: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Code point -> token. The last entry, which all points beyond it share, is unknown."""
    table = np.full(max(0xD800, max(map(ord, alphabet), default=0)) + 2, 1, dtype)
    table[0xD800] = 0
    table[list(map(ord, alphabet))] = np.arange(2, len(alphabet) + 2, dtype=dtype)
    return table


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _names(special: Sequence[str]) -> None:
    """Raise UserError for names of special tokens that no file could tell apart."""
    if "" in special or len(set(special)) < len(special):
        raise UserError(f"special = {list(special)} must be names that differ: leave the doubled or empty one out")


def _checked_special(content: dict[str, Any]) -> list[str]:
    special: Any = content.get("special", [])
    if not isinstance(special, list) or not all(isinstance(name, str) and name for name in special):
        raise ValueError("its special tokens are not a list of names")
    if len(set(special)) < len(special):
        raise ValueError("two of its special tokens have one name")
    return special


def _checked(content: Any) -> tuple[str, str, list[tuple[int, int]]]:
    """Kind, alphabet and merges of a tokenizer.json. Raises ValueError saying what is wrong."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    kind, alphabet, merges = content.get("kind"), content.get("alphabet", ""), content.get("merges", [])
    if kind not in ("character", "byte", "bpe"):
        raise ValueError(f"kind {kind!r} is not known")
    if not isinstance(alphabet, str) or list(alphabet) != sorted(set(alphabet) - _HALVES):
        raise ValueError("its alphabet is not a sorted text of distinct characters")
    if kind == "bpe" and content.get("pattern") != PATTERN:
        raise ValueError("its pattern is not this version's")
    return kind, alphabet, list(_checked_merges(merges))


def _checked_merges(merges: Any) -> Iterator[tuple[int, int]]:
    if not isinstance(merges, list):
        raise ValueError("its merges are not a list")
    for rank, pair in enumerate(merges):
        earlier = isinstance(pair, list) and [x for x in pair if type(x) is int and 0 <= x < 256 + rank]
        if not earlier or len(earlier) != len(pair) or len(pair) != 2:
            raise ValueError(f"merge {rank} is not a pair of earlier tokens")
        yield pair[0], pair[1]
