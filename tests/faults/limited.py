"""A verb in a process of its own, with a limit of memory and of time: what a folder from elsewhere is opened in."""

import multiprocessing
import os
import sys
from pathlib import Path

import harness
import pytest

SECONDS, WAIT = 20, 300  # of computing, and on the clock, as other programs may be busy
MEMORY = 1 << 31  # bytes beyond what a process has with everything imported
PRELOADED = [*harness.PRELOADED, "uvicorn", "fastapi", "limited", "pyarrow.parquet", "mido"]


def ended(words: list[str], log: Path) -> tuple[int, str]:
    """Exit status and words of a command line. A failure where it does not end."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the server, which starts with the first fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(words, log), daemon=True)
    process.start()
    process.join(WAIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{' '.join(words)[:200]} still ran after {WAIT} s")
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _main(words: list[str], log: Path) -> None:
    """The command line in this process, which ends; a server ends where it would listen."""
    import resource

    import psutil
    import uvicorn

    from handmill import cli

    stream = log.open("w", encoding="utf-8")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    uvicorn.Server.run = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.exit(cli.main(words))
