"""The model folder: what training leaves, complete in itself, verified when loaded.

    recipe.toml           everything about the model, defaults filled in
    weights.safetensors   the trained (or averaged) weights, fp32
    codec/                the tokenizer, or what pixels are, or a trained autoencoder's whole model folder
    data/                 manifest, report and the held-out splits
    receipt.json          hashes of all of the above, seeds, metrics with intervals, parity of every export
    metrics.jsonl  loss.png  samples/  exports/  card.md  card.html  checkpoints/

Only safetensors and JSON (and TOML) are read; nothing in a folder can run code. One from elsewhere is taken to have
been made to do harm: before anything of it is read or written, `entries` has found nothing in it that leads outside,
never ends or is no plain file; and a network is built only where the weights beside its recipe fill it.
"""

import os
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from handmill import media
from handmill import recipe as recipes
from handmill.data.sources import printable
from handmill.disk import fingerprint, parsed, sealed, write_text
from handmill.errors import UserError
from handmill.networks import build
from handmill.networks.weights import tied_names, weights_of
from handmill.recipe import Recipe

FORMAT = "handmill-model/1"
LARGEST = {"recipe.toml": 4 << 20, "data": 1 << 30}  # bytes of a table, or of one in a folder ...
OTHERS = 64 << 20  # ... and of every other: data's manifests name each source
DOTS = 32  # in a line of a recipe; the time that TOML takes to read grows with the square of a key's parts
_WITNESSES = 4096  # numbers of the trained network's answer
_UNTRUE = "copy the folder again from where it was made"

__all__ = ["FORMAT", "Model", "fingerprint", "load", "read_receipt", "record", "sealed", "verify", "weights_of",
           "write", "write_text"]


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


def write(path: Path, recipe: Recipe, weights: Mapping[str, Tensor], codec: Any, parts: Mapping[str, Path],
          training: Mapping[str, Any]) -> None:
    """Write weights, recipe, codec and `parts` (name in the folder -> file to copy), then the receipt, last.

    `training` goes into the receipt as it is: steps, seed, tokens, seconds, machine. A folder whose receipt is
    missing was not finished and does not load.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "receipt.json").unlink(missing_ok=True)
    write_text(path / "recipe.toml", tomli_w.dumps(recipe.table()))
    staged = path / "weights.safetensors.tmp"  # one that a kill leaves is written over by the next run
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
    try:
        codec = codec_in(path, recipe, device)
        weights = load_file(path / "weights.safetensors")
        _fit(recipe, codec, weights)
        network = build(recipe.network, codec)
        network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path / 'weights.safetensors'} is not a safetensors file: {error}") from None
    except Exception as error:  # a codec or network may raise anything on settings that nobody has tried
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{path} cannot be loaded ({said}): {_UNTRUE}") from error
    return Model(path, recipe, network.to(device).eval(), codec, receipt)


def _fit(recipe: Recipe, codec: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the weights fill the recipe's network, which is built without memory to see it."""
    with torch.device("meta"), _at_most(weights):
        network = build(recipe.network, codec)
    wanted, tied = network.state_dict(), set(tied_names(network))
    for name in sorted(weights.keys() | wanted.keys() - tied):
        here, there = weights.get(name), wanted.get(name)
        if here is None or there is None:
            raise _unfit(f"{name} is in {'the weights' if there is None else 'the network'} alone")
        if here.shape != there.shape or here.is_floating_point() != there.is_floating_point():
            raise _unfit(f"{name} is {here.dtype} {tuple(here.shape)} and not {there.dtype} {tuple(there.shape)}")


@contextmanager
def _at_most(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise UserError in the block as soon as a network has far more parameters than there are weights for."""
    tensors, numbers = 2 * len(weights), 2 * sum(weight.numel() for weight in weights.values())  # tied ones come twice

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors, numbers
        tensors, numbers = tensors - 1, numbers - (0 if parameter is None else parameter.numel())
        if tensors < 0 or numbers < 0:
            raise _unfit("the network has more parameters than there are weights")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _unfit(why: str) -> UserError:
    return UserError(f"weights.safetensors does not fit the network in recipe.toml ({why}): {_UNTRUE}")


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
    found = entries(path)
    receipt = read_receipt(path)
    coded = [name for name in receipt["files"] if name.startswith("codec/")] or ["codec"]
    for name in ("recipe.toml", "weights.safetensors", *coded[:1], *files_below(path, "codec")):
        if name not in receipt["files"]:
            raise UserError(f"{path / 'receipt.json'} does not vouch for {name}: copy the folder again from where "
                            "it was made, or train again")
    for name, expected in receipt["files"].items():
        file = path / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path / 'receipt.json'} names a file outside the model folder: {name[:300]!a}")
        if name not in found:
            raise UserError(f"{printable(str(file))[:300]} is missing from the model folder: {_UNTRUE}")
        size = expected.get("bytes") if isinstance(expected, dict) else None
        if size != file.stat().st_size or fingerprint(file) != expected:
            raise UserError(f"{file} is not as it was written (its checksum differs): {_UNTRUE}, or train again")
    _plain(path / "recipe.toml")
    return receipt


def entries(path: Path) -> set[str]:
    """The files in a folder, as names from `path` on, but for those of its checkpoints, which no verb reads but train.

    Raises UserError for what would lead a reader or writer outside or hold it for ever: a link out of the folder or to
    a folder, a pipe, a device, a table of gigabytes.
    """
    found, top = set[str](), path.resolve()
    for here, inner, files in os.walk(path):
        inner[:] = [name for name in inner if (here, name) != (str(path), "checkpoints")]
        for file in (Path(here, name) for name in [*inner, *files]):
            name = file.relative_to(path).as_posix()
            said = printable(str(file))
            if file.is_symlink() and not (file.is_file() and Path(os.path.realpath(file)).is_relative_to(top)):
                raise UserError(f"{said} is a link to no file of the model folder: copy the folder with its files in "
                                "place (cp -rL), if you trust where it is from")
            if not (file.is_file() or file.is_dir()):
                raise UserError(f"{said} is neither a file nor a folder: remove it, if you trust where it is from")
            if not file.is_file():
                continue
            size, limit = file.stat().st_size, LARGEST.get(name.partition("/")[0], OTHERS)
            if size > limit and file.suffix in (".json", ".jsonl", ".toml"):
                raise UserError(f"{said} has {size:,} bytes, and {limit:,} are enough for such a file: {_UNTRUE}")
            found.add(name)
    return found


def _plain(file: Path) -> None:
    """Raise UserError for TOML that its reader would not come to an end with, or break on."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        if any(line.count(".") > DOTS for line in text.split("\n")):
            raise ValueError(f"a line with more than {DOTS} dots")
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pass  # whoever reads it says where
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not what `handmill train` writes ({error}): {_UNTRUE}") from None


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt without verifying the files. Raises UserError when there is none or it is of another format."""
    try:
        text = (path / "receipt.json").read_text(encoding="utf-8")
        receipt: dict[str, Any] = parsed(text)
    except FileNotFoundError:
        raise UserError(f"{path} holds no receipt.json: it is not a model folder, or its training did not end "
                        "(`handmill train` goes on where it stopped)") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path / 'receipt.json'} cannot be read: {error}") from None
    if not isinstance(receipt, dict) or receipt.get("format") != FORMAT or not _tables(receipt):
        raise UserError(f"{path / 'receipt.json'} is not of the format {FORMAT}")
    if text != sealed(receipt):
        raise UserError(f"{path / 'receipt.json'} is not as it was written (its seal differs): {_UNTRUE}, or train "
                        "again")
    return receipt


def _tables(receipt: dict[str, Any]) -> bool:
    """Whether the sections that verbs look into are tables, and the witness in them lists that end."""
    sections = [receipt.get("files"), *(receipt.get(name, {}) for name in ("training", "exports", "check"))]
    if not all(isinstance(section, dict) for section in sections):
        return False
    witness = receipt.get("training", {}).get("witness", {})
    return isinstance(witness, dict) and all(
        isinstance(part, list) and len(part) <= _WITNESSES and all(isinstance(n, int | float) for n in part)
        for part in witness.values())


def record(path: Path, section: str, value: Any, key: str | None = None) -> None:
    """Set receipt[section] = value, or receipt[section][key] = value, atomically."""
    receipt = read_receipt(path)
    if key is None:
        receipt[section] = value
    else:
        receipt.setdefault(section, {})[key] = value
    _save_receipt(path, receipt)


def _save_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    """Replace the receipt of a model folder, with its seal."""
    write_text(path / "receipt.json", sealed(receipt))
