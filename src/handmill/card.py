"""The card of a model: what it is, what it was made of and how, what it can do, in sections for a page.

Every sentence comes from the model folder. What was not measured is said to be not measured; no path of the
machine gets in.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import tomli_w

from handmill import recipe as recipes
from handmill.checks.verdict import carried_lines, copying_table, shown
from handmill.page import Block, Code, Picture, Points, Section, Table, Text
from handmill.recipe import Recipe
from handmill.training.monitor import duration, size

NOT_CHECKED = "Not measured: run `handmill check` on this model folder."
_SOURCES, _SAMPLES, _CHARACTERS = 20, 4, 1200  # shown
_NAMES = {"trigram": "character trigram model", "xz": "xz -9e, this text alone",
          "xz_trained": "xz -9e, after the training text"}

Row = tuple[str, ...]


def sections(path: Path, receipt: dict[str, Any]) -> list[Section]:
    """The sections of a model folder's card. Raises UserError when its recipe cannot be read."""
    recipe = recipes.read(path / "recipe.toml")
    manifest, report = _json(path / "data" / "manifest.json"), _json(path / "data" / "report.json")
    check = _current_check(receipt)
    return [
        Section(recipe.name, _head(path, recipe, receipt, check)),
        Section("Use and limits", [Points(_limits(recipe, report, check))]),
        Section("Data", _data(manifest, report)),
        Section("Training", _training(path, receipt.get("training", {}), report)),
        Section("Quality on held-out text", _quality(check)),
        Section("Copying from the training text", _copying(check)),
        Section("Samples", _samples(path, check)),
        Section("Exports", _exports(receipt)),
        Section("Settings", [Text("The whole recipe, defaults filled in; files without their folders."),
                             Code(tomli_w.dumps(_public_recipe(recipe)).strip())]),
        Section("Licence", _licence(manifest)),
    ]


def _head(path: Path, recipe: Recipe, receipt: dict[str, Any], check: dict[str, Any]) -> list[Block]:
    training, tokenizer = receipt.get("training", {}), _json(path / "codec" / "tokenizer.json")
    count = training.get("parameters")
    rows: list[Row] = [
        ("medium, family", f"{recipe.medium}, {recipe.family}"),
        ("network", _network(recipe)),
        ("parameters", f"{count:,}" if isinstance(count, int) else "not recorded"),
        ("context", f"{recipe.network.context:,} tokens"),
        ("tokenizer", f"{recipe.codec.kind}, {_number(tokenizer.get('size'))} tokens"),
        ("made", f"{receipt.get('created', 'not recorded')} with handmill {receipt.get('handmill', '?')}"),
        ("weights", f"sha256 {_digest(receipt.get('files', {}).get('weights.safetensors', {}))}"),
    ]
    verdict = check.get("verdict", {}).get("text")
    said = f"On text it has not seen: {verdict}." if verdict else NOT_CHECKED
    return [Text(f"A {recipe.medium} model made with Handmill. {said}"), Table([("", ""), *rows])]


def _network(recipe: Recipe) -> str:
    named = ("layers", "width", "heads")
    parts = [f"{getattr(recipe.network, name)} {name}" for name in named if hasattr(recipe.network, name)]
    return ", ".join([recipe.network.kind, *parts]).replace(" width", " wide")


def _limits(recipe: Recipe, report: dict[str, Any], check: dict[str, Any]) -> list[str]:
    points = [_purpose(report),
              "It continues text. It was not trained to answer, to follow instructions or to be safe, and "
              "what it writes may be false, offensive or about real people.",
              f"It does not see farther back than its context of {recipe.network.context:,} tokens."]
    if recipe.codec.kind == "character":
        points.append("It knows only the characters of its training text.")
    secrets = sum(report.get("secrets", {}).get("counts", {}).values())
    if secrets:
        points.append(f"{secrets:,} possible secrets (keys, passwords) were found in its training text, and "
                      "it may repeat them: look at data/report.json before sharing it.")
    verdict = check.get("verdict")
    if verdict is None:
        points.append("Its quality and its copying were not measured: do not rely on either.")
    elif not verdict.get("good"):
        points.append(f"Its check does not call it good: {verdict.get('text', '')}.")
    return points


def _purpose(report: dict[str, Any]) -> str:
    shares = report.get("languages", {}).get("shares", {})
    if not shares:
        return "It is meant for text like its training text, whose languages were not estimated."
    named = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:4] if share >= 0.005)
    return f"It is meant for text like its training text (languages, estimated by document: {named})."


def _data(manifest: dict[str, Any], report: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = [_sources(manifest)]
    if not report:
        return [*blocks, Text("Not recorded: how the data were cleaned and split.")]
    documents, copies = report.get("documents", {}), report.get("duplicates", {})
    found = sum(report.get("secrets", {}).get("counts", {}).values())
    rows: list[Row] = [
        ("documents read", _number(documents.get("read"))),
        ("documents kept", _number(documents.get("kept"))),
        ("exact duplicates removed", _number(copies.get("exact"))),
        (f"near duplicates removed (Jaccard {copies.get('jaccard', '?')})", _number(copies.get("near"))),
        ("possible secrets found", f"{found:,}" if "secrets" in report else "not measured"),
        ("e-mail addresses found", _number(report.get("emails", {}).get("count"))),
        ("languages (estimated)", _languages(report)),
        ("overlap of held-out and training text", _overlap(report))]
    splits = [("split", "documents", "tokens", "bytes"),
              *((name, *(_number(part.get(key)) for key in ("documents", "tokens", "bytes")))
                for name, part in report.get("splits", {}).items())]
    remarks = [_public(remark) for remark in report.get("remarks", [])]
    return [*blocks, Table([("", ""), *rows]), Table(splits), *([Points(remarks)] if remarks else [])]


def _sources(manifest: dict[str, Any]) -> Block:
    sources = manifest.get("sources", [])
    if not sources:
        return Text("Not recorded: the sources of the data.")
    rows: list[Row] = [(_name(source.get("path", "?")), size(source.get("bytes", 0)),
                        source.get("licence", "unknown"), _digest(source)) for source in sources[:_SOURCES]]
    if len(sources) > _SOURCES:
        rows.append((f"and {len(sources) - _SOURCES:,} more, listed in data/manifest.json", "", "", ""))
    return Table([("source", "size", "licence", "sha256"), *rows])


def _languages(report: dict[str, Any]) -> str:
    shares = report.get("languages", {}).get("shares", {})
    return ", ".join(f"{name} {share:.1%}" for name, share in list(shares.items())[:6]) or "not measured"


def _overlap(report: dict[str, Any]) -> str:
    seen = report.get("overlap", {})
    windows = seen.get("windows", {})
    parts = []
    if "exact" in seen:
        parts.append(f"{seen['exact']:,} held-out documents occur in the training split")
    if "near" in seen:
        parts.append(f"{seen['near'].get('pairs', 0):,} are near duplicates of one in it")
    if windows.get("share") is not None:
        parts.append(f"{windows['share']:.2%} of {windows['windows']:,} held-out windows of "
                     f"{windows['words']} words occur in it")
    return "; ".join(parts) or "not measured"


def _training(path: Path, training: dict[str, Any], report: dict[str, Any]) -> list[Block]:
    tokens, once = training.get("tokens"), report.get("splits", {}).get("train", {}).get("tokens")
    passes = f" ({tokens / once:.1f} times the training split)" if tokens and once else ""
    early = " (stopped early)" if training.get("stopped_early") else ""
    rows: list[Row] = [
        ("steps", _number(training.get("steps")) + early),
        ("tokens", _number(tokens) + passes), ("time", _seconds(training.get("seconds"))),
        ("last training loss", _nats(training.get("loss"))),
        ("last validation loss", _nats(training.get("validation_loss"))),
        ("seed", str(training.get("seed", "not recorded"))),
        ("precision", str(training.get("precision", "not recorded"))),
        ("compiled", str(training.get("compile", "not recorded"))),
        ("processes", str(training.get("processes", "not recorded"))),
        ("machine", ", ".join(f"{k} {v}" for k, v in training.get("machine", {}).items()) or "not recorded")]
    curve = path / "loss.png"
    drawn: Block = Picture("loss.png", "Loss over the steps of training") if curve.is_file() else Text(
        "Not drawn: the loss curve.")
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


def _quality(check: dict[str, Any]) -> list[Block]:
    if not check:
        return [Text(NOT_CHECKED)]
    held, found = check["held_out"], check["likelihood"]
    rows: list[Row] = [("", "bits per character", "bits per byte"),
                       ("this model", shown(found["bits_per_character"]), shown(found["bits_per_byte"]))]
    for name, base in check["baselines"].items():
        cells = (base["missing"], "") if "missing" in base else (
            shown(base["bits_per_character"]), shown(base["bits_per_byte"]))
        rows.append((_NAMES[name], *cells))
    unit = found["bits_per_character"]
    return [
        Text(f"Measured on {held['documents']:,} of {held['documents_in_split']:,} documents of the "
             f"{held['split']} split: {held['characters']:,} characters, {held['tokens']:,} tokens. Lower is "
             f"better; in brackets the interval of 95 %, by {unit['method']}, n = {unit['n']:,}."),
        Table(rows),
        Text(f"Perplexity per token: {shown(found['perplexity'])}; it compares only with models of the same "
             f"tokenizer. {shown(found['nats_per_token'])} nats per token."),
        Text(f"Counted: {found['counted']}. Network in {found['precision']}, windows of {found['context']:,} "
             f"tokens, {found['stride']:,} from one to the next. Characters the tokenizer does not know: "
             f"{held['unknown_characters']:,}."),
        *map(Text, carried_lines(check)), Text(f"Verdict: {check['verdict']['text']}.")]


def _copying(check: dict[str, Any]) -> list[Block]:
    if not check:
        return [Text(NOT_CHECKED)]
    copying = check["copying"]
    if "missing" in copying:
        return [Text(f"{copying['missing'].capitalize()}.")]
    longest = copying["longest"]
    run = (f"The longest run that a sample copies has {longest['characters']:,} characters (sample "
           f"{longest['text']}, training document {longest['document']:,})." if longest else
           "No sample copies a character.")
    return [Text(f"The share of {copying['samples']:,} generated texts that stands word for word in the "
                 f"training text, beside the same for {copying['held_out_excerpts']:,} excerpts of held-out "
                 "text, with intervals of 95 % over texts."), Table([*copying_table(copying)]), Text(run)]


def _samples(path: Path, check: dict[str, Any]) -> list[Block]:
    about = check.get("samples", {})
    texts = _sample_texts(path / about["file"]) if about.get("count") else []
    if not texts:
        return [Text("None recorded: `handmill check` makes them.")]
    drawn = ", ".join(f"{key} {value}" for key, value in about["sampling"].items() if value != [])
    blocks: list[Block] = [Text(f"The first {min(_SAMPLES, len(texts))} of {len(texts)}, not chosen, from an "
                                f"empty prompt with seed {check['seed']} ({drawn}).")]
    for number, text in enumerate(texts[:_SAMPLES]):
        cut = " (cut)" if len(text) > _CHARACTERS else ""
        blocks.append(Code(text[:_CHARACTERS], f"Sample {number}{cut}"))
    return blocks


def _sample_texts(file: Path) -> list[str]:
    try:
        return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _exports(receipt: dict[str, Any]) -> list[Block]:
    exports = receipt.get("exports", {})
    if not exports:
        return [Text("None made.")]
    rows: list[Row] = [("form", "made", "compared with", "largest error of a logit", "greedy tokens alike")]
    for name, export in exports.items():
        error = export.get("logits_error")
        rows.append((name, str(export.get("made", "?")), str(export.get("compared_with", "not recorded")),
                     "not measured" if error is None else f"{error:.1e}",
                     _number(export.get("greedy_tokens"))))
    now = _weights(receipt)
    stale = [name for name, export in exports.items() if export.get("weights", now) != now]
    return [Table(rows), *([Text(f"Made of other weights than these: {', '.join(stale)}.")] if stale else [])]


def _licence(manifest: dict[str, Any]) -> list[Block]:
    counts = Counter(str(source.get("licence", "unknown")) for source in manifest.get("sources", []))
    if not counts:
        return [Text("Not recorded: the licence of the training data.")]
    named = "; ".join(f"{licence} ({count:,} source{'s' * (count > 1)})"
                      for licence, count in counts.most_common())
    warning = (" Some of it is of unknown licence: find out before the model is given to others."
               if "unknown" in counts else "")
    return [Text(f"The weights were made of text under: {named}.{warning}")]


def _current_check(receipt: dict[str, Any]) -> dict[str, Any]:
    """The check of these very weights, {} where there is none."""
    check: dict[str, Any] = receipt.get("check") or {}
    return check if check.get("weights") == _weights(receipt) else {}


def _weights(receipt: dict[str, Any]) -> str | None:
    digest: str | None = receipt.get("files", {}).get("weights.safetensors", {}).get("sha256")
    return digest


def _public_recipe(recipe: Recipe) -> dict[str, Any]:
    table = recipe.table()
    if "paths" in table["data"]:
        table["data"]["paths"] = [_name(path) for path in table["data"]["paths"]]
    return table


def _name(path: str) -> str:
    """A path as the user gave it, or its last part where it is absolute, which is the machine's business."""
    absolute = re.match(r"[/\\~]|[A-Za-z]:", path)
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if absolute else path


def _public(sentence: str) -> str:
    """A sentence with absolute paths in it cut to their last parts."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:]+[/\\])+", "", sentence)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _nats(value: Any) -> str:
    return f"{value:.4f} nats per token" if isinstance(value, float) else "not recorded"


def _digest(entry: dict[str, Any]) -> str:
    return str(entry.get("sha256") or "not recorded")


def _seconds(value: Any) -> str:
    """Seconds, or a table of what they were spent on."""
    if isinstance(value, dict) and value:
        return (f"{duration(sum(value.values()))} ("
                + ", ".join(f"{name} {duration(part)}" for name, part in value.items()) + ")")
    return duration(value) if isinstance(value, (int, float)) else "not recorded"
