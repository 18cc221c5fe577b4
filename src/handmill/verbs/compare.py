"""`handmill compare`: models of the same data side by side, in one table and one picture."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from handmill import folder, page
from handmill import recipe as recipes
from handmill.card import facts
from handmill.checks import comparing
from handmill.checks.comparing import Entry, lines
from handmill.checks.comparing_picture import draw
from handmill.errors import UserError
from handmill.families import tensors
from handmill.folder import Model
from handmill.page import Picture, Points, Section, Table, Text
from handmill.verbs import check as checking

SAMPLES, SHOWN, SEED = 64, 12, 1  # made to take the time; of them drawn; theirs

__all__ = ["compare", "lines"]


def compare(paths: Sequence[Path | str], out: Path | str | None = None, check: bool = True,
            progress: bool = True) -> dict[str, Any]:
    """Compare model folders of one data set, of any families; writes compare.md and compare.png into `out`.

    `out` is compare/ by default. Where a folder's check is missing, of other weights or of other settings than the
    first one's, `check` runs it again. Returns what comparing.compare does, and "files". Raises UserError for fewer
    than two folders, for data that differ, and for a check that is not as the others where `check` is false.
    """
    folders = [Path(path) for path in paths]
    if len({path.resolve() for path in folders}) < max(2, len(folders)):
        raise UserError("compare needs two or more different model folders: name them all, as in "
                        "`handmill compare runs/a runs/b`")
    entries = [_entry(path, name) for path, name in zip(folders, _names(folders), strict=True)]
    for other in entries[1:]:
        if found := comparing.apart(entries[0], other):
            raise UserError(f"{entries[0].path} and {other.path} cannot be compared, because they differ in {found}: "
                            "train both on the same prepared data")
    entries = _checked(entries, check, progress)
    samples: dict[str, NDArray[np.uint8]] = {}
    if entries[0].recipe.medium == "image":
        entries = [_sampled(entry, samples) for entry in entries]
    result = comparing.compare(entries)
    if samples:
        result["notes"].append(f"Time per sample: {SAMPLES} samples made at once, once, on this machine's "
                               f"{'GPU' if torch.cuda.is_available() else 'CPU'}, {torch.get_num_threads()} threads; "
                               f"the picture shows the same classes and the seed {SEED} of every model.")
    return result | {"files": _write(result, samples, Path("compare" if out is None else out))}


def _entry(path: Path, name: str) -> Entry:
    """What a folder says of itself. Raises UserError for one that is not as it was written."""
    receipt = folder.verify(path)
    report = facts.read(path / "data" / "report.json")
    inside = facts.read(path / "codec" / "model" / "receipt.json").get("training", {})
    return Entry(name, path, recipes.read(path / "recipe.toml"), receipt,
                 facts.read(path / "data" / "manifest.json"), report.get("splits", {}), inside, 0, None)


def _names(folders: list[Path]) -> list[str]:
    """Names of the folders, numbered where they are alike."""
    names = [path.resolve().name for path in folders]
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _checked(entries: list[Entry], check: bool, progress: bool) -> list[Entry]:
    """The entries with checks that can stand side by side. Raises UserError where they cannot."""
    first = next((entry for entry in entries if not comparing.stale(entry, {}, None)), entries[0])
    wanted, network = comparing.settings_of(first), comparing.features_of(first)
    for i, entry in enumerate(entries):
        if not (why := comparing.stale(entry, wanted, network)):
            network = network or comparing.features_of(entry)
            continue
        command = " ".join([f"handmill check {entry.path}", *_overrides(entry, wanted)])
        if not check:
            raise UserError(f"{entry.path} {why}: run `{command}` first")
        if progress:
            print(f"{entry.path} {why}: {command}", flush=True)
        checking.check(entry.path, progress, **wanted)
        entries = [*entries[:i], _entry(entry.path, entry.name), *entries[i + 1:]]
        network = network or comparing.features_of(entries[i])
        if why := comparing.stale(entries[i], wanted, network):
            raise UserError(f"{entry.path} {why}, after a new check too: run `{command}` for every folder where the "
                            "prepared data lie beside it")
    return entries


def _overrides(entry: Entry, wanted: dict[str, Any]) -> list[str]:
    """The settings that differ from the recipe's own, as the command line takes them."""
    own = entry.recipe.table()["check"]
    return [f"{key}={value}".replace(" ", "") for key, value in wanted.items() if own[key] != value]


def _sampled(entry: Entry, samples: dict[str, NDArray[np.uint8]]) -> Entry:
    """The entry with the time that a sample takes here; the first samples go into `samples`."""
    model = folder.load(entry.path, "cuda" if torch.cuda.is_available() else "cpu")
    entry = entry._replace(evaluations=evaluations(model))
    if getattr(model.network, "quantiser", None) is not None:  # codes without a prior
        return entry
    labels = tensors.every_class(model.recipe, model.codec, SAMPLES)
    _make(model, labels[:1])  # what only the first call pays is not counted
    started = time.perf_counter()
    made = _make(model, labels)
    samples[entry.name] = made[:SHOWN]
    return entry._replace(sample_seconds=(time.perf_counter() - started) / SAMPLES)


def _make(model: Model, labels: list[int]) -> NDArray[np.uint8]:
    return tensors.make(model.network, model.codec, model.recipe, labels, model.recipe.sampling, SEED)


def evaluations(model: Model) -> int:
    """How often the network runs for one sample: once a code, or a step of diffusion, twice where it is guided."""
    recipe = model.recipe
    if recipe.family != "diffusion":
        return int(model.codec.length) if recipe.family == "autoregressive" else 1
    from handmill.families.diffusion import making, samplers

    sampling = recipe.sampling
    sigmas = making.grid(recipe.objective, sampling)[:-1].tolist()
    visited = sigmas + (sigmas[1:] if sampling.sampler == "heun" else [])
    assert len(visited) == samplers.evaluations(sampling.sampler, sampling.steps), (len(visited), sampling)
    if sampling.guidance == 1 or not model.codec.classes:
        return len(visited)
    low, high = sampling.interval
    return len(visited) + sum(low < sigma <= high for sigma in visited)


def _write(result: dict[str, Any], samples: dict[str, NDArray[np.uint8]], out: Path) -> list[str]:
    """compare.md and compare.png."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(result, samples, out / "compare.png")
        table = Table([("", *result["columns"]), *((row["what"], *row["cells"]) for row in result["rows"])])
        title = Section("Comparison of " + ", ".join(result["models"]),
                        [Text(f"{result['medium'].capitalize()} models of the same data."), table,
                         Points(result["notes"]), Picture("compare.png", "Figures of the models side by side")])
        folder.write_text(out / "compare.md", page.markdown([title]))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): choose another folder") from None
    return [str(out / "compare.md"), str(out / "compare.png")]
