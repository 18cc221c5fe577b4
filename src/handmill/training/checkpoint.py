"""Checkpoints that are either whole or not there.

    step-N.tmp/  ->  files, each flushed to the disk  ->  MANIFEST.json with size and checksum of every file
                 ->  renamed to step-N/  ->  the parent folder flushed
    step-N/      ->  renamed to step-N.old/  ->  removed

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

from handmill.disk import fingerprint, flush, parsed
from handmill.errors import UserError

Tensors = dict[str, Tensor]
FULL = {errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "this user's share of the disk is full: free some space",
        errno.EFBIG: "files may not be so large here: raise the limit (ulimit -f)"}


def save(folder: Path, step: int, parts: dict[str, Tensors], facts: dict[str, Any], keep: int,
         kept: int | None = None) -> Path:
    """Write checkpoint `step` of `parts` (file name -> tensors) and `facts` (JSON).

    All are dropped but the newest `keep` and the one of step `kept`.

    Raises UserError when the disk is full or not writable; what was there before is then untouched.
    """
    final, staged = folder / f"step-{step}", folder / f"step-{step}.tmp"
    try:
        _remove(staged)
        _make(folder)
        staged.mkdir()
        for name, tensors in parts.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, staged / f"{name}.safetensors")
        (staged / "facts.json").write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
        _seal(staged)
        _drop(final)
        os.rename(staged, final)
        flush(folder)
    except Exception as error:  # safetensors raises its own type for a full disk
        shutil.rmtree(staged, ignore_errors=True)  # on a disk that became read-only this fails, too
        raise UserError(_reason(error, folder, step)) from error
    for old in checkpoints(folder)[keep:]:
        if old.name != f"step-{kept}":
            _drop(old)
    return final


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that went back to `step` must not go on from."""
    for path in checkpoints(folder):
        if int(path.name[5:]) > step:
            _drop(path)


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
            return {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}, _facts(path), passed
        passed.append(f"passed over checkpoint {path}: {fault}")
    if passed:
        raise UserError(f"no checkpoint in {folder} is whole ({passed[0]}): delete that folder to train from the start")
    return None


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the checkpoint that `load` would take, without its tensors."""
    for path in checkpoints(folder):
        if verify(path) is None:
            return _facts(path)
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = parsed((path / "MANIFEST.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its MANIFEST.json cannot be read ({error})"
    if not isinstance(manifest, dict) or "facts.json" not in manifest:
        return "its MANIFEST.json lists no facts.json"
    for name, expected in manifest.items():
        if Path(name).name != name or not (path / name).is_file():
            return f"{name} is missing"
        try:
            found = fingerprint(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is not as it was written"
    extra = {p.name for p in path.iterdir()} - set(manifest) - {"MANIFEST.json"}
    if extra:
        return f"{sorted(extra)[0]} does not belong to it"
    return None if path.name.split(".")[0] == f"step-{_facts(path).get('step')}" else "it is of another step"


def clear_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left behind; a checkpoint that only lacked its name gets it."""
    for path in folder.glob("step-*.tmp"):
        final = path.with_suffix("")
        if verify(path) is None:
            _drop(final)
            os.rename(path, final)
            flush(folder)
        _remove(path)
    for path in folder.glob("step-*.old"):
        _remove(path)


def _make(folder: Path) -> None:
    """Make a folder whose name is on the disk before anything lies in it."""
    if not folder.exists():
        folder.mkdir(parents=True)
        flush(folder.parent)


def _seal(staged: Path) -> None:
    """Flush every file to the disk, and then the manifest that vouches for them."""
    manifest = {}
    for file in sorted(staged.iterdir()):
        flush(file)
        manifest[file.name] = fingerprint(file)
    (staged / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush(staged / "MANIFEST.json")
    flush(staged)


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = parsed((path / "facts.json").read_text(encoding="utf-8"))
    return facts


def _drop(path: Path) -> None:
    """Remove a checkpoint; one that is half removed is not taken for one."""
    old = path.with_name(f"{path.name}.old")
    if path.exists():
        _remove(old)
        os.rename(path, old)
        _remove(old)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _reason(error: Exception, folder: Path, step: int) -> str:
    found = next((why for number, why in FULL.items() if getattr(error, "errno", None) == number
                  or os.strerror(number) in str(error)), f"{error}: make the folder writable")
    return f"checkpoint {step} could not be written to {folder}, {found}, then train again to go on from the one before"
