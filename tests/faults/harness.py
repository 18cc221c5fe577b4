"""Real runs of every family, small enough to be broken by the dozen: their command lines, processes and hashes.

A run is `python -m handmill train ...` in a process of its own. Where a case starts it again and again, the process is
forked from a server that has imported torch already: the same command line and the same signals, without the start.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import shapes
from safetensors.numpy import load_file

from handmill import recipe as recipes
from handmill.checks import features
from handmill.data import prepare
from handmill.training import checkpoint
from handmill.training.loop import Run

STEPS = 30
COMMON = (f"training.steps={STEPS}", "training.evaluate_every=10", "training.save_every=4", "training.warmup=5",
          "training.precision='fp32'", "training.compile='no'", "training.sample_every=0.0")
TEXT = ("codec.vocabulary=270", "network.width=16", "training.batch=8", "training.evaluate_items=2000",
        "data.validation=0.2", "data.test=0.2")
IMAGES = ("data.size=[16, 16]", "training.batch=8", "training.evaluate_items=16", "data.near_duplicates=0",
          "data.validation=0.1", "data.test=0.2")
DECODER = ("network.layers=2", "network.heads=2", "network.dropout=0.1")

# name -> (shipped recipe, overrides that make it tiny); precision and micro-batch are set, as `auto` measures them anew
FAMILIES: dict[str, tuple[str, ...]] = {
    "gpt": ("gpt", *TEXT, *DECODER, "network.context=32", "training.micro_batch=4", "training.ema=0.9"),
    "transformer-xl": ("transformer-xl", *TEXT, *DECODER, "network.context=16", "network.memory=24"),
    "lstm": ("lstm", *TEXT, "network.width=16", "network.embedding=16", "network.context=16"),
    "vae": ("vae", *IMAGES, "network.width=8", "network.latent=4", "training.micro_batch=4", "training.ema=0.9"),
    "vqvae": ("vqvae", *IMAGES, "network.width=8", "network.latent=4", "network.codes=16"),
    "ddpm": ("ddpm", *IMAGES, "network.width=8", "network.groups=4", "network.head_width=8", "network.dropout=0.1",
             "sampling.steps=4"),
    "cgan": ("cgan", *IMAGES, "network.width=8", "network.most=16", "network.latent=8", "objective.r1_every=2",
             "network.discriminator_norm='batch'"),
    "stylegan2": ("stylegan2", *IMAGES, "network.width=8", "network.most=8", "network.discriminator_width=8",
                  "network.latent=8", "network.style=8", "objective.r1_every=2", "objective.path_every=3",
                  "objective.augment=['shift', 'brightness']"),
}
SEQUENCES, JUDGED = ("gpt", "transformer-xl", "lstm"), ("cgan", "stylegan2")
PRELOADED = ["torch._dynamo", "torch._subclasses.fake_tensor", "torch.distributed._tools.mem_tracker", "psutil",
             "matplotlib.pyplot", "handmill.cli", "handmill.verbs.train", "handmill.data.text_prepare",
             "handmill.data.image_prepare", "handmill.checks.text", "handmill.checks.image",
             "handmill.families.token_sources", "handmill.families.variational", "handmill.families.competing"]


def data(folder: Path) -> Path:
    """A small text corpus in `folder`/texts and a small image set of three classes in `folder`/images."""
    from pydoc_data.topics import topics

    texts = folder / "texts"
    texts.mkdir(parents=True)
    for name in sorted(topics)[:8]:
        (texts / f"{name}.txt").write_text(topics[name][:4000], encoding="utf-8")
    shapes.folder(folder / "images", each=30)
    return folder


def words(name: str, folder: Path, out: Path, *overrides: str) -> list[str]:
    """The command line that trains FAMILIES[name] on `data(folder)` into `out`."""
    recipe, *tiny = FAMILIES[name]
    paths = folder / ("texts" if name in SEQUENCES else "images")
    settings = [*COMMON, *tiny, f"data.paths=['{paths}']", *overrides]
    if name in JUDGED:
        _judge(recipes.read(recipe, settings), out.parent / ".prepared")
    return [sys.executable, "-m", "handmill", "train", recipe, *settings, "--out", str(out)]


def _judge(recipe: recipes.Recipe, cache: Path) -> None:
    """The feature network that judges a generator's images, of a hundredth of its training, where there is none yet."""
    prepared = prepare(recipe, cache, progress=False)
    home, images, labels = prepared.folder / features.FEATURES, prepared.images("train"), prepared.labels("train")
    if not home.exists():
        few = features.Settings(images=1280, warmup=2)
        made = features.train(images, labels, len(prepared.classes), features.SEED, few, prepared.fingerprint)
        made.facts["settings"] = asdict(features.Settings())  # what a run looks for
        made.save(home)


def environment(**more: str) -> dict[str, str]:
    """This process's, with one thread to compute with."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def finished(command: list[str], timeout: float = 300.0, **more: str) -> subprocess.CompletedProcess[str]:
    """The command, run to its end; `more` is added to its environment."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(**more))


def started(command: list[str], **more: str) -> subprocess.Popen[str]:
    """The command, running; what it says comes through `stderr`, or `communicate()`."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more))


def forked(command: list[str], log: Path, tell: Connection | None = None) -> ForkServerProcess:
    """The command as a fork of a process that has imported everything; what it says is added to the file `log`.

    `tell` is sent ("step", steps done) as a step begins, ("save", N) and ("saved", N) around the saving of step N.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the server, which starts with the first fork
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(command[3:], log, tell), daemon=True)
    process.start()
    return process


def _main(arguments: list[str], log: Path, tell: Connection | None) -> None:
    from handmill import cli

    for number in (signal.SIGINT, signal.SIGHUP):  # which who started the tests may have had ignored
        signal.signal(number, signal.SIG_DFL)
    stream = log.open("a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    if tell is not None:
        _telling(tell)
    sys.exit(cli.main(arguments))


def _telling(tell: Connection) -> None:
    step, save = Run.step, checkpoint.save

    def telling_step(run: Run) -> None:
        tell.send(("step", run.progress.step))
        step(run)

    def telling_save(folder: Path, number: int, *rest: Any) -> Path:
        tell.send(("save", number))
        path = save(folder, number, *rest)
        tell.send(("saved", number))
        return path

    Run.step, checkpoint.save = telling_step, telling_save  # type: ignore[method-assign,assignment]


def heard(listen: Connection) -> list[tuple[str, int]]:
    """What a run still tells, until it ends."""
    told = []
    with suppress(EOFError):
        while True:
            told.append(listen.recv())
    return told


def ended(process: ForkServerProcess, timeout: float = 300.0) -> int:
    """The exit status of a forked run; a signal's number is negative."""
    process.join(timeout)
    assert process.exitcode is not None, f"it still runs after {timeout:.0f} s"
    return process.exitcode


def finish(command: list[str], log: Path) -> str:
    """Run the command to its good end, forked; what it said."""
    log.unlink(missing_ok=True)
    code = ended(forked(command, log))
    said = log.read_text(encoding="utf-8")
    assert code == 0, said
    return said


def hashes(out: Path) -> str:
    """SHA-256 over the names and values of all tensors of the newest checkpoint and of weights.safetensors."""
    newest = checkpoint.checkpoints(out / "checkpoints")[0]
    digest = hashlib.sha256(newest.name.encode())
    for file in [*sorted(newest.glob("*.safetensors")), out / "weights.safetensors"]:
        for name, value in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


@cache
def hash_of(name: str, home: Path, run: str, *overrides: str) -> str:
    """`hashes` of a run of this name that nothing disturbs."""
    out = home / "runs" / f"{name}-{run}"
    finish(words(name, home, out, *overrides), home / f"{name}-{run}.log")
    return hashes(out)


def wait_for(path: Path, process: Any, timeout: float = 300.0) -> None:
    """Return when `path` is there; a process (Popen or forked) that ends before is a failure."""
    end = time.monotonic() + timeout
    while not path.exists():
        running = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert running, f"it ended before {path.name} was there"
        assert time.monotonic() < end, f"{path.name} is not there after {timeout:.0f} s"
        time.sleep(0.002)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder` while the block runs (options = "size=256k"); skips the test where that is not allowed."""
    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tell(fault: str, case: str, result: str) -> None:
    """One row of the table in docs/faults.md, as a line of JSON in the file $HANDMILL_FAULTS, where that is set."""
    if path := os.environ.get("HANDMILL_FAULTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"fault": fault, "case": case, "result": result}, ensure_ascii=False) + "\n")
