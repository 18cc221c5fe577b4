"""Runs of several processes, one of which has a fault, and notes of what each of them did.

`forked` starts them as forks of a process that has imported everything, `torchrun` as a user does. Either way they are
real processes that talk through gloo. The fault comes from within the one that has it, at a batch: a signal that it
sends itself, an error that it raises, a loss or a gradient of the real task that it spoils.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch import Tensor, nn

SENTENCES = ("handmill: ", "handmill train: ")
SPOILT = {"nan": float("nan"), "infinite": float("inf")}


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one process. All but what spoils numbers happens once, even if the run is started again."""

    kind: str = ""  # a signal's name, "refuse", "crash", "stall", or "nan loss", "infinite gradient" and so on
    rank: int = 1
    turns: tuple[int, ...] = ()  # batches of the endless order that it meets
    pause: float = 0.0  # seconds that every step takes longer


def forked(command: list[str], notes: Path, fault: Fault = Fault(), world: int = 2,
           **more: str) -> list[ForkServerProcess]:
    """The processes of a run, by rank; what they say is added to `notes`/said."""
    import harness

    notes.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(harness.PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = []
    for rank in range(world):
        told = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "FAULT": _told(fault, notes)}
        processes.append(context.Process(target=_fork, args=(command[3:], notes / "said", told), daemon=True))
        processes[-1].start()
    return processes


def finish(processes: list[ForkServerProcess], timeout: float = 240.0) -> list[int | None]:
    """Their exit statuses, once all have ended; None: it had to be killed."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def torchrun(command: list[str], notes: Path, fault: Fault = Fault(), world: int = 2, restarts: int = 3,
             **more: str) -> subprocess.Popen[str]:
    """The same as a user starts it; what it says is in `notes`/said."""
    import harness

    notes.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
             f"--max-restarts={restarts}", __file__, *command[3:]]
    with (notes / "said").open("a") as said:
        return subprocess.Popen(words, stdout=said, stderr=said, text=True,
                                env=harness.environment(FAULT=_told(fault, notes), **more))


def sentences(notes: Path) -> list[str]:
    """What the processes said of themselves when they ended."""
    return [line for line in (notes / "said").read_text().splitlines() if line.startswith(SENTENCES)]


def steps(notes: Path, rank: int) -> list[dict[str, Any]]:
    """What a process noted: step, turn, world, places, time, and whether all weights were finite after it."""
    path = notes / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(notes: Path, rank: int) -> str:
    """Of the weights that a process ended its training with."""
    return (notes / f"{rank}.weights").read_text()


def places(notes: Path, world: int = 2) -> dict[int, list[int]]:
    """Turn -> the places of its batch, those of the processes one after the other; the last time that it was taken."""
    found: dict[int, dict[int, tuple[int, list[int]]]] = {}
    for rank in range(world):
        for line in steps(notes, rank):
            others = found.setdefault(line["turn"], {})
            if any(seen != line["world"] for seen, _ in others.values()):
                others.clear()
            others[line["rank"]] = line["world"], line["places"]
    return {turn: [place for rank in sorted(by) for place in by[rank][1]] for turn, by in sorted(found.items())}


def _told(fault: Fault, notes: Path) -> str:
    return json.dumps({"notes": str(notes), **asdict(fault)})


def _fork(arguments: list[str], log: Path, told: dict[str, str]) -> None:
    os.environ.update(told)
    stream = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    sys.exit(main(arguments))


def main(arguments: list[str]) -> int:
    """The command line in a process that notes what it does and has its fault."""
    from handmill import cli
    from handmill.training.loop import Run

    told = json.loads(os.environ["FAULT"])
    notes, mine = Path(told.pop("notes")), int(os.environ.get("RANK", 0))
    fault, world = Fault(**told), int(os.environ.get("WORLD_SIZE", 1))
    made, stepped, phased, trained = Run.__init__, Run.step, Run.phase_step, Run.train
    turn, asked = [-1], list[int]()

    def make(run: Run, *args: Any, **kwargs: Any) -> None:
        made(run, *args, **kwargs)
        plain = run.task.batch

        def batch(wanted: Any) -> Any:
            asked.extend(wanted.tolist())
            return plain(wanted)

        run.task.batch = batch
        for phase in run.task.phases:
            phase.loss = spoiling(phase.loss)

    def spoiling(plain: Any) -> Any:
        def loss(module: nn.Module, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
            total, figures = plain(module, *rest)
            how, _, what = fault.kind.partition(" ")
            if mine != fault.rank or turn[0] not in fault.turns or not what:
                return total, figures
            if what == "loss":
                return total * SPOILT[how], figures
            total.register_hook(lambda slope: slope * SPOILT[how])
            return total, figures

        return loss

    def step(run: Run) -> None:
        before = run.progress.step
        time.sleep(fault.pause)
        asked.clear()
        stepped(run)
        finite = all(v.isfinite().all().item() for v in weights(run))
        line = {"step": before, "turn": turn[0], "rank": mine, "world": world, "places": [*asked],
                "finite": finite, "time": time.time()}
        with (notes / f"{mine}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def phase_step(run: Run, phase: Any, wanted: Any) -> Any:
        turn[0] = int(wanted[0]) // run.training.batch
        asked.clear()
        if mine == fault.rank and turn[0] in fault.turns and not (notes / "struck").exists():
            strike(fault.kind, notes)
        return phased(run, phase, wanted)

    def train(run: Run) -> Any:
        result = trained(run)
        (notes / f"{mine}.weights").write_text(hashlib.sha256(b"".join(
            v.detach().numpy().tobytes() for v in weights(run))).hexdigest())
        return result

    Run.__init__, Run.step, Run.phase_step, Run.train = make, step, phase_step, train  # type: ignore[method-assign]
    return cli.main(arguments)


def weights(run: Any) -> list[Tensor]:
    return [v for phase in run.task.owners for v in phase.network.state_dict().values()]


def strike(kind: str, notes: Path) -> None:
    """What happens to this process, once."""
    from handmill.errors import UserError

    if " " in kind or not kind:
        return
    (notes / "struck").write_text(str(time.time()))
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "refuse":
        raise UserError("the disk is full: free some space")
    elif kind == "crash":
        raise ZeroDivisionError("a fault of the code")
    elif kind == "stall":
        time.sleep(600)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
