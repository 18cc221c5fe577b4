"""A check of images in plain words: what the figures show, and the lines for the screen."""

from typing import Any

from handmill.checks.collapse import collapsed
from handmill.checks.verdict import aligned, carried_lines, percent, shown

ENOUGH = 0.75  # of what real images reach: less is not called good
COPIED = 0.01  # of the samples, more than of real images, may stand out as near to one training image
_TELLING = ("precision", "recall", "density", "coverage")
_MEANING = {"precision": "look like real images", "recall": "real images that could be made",
            "density": "in the thick of real images", "coverage": "real images with a sample near"}


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Plain words and their grounds. None: could not be measured.

    `good` is true only where precision, recall, density and coverage are shown to reach ENOUGH of the floor's, where
    samples show the class asked for as often in proportion, where no loss of variety and no copying is shown.
    """
    what = result["samples"]["what"]
    alike, words = _alike(result["fidelity"], what)
    lost = collapsed(result["fidelity"])
    obeys, said = _obeys(result["labels"], what)
    copies, told = _copies(result["copying"])
    known = [value for value in (alike, obeys, None if copies is None else not copies) if value is not None]
    return {"text": "; ".join(part for part in (words, lost, said, told) if part), "like_real": alike,
            "varied": None if alike is None else not lost, "obeys": obeys, "copies": copies,
            "good": alike is True and not lost and all(known)}


def _alike(fidelity: dict[str, Any], what: str) -> tuple[bool | None, str]:
    if "missing" in fidelity:
        return None, f"likeness {fidelity['missing']}"
    short = [name for name in _TELLING
             if (fidelity["generated"][name]["low"] or 0.0) < ENOUGH * fidelity["floor"][name]["value"]]
    if not short:
        return True, f"{what} reach {ENOUGH:.0%} of what real images reach in {', '.join(_TELLING)}"
    worst = min(short, key=lambda name: fidelity["generated"][name]["value"] / (fidelity["floor"][name]["value"] or 1))
    return False, (f"{what} fall short of real images in {', '.join(short)} (worst: {worst} "
                   f"{fidelity['generated'][worst]['value']:.3f} against {fidelity['floor'][worst]['value']:.3f})")


def _obeys(labels: dict[str, Any], what: str) -> tuple[bool | None, str]:
    agreement, ceiling = labels.get("agreement"), labels.get("ceiling")
    if not agreement or not ceiling:
        return None, ""
    enough = agreement["low"] >= ENOUGH * ceiling["value"]
    return enough, f"{agreement['value']:.1%} of {what} are seen as the class they should be of"


def _copies(copying: dict[str, Any]) -> tuple[bool | None, str]:
    if "missing" in copying:
        return None, f"copying {copying['missing']}"
    worst = max(copying["by"].values(), key=lambda found: found["excess"]["low"])
    if worst["excess"]["low"] > COPIED:
        return True, (f"copies: {worst['share_closer_than_real_1pct']['value']:.1%} of samples stand out as near to "
                      f"one training image, of real images {worst['share_of_real']['value']:.1%}")
    return False, "not shown to copy training images"


def lines(result: dict[str, Any]) -> list[str]:
    """What the screen shows."""
    held, samples = result["held_out"], result["samples"]
    shown_lines = [f"{held['split']} split: {held['images']:,} images; {samples['count']:,} {samples['what']}", "",
                   *_fidelity_lines(result["fidelity"]), *_label_lines(result["labels"]), "",
                   *_likelihood_lines(result["likelihood"]), *_code_lines(result["codes"]), "",
                   *_copying_lines(result["copying"]), "",
                   *(f"{what:24s}{file}" for what, file in result["pictures"].items()),
                   *carried_lines(result), f"verdict: {result['verdict']['text']}"]
    return [line for line, before in zip(shown_lines, ["", *shown_lines], strict=False) if line or before]


def fidelity_rows(fidelity: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Header and rows: a figure, of the model and of real images."""
    rows = [("", "generated", "real images")]
    for name, found in fidelity["generated"].items():
        meaning = f" ({_MEANING[name]})" if name in _MEANING else ""
        rows.append((name + meaning, shown(found), shown(fidelity["floor"][name])))
    return rows


def _fidelity_lines(fidelity: dict[str, Any]) -> list[str]:
    if "missing" in fidelity:
        return [f"likeness and variety {fidelity['missing']}"]
    method = fidelity["generated"]["coverage"]["method"]
    return [*aligned(fidelity_rows(fidelity)), f"n = {fidelity['n']:,} each; intervals of 95 %: {method}"]


def _label_lines(labels: dict[str, Any]) -> list[str]:
    if "missing" in labels:
        return []
    modes = labels["modes"]
    told = [f"classes seen {modes['modes']} of {len(modes['counts'])}, KL to the data's shares {modes['kl']:.4f} nats "
            f"(by chance {modes['kl_by_chance']:.4f})"]
    if labels["agreement"]:
        told.append(f"label agreement {percent(labels['agreement'])}, of real images {percent(labels['ceiling'])}")
    return told


def likelihood_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Every figure of the likelihood."""
    return [(name.replace("_", " "), shown(value)) for name, value in found.items()
            if isinstance(value, dict) and "value" in value]


def _likelihood_lines(found: dict[str, Any]) -> list[str]:
    if "missing" in found:
        return [f"likelihood {found['missing']}"]
    return [f"{found['kind']} ({found['counted']}; {found['images']:,} images):",
            *(f"  {name:20s}{value}" for name, value in likelihood_rows(found))]


def _code_lines(codes: dict[str, Any]) -> list[str]:
    if "missing" in codes:
        return []
    return [f"codes in use {codes['used']} of {codes['codes']}, perplexity {codes['perplexity']:.1f}"]


def _copying_lines(copying: dict[str, Any]) -> list[str]:
    if "missing" in copying:
        return [f"copies of training images: {copying['missing']}"]
    return ["samples that stand out as near to one training image:", *aligned(copying_rows(copying))]


def copying_rows(copying: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Header and rows: by pixels and by features, of samples and of real images."""
    rows = [("compared by", "generated", "real images")]
    for name, found in copying["by"].items():
        rows.append((name, percent(found["share_closer_than_real_1pct"]), percent(found["share_of_real"])))
        rows.append(("  distance to the nearest, over real images'", shown(found["median_ratio"]), "1"))
    return rows
