"""What the user is told of the data: the values of report.json, and a few lines of them for the screen."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from handmill.data.corpus import Corpus
from handmill.data.ingest import Notes
from handmill.data.languages import LOOK, language
from handmill.data.sources import CODE, Source
from handmill.data.splits import Parts
from handmill.media.tokenizers import Tokenizer
from handmill.recipe import Recipe

_LANGUAGES = 5  # on the screen
_SAMPLED = 2000  # documents whose language is guessed


def compose(recipe: Recipe, notes: Notes, corpus: Corpus, parts: Parts, about: dict[str, dict[str, int]],
            codec: Tokenizer, work: Path, sources: list[Source]) -> dict[str, Any]:
    """The report, but for the time taken."""
    kept = np.sort(np.concatenate(list(parts.values())))
    counts = np.bincount(corpus.sources[kept], minlength=len(sources)).tolist()
    for entry, count in zip(notes.manifest, counts, strict=True):
        entry["kept"] = count
    return {
        "sources": {"files": len(sources), "left_out": notes.skipped.files,
                    "records_left_out": notes.skipped.records, "first_left_out": notes.skipped.first},
        "documents": {"read": notes.read, "too_short": notes.empty, "cut": notes.cut, "kept": len(kept)},
        "tokens": sum(split["tokens"] for split in about.values()),
        "splits": about,
        "split": recipe.data.split,
        "tokenizer": _tokenizer(codec, about),
        "lengths": _lengths(work, about),
        "languages": _languages(corpus, kept, sources),
        "cleaning": dict(notes.cleaned),
        "boilerplate": notes.boilerplate,
        "secrets": {"counts": dict(notes.secrets.counts), "first": notes.secrets.first},
        "emails": {"count": notes.emails.counts.total(), "first": notes.emails.first},
        "duplicates": notes.copies,
        "overlap": notes.overlap,
        "remarks": _remarks(recipe, about, notes),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for the screen."""
    documents, copies, left_out = report["documents"], report["duplicates"], report["sources"]
    lengths, shares = report["lengths"], list(report["languages"]["shares"].items())[:_LANGUAGES]
    secrets, emails = sum(report["secrets"]["counts"].values()), report["emails"]["count"]
    lines = [
        f"documents   {documents['read']:,} read, {documents['cut'] + ', ' if documents['cut'] else ''}"
        f"{documents['kept']:,} kept; "
        f"{copies['exact']:,} exact and {copies['near']:,} near duplicates removed",
        "splits      " + ", ".join(f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens"
                                   for name, split in report["splits"].items() if split["documents"]),
        f"tokenizer   {report['tokenizer']['kind']}, {report['tokenizer']['size']:,} tokens, "
        f"{report['tokenizer']['bytes_per_token']:.2f} bytes a token",
        f"lengths     {lengths['median']:,} tokens a document in the middle, {lengths['shortest']:,} to "
        f"{lengths['longest']:,}",
        "languages   " + ", ".join(f"{name} {share:.0%}" for name, share in shares) + " (estimated)",
        f"found       {secrets:,} secrets, {emails:,} e-mail addresses",
        f"overlap     {_overlap(report['overlap'])}",
    ]
    if left_out["first_left_out"]:
        lines.append(f"left out    {left_out['left_out']:,} files and {left_out['records_left_out']:,} "
                     f"records, first {left_out['first_left_out'][0]}")
    if report["boilerplate"]["lines"]:
        lines.append(f"boilerplate {report['boilerplate']['lines']:,} lines removed, "
                     f"most often {report['boilerplate']['top'][0]['line'][:60]!r}")
    return lines + [f"note        {remark}" for remark in report["remarks"]]


def _overlap(seen: dict[str, Any]) -> str:
    windows = seen["windows"]
    text = ""
    if "exact" in seen:
        text = f"{seen['exact']:,} exact and {seen['near']['pairs']:,} near copies across the splits; "
    if windows["share"] is None:
        return text + f"no held-out document has {windows['words']} words in a row to look for"
    return (text + f"{windows['share']:.2%} of {windows['windows']:,} held-out {windows['words']}-word windows and "
            f"most of {windows['mostly_seen']:,} of {windows['documents']:,} documents occur in the training split")


def _tokenizer(codec: Tokenizer, about: dict[str, dict[str, int]]) -> dict[str, Any]:
    held = about["validation"]
    tokens = held["tokens"] - held["documents"]
    ratio = round(held["bytes"] / max(1, tokens), 4)
    return {"kind": codec.kind, "size": codec.size, "bytes_per_token": ratio, "measured_on": "validation"}


def _lengths(work: Path, about: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Tokens a document, without `end`."""
    lengths = np.concatenate([np.diff(np.load(work / f"{name}.starts.npy"), append=split["tokens"]) - 1
                              for name, split in about.items()])
    marks = np.percentile(lengths, [0, 10, 50, 90, 99, 100], method="nearest").tolist()
    names = ("shortest", "p10", "median", "p90", "p99", "longest")
    return {"unit": "tokens", **dict(zip(names, marks, strict=True)), "mean": round(float(lengths.mean()), 1)}


def _languages(corpus: Corpus, kept: np.ndarray[Any, Any], sources: list[Source]) -> dict[str, Any]:
    """Shares of a sample of documents; "code" goes by the ending of the file."""
    sample = kept[::1 + len(kept) // _SAMPLED]
    counts: Counter[str] = Counter()
    for document in sample.tolist():
        if sources[corpus.sources[document]].suffix in CODE:
            counts["code"] += 1
        else:
            counts[language(corpus.head(document)[:4 * LOOK].decode("utf-8", "ignore"))] += 1
    shares = {name: round(count / len(sample), 4) for name, count in counts.most_common()}
    return {"estimated": True, "documents": len(sample), "shares": shares}


def _remarks(recipe: Recipe, about: dict[str, dict[str, int]], notes: Notes) -> list[str]:
    remarks = []
    assert all(about[name]["tokens"] for name in ("train", "validation")), "a split is empty"
    if pairs := notes.overlap.get("near", {}).get("pairs"):
        remarks.append(f"{pairs:,} pairs of near copies stand on both sides of the split: "
                       f"data.near_duplicates = {notes.overlap['near']['jaccard']:g} removes them")
    total = sum(split["bytes"] for split in about.values())
    for name, asked in (("validation", recipe.data.validation), ("test", recipe.data.test)):
        share = about[name]["bytes"] / total
        if asked and not asked / 2 <= share <= 2 * asked:
            remarks.append(f"{name} holds {share:.1%} of the text where {asked:.1%} was asked for, because "
                           "documents stay whole: data.document = \"paragraph\" makes smaller ones")
        if about[name]["unknown"]:
            remarks.append(f"{about[name]['unknown']:,} characters of {name} are unknown to the tokenizer")
    return remarks
