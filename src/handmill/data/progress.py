"""A progress bar on the screen for what takes more than a second."""

import time
from types import TracebackType
from typing import Any


class Bar:
    """Bytes done of a total, with speed and time left, on standard error; nothing in the first second."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self.what, self.total, self.shown = what, total, shown
        self.done, self.began = 0, time.time()
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self.bar is not None:
            if kind is None:
                self.bar.update(max(0, self.total - self.bar.n))
            self.bar.close()

    def tick(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        if self.bar is None and self.shown and time.time() - self.began > 1:
            from tqdm import tqdm

            self.bar = tqdm(desc=self.what, total=self.total, unit="B", unit_scale=True, smoothing=0,
                            dynamic_ncols=True)
            self.bar.start_t = self.began
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)
