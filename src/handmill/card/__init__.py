"""The card of a model: what it is, what it was made of and how, what it can do, in sections for a page.

Every sentence comes from the model folder. What was not measured is said to be not measured; no path of the
machine gets in. What depends on the medium is in a module of its name.
"""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import tomli_w

from handmill import recipe as recipes
from handmill.card import facts
from handmill.card.facts import NOT_CHECKED, Row, number
from handmill.page import Block, Code, Points, Section, Table, Text
from handmill.recipe import Recipe
from handmill.training.monitor import duration, size

_PATHS = {"data": ("paths", "test_paths"), "codec": ("path",), "check": ("inception",)}  # keys of a recipe

__all__ = ["NOT_CHECKED", "sections"]


def sections(path: Path, receipt: dict[str, Any]) -> list[Section]:
    """The sections of a model folder's card. Raises UserError when its recipe cannot be read."""
    recipe = recipes.read(path / "recipe.toml")
    medium = importlib.import_module(f"handmill.card.{recipe.medium}")
    manifest, report = facts.read(path / "data" / "manifest.json"), facts.read(path / "data" / "report.json")
    check = current_check(receipt)
    limits = [*medium.limits(path, recipe, report, check), *_warnings(check)]
    return [
        Section(recipe.name, _head(recipe, receipt, medium.head(path, recipe), check, medium.SEEN)),
        Section("Use and limits", [Points(limits)]),
        Section("Data", [facts.sources(manifest), *medium.data(path, report)]),
        Section("Training", _training(path, receipt.get("training", {}), report)),
        *medium.measured(path, recipe, check),
        Section("Exports", _exports(receipt)),
        Section("Settings", [Text("The whole recipe, defaults filled in; files without their folders."),
                             Code(tomli_w.dumps(_public_recipe(recipe)).strip())]),
        Section("Licence", _licence(medium.DATA, manifest)),
    ]


def current_check(receipt: dict[str, Any]) -> dict[str, Any]:
    """The check of these very weights, {} where there is none."""
    check: dict[str, Any] = receipt.get("check") or {}
    return check if check.get("weights") == facts.weights(receipt) else {}


def _head(recipe: Recipe, receipt: dict[str, Any], special: list[Row], check: dict[str, Any],
          seen: str) -> list[Block]:
    rows: list[Row] = [
        ("medium, family", f"{recipe.medium}, {recipe.family}"),
        ("network", _network(recipe)),
        ("parameters", number(receipt.get("training", {}).get("parameters"))),
        *special,
        ("made", f"{receipt.get('created', 'not recorded')} with handmill {receipt.get('handmill', '?')}"),
        ("weights", f"sha256 {facts.digest(receipt.get('files', {}).get('weights.safetensors', {}))}"),
    ]
    verdict = check.get("verdict", {}).get("text")
    said = f"{seen}: {verdict}." if verdict else NOT_CHECKED
    article = "An" if recipe.medium[0] in "aeiou" else "A"
    return [Text(f"{article} {recipe.medium} model made with Handmill. {said}"), Table([("", ""), *rows])]


def _network(recipe: Recipe) -> str:
    named = ("layers", "width", "heads")
    parts = [f"{getattr(recipe.network, name)} {name}" for name in named if hasattr(recipe.network, name)]
    return ", ".join([recipe.network.kind, *parts]).replace(" width", " wide")


def _warnings(check: dict[str, Any]) -> list[str]:
    verdict = check.get("verdict")
    if verdict is None:
        return ["Its quality and its copying were not measured: do not rely on either."]
    return [] if verdict.get("good") else [f"Its check does not call it good: {verdict.get('text', '')}."]


def _training(path: Path, training: dict[str, Any], report: dict[str, Any]) -> list[Block]:
    unit, measure = training.get("unit", "items"), training.get("measure", "")
    items, once = training.get("items"), report.get("splits", {}).get("train", {}).get(unit)
    passes = f" ({items / once:.1f} times the training split)" if items and once else ""
    early = " (stopped early)" if training.get("stopped_early") else ""
    rows: list[Row] = [
        ("steps", number(training.get("steps")) + early),
        (unit, number(items) + passes), ("time", facts.seconds(training.get("seconds"))),
        ("last training loss", facts.loss(training.get("loss"), training.get("training_measure") or measure)),
        ("last validation loss", facts.loss(training.get("validation_loss"), measure)),
        *((name, str(training.get(key, "not recorded"))) for name, key in
          (("seed", "seed"), ("precision", "precision"), ("compiled", "compile"), ("processes", "processes"))),
        ("machine", ", ".join(f"{k} {v}" for k, v in training.get("machine", {}).items()) or "not recorded")]
    drawn = facts.picture(path, "loss.png", "Loss over the steps of training", "Not drawn: the loss curve.")
    return [Table([("", ""), *rows]), *_plan(training.get("plan")), drawn]


def _plan(plan: dict[str, Any] | None) -> list[Block]:
    if not plan:
        return [Text("Not recorded: what the plan predicted.")]
    rows: list[Row] = [("", "planned", "actual")]
    sides = [plan.get(side, {}) for side in ("predicted", "actual")]
    for key in dict.fromkeys(key for side in sides for key in side):
        form = duration if key.endswith("seconds") else size if key.endswith("bytes") else str
        name = key.removesuffix("_bytes").replace("_", " ")
        rows.append((name, *("not recorded" if side.get(key) is None else form(side[key]) for side in sides)))
    return [Table(rows)]


def _exports(receipt: dict[str, Any]) -> list[Block]:
    exports = receipt.get("exports", {})
    if not exports:
        return [Text("None made.")]
    texts = any("greedy_tokens" in export for export in exports.values())
    rows: list[Row] = [("form", "made", "compared with", "largest error",
                        *(["greedy tokens alike"] if texts else []))]
    for name, export in exports.items():
        rows.append((name, str(export.get("made", "?")), str(export.get("compared_with", "not recorded")),
                     _error(export), *([number(export.get("greedy_tokens"))] if texts else [])))
    now = facts.weights(receipt)
    stale = [name for name, export in exports.items() if export.get("weights", now) != now]
    return [Table(rows), *([Text(f"Made of other weights than these: {', '.join(stale)}.")] if stale else [])]


def _error(export: dict[str, Any]) -> str:
    """The largest difference from the trained network: of the logits, or of the worst of several graphs."""
    logits = {"largest_error": export.get("logits_error"), "tolerance": export.get("tolerance")}
    graphs = export.get("graphs") or {"logits": logits}
    errors = {name: graph["largest_error"] for name, graph in graphs.items() if graph.get("largest_error") is not None}
    if not errors:
        return "not measured"
    worst = max(errors, key=errors.__getitem__)
    allowed = graphs[worst].get("tolerance")
    return f"{errors[worst]:.1e}" + (f" ({worst}; {allowed:.0e} allowed)" if allowed else "")


def _licence(what: str, manifest: dict[str, Any]) -> list[Block]:
    counts = Counter(str(source.get("licence", "unknown")) for source in manifest.get("sources", []))
    if not counts:
        return [Text("Not recorded: the licence of the training data.")]
    named = "; ".join(f"{licence} ({count:,} source{'s' * (count > 1)})"
                      for licence, count in counts.most_common())
    warning = (" Some of it is of unknown licence: find out before the model is given to others."
               if "unknown" in counts else "")
    return [Text(f"The weights were made of {what} under: {named}.{warning}")]


def _public_recipe(recipe: Recipe) -> dict[str, Any]:
    table = recipe.table()
    for part, keys in _PATHS.items():
        for key in keys & table[part].keys():
            value = table[part][key]
            table[part][key] = facts.name(value) if isinstance(value, str) else [facts.name(path) for path in value]
    return table
