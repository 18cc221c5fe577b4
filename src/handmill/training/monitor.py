"""What a run tells: one live line on the screen, a line a step in metrics.jsonl, samples now and then."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from handmill.disk import parsed, write_text

EVERY = 0.5  # seconds between refreshes of the live line


class Monitor:
    """Writes metrics.jsonl and the live line. Only rank 0 has one that is not `quiet`."""

    def __init__(self, folder: Path, quiet: bool = False, resume_at: int = 0) -> None:
        self.quiet, self.screen = quiet, sys.stderr
        self.shown = self.refreshed = 0.0
        self.width = 0  # of the line that now stands on the screen
        self.file: TextIO | None = None
        if not quiet:
            path = folder / "metrics.jsonl"
            keep_until(path, resume_at)
            self.file = path.open("a", encoding="utf-8")

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        if self.file is not None:
            self.file.write(json.dumps({k: v for k, v in values.items() if v is not None}) + "\n")

    def flush(self) -> None:
        """Hand what was recorded to the system: a process that is killed later has it in its file."""
        if self.file is not None:
            self.file.flush()

    def live(self, text: str, now: bool = False) -> None:
        """Put `text` in place of the last live line, every half second; whole lines where there is no terminal."""
        terminal = self.screen.isatty()
        if self.quiet or (not now and time.monotonic() - self.refreshed < (EVERY if terminal else 10.0)):
            return
        self.refreshed = time.monotonic()
        if terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._show("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            self._show(text + "\n")
        self.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        wiped = "\r" + " " * self.width + "\r" if self.width else ""
        self.width = 0
        self._show(wiped + text + "\n")

    def close(self) -> None:
        if self.width and not self.quiet:
            self._show("\n")
            self.width = 0
        if self.file is not None:
            self.file.close()

    def _show(self, text: str) -> None:
        """Put text on the screen; once that is gone (a terminal that was closed) training goes on without."""
        try:
            self.screen.write(text)
            self.screen.flush()
        except OSError:
            self.quiet = True


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that lie beyond the step a resumed run starts from, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if parsed(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))


def duration(seconds: float) -> str:
    """9.4 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def count(number: float) -> str:
    """87.2, 990, 42.1k."""
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def size(count: float) -> str:
    """512 B, 1.4 MB, 3.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
