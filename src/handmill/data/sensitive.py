"""Keys, passwords and e-mail addresses in text: counted, and the first ones named without being repeated."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_FIRST = 20  # findings named in the report

# kind -> what a text must contain before the pattern is tried, pattern
_KINDS: dict[str, tuple[tuple[str, ...], re.Pattern[str]]] = {
    "AWS access key": (("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    "GitHub token": (("_",), re.compile(r"gh(?:[pousr]_[A-Za-z0-9]{36,}|ithub_pat_\w{22,})")),
    "Slack token": (("xox",), re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}")),
    "Google API key": (("AIza",), re.compile(r"\bAIza[\w-]{35}")),
    "Stripe key": (("_live_",), re.compile(r"\b[rs]k_live_[A-Za-z0-9]{16,}")),
    "sk- key": (("sk-",), re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    "JSON web token": (("eyJ",), re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    "private key": (("PRIVATE KEY-----",), re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
}
_ASSIGNED = re.compile(r"""[:=][ \t]*["']?([A-Za-z0-9+/_-]{20,})""")
_NAMED = re.compile(r"""(?i)(?:api[_-]?key|secret|token|passw(?:or)?d|credential|auth)\w*["']?\s*$""")
_WORDLIKE = re.compile("[A-Z]?[a-z]{7}")
_ENTROPY = 3.5  # bits a character, from which on an assigned value is no ordinary word
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")
_MAILBOX = re.compile(r"[A-Za-z0-9._%+-]+$")


@dataclass
class Findings:
    """How many of each kind, and where the first ones are."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, value: str, name: str, line: int, before: tuple[str, int]) -> None:
        """Count a value that stands in the text `before[0]` at the place `before[1]`; it begins at `line`."""
        self.counts[kind] += 1
        if len(self.first) < _FIRST:
            text, place = before
            self.first.append({"kind": kind, "document": name, "line": line + text.count("\n", 0, place),
                               "value": redacted(value)})


def redacted(value: str) -> str:
    """The first two characters and the length."""
    return f"{value[:2]}… ({len(value)} characters)"


def secrets(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, value and place of each secret: well-known forms, then values assigned to a telling name."""
    known: set[str] = set()
    for kind, (needles, pattern) in _KINDS.items():
        if any(needle in text for needle in needles):
            for match in pattern.finditer(text):
                known.add(match[0])
                yield kind, match[0], match.start()
    for match in _ASSIGNED.finditer(text):
        value, start = match[1], match.start()
        if _NAMED.search(text, max(0, start - 40), start) and _random(value) and value not in known:
            yield "assigned secret", value, match.start(1)


def emails(text: str) -> Iterator[tuple[str, int]]:
    """Each e-mail address and its place."""
    if "@" in text:
        for match in _DOMAIN.finditer(text):
            start = max(0, match.start() - 64)
            if mailbox := _MAILBOX.search(text[start:match.start()]):
                yield mailbox[0] + match[0], start + mailbox.start()


def scan(text: str, name: str, line: int, record: bool, found: Findings, addresses: Findings) -> None:
    """Add the secrets and addresses of a text that begins at a line of a source, or is a record there."""
    for kind, value, place in secrets(text):
        found.add(kind, value, name, line, (text, 0 if record else place))
    for value, place in emails(text):
        addresses.add("e-mail address", value, name, line, (text, 0 if record else place))


def _random(value: str) -> bool:
    """Letters and digits mixed as no name or word mixes them."""
    if _WORDLIKE.search(value) or sum(map(str.isdigit, value)) < 2 or value.isdigit():
        return False
    counts = Counter(value).values()
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts) >= _ENTROPY
