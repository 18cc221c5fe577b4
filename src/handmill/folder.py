"""The model folder: what training leaves, complete in itself, verified when loaded.

    recipe.toml           everything about the model, defaults filled in
    weights.safetensors   the trained (or averaged) weights, fp32
    codec/                the tokenizer, or what pixels are, or a trained autoencoder's whole model folder
    data/                 manifest, report and the held-out splits
    receipt.json          hashes of all of the above, seeds, metrics with intervals, parity of every export
    metrics.jsonl  loss.png  samples/  exports/  card.md  card.html  checkpoints/

Only safetensors and JSON (and TOML) are read; nothing in a folder can run code.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from handmill import media
from handmill import recipe as recipes
from handmill.disk import fingerprint, write_text
from handmill.errors import UserError
from handmill.networks import build
from handmill.networks.weights import tied_names, weights_of
from handmill.recipe import Recipe

FORMAT = "handmill-model/1"

__all__ = ["FORMAT", "Model", "fingerprint", "load", "read_receipt", "record", "verify", "weights_of", "write",
           "write_text"]


@dataclass
class Model:
    """A loaded model folder: the network in evaluation mode on its device, its codec, its recipe and its receipt."""

    path: Path
    recipe: Recipe
    network: nn.Module
    codec: Any
    receipt: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def generate(self, prompt: str = "", **settings: Any) -> Any:
        """One sample: a text, an image (H, W, C) uint8, or a media.scores.Score; `prompt` is its beginning, the name of
        its class, or what a piece of music is to be ("key=G").

        Keywords override the recipe's [sampling] table (temperature=0.8, seed=1, ...).
        """
        from handmill.verbs.generate import generate

        return generate(self, [prompt], **settings)[0]


def write(path: Path, recipe: Recipe, weights: Mapping[str, Tensor], codec: Any, parts: Mapping[str, Path],
          training: Mapping[str, Any]) -> None:
    """Write weights, recipe, codec and `parts` (name in the folder -> file to copy), then the receipt, last.

    `training` goes into the receipt as it is: steps, seed, tokens, seconds, machine. A folder whose receipt is
    missing was not finished and does not load.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "receipt.json").unlink(missing_ok=True)
    write_text(path / "recipe.toml", tomli_w.dumps(recipe.table()))
    with tempfile.NamedTemporaryFile(dir=path, delete=False) as file:
        staged = Path(file.name)
    save_file({k: v.detach().contiguous().cpu() for k, v in weights.items()}, staged)
    staged.chmod(0o644)
    os.replace(staged, path / "weights.safetensors")
    shutil.rmtree(path / "codec", ignore_errors=True)
    codec.save(path / "codec")
    for name, source in parts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path / name)
    from handmill import __version__

    files = ["recipe.toml", "weights.safetensors", *files_below(path, "codec"), *parts]
    _save_receipt(path, {
        "format": FORMAT,
        "handmill": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: fingerprint(path / name) for name in files},
        "training": dict(training),
    })


def load(path: Path | str, device: str | torch.device = "cpu") -> Model:
    """Verify a model folder and load its network and codec. Raises UserError naming the file that is not as written."""
    path = Path(path)
    receipt = verify(path)
    recipe = recipes.read(path / "recipe.toml")
    codec = codec_in(path, recipe, device)
    network = build(recipe.network, codec)
    try:
        weights = load_file(path / "weights.safetensors")
    except SafetensorError as error:
        raise UserError(f"{path / 'weights.safetensors'} is not a safetensors file: {error}") from None
    network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    missing = {k for k in network.state_dict() if k not in weights} - set(tied_names(network))
    if missing or set(weights) - set(network.state_dict()):
        raise UserError(f"{path / 'weights.safetensors'} does not fit the network in recipe.toml: "
                        f"{sorted(missing or set(weights) - set(network.state_dict()))[0]}")
    return Model(path, recipe, network.to(device).eval(), codec, receipt)


def codec_in(path: Path, recipe: Recipe, device: str | torch.device) -> Any:
    """The codec of a model folder; one that is a trained autoencoder is a model folder itself. Raises UserError."""
    trained = load(path / "codec" / "model", device) if recipe.codec.kind == "model" else None
    return media.codec(recipe, path / "codec", trained)


def files_below(path: Path, name: str) -> list[str]:
    """The files in `path`/`name`, as names from `path` on."""
    return [p.relative_to(path).as_posix() for p in sorted((path / name).rglob("*")) if p.is_file()]


def verify(path: Path) -> dict[str, Any]:
    """The receipt, after every file in it has been found unchanged. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: name a model folder that `handmill train` wrote")
    receipt = read_receipt(path)
    coded = [name for name in receipt["files"] if name.startswith("codec/")] or ["codec"]
    for name in ("recipe.toml", "weights.safetensors", *coded[:1], *files_below(path, "codec")):
        if name not in receipt["files"]:
            raise UserError(f"{path / 'receipt.json'} does not vouch for {name}: copy the folder again from where "
                            "it was made, or train again")
    for name, expected in receipt["files"].items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path / 'receipt.json'} names a file outside the model folder: {name}")
        if not file.is_file():
            raise UserError(f"{file} is missing from the model folder: copy the folder again from where it was made")
        if fingerprint(file) != expected:
            raise UserError(f"{file} is not as it was written (its checksum differs): "
                            "copy the folder again from where it was made, or train again")
    return receipt


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt without verifying the files. Raises UserError when there is none or it is of another format."""
    try:
        receipt: dict[str, Any] = json.loads((path / "receipt.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no receipt.json: it is not a model folder, or its training did not end "
                        "(`handmill train` goes on where it stopped)") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path / 'receipt.json'} cannot be read: {error}") from None
    if not isinstance(receipt, dict) or receipt.get("format") != FORMAT or not isinstance(receipt.get("files"), dict):
        raise UserError(f"{path / 'receipt.json'} is not of the format {FORMAT}")
    return receipt


def record(path: Path, section: str, value: Any, key: str | None = None) -> None:
    """Set receipt[section] = value, or receipt[section][key] = value, atomically."""
    receipt = read_receipt(path)
    if key is None:
        receipt[section] = value
    else:
        receipt.setdefault(section, {})[key] = value
    _save_receipt(path, receipt)


def _save_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    write_text(path / "receipt.json", json.dumps(receipt, indent=1, ensure_ascii=False) + "\n")
