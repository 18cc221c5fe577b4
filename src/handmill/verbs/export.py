"""`handmill export`: another form of a model, compared with the trained network on the spot."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handmill import folder
from handmill.errors import UserError
from handmill.export import huggingface, onnx
from handmill.export.compare import compare
from handmill.folder import Model

WINDOWS = 4  # compared
LENGTH = 128  # tokens a window, where the context holds as many


def export(path: Path | str, to: str) -> dict[str, Any]:
    """Write `path`/exports/<to>/ ("onnx" or "huggingface"), compare it, record the figures in the receipt.

    Returns the record: {"path", "made", "weights" (sha256), "compared_with", "logits_error", "greedy_tokens",
    "files", ...}. Raises UserError, leaving no export, when it computes another thing than the network.
    """
    targets = {"onnx": _onnx, "huggingface": _huggingface}
    if to not in targets:
        raise UserError(f"cannot export to {to!r}: choose one of {', '.join(targets)}")
    model = folder.load(path)
    target = model.path / "exports" / to
    staged = target.with_name(to + ".tmp")
    for old in (target, staged):
        shutil.rmtree(old, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        figures = targets[to](model, staged)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    record = {"path": target.relative_to(model.path).as_posix(),
              "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              "weights": model.receipt["files"]["weights.safetensors"]["sha256"], **figures,
              "files": {p.relative_to(target).as_posix(): folder.fingerprint(p) for p in files}}
    folder.record(model.path, "exports", record, key=to)
    return record


def held_out(model: Model) -> tuple[Tensor, str]:
    """Windows (B, T) of the model's validation text, evenly spread, or random tokens where there is none."""
    length = min(LENGTH, model.recipe.network.context)
    if (model.path / "data").is_dir():
        from handmill.data.packed import Packed

        tokens = Packed.open(model.path / "data").tokens("validation")
        if len(tokens) >= WINDOWS * length:
            starts = [i * (len(tokens) - length) // (WINDOWS - 1) for i in range(WINDOWS)]
            rows = [tokens[start:start + length].tolist() for start in starts]
            return torch.tensor(rows), "validation text"
    generator = torch.Generator().manual_seed(model.recipe.seed)
    return torch.randint(model.codec.size, (WINDOWS, length), generator=generator), "random tokens"


def _onnx(model: Model, target: Path) -> dict[str, Any]:
    from handmill.serving.onnxruntime import Runtime

    onnx.write(model.network, target / "model.onnx")
    shutil.copytree(model.path / "codec", target / "codec")
    about = onnx.about(model)
    folder.write_text(target / "export.json", json.dumps(about, indent=1) + "\n")
    folder.write_text(target / "README.md", onnx.readme(model))
    runtime = Runtime(target)
    windows, source = held_out(model)
    figures = compare(model.network, runtime, windows)
    figures |= {"compared_on": source, "compared_with": runtime.name}
    folder.write_text(target / "export.json", json.dumps(about | {"parity": figures}, indent=1) + "\n")
    return figures


def _huggingface(model: Model, target: Path) -> dict[str, Any]:
    huggingface.write(model, target)
    windows, source = held_out(model)
    figures = huggingface.compare_folder(model, target, windows) | {"compared_on": source}
    return figures | {"shape": huggingface.shape(model.recipe.network)}
