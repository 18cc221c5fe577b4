"""Cleaning of text: control characters, line ends, Unicode form, and boilerplate lines."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_EDGE = 5  # lines at the beginning and the end of a document where boilerplate stands
_NEAR = 1000  # characters from the beginning and the end in which those lines are looked for
_SHORTEST = 20  # characters of a boilerplate line: "}" and "---" are text
_FEWEST = 10  # documents, before any line is boilerplate
_KEPT = 100_000  # lines counted at once


def clean(text: str, counts: Counter[str] | None = None) -> str:
    """Text without control characters (but line feed and tab), lone surrogates and byte order mark, with line
    feeds for line ends, in Unicode form NFC. Cleaning twice changes nothing more.

    `counts` is told how many control characters and carriage returns went, and how many texts changed form.
    """
    counts = Counter() if counts is None else counts
    if _CONTROL.search(text):
        text, found = _CONTROL.subn("", text)
        counts["control characters"] += found
    if "\r" in text:
        counts["carriage returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.startswith("\ufeff"):
        counts["byte order marks"] += 1
        text = text.lstrip("\ufeff")
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        counts["texts brought to NFC"] += 1
        text = unicodedata.normalize("NFC", text)
    return text


class Boilerplate:
    """Finds lines that a large share of the documents have among their first or last five."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.documents = 0
        self.counts: Counter[str] = Counter()

    def see(self, text: str) -> None:
        """Count the lines at the edges of one document."""
        self.documents += 1
        if not self.share:
            return
        edges = {*text[:_NEAR].split("\n")[:_EDGE], *text[-_NEAR:].split("\n")[-_EDGE:]}
        self.counts.update(line for line in map(str.strip, edges) if len(line) >= _SHORTEST)
        if len(self.counts) > _KEPT:  # a line of a large share is soon back
            few = 1 + self.documents * self.share / 10
            self.counts = Counter({line: n for line, n in self.counts.items() if n > few})

    def lines(self) -> dict[str, int]:
        """The boilerplate lines and in how many documents each stands."""
        if self.documents < _FEWEST or not self.share:
            return {}
        return {line: n for line, n in self.counts.most_common() if n > self.share * self.documents}


def without(text: str, boilerplate: Iterable[str]) -> tuple[str, int]:
    """The text without boilerplate lines among its first and last five, and how many lines went."""
    lines = text.split("\n")
    edges = {*range(min(_EDGE, len(lines))), *range(max(0, len(lines) - _EDGE), len(lines))}
    kept = [line for i, line in enumerate(lines) if not (i in edges and line.strip() in boilerplate)]
    assert len(lines) - len(kept) <= 2 * _EDGE
    return "\n".join(kept), len(lines) - len(kept)
