"""`handmill export`: another form of a model, compared with the trained network on the spot."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handmill import folder
from handmill.errors import UserError
from handmill.export import compare_tensors, huggingface, onnx_decoder, onnx_recurrent, onnx_tensors
from handmill.export.compare import SEGMENTS, compare
from handmill.folder import Model
from handmill.serving import onnxruntime
from handmill.verbs.generate import MADE

WINDOWS = 4  # compared
LENGTH = 128  # tokens a window, or a segment of one, where the context holds as many
IMAGES = 8  # compared
SAMPLES = 4  # images made by both runtimes ...
STEPS = 20  # ... in so many steps at most
_TOKENS: dict[str, Any] = {"decoder": onnx_decoder, "recurrent": onnx_recurrent}  # network.kind -> what writes it


def export(path: Path | str, to: str) -> dict[str, Any]:
    """Write `path`/exports/<to>/ ("onnx" or "huggingface"), compare it, record the figures in the receipt.

    Returns the record: {"path", "made", "weights" (sha256), "compared_with", "compared_on", "files", ...} with
    "logits_error", "tolerance" and "greedy_tokens" of text and music, and of images "graphs" {file: {"largest_error",
    "tolerance", "fp32_rounding", ...}} and, where the model makes images by itself, "levels_apart". Raises UserError,
    leaving no export, when it computes another thing than the network.
    """
    targets = {"onnx": _onnx, "huggingface": _huggingface}
    if to not in targets:
        raise UserError(f"cannot export to {to!r}: choose one of {', '.join(targets)}")
    model = folder.load(path)
    if to == "huggingface" and (strange := _strange(model)):
        raise UserError(f"transformers has no name for {strange} such as {model.path}: export --to onnx instead")
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
    """Windows (B, T) of the model's validation tokens, evenly spread, or random ones where there are none.

    Where the network carries its state a window is several segments long."""
    carries = getattr(model.network, "carries", False)
    length = min(LENGTH, model.recipe.network.context) * (SEGMENTS if carries else 1)
    if (model.path / "data").is_dir():
        tokens = _packed(model).tokens("validation")
        if len(tokens) >= WINDOWS * length:
            starts = [i * (len(tokens) - length) // (WINDOWS - 1) for i in range(WINDOWS)]
            rows = [tokens[start:start + length].tolist() for start in starts]
            return torch.tensor(rows), f"validation {model.recipe.medium}"
    generator = torch.Generator().manual_seed(model.recipe.seed)
    return torch.randint(model.codec.size, (WINDOWS, length), generator=generator), "random tokens"


def _packed(model: Model) -> Any:
    """The data that a model of tokens keeps."""
    if model.recipe.medium == "music":
        from handmill.data.music import Pieces

        return Pieces.open(model.path / "data")
    from handmill.data.packed import Packed

    return Packed.open(model.path / "data")


def _strange(model: Model) -> str:
    """What keeps a model from having a name in transformers; settings that do are named by export/huggingface.py."""
    recipe, network = model.recipe, model.recipe.network
    if recipe.medium != "text":
        return f"a model of {MADE[recipe.medium]}"
    if network.kind != "decoder":
        return f"a {network.kind} network"
    if network.memory:
        return "a decoder with a memory"
    return "a decoder with relative positions" if network.positions == "relative" else ""


def lines(record: dict[str, Any]) -> list[str]:
    """What a record says, for the screen."""
    if "graphs" in record:
        said = [f"{file}: largest difference from the trained network {figures['largest_error']:.2g} "
                f"(allowed {figures['tolerance']:.2g})" for file, figures in record["graphs"].items()]
    else:
        said = [f"largest difference from the trained network's logits: {record['logits_error']:.2g} "
                f"(allowed {record['tolerance']:.2g}), {record['greedy_tokens']} greedy tokens the same"]
    if "steps_error" in record:
        said.append(f"{record['steps_tokens']} steps far beyond the context: logits and state differ by at most "
                    f"{record['steps_error']:.2g} (allowed {record['steps_tolerance']:.2g}), "
                    f"{record['steps_alike']} likeliest tokens the same")
    if "levels_apart" in record:
        said.append(f"{record['samples']} images made by both: at most {record['levels_apart']} of 255 levels apart")
    return [*said, f"compared with {record['compared_with']} on {record['compared_on']}; recorded in the receipt"]


def _onnx(model: Model, target: Path) -> dict[str, Any]:
    return _onnx_images(model, target) if model.recipe.medium == "image" else _onnx_tokens(model, target)


def _onnx_tokens(model: Model, target: Path) -> dict[str, Any]:
    form = _TOKENS[model.recipe.network.kind]
    form.write(model.network, target / "model.onnx")
    shutil.copytree(model.path / "codec", target / "codec")
    about = form.about(model)
    _describe(target, about, form.readme(model))
    runtime = onnxruntime.load(target)
    windows, source = held_out(model)
    figures = compare(model.network, runtime, windows)
    figures |= {"compared_on": source, "compared_with": onnxruntime.name()}
    _describe(target, about | {"parity": figures})
    return figures


def _onnx_images(model: Model, target: Path) -> dict[str, Any]:
    if model.recipe.network.kind == "recurrent":
        raise UserError(f"{model.path} makes images with a recurrent network, for which there is no export: train with "
                        "network.kind = 'decoder' to have one")
    graphs, figures = onnx_tensors.graphs(model), {}
    images, labels, source = held_out_images(model)
    about = onnx_tensors.about(model, graphs)
    shutil.copyfile(model.path / "codec" / "codec.json", target / "codec.json")
    _describe(target, about, onnx_tensors.readme(model, graphs))
    for graph in graphs:
        onnx_tensors.write(graph, target)
        inputs = compare_tensors.inputs_of(graph, model, images, labels)
        figures[graph.file] = compare_tensors.compare(graph, onnxruntime.Graph(target / graph.file), inputs)
    parity = {"graphs": figures, "compared_on": source, "compared_with": onnxruntime.name()}
    if model.recipe.family == "autoregressive":
        onnx_decoder.write(model.network, target / "model.onnx")
        windows = model.codec.tokens(model.codec.encode(images), labels)[:, :model.recipe.network.context]  # (N, T)
        logits = compare(model.network, onnxruntime.load(target), windows)
        parity["greedy_tokens"] = logits["greedy_tokens"]
        figures["model.onnx"] = {
            "largest_error": logits["logits_error"], "tolerance": logits["tolerance"],
            "fp32_rounding": logits["fp32_rounding"], "items_compared": len(windows),
            "numbers_compared": logits["logits_compared"]}
    parity |= _samples(model, onnxruntime.load(target))
    _describe(target, about | {"parity": parity})
    return parity


def held_out_images(model: Model) -> tuple[Tensor, Tensor, str]:
    """Held-out images (N, C, H, W) of the model in [-1, 1], evenly spread, and the numbers of their classes (N,), the
    last of which asks for none; random noise where there are none."""
    from handmill.data.images import Images
    from handmill.media.pictures import from_uint8

    height, width, channels = model.recipe.data.shape
    classes = len(model.codec.classes)
    held = Images.open(model.path / "data") if (model.path / "data").is_dir() else None
    split = next((name for name in ("test", "validation") if held is not None and held.count(name)), "")
    if held is not None and split:
        places = np.linspace(0, held.count(split) - 1, min(IMAGES, held.count(split))).astype(np.int64)
        images, labels = from_uint8(held.images(split)[places]), torch.tensor(held.labels(split)[places])
    else:
        generator = torch.Generator().manual_seed(model.recipe.seed)
        images = 2 * torch.rand(IMAGES, channels, height, width, generator=generator) - 1
        labels = torch.arange(IMAGES) % max(1, classes)
    labels[labels < 0] = classes
    labels[-1] = classes
    return images, labels, f"{split} images" if split else "random noise"


def _samples(model: Model, runtime: Any) -> dict[str, Any]:
    """How far apart images are that the trained network and the export make of the same seed, in levels of 255."""
    from handmill.families import tensors

    if getattr(runtime, "quantiser", None) is not None:
        return {}  # an autoencoder of codes makes nothing by itself
    sampling = model.recipe.sampling
    if model.recipe.family == "diffusion" and sampling.steps > STEPS:
        sampling = dataclasses.replace(sampling, steps=STEPS)
    labels = tensors.every_class(model.recipe, model.codec, SAMPLES)
    two = [tensors.make(network, model.codec, model.recipe, labels, sampling, abs(model.recipe.seed)).astype(np.int64)
           for network in (model.network, runtime)]
    return {"samples": SAMPLES, "levels_apart": int(np.abs(two[0] - two[1]).max())}


def _describe(target: Path, about: dict[str, Any], readme: str = "") -> None:
    folder.write_text(target / "export.json", json.dumps(about, indent=1) + "\n")
    if readme:
        folder.write_text(target / "README.md", readme)


def _huggingface(model: Model, target: Path) -> dict[str, Any]:
    huggingface.write(model, target)
    windows, source = held_out(model)
    figures = huggingface.compare_folder(model, target, windows) | {"compared_on": source}
    return figures | {"shape": huggingface.shape(model.recipe.network)}
