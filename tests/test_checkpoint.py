"""Checkpoints are whole or not there: every kind of damage is found, and the one before is used."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.training import checkpoint


def save_two(folder: Path) -> None:
    for step in (1, 2):
        parts = {"network": {"w": torch.full((50,), float(step))}, "optimizer": {"0.m": torch.arange(9.0)}}
        checkpoint.save(folder, step, parts, {"seed": 1}, keep=2)


def loaded_step(folder: Path) -> tuple[int, list[str]]:
    found = checkpoint.load(folder)
    assert found is not None
    parts, facts, passed = found
    assert torch.equal(parts["network"]["w"], torch.full((50,), float(facts["step"])))
    return facts["step"], passed


def test_round_trip_and_keep(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    save_two(tmp_path)
    assert loaded_step(tmp_path) == (2, [])
    checkpoint.save(tmp_path, 3, {"network": {"w": torch.full((50,), 3.0)}}, {}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-3", "step-2"]


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.safetensors", "facts.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "swap"])
def test_damage_falls_back(tmp_path: Path, name: str, damage: str) -> None:
    save_two(tmp_path)
    file = tmp_path / "step-2" / name
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "remove":
        file.unlink()
    else:
        parts = {"network": {"w": torch.zeros(3)}, "optimizer": {"x": torch.zeros(2)}}
        checkpoint.save(tmp_path / "other", 7, parts, {}, 2)
        shutil.copy(tmp_path / "other" / "step-7" / name, file)
    step, passed = loaded_step(tmp_path)
    assert step == 1
    assert len(passed) == 1
    assert "step-2" in passed[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path)
    save_two(tmp_path)
    file = data.draw(st.sampled_from(sorted((tmp_path / "step-2").iterdir())))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if file.name == "MANIFEST.json":
        try:  # a flip that leaves the same JSON changes nothing
            if json.loads(content) == json.loads(file.read_bytes()):
                return
        except ValueError:
            pass
    file.write_bytes(content)
    assert loaded_step(tmp_path)[0] == 1


def test_all_broken_is_an_error(tmp_path: Path) -> None:
    save_two(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-{step}" / "facts.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint .* is whole"):
        checkpoint.load(tmp_path)


def test_leftovers_are_not_checkpoints(tmp_path: Path) -> None:
    save_two(tmp_path)
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-9.tmp")
    assert loaded_step(tmp_path)[0] == 2
    checkpoint.clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        save_two(disk)
        with pytest.raises(UserError, match=r"disk is full.*free some space"):
            checkpoint.save(disk, 3, {"network": {"w": torch.zeros(100_000)}}, {}, keep=2)
        assert loaded_step(disk) == (2, [])
        assert sorted(p.name for p in disk.iterdir()) == ["step-1", "step-2"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
