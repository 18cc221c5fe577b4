"""The model folder: complete, verified, movable, and safe to open."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from handmill import folder
from handmill.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tiny.write(tmp_path / "model", network=tiny.GPT2)
    return tmp_path / "model"


def test_write_and_load_give_the_same_network(path: Path, tmp_path: Path) -> None:
    a = folder.load(path)
    moved = shutil.move(path, tmp_path / "elsewhere")
    b = folder.load(moved)
    tokens = torch.arange(8)[None]
    assert torch.equal(a.network(tokens)[0], b.network(tokens)[0])
    assert a.codec.encode("abc").tolist() == b.codec.encode("abc").tolist()
    assert not b.network.training


def test_any_changed_file_is_found(path: Path) -> None:
    for name in folder.read_receipt(path)["files"]:
        file = path / name
        before = file.read_bytes()
        for damaged in (before[:-1], before[:-1] + bytes([before[-1] ^ 1]), before + b" "):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is not as it was written"):
                folder.load(path)
        file.unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            folder.load(path)
        file.write_bytes(before)
    folder.load(path)


def test_broken_receipts(path: Path) -> None:
    receipt = (path / "receipt.json").read_text()
    for text, said in ((receipt[:50], "cannot be read"), ("[]", "not of the format"),
                       (receipt.replace("handmill-model/1", "other/9"), "not of the format")):
        (path / "receipt.json").write_text(text)
        with pytest.raises(UserError, match=said):
            folder.load(path)
    (path / "receipt.json").unlink()
    with pytest.raises(UserError, match=r"holds no receipt\.json"):
        folder.load(path)
    with pytest.raises(UserError, match="is not a folder"):
        folder.load(path / "nowhere")


def test_a_receipt_cannot_reach_outside(path: Path) -> None:
    secret = path.parent / "secret.txt"
    secret.write_text("x")
    receipt = json.loads((path / "receipt.json").read_text())
    receipt["files"]["../secret.txt"] = folder.fingerprint(secret)
    (path / "receipt.json").write_text(folder.sealed(receipt))
    with pytest.raises(UserError, match="outside the model folder"):
        folder.load(path)


def test_tied_weights_are_saved_once(path: Path) -> None:
    from safetensors.torch import load_file

    network = folder.load(path).network
    assert network.head.weight is network.embedding.weight
    assert "head.weight" not in load_file(path / "weights.safetensors")


def test_record_keeps_the_rest(path: Path) -> None:
    before = folder.read_receipt(path)
    folder.record(path, "exports", {"error": 1e-6}, key="onnx")
    folder.record(path, "check", {"n": 3})
    after = folder.verify(path)
    assert after["exports"] == {"onnx": {"error": 1e-6}}
    assert after["check"] == {"n": 3}
    assert after["files"] == before["files"]


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.toml"])
def test_a_receipt_must_vouch_for_what_is_loaded(path: Path, name: str) -> None:
    """A folder whose receipt leaves the weights or the recipe out would load them unverified."""
    receipt = json.loads((path / "receipt.json").read_text())
    del receipt["files"][name]
    (path / "receipt.json").write_text(folder.sealed(receipt))
    with pytest.raises(UserError, match=name):
        folder.load(path)
