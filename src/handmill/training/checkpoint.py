"""Checkpoints that are either whole or not there.

    step-N.tmp/  ->  files, each flushed to the disk  ->  MANIFEST.json with size and checksum of every file
                 ->  renamed to step-N/  ->  the parent folder flushed

Loading takes the newest that verifies, else the next older, and says so. Only safetensors and JSON are read.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from handmill.disk import fingerprint, flush
from handmill.errors import UserError

Tensors = dict[str, Tensor]


def save(folder: Path, step: int, parts: dict[str, Tensors], facts: dict[str, Any], keep: int,
         kept: int | None = None) -> Path:
    """Write checkpoint `step` of `parts` (file name -> tensors) and `facts` (JSON).

    All are dropped but the newest `keep` and the one of step `kept`.

    Raises UserError when the disk is full or not writable; what was there before is then untouched.
    """
    final, staged = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        _clear(staged)
        staged.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, staged / f"{name}.safetensors")
        (staged / "facts.json").write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
        manifest = {}
        for file in sorted(staged.iterdir()):
            flush(file)
            manifest[file.name] = fingerprint(file)
        (staged / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush(staged / "MANIFEST.json")
        flush(staged)
        _clear(final)
        os.rename(staged, final)
        flush(folder)
    except Exception as error:  # safetensors raises its own type for a full disk
        _clear(staged)
        raise UserError(_reason(error, folder, step)) from error
    for old in checkpoints(folder)[keep:]:
        if old.name != f"step-{kept}":
            _clear(old)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that went back to `step` must not go on from."""
    for path in checkpoints(folder):
        if int(path.name[5:]) > step:
            _clear(path)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def load(folder: Path, last: int | None = None) -> tuple[dict[str, Tensors], dict[str, Any], list[str]] | None:
    """(parts, facts, sentences about checkpoints passed over) of the newest that verifies; None when there is none.

    With `last`, of the steps up to it.

    Raises UserError when there are checkpoints and every one of them is broken.
    """
    passed: list[str] = []
    for path in checkpoints(folder):
        if last is not None and int(path.name[5:]) > last:
            continue
        fault = verify(path)
        if fault is None:
            facts: dict[str, Any] = json.loads((path / "facts.json").read_text(encoding="utf-8"))
            parts = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
            return parts, facts, passed
        passed.append(f"passed over checkpoint {path}: {fault}")
    if passed:
        raise UserError(f"no checkpoint in {folder} is whole ({passed[0]}): delete that folder to train from the start")
    return None


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the checkpoint that `load` would take, without its tensors."""
    for path in checkpoints(folder):
        if verify(path) is None:
            facts: dict[str, Any] = json.loads((path / "facts.json").read_text(encoding="utf-8"))
            return facts
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or "facts.json" not in manifest:
            return "its MANIFEST.json lists no facts.json"
        for name, expected in manifest.items():
            if Path(name).name != name or not (path / name).is_file():
                return f"{name} is missing"
            if fingerprint(path / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"its MANIFEST.json cannot be read ({error})"
    extra = {p.name for p in path.iterdir()} - set(manifest) - {"MANIFEST.json"}
    return f"{sorted(extra)[0]} does not belong to it" if extra else None


def clear_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in folder.glob("step-*.tmp"):
        _clear(path)


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _reason(error: Exception, folder: Path, step: int) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    why = "the disk is full: free some space" if full else f"{error}: make the folder writable"
    return f"checkpoint {step} could not be written to {folder}, {why}, then train again to go on from the one before"
