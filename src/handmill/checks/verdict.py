"""A check in plain words: what the figures show, and the lines for the screen."""

from typing import Any

from handmill.checks import code, memory
from handmill.checks.tables import aligned, percent, shown

__all__ = ["aligned", "carried_lines", "copying_table", "lines", "percent", "shown", "verdict"]

_NAMES = {"trigram": "trigram model", "xz": "xz", "xz_trained": "xz after training text"}


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Plain words and their grounds. None: could not be measured, or too little text to tell.

    `copies` is true where the share of generated text found in the training text is shown to lie above that of
    held-out text by more than the margin, at any length.

    `good` is true only where the model is shown to be better than a trigram model and than xz, and no copier; what it
    makes of code is told beside it.
    """
    trigram, worse = _against_trigram(result["baselines"]["trigram"])
    xz, worse_than_xz, rival = _against_xz(result)
    copying = result["copying"]
    copies = None if "missing" in copying else bool(copying["much_more_at"])
    words = [_words("a trigram model", trigram, worse, result["baselines"]["trigram"].get("missing")),
             _words(rival, xz, worse_than_xz, None), _copies(copying), *_code(result)]
    return {"text": "; ".join(words), "better_than_trigram": trigram, "better_than_xz": xz, "copies": copies,
            "good": trigram is True and xz is True and copies is False}


def lines(result: dict[str, Any]) -> list[str]:
    """What the screen shows: a small table, the figure and its interval first."""
    held, found = result["held_out"], result["likelihood"]
    unit = found["bits_per_character"]
    rows = [("this model", found), *((_NAMES[name], base) for name, base in result["baselines"].items())]
    table = [("", "bits per character", "bits per byte")]
    table += [(name, row["missing"], "") if "missing" in row else
              (name, shown(row["bits_per_character"]), shown(row["bits_per_byte"])) for name, row in rows]
    return [
        f"{held['split']} text: {held['documents']:,} of {held['documents_in_split']:,} documents, "
        f"{held['characters']:,} characters, {held['tokens']:,} tokens", "",
        *aligned(table), "",
        f"perplexity {shown(found['perplexity'])}, {shown(found['nats_per_token'])} nats, per token", "",
        *_copying_lines(result["copying"]), "", *_code_lines(result), *memory.lines(result.get("memory", [])),
        f"intervals of 95 %: {unit['method']}, n = {unit['n']}", *carried_lines(result),
        f"verdict: {result['verdict']['text']}"]


def carried_lines(result: dict[str, Any]) -> list[str]:
    """Which figures are those of an earlier check, none or one line."""
    earlier = result.get("carried")
    return [f"measured {earlier['created']}, while the training data were at hand: "
            f"{', '.join(earlier['parts'])}"] if earlier else []


def copying_table(copying: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Copied shares by length: header and rows."""
    rows = [("characters in a row", "generated text", "held-out text")]
    for length, row in copying["lengths"].items():
        rows.append((length, row["missing"], "") if "missing" in row else
                    (length, percent(row["generated"]), percent(row["held_out"])))
    return rows


def _against_trigram(trigram: dict[str, Any]) -> tuple[bool | None, bool]:
    """(better, or None; worse), from the paired difference on the same text."""
    saved = trigram.get("model_saves_bits_per_character")
    if saved is None or saved["low"] is None:
        return None, False
    return (True if saved["low"] > 0 else False if saved["high"] < 0 else None), saved["high"] < 0


def _against_xz(result: dict[str, Any]) -> tuple[bool | None, bool, str]:
    """(better, or None; worse; which), against the better of the two ways to use xz."""
    reached = {name: result["baselines"][name] for name in ("xz", "xz_trained")}
    bits = {name: base["bits_per_character"]["value"] for name, base in reached.items() if "missing" not in base}
    rival = min(bits, key=bits.__getitem__)
    model = result["likelihood"]["bits_per_character"]
    if model["low"] is None:
        return None, False, _NAMES[rival]
    worse = model["low"] > bits[rival]
    return (True if model["high"] < bits[rival] else False if worse else None), worse, _NAMES[rival]


def _words(rival: str, better: bool | None, worse: bool, missing: str | None) -> str:
    if missing:
        return f"against {rival} {missing}"
    return f"{'better' if better else 'worse' if worse else 'not shown to be better'} than {rival}"


def _copies(copying: dict[str, Any]) -> str:
    if "missing" in copying:
        return f"copying {copying['missing']}"
    if copying["much_more_at"]:
        at = ", ".join(map(str, copying["much_more_at"]))
        return f"copies: repeats its training text more than held-out text does (at {at} characters in a row)"
    if copying["more_at"]:
        at = ", ".join(map(str, copying["more_at"]))
        return (f"repeats its training text slightly more than held-out text does (at {at} characters in a row, not "
                f"shown to be over {100 * copying['margin']:g} % of the text more)")
    return "not shown to repeat its training text more than held-out text does"


def _copying_lines(copying: dict[str, Any]) -> list[str]:
    if "missing" in copying:
        return [f"found word for word in the training text: {copying['missing']}"]
    longest = copying["longest"]
    run = (f"longest run copied: {longest['characters']} characters, in sample {longest['text']}, "
           f"from training document {longest['document']}" if longest else "no character copied")
    return ["found word for word in the training text:", *aligned(copying_table(copying)), run]


def _code(result: dict[str, Any]) -> list[str]:
    found = result.get("code")
    return [] if found is None else [f"code {found['missing']}"] if "missing" in found else code.words(found)


def _code_lines(result: dict[str, Any]) -> list[str]:
    found = result.get("code")
    if found is None:
        return []
    return [f"Python functions: {found['missing']}" if "missing" in found else "\n".join(code.lines(found)), ""]
