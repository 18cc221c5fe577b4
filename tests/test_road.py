"""The road as a user walks it: the command line on real text, in processes that are killed, stopped and doubled."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from handmill.recipe import SHIPPED

SMALL = ("codec.kind='byte'", "network.layers=2", "network.width=32", "network.heads=2", "network.context=32",
         "training.steps=40", "training.batch=8", "training.evaluate_every=10", "training.save_every=10",
         "training.sample_every=0", "training.precision='fp32'", "data.validation=0.2", "data.test=0.2")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen real documents: topics of Python's own language reference."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("texts")
    for name in sorted(topics)[:14]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


def handmill(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "handmill", *map(str, words)], capture_output=True, text=True,
                          timeout=300, **options)  # type: ignore[call-overload]


def train_words(texts: Path, out: Path, *more: str) -> list[str]:
    """A byte-level gpt recipe shrunk to seconds; `kind` needs no vocabulary, so that key goes."""
    recipe = out.parent / "small.toml"
    if not recipe.exists():
        done = handmill("new", "gpt", texts, "--out", recipe)
        assert done.returncode == 0, done.stderr
        recipe.write_text(re.sub(r"(?m)^vocabulary.*\n", "", recipe.read_text()))
    return ["train", str(recipe), *SMALL, *more, "--out", str(out)]


@pytest.fixture(scope="session")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    done = handmill(*train_words(texts, out))
    assert done.returncode == 0, done.stderr
    assert "next          handmill check" in done.stdout
    return out


def test_the_whole_road(trained: Path, texts: Path) -> None:
    for name in ("recipe.toml", "weights.safetensors", "receipt.json", "metrics.jsonl", "loss.png", "data/report.json"):
        assert (trained / name).stat().st_size > 0, name
    receipt = json.loads((trained / "receipt.json").read_text())["training"]
    assert receipt["steps"] == 40
    for key in ("seconds", "memory_bytes"):
        assert 0 < receipt["plan"]["predicted"][key] < 100 * receipt["plan"]["actual"][key]
    checked = handmill("check", trained, "samples=4", "sample_tokens=40")
    assert checked.returncode == 0, checked.stderr
    assert "xz" in checked.stdout
    a, b, c = (handmill("generate", trained, "The ", "--max-tokens", "30", "--seed", s) for s in "112")
    assert a.stdout == b.stdout != c.stdout
    assert a.stdout.startswith("The ")
    card = handmill("card", trained)
    assert card.returncode == 0, card.stderr
    assert (trained / "card.html").exists()
    assert not any(Path(p).suffix in {".pkl", ".pt", ".bin"} for p in trained.rglob("*"))


def test_onnx_gives_the_same_text(trained: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = handmill("export", trained, "--to", "onnx")
    assert done.returncode == 0, done.stderr
    words = ("generate", trained, "def", "--max-tokens", "20", "--temperature", "0")
    assert handmill(*words).stdout == handmill(*words, "--runtime", "onnx").stdout


def test_every_verb_has_help_with_an_example() -> None:
    for verb in ("new", "plan", "train", "check", "generate", "export", "serve", "card", "compare"):
        done = handmill(verb, "--help")
        assert done.returncode == 0
        assert f"handmill {verb} " in done.stdout.split("example:")[1]


def state_hash(out: Path) -> str:
    """Of the newest checkpoint's tensors: weights and optimizer states."""
    newest = max((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    digest = hashlib.sha256(newest.name.encode())
    for file in sorted(newest.glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def wait_for(out: Path, name: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not (out / "checkpoints" / name).exists():
        assert process.poll() is None, "training ended before it could be interrupted"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_training_goes_on_bit_equal(texts: Path, trained: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "small"
    words = [sys.executable, "-m", "handmill", *train_words(texts, out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, "step-10", process)
    process.send_signal(number)
    assert process.wait(timeout=60) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert not (out / "receipt.json").exists()
    refused = handmill("generate", out)
    assert refused.returncode == 2
    assert "its training did not end" in refused.stderr
    again = handmill(*train_words(texts, out))
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    assert state_hash(out) == state_hash(trained)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 41))


def test_a_truncated_checkpoint_falls_back(texts: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    process = subprocess.Popen([sys.executable, "-m", "handmill", *train_words(texts, out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, "step-20", process)
    process.kill()
    process.wait()
    newest = max((out / "checkpoints").glob("step-*[0-9]"), key=lambda p: int(p.name[5:]))
    os.truncate(newest / "network.safetensors", 1000)
    again = handmill(*train_words(texts, out))
    assert again.returncode == 0, again.stderr
    assert f"passed over checkpoint {newest}" in again.stderr
    assert state_hash(out) == state_hash(trained)


def test_two_processes_give_the_losses_of_one(texts: Path, trained: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "small"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
             f"--master-port={port}", "-m", "handmill", *train_words(texts, out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    def losses(folder: Path, key: str) -> list[float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line[key] for line in lines if key in line]

    for key in ("loss", "validation_loss"):
        assert losses(out, key) == pytest.approx(losses(trained, key), rel=1e-3)
    assert losses(out, "loss")[:5] == pytest.approx(losses(trained, "loss")[:5], rel=1e-5)
    assert json.loads((out / "receipt.json").read_text())["training"]["processes"] == 2


def refusal(*words: str | Path, **options: object) -> str:
    """The one sentence of a refused command: exit code 2, no traceback."""
    done = handmill(*words, **options)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("handmill ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_bad_data(texts: Path, tmp_path: Path) -> None:
    def attempt(files: Path, *more: str) -> str:
        recipe = tmp_path / "r.toml"
        recipe.write_text(re.sub(r"(?m)^paths = .*$", f"paths = ['{files}']", (SHIPPED / "gpt.toml").read_text()))
        return refusal("train", recipe, *more, "--out", tmp_path / "out")

    (tmp_path / "empty").mkdir()
    assert "empty" in attempt(tmp_path / "empty")
    assert "missing" in attempt(tmp_path / "missing")
    short = tmp_path / "short.txt"
    short.write_text("To be or not to be.\n" * 3)
    assert "context" in attempt(short, "network.context=1024",
                                "data.split='tail'", "data.test=0", "data.validation=0.3")
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"good text \xff\xfe" * 50)
    assert "broken.txt" in attempt(broken)
    binary = tmp_path / "picture.txt"
    binary.write_bytes(bytes(range(256)) * 40)
    assert "picture.txt" in attempt(binary)
    assert not (tmp_path / "out" / "receipt.json").exists()


@pytest.mark.parametrize(("override", "said"), [
    ("training.stepz=5", "did you mean training.steps"),
    ("training.steps='many'", "training.steps"),
    ("network.width=100", "not divisible by heads"),
    ("network.kind='decodr'", "did you mean 'decoder'"),
    ("training.batch=0", "batch"),
    ("nonsense", "key.sub=value"),
])
def test_bad_recipes(texts: Path, tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(*train_words(texts, tmp_path / "out")[:2], override, "--out", tmp_path / "out")


def test_a_changed_byte_is_found(trained: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    assert handmill("generate", moved, "--max-tokens", "5").returncode == 0
    content = bytearray((moved / "weights.safetensors").read_bytes())
    content[-7] ^= 4
    (moved / "weights.safetensors").write_bytes(content)
    for verb in (("generate",), ("check",), ("export", "--to", "huggingface"), ("serve",)):
        assert "weights.safetensors is not as it was written" in refusal(verb[0], moved, *verb[1:])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("mode", ["ro", "size=100k"])
def test_unwritable_and_full_disks(texts: Path, tmp_path: Path, mode: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", mode, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        words = train_words(texts, tmp_path / "elsewhere")[:-1]
        sentence = refusal(*words, disk / "run")
        assert "writ" in sentence or "disk" in sentence
        assert not list(disk.rglob("receipt.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_busy_port(trained: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refusal("serve", trained, "--port", port)


def test_another_recipe_does_not_overwrite_a_run(texts: Path, trained: Path, tmp_path: Path) -> None:
    before = (trained / "receipt.json").read_bytes()
    (trained.parent / "again.toml").write_text((trained / "recipe.toml").read_text())
    sentence = refusal("train", trained.parent / "again.toml", "training.batch=4", "--out", trained)
    assert "holds a run of another recipe (training.batch differs)" in sentence
    assert (trained / "receipt.json").read_bytes() == before
