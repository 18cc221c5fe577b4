"""The sections of a card that only text has."""

from pathlib import Path
from typing import Any

from handmill.card import facts
from handmill.card.facts import NOT_CHECKED, Row, number
from handmill.checks import code
from handmill.checks.verdict import carried_lines, copying_table, shown
from handmill.disk import parsed
from handmill.page import Block, Code, Points, Section, Table, Text
from handmill.recipe import Recipe

DATA, SEEN = "text", "On text it has not seen"
_SAMPLES, _CHARACTERS = 4, 1200  # shown
_NAMES = {"trigram": "character trigram model", "xz": "xz -9e, this text alone",
          "xz_trained": "xz -9e, after the training text"}


def head(path: Path, recipe: Recipe) -> list[Row]:
    """Rows of the first table."""
    tokenizer = facts.read(path / "codec" / "tokenizer.json")
    return [("context", f"{recipe.network.context:,} tokens"),
            ("tokenizer", f"{recipe.codec.kind}, {number(tokenizer.get('size'))} tokens")]


def limits(path: Path, recipe: Recipe, report: dict[str, Any], check: dict[str, Any]) -> list[str]:
    """What it is for, and what it cannot do."""
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
    return points


def data(path: Path, report: dict[str, Any]) -> list[Block]:
    """How the text was cleaned and split."""
    if not report:
        return [Text("Not recorded: how the data were cleaned and split.")]
    documents, copies = report.get("documents", {}), report.get("duplicates", {})
    found = sum(report.get("secrets", {}).get("counts", {}).values())
    rows: list[Row] = [
        ("documents read", number(documents.get("read"))),
        ("documents kept", number(documents.get("kept"))),
        ("exact duplicates removed", number(copies.get("exact"))),
        (f"near duplicates removed (Jaccard {copies.get('jaccard', '?')})", number(copies.get("near"))),
        ("possible secrets found", f"{found:,}" if "secrets" in report else "not measured"),
        ("e-mail addresses found", number(report.get("emails", {}).get("count"))),
        ("languages (estimated)", _languages(report)),
        ("overlap of held-out and training text", _overlap(report))]
    splits = [("split", "documents", "tokens", "bytes"),
              *((name, *(number(part.get(key)) for key in ("documents", "tokens", "bytes")))
                for name, part in report.get("splits", {}).items())]
    remarks = [facts.public(remark) for remark in report.get("remarks", [])]
    return [Table([("", ""), *rows]), Table(splits), *([Points(remarks)] if remarks else [])]


def measured(path: Path, recipe: Recipe, check: dict[str, Any]) -> list[Section]:
    """What the check found."""
    return [Section("Quality on held-out text", _quality(check) if check else [Text(NOT_CHECKED)]),
            *([Section("Python that it writes", _code(check["code"]))] if "code" in check else []),
            Section("Copying from the training text", _copying(check["copying"]) if check else [Text(NOT_CHECKED)]),
            Section("Samples", _samples(path, check))]


def _purpose(report: dict[str, Any]) -> str:
    shares = report.get("languages", {}).get("shares", {})
    if not shares:
        return "It is meant for text like its training text, whose languages were not estimated."
    named = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:4] if share >= 0.005)
    return f"It is meant for text like its training text (languages, estimated by document: {named})."


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


def _quality(check: dict[str, Any]) -> list[Block]:
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


def _code(found: dict[str, Any]) -> list[Block]:
    if "missing" in found:
        return [Text(f"Code was {found['missing']}.")]
    return [Text(f"{code.heading(found)}. What parses and compiles may still be wrong: `pass` is a correct body. In "
                 "brackets the interval of 95 % (Wilson 1927)."),
            *(Table([*table]) for table in code.tables(found)), Points(code.remarks(found))]


def _copying(copying: dict[str, Any]) -> list[Block]:
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
    texts = _sample_texts(facts.inside(path, about["file"])) if about.get("count") else []
    if not texts:
        return [Text("None recorded: `handmill check` makes them.")]
    blocks: list[Block] = [Text(f"The first {min(_SAMPLES, len(texts))} of {len(texts)}, not chosen, from an empty "
                                f"prompt with seed {check['seed']} ({facts.sampling(about['sampling'])}).")]
    for i, text in enumerate(texts[:_SAMPLES]):
        cut = " (cut)" if len(text) > _CHARACTERS else ""
        blocks.append(Code(text[:_CHARACTERS], f"Sample {i}{cut}"))
    return blocks


def _sample_texts(file: Path) -> list[str]:
    try:
        return [parsed(line)["text"] for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError):
        return []
