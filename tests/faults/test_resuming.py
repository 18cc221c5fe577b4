"""Runs that cannot be gone on with: their data are others, or another process is at work on them."""

import io
import os
import signal
from pathlib import Path

import harness
import pytest
from PIL import Image

from handmill.training import checkpoint

LONG = ("training.steps=2000", "training.evaluate_every=1000")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("resuming"))


def refusal(command: list[str], log: Path) -> str:
    """The one sentence of a run that does not begin."""
    log.unlink(missing_ok=True)
    assert harness.ended(harness.forked(command, log)) == 2
    said = log.read_text()
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("handmill train: ")]
    assert len(lines) == 1, said
    return lines[0]


def another(image: bytes) -> bytes:
    """It upside down."""
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["gpt", "ddpm"])
def test_other_data_are_not_gone_on_with(home: Path, tmp_path: Path, name: str) -> None:
    here = harness.data(tmp_path)
    out, log = here / "runs" / name, here / "log"
    command = harness.words(name, here, out, "training.steps=8")
    harness.finish(command, log)
    before = harness.hashes(out)
    file = sorted(file for file in (here / ("texts" if name == "gpt" else "images")).rglob("*") if file.is_file())[0]
    content = file.read_bytes()
    file.write_bytes(content + b" And one sentence more." if name == "gpt" else another(content))
    assert "the data changed since the run" in refusal(command, log)
    file.write_bytes(content)
    os.utime(file, (0, 0))
    harness.finish(command, log)
    assert harness.hashes(out) == before
    harness.tell("the data change between two starts of a run", name, "refused in one sentence; files that were only "
                 "copied or touched are the same data")


def test_two_processes_do_not_train_into_one_folder(home: Path) -> None:
    out, log = home / "runs" / "one", home / "second.log"
    command = harness.words("gpt", home, out, *LONG)
    process = harness.forked(command, home / "first.log")
    harness.wait_for(out / "checkpoints" / "step-8", process)
    assert "another process is training into" in refusal(command, log)
    assert process.is_alive()
    os.kill(process.pid or 0, signal.SIGKILL)
    assert harness.ended(process) == -9
    process = harness.forked(command, log)  # the hold ended with the process
    newest = checkpoint.newest_facts(out / "checkpoints")
    assert newest is not None
    harness.wait_for(out / "checkpoints" / f"step-{newest['step'] + 4}", process)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert harness.ended(process) == 0
    harness.tell("a second process trains into the same folder", "gpt", "refused in one sentence; the first goes on; "
                 "once that is killed the folder is free")
