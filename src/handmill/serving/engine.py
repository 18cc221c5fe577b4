"""One worker thread that owns the networks and answers requests in the order they came."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What one request and all of them together may ask for."""

    waiting: int = 32  # requests in the queue; further ones are refused
    samples: int = 16  # prompts times n of one request
    max_tokens: int = 4096  # new tokens a sample
    stops: int = 16  # stop strings
    body: int = 1_000_000  # bytes of a request
    images: int = 64  # n of one request
    evaluations: int = 1000  # of a diffusion network, an image
    work: int = 20_000  # images times evaluations of one request; guidance counts twice


class Busy(Exception):
    """The queue is full."""


class Dropped(Exception):
    """What a job's work may raise once `dropped()` says that nobody waits for it."""


@dataclass(eq=False)
class Job:
    """A request. The worker hands what `work(dropped)` yields to `emit`, then an exception if there was one, then None.

    `dropped()` says whether the work may end: it is asked between results, and may be asked within.
    """

    work: Callable[[Callable[[], bool]], Iterable[Any]]
    emit: Callable[[Any], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """The queue and its worker."""

    def __init__(self, waiting: int = Limits.waiting) -> None:
        self.most, self.jobs, self.changed = waiting, deque[Job](), threading.Condition()
        self.closed = False
        self.worker = threading.Thread(target=self._work, name="handmill-engine", daemon=True)
        self.worker.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue, without the one being answered."""
        return len(self.jobs)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy when the queue is full or closed."""
        with self.changed:
            if self.closed or len(self.jobs) >= self.most:
                raise Busy
            self.jobs.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job: at once from the queue, after the token or step being made where it is being answered."""
        with self.changed:
            job.cancelled.set()
            if job not in self.jobs:
                return
            self.jobs.remove(job)
        job.emit(None)

    def close(self) -> None:
        """Stop taking jobs, drop those that wait, and let the worker end after the token or step being made."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        for job in list(self.jobs):
            self.cancel(job)

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.jobs and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return
                job = self.jobs.popleft()
            self._answer(job)

    def _answer(self, job: Job) -> None:
        def dropped() -> bool:
            return job.cancelled.is_set() or self.closed

        try:
            for result in job.work(dropped):
                if dropped():
                    break
                job.emit(result)
        except Dropped:
            pass
        except Exception as error:  # one failed request must not end the worker
            job.emit(error)
        job.emit(None)
