"""Models of the same data side by side: what keeps them apart, and a table of their figures.

The best figure of a row is marked only where its interval overlaps no other model's.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from handmill.checks import music_verdict
from handmill.checks.verdict import carried_lines, percent, shown
from handmill.recipe import Recipe
from handmill.training.monitor import duration

# keys of the [data] table that leave the held-out items as they are
_FREE = ("paths", "test_paths", "licence", "flip", "shift", "rotation", "colour_jitter", "binarise", "transpose",
         "transpose_share")
_BASELINES = {"trigram": "trigram model", "xz": "xz", "xz_trained": "xz after training text"}
_MORE_IS_BETTER = ("precision", "recall", "coverage")  # of density, up to that of real images only

Figure = dict[str, Any]


class Entry(NamedTuple):
    """One model: its folder under the name it has in the table, and what was measured of it now."""

    name: str
    path: Path
    recipe: Recipe
    receipt: dict[str, Any]
    manifest: dict[str, Any]
    splits: dict[str, Any]  # of the data's report
    codec: dict[str, Any]  # receipt["training"] of the autoencoder inside, where there is one
    evaluations: int  # of the network, a sample
    sample_seconds: float | None  # None: it makes no samples

    @property
    def check(self) -> dict[str, Any]:
        check: dict[str, Any] = self.receipt.get("check") or {}
        return check

    @property
    def training(self) -> dict[str, Any]:
        training: dict[str, Any] = self.receipt.get("training", {})
        return training


class Row(NamedTuple):
    """A figure or a text for each column; figures are plain, as a receipt has them."""

    what: str
    cells: Sequence[Figure | str]
    better: Literal["", "lower", "higher"] = ""
    form: Callable[[Figure], str] = shown


def apart(a: Entry, b: Entry) -> str:
    """What keeps two models from being compared, "" for nothing: figures compare on the same held-out items only.

    Equal sources, [data] tables and seeds hold out the same items, whatever the tokenizer; bits per character and
    figures of images then compare.
    """
    if a.recipe.medium != b.recipe.medium:
        return f"medium ({a.recipe.medium} and {b.recipe.medium})"
    if a.training.get("fingerprint") == b.training.get("fingerprint") is not None:
        return ""
    if a.recipe.seed != b.recipe.seed:
        return f"seed ({a.recipe.seed} and {b.recipe.seed}), which chooses what is held out"
    one, other = a.recipe.table()["data"], b.recipe.table()["data"]
    for key in one:
        if key not in _FREE and one[key] != other[key]:
            return f"data.{key} ({one[key]} and {other[key]})"
    if not a.manifest or not b.manifest or _sources(a.manifest) != _sources(b.manifest):
        return "the checksums of their sources, in data/manifest.json"
    return "" if _held_out(a) == _held_out(b) else "how many items they hold out, in data/report.json"


def stale(entry: Entry, wanted: dict[str, Any], network: str | None) -> str:
    """Why an entry's check cannot stand beside the others', "" where it can.

    `wanted` are check settings, `network` names the features that images are compared in.
    """
    check = entry.check
    if not check:
        return "is not checked"
    if check.get("weights") != entry.receipt["files"]["weights.safetensors"]["sha256"]:
        return "has a check of other weights"
    for key, value in wanted.items():
        if (found := check["settings"].get(key)) != value:
            return f"is checked with {key} = {found}, not {value}"
    own = features_of(entry)
    return f"is checked in the features {own}, not {network}" if network and own and own != network else ""


def settings_of(entry: Entry) -> dict[str, Any]:
    """The settings of an entry's check, or of its recipe where it has none; all that figures depend on."""
    found = entry.check.get("settings") or entry.recipe.table()["check"]
    loose = ("inception", "images", "memories")  # these add figures, or say of how many images a mean is
    return {key: value for key, value in found.items() if key not in loose}


def features_of(entry: Entry) -> str | None:
    """The name of the network in whose features an entry's images were compared."""
    name: str | None = entry.check.get("fidelity", {}).get("network")
    return name


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """The table: {"medium", "models", "columns", "rows": [{"what", "cells", "figures", "better", "best"}], "notes"}.

    "columns" are the models and what they are held against; "best" is a model's number, None where none is shown.
    """
    medium = entries[0].recipe.medium
    references, rows, notes = {"image": _image, "music": _music, "text": _text}[medium](entries)
    notes += [f"{e.name}: {line}" for e in entries for line in carried_lines(e.check)]
    machines = {tuple(sorted((k, str(v)) for k, v in e.training.get("machine", {}).items())) for e in entries}
    if len(machines) > 1:
        notes.append("Training times are of different machines.")
    names = [e.name for e in entries]
    verdicts = Row("verdict", [e.check["verdict"]["text"] for e in entries])
    return {"medium": medium, "models": names, "columns": [*names, *references],
            "rows": [_plain(row, len(entries), len(references)) for row in [*_cost(entries), *rows, verdicts]],
            "notes": ["Intervals are of 95 %; (best) stands only where a model's interval overlaps no other model's.",
                      *notes]}


def best(figures: Sequence[Figure | None], better: str) -> int | None:
    """The number of the figure whose interval lies wholly on the better side of all others, None where none does."""
    known = [(i, f) for i, f in enumerate(figures) if f is not None]
    if len(known) < 2 or not better or any(f["low"] is None for _, f in known):
        return None
    if better == "lower":
        i, leader = min(known, key=lambda pair: pair[1]["high"])
        return i if all(leader["high"] < f["low"] for j, f in known if j != i) else None
    i, leader = max(known, key=lambda pair: pair[1]["low"])
    return i if all(leader["low"] > f["high"] for j, f in known if j != i) else None


def lines(result: dict[str, Any]) -> list[str]:
    """The table for the screen, in several parts where it is wider; verdicts and notes below it."""
    table = [["", *result["columns"]], *([row["what"], *row["cells"]] for row in result["rows"][:-1])]
    shown_lines: list[str] = []
    for columns in _that_fit(table, shutil.get_terminal_size((120, 24)).columns):
        widths = [max(len(row[c]) for row in table) for c in columns]
        shown_lines += ["  ".join(f"{row[c]:{width}}" for c, width in zip(columns, widths, strict=True)).rstrip()
                        for row in table] + [""]
    verdicts = zip(result["models"], result["rows"][-1]["cells"], strict=False)
    return [*shown_lines, *(f"verdict of {name}: {text}" for name, text in verdicts), "", *result["notes"]]


def _that_fit(table: list[list[str]], room: int) -> Iterator[list[int]]:
    """Numbers of the columns in each part of a table: the first in all of them, and one other at least."""
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    part = [0]
    for c in range(1, len(widths)):
        if len(part) > 1 and sum(widths[i] for i in [*part, c]) > room:
            yield part
            part = [0]
        part.append(c)
    yield part


def _plain(row: Row, models: int, references: int) -> dict[str, Any]:
    cells = [*row.cells, *[""] * (models + references - len(row.cells))]
    figures = [cell if isinstance(cell, dict) else None for cell in cells]
    leader = best(figures[:models], row.better)
    texts = [cell if isinstance(cell, str) else row.form(cell) for cell in cells]
    return {"what": row.what, "figures": figures, "better": row.better, "best": leader,
            "cells": [f"{text} (best)" if i == leader else text for i, text in enumerate(texts)]}


def _sources(manifest: dict[str, Any]) -> list[str]:
    return [str(source.get("sha256") or source.get("path")) for source in manifest.get("sources", [])]


def _held_out(entry: Entry) -> dict[str, Any]:
    """Sizes of the splits in units that no tokenizer changes."""
    return {name: {key: split.get(key) for key in ("images", "documents", "bytes")}
            for name, split in entry.splits.items()}


def _cost(entries: Sequence[Entry]) -> list[Row]:
    def with_codec(entry: Entry, key: str, form: Callable[[Any], str]) -> str:
        parts = [form(facts[key]) for facts in (entry.training, entry.codec) if facts.get(key) is not None]
        return " + ".join(parts) + (" (codec)" if len(parts) > 1 else "") or "not recorded"

    return [Row("parameters", [with_codec(e, "parameters", "{:,}".format) for e in entries]),
            Row("training time", [with_codec(e, "seconds", _duration) for e in entries]),
            Row("steps", [with_codec(e, "steps", "{:,}".format) for e in entries])]


def _duration(seconds: Any) -> str:
    return duration(sum(seconds.values()) if isinstance(seconds, dict) else seconds)


def _text(entries: Sequence[Entry]) -> tuple[list[str], list[Row], list[str]]:
    """Reference columns, rows and notes."""
    found = [e.check["likelihood"] for e in entries]
    baselines = {name: _first(e.check["baselines"].get(name, {"missing": ""}) for e in entries) for name in _BASELINES}
    known = {name: base for name, base in baselines.items() if base}
    rows = [Row(unit.replace("_", " "), [*(f[unit] for f in found), *(base[unit] for base in known.values())], "lower")
            for unit in ("bits_per_character", "bits_per_byte")]
    rows.append(Row("perplexity (of each one's own tokens: not comparable)", [f["perplexity"] for f in found]))
    rows += [Row(f"copied, {length} characters in a row", _copied(entries, length), form=percent)
             for length in dict.fromkeys(length for e in entries for length in e.check["copying"].get("lengths", {}))]
    notes = [_of_split(entries), *_unknown(entries), *_reasons(entries, ("copying",)), "Copying has no best: the "
             "verdict says where it is more than held-out text shares with the training text."]
    return [_BASELINES[name] for name in known], rows, notes


def _music(entries: Sequence[Entry]) -> tuple[list[str], list[Row], list[str]]:
    """Reference columns, rows and notes. Only figures per frame and per note compare across kinds of tokens."""
    found = [e.check["likelihood"] for e in entries]
    trigram = _first(e.check["baselines"]["trigram"] for e in entries)
    rows = []
    for name, unit in music_verdict.units(entries[0].check).items():
        if all(name in f for f in found):
            rows.append(Row(unit, [*(f[name] for f in found), *([trigram[name]] if trigram else [])],
                            "" if name == "nats_per_token" else "lower"))
    styles = {"scale_consistency": "share of a sample's notes in one scale", "notes_per_step": "its notes a step"}
    real: dict[str, Any] = next((e.check["style"] for e in entries if "missing" not in e.check["style"]), {})
    rows += [Row(words, [_made(e.check["style"], name) for e in entries]
                 + ([f"held-out pieces {shown(real[name]['held_out'])}"] if trigram and name in real else []))
             for name, words in styles.items()]
    pieces = ", ".join(f"{e.name} {e.check['held_out']['pieces']:,}" for e in entries)
    return ["trigram model"] if trigram else [], rows, [
        f"Pieces of the {entries[0].check['held_out']['split']} split that were read: {pieces}."]


def _made(style: dict[str, Any], name: str) -> Figure | str:
    """A figure of the samples, or why there is none."""
    part = style.get(name, {}).get("generated") or style
    return _short(part) if "missing" in part else part


def _copied(entries: Sequence[Entry], length: str) -> list[Figure | str]:
    """Copied shares of generated text, by characters in a row."""
    parts = [e.check["copying"].get("lengths", {}).get(length, e.check["copying"]) for e in entries]
    return [part.get("generated") or _short(part) for part in parts]


def _of_split(entries: Sequence[Entry]) -> str:
    held = [e.check["held_out"] for e in entries]
    named = ", ".join(f"{e.name} {h['documents']:,} ({h['characters']:,} characters)"
                      for e, h in zip(entries, held, strict=True))
    same = len({(h["documents"], h["characters"]) for h in held}) == 1
    return (f"Documents of the {held[0]['split']} split that were read: {named}"
            + ("." if same else ", which differ: `handmill check FOLDER tokens=0` reads all."))


def _unknown(entries: Sequence[Entry]) -> list[str]:
    return [f"{e.name} does not know {count:,} of these characters and takes them for one: its figures are flattered."
            for e in entries if (count := e.check["held_out"].get("unknown_characters", 0))]


def _image(entries: Sequence[Entry]) -> tuple[list[str], list[Row], list[str]]:
    """Reference columns, rows and notes."""
    made = {e.check["samples"]["what"] for e in entries}
    judged = [*_fidelity_rows(entries), *_label_rows(entries), *_copying_rows(entries)]
    rows = [Row("network evaluations per sample", [f"{e.evaluations:,}" for e in entries]),
            Row("time per sample", ["no samples" if e.sample_seconds is None else _brief(e.sample_seconds)
                                    for e in entries]),
            *(judged if len(made) == 1 else [row._replace(better="") for row in judged]), *_likelihood_rows(entries)]
    measured = _first(e.check["fidelity"] for e in entries)
    notes = [f"Likeness and variety: features {measured['network']}, n = {measured['n']:,} of each; real images are "
             "one half of the unseen ones beside the other."] if measured else []
    if len(made) > 1:
        notes.append("Likeness has no best, because not all are judged alike: " + ", ".join(
            f"{e.name} by {e.check['samples']['what']}" for e in entries) + ".")
    notes += _reasons(entries, ("fidelity", "labels", "copying", "likelihood"))
    return ["real images"], rows, [*notes, "Density and copying have no best: above what real images reach, density "
                                   "says that samples crowd together."]


def _fidelity_rows(entries: Sequence[Entry]) -> Iterator[Row]:
    parts = [e.check["fidelity"] for e in entries]
    floor = (_first(parts) or {}).get("floor", {})
    for name in floor:
        distance = name.startswith(("fd_", "fid"))
        cells = [part.get("generated", {}).get(name) or _short(part) for part in parts]
        yield Row(f"Fréchet distance {name}" if distance else name, [*cells, floor[name]],
                  "lower" if distance else "higher" if name in _MORE_IS_BETTER else "")


def _label_rows(entries: Sequence[Entry]) -> Iterator[Row]:
    parts = [e.check["labels"] for e in entries]
    if any(part.get("agreement") for part in parts):
        ceiling = next((part["ceiling"] for part in parts if part.get("ceiling")), "")
        cells = [part.get("agreement") or (_short(part) if "missing" in part else "not asked") for part in parts]
        yield Row("label agreement", [*cells, ceiling], "higher")


def _copying_rows(entries: Sequence[Entry]) -> Iterator[Row]:
    parts = [e.check["copying"] for e in entries]
    first = (_first(parts) or {}).get("by", {})
    for space in first:
        found = [part.get("by", {}).get(space, part) for part in parts]
        cells = [f.get("share_closer_than_real_1pct") or _short(f) for f in found]
        yield Row(f"near to one training image, by {space}", [*cells, first[space]["share_of_real"]], form=percent)


def _likelihood_rows(entries: Sequence[Entry]) -> Iterator[Row]:
    """A row for each way of counting: bits of black and white pixels do not compare with those of grey ones."""
    parts = [e.check["likelihood"] for e in entries]
    ways = [_way(e) for e in entries]
    for way in dict.fromkeys(w for w in ways if w):
        yield Row(f"bits per dimension, {way}",
                  [p["bits_per_dimension"] if w == way else "counted otherwise" if w else "no likelihood"
                   for p, w in zip(parts, ways, strict=True)], "lower")


def _way(entry: Entry) -> str:
    found, binarise = entry.check["likelihood"], getattr(entry.recipe.data, "binarise", "no")
    if "bits_per_dimension" not in found or found["kind"].startswith("reconstruction alone"):
        return ""
    return str(found["counted"]).partition(",")[0] + (f", binarised ({binarise})" if binarise != "no" else "")


def _brief(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.2g} ms"


def _first(parts: Any) -> dict[str, Any] | None:
    """The first part of several checks that was measured."""
    return next((part for part in parts if part and "missing" not in part), None)


def _short(part: dict[str, Any]) -> str:
    """Why there is no figure, in two words; `_reasons` says the rest."""
    return str(part.get("missing") or "not measured").partition(":")[0]


def _reasons(entries: Sequence[Entry], parts: Sequence[str]) -> list[str]:
    return [f"{e.name}: {part} {e.check[part]['missing']}." for e in entries for part in parts
            if "missing" in e.check.get(part, {})]
