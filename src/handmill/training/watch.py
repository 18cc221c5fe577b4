"""Processes that watch each other: where one dies, hangs or gives up, all of them end, with one sentence.

Each leaves a sign of life twice a second in the store that torchrun keeps, and reads that of the next one, so that the
cost does not grow with their number. It looks after those of its own machine too, as one that was killed is seen at
once. A thread does so: it sees what happens while the engine waits for a process that never answers. Once all have
ended, torchrun starts them again as often as --max-restarts says.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
from torch import distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from handmill.errors import UserError

TIMEOUT = "HANDMILL_TIMEOUT"  # seconds that a process may keep the others waiting
DEFAULT_TIMEOUT = 600.0
MEETING = timedelta(seconds=DEFAULT_TIMEOUT)  # for all to start
BEAT = 0.5  # seconds between signs of life
LAST = 10.0  # seconds after which a process that was to end is ended, whatever its engine waits for
REFUSED = "handmill refused"  # set where starting again would not help


class Lost(UserError):
    """Another process of the run is gone. Starting all of them again mends it."""


def timeout() -> float:
    """What HANDMILL_TIMEOUT says, in seconds. Raises UserError when that is no number of at least a second."""
    said = os.environ.get(TIMEOUT, "") or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise UserError(f"{TIMEOUT} = {said!r} is no time to wait for another process: set it to a number of seconds, "
                        f"such as {DEFAULT_TIMEOUT:g}")
    return seconds


class Watch:
    """One process's part in it; made by all once they have a process group.

    Raises SystemExit where torchrun started a run again that has refused to run.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.rank, self.world = limit, dist.get_rank(), dist.get_world_size()
        self.next = (self.rank + 1) % self.world
        self.run = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                            timeout=MEETING)  # a line of its own: the engine's may be busy
        if starts() and self.run.check([REFUSED]):
            raise SystemExit(2)
        self.store = PrefixStore(f"watch {starts()}", self.run)
        self.near = self._near()
        self.turns = 0  # that the first process had alone
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()

    def follow(self) -> None:
        """Return once the first process calls it, however long that takes: it is alive."""
        self.turns += 1
        key = f"turn {self.turns}"
        if self.rank == 0:
            self.store.set(key, "done")
        while not self.store.check([key]):
            time.sleep(0.01)

    def leave(self) -> None:
        """This process ends well, and is not missed."""
        self.done.set()
        self.thread.join()
        with suppress(RuntimeError):  # the store of a first process that has left already
            self.store.set(f"left {self.rank}", "")

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process, and so all others, for `error`; the first one that does so says why.

        Raises the error; Lost where it came of another process's end; SystemExit where another one has said why.
        """
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would come before the sentence
        self.done.set()
        self.thread.join()
        last = threading.Timer(LAST, os._exit, (1,))
        last.daemon = True
        last.start()
        lost = not isinstance(error, UserError) and broken(error)
        end = time.monotonic() + (BEAT if lost else 0.0)
        while time.monotonic() < end and not self._gone():  # the other is about to be gone, or to say why
            time.sleep(0.01)
        first = self._first()
        if isinstance(error, UserError):
            with suppress(RuntimeError):
                self.run.set(REFUSED, "")
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            psutil.wait_procs([*self.near.values()], timeout=3 * BEAT)  # they read it in its store
        if not first:
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        if lost:
            raise Lost(self._gone() or f"another process does not answer ({str(error).splitlines()[0]}): {again()}")
        raise error

    def _look(self) -> None:
        seen, still, beat = b"", 0, 0
        while not self.done.wait(BEAT):
            beat += 1
            try:
                self.store.set(f"sign {self.rank}", str(beat))
                if self.store.check(["over"]):
                    os._exit(1)
                if gone := self._gone():
                    self._end(gone)
                sign = self._read(f"sign {self.next}")
                still = still + 1 if sign == seen else 0  # beats, not seconds: a machine that slept has missed none
                seen = sign
                if still * BEAT > self.limit and not self._left(self.next):
                    self._end(f"rank {self.next} has not answered for {self.limit:g} seconds ({TIMEOUT}): {again()}")
            except RuntimeError:  # of the store, which ends with torchrun, or without one with the first process
                self._end(self._gone() or f"torchrun, which started the processes, is gone: {again()}")

    def _end(self, why: str) -> NoReturn:
        """Say why, unless another process did; kill the neighbours that hang; end."""
        if self._first():
            print(f"handmill: {why}", file=sys.stderr, flush=True)
        time.sleep(2 * BEAT)  # for those that can end by themselves
        for process in self.near.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    def _first(self) -> bool:
        """Whether no other process has told why all end; from now on they do. Without a store the first alive tells."""
        try:
            self.store.set("over", "")
            return self.store.add("told", 1) == 1
        except RuntimeError:
            return all(rank > self.rank or not lives(process) for rank, process in self.near.items())

    def _gone(self) -> str:
        """The sentence about neighbours that ended before their time; "": there are none."""
        dead = [rank for rank, process in self.near.items() if not lives(process) and not self._left(rank)]
        return f"rank {dead[0]} was killed, or crashed: {again()}" if dead else ""

    def _left(self, rank: int) -> bool:
        try:
            return self.store.check([f"left {rank}"])
        except RuntimeError:
            return False

    def _read(self, key: str) -> bytes:
        return self.store.get(key) if self.store.check([key]) else b""

    def _near(self) -> dict[int, Any]:
        """The other processes of this machine, by rank."""
        self.store.set(f"home {self.rank}", f"{os.getpid()} {machine()}")
        homes = {r: self.store.get(f"home {r}").decode().split(" ", 1) for r in range(self.world) if r != self.rank}
        return {r: psutil.Process(int(number)) for r, (number, home) in homes.items() if home == machine()}


def starts() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join(backend: str, limit: float) -> None:
    """Make the process group whose collectives wait so many seconds. Raises Lost when the others do not come.

    They meet in a part of torchrun's store, which is the same for every start: it holds addresses of processes that
    are gone.
    """
    try:
        whole, rank, world = next(iter(rendezvous("env://", timeout=MEETING)))
        store, wait = PrefixStore(f"start {starts()}", whole), timedelta(seconds=limit)
        dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise Lost(f"rank {os.environ['RANK']} did not find the other processes ({said}): {again()}") from error


def machine() -> str:
    """What tells this machine, and this numbering of its processes, from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def lives(process: Any) -> bool:
    """Whether a process (of psutil) has not ended; one that nobody has buried yet has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def broken(error: BaseException) -> bool:
    """Whether the engine raised this because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def again() -> str:
    """How the run goes on."""
    if starts() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return "torchrun starts all of them again, from the last checkpoint"
    return "the same command goes on from the last checkpoint, and torchrun --max-restarts=3 would do so by itself"
