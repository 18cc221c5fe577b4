"""A check of music in plain words: what the figures show, and the lines for the screen."""

from typing import Any

from handmill.checks import memory
from handmill.checks.tables import Row, aligned, percent, shown
from handmill.checks.verdict import carried_lines

KNOWN = 0.5  # of the new chords that held-out pieces have: fewer are copying
ENOUGH = 0.75  # of the way from chance to held-out pieces' scale consistency: less is out of reach
CHANCE = 7 / 12  # what even pitch classes have of a scale
FURTHER = 0.05  # of the sounding time may lie on other pitch classes than as many training pieces have it


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Plain words and their grounds. None: could not be measured, or too little music to tell.

    `copies` is true where samples are shown to have less than KNOWN of the new chords in a row that held-out pieces
    have, at any length. `good` is true only where the model is shown to be better than a trigram model, where scales
    and pitch classes are within reach of real ones, and where it is no copier.
    """
    better, against = _against_trigram(result["baselines"]["trigram"])
    tonal, scales = _tonal(result["style"])
    alike, classes = _alike(result["pitch_classes"])
    copies, told = _copies(result["novelty"]["found"])
    return {"text": "; ".join([against, scales, classes, told]), "better_than_trigram": better, "tonal": tonal,
            "pitch_classes": alike, "copies": copies,
            "good": better is True and tonal is True and alike is True and copies is False}


def lines(result: dict[str, Any]) -> list[str]:
    """What the screen shows."""
    held, samples, found = result["held_out"], result["samples"], result["likelihood"]
    steps = f", {held['steps']:,} steps of {held['step']}" if held["steps"] else ""
    return [
        f"{held['split']} pieces: {held['pieces']:,} of {held['pieces_in_split']:,}, {held['tokens']:,} tokens, "
        f"{held['notes']:,} notes{steps}", "",
        *aligned(likelihood_rows(result)), f"counted: {found['counted']}", f"read in {found['read']}", "",
        f"{samples['count']:,} samples, asked for {samples['asked']}", *_compared(result), "",
        *memory.lines(result.get("memory", [])),
        f"intervals of 95 %: {found['nats_per_token']['method']}, n = {found['nats_per_token']['n']}",
        *carried_lines(result), f"verdict: {result['verdict']['text']}"]


def units(result: dict[str, Any]) -> dict[str, str]:
    """What each figure of the likelihood is in, in words."""
    step = f"step of {result['held_out']['step']}"
    frames = result["held_out"]["steps"] > 0
    return {"nats_per_frame": f"nats per frame ({step}), over all frames",
            "nats_per_frame_mean_of_pieces": f"nats per frame ({step}), mean of the pieces' means",
            "nats_per_note": "nats per note of a step" if frames else "nats per note struck",
            "nats_per_token": "nats per token"}


def likelihood_rows(result: dict[str, Any]) -> list[Row]:
    """Header and rows: a figure, of the model, and of the trigram model or else of single tokens."""
    trigram = result["baselines"]["trigram"]
    rival = ("entropy of single tokens", result["baselines"]["unigram"]) if "missing" in trigram else (
        "trigram model", trigram)
    return [("", "this model", rival[0]),
            *((unit, shown(result["likelihood"][name]), shown(rival[1][name])) for name, unit in units(result).items()
              if name in result["likelihood"])]


def compared_rows(result: dict[str, Any]) -> list[Row]:
    """Header and rows: a figure, of samples and of held-out pieces."""
    style, apart, found = result["style"], result["pitch_classes"], result["novelty"]["found"]
    if "missing" in style:
        return []
    names = {"scale_consistency": "share of the notes in one scale, mean of pieces", "notes_per_step": "notes a step",
             "steps_per_piece": f"steps of {result['held_out']['step']} a piece"}
    rows: list[Row] = [("", "samples", "held-out pieces")]
    rows += [(unit, _cell(style[name]["generated"]), _cell(style[name]["held_out"])) for name, unit in names.items()]
    rows += [(f"{n} steps in a row that no training piece has, share", _cell(row["generated"], percent),
              _cell(row["held_out"], percent)) for n, row in found.get("steps_in_a_row", {}).items()]
    floor = "" if "missing" in apart["floor"] else f"{shown(apart['floor'])} of training pieces"
    return [*rows, ("total variation distance to held-out pitch classes", shown(apart["distance"]), floor)]


def longest_line(result: dict[str, Any]) -> str:
    """The longest run of chords that samples share with a training piece."""
    found, key = result["novelty"]["found"], " in any key" if result["novelty"].get("any_key") else ""
    if "missing" in found:
        return f"chords found in training pieces: {found['missing']}"
    made, held = found["longest"]["generated"], found["longest"]["held_out"]
    if made is None:
        return "no chord of a sample stands in a training piece"
    return (f"longest run of a sample in a training piece{key}: {made['steps']} steps of {result['held_out']['step']}, "
            f"sample {made['piece']}, in {made['training_piece']} (of as many held-out pieces: "
            f"{held['steps'] if held else 0} steps)")


def _compared(result: dict[str, Any]) -> list[str]:
    rows = compared_rows(result)
    if not rows:
        return [f"samples: {result['style']['missing']}"]
    cut = result["style"]["cut"]
    return [*aligned(rows), *[f"{cut:,} samples are as long as check.sample_tokens lets them be"] * bool(cut),
            longest_line(result)]


def _cell(figure: dict[str, Any], form: Any = shown) -> str:
    return str(figure["missing"] if "missing" in figure else form(figure))


def _against_trigram(trigram: dict[str, Any]) -> tuple[bool | None, str]:
    """From the paired difference on the same pieces."""
    if "missing" in trigram:
        return None, f"against a trigram model {trigram['missing']}"
    saved = trigram["model_saves_nats_per_token"]
    better = None if saved["low"] is None else True if saved["low"] > 0 else False if saved["high"] < 0 else None
    words = {True: "better", False: "worse", None: "not shown to be better"}
    return better, f"{words[better]} than a trigram model of its tokens"


def _tonal(style: dict[str, Any]) -> tuple[bool | None, str]:
    if "missing" in style:
        return None, f"samples {style['missing']}"
    made, held = style["scale_consistency"]["generated"], style["scale_consistency"]["held_out"]
    if "missing" in made or "missing" in held:
        return None, f"scales {made.get('missing') or held['missing']}"
    reached = made["value"] >= held["value"] - (1 - ENOUGH) * max(0.0, held["value"] - CHANCE)
    words = "keeps to scales as held-out pieces do" if reached else "keeps to scales less than held-out pieces do"
    return reached, f"{words} ({made['value']:.3f} of the notes against {held['value']:.3f})"


def _alike(classes: dict[str, Any]) -> tuple[bool | None, str]:
    if "missing" in classes or "missing" in classes["floor"]:
        return None, f"pitch classes {classes.get('missing') or classes['floor']['missing']}"
    apart, most = classes["distance"]["value"], classes["floor"]["high"]
    near = apart <= most + FURTHER
    return near, (f"pitch classes {'near' if near else 'far from'} those of held-out pieces (distance {apart:.3f}, "
                  f"as many training pieces up to {most:.3f})")


def _copies(found: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether fewer chords in a row are new than in held-out pieces, at the length where it is worst."""
    if "missing" in found:
        return None, f"copying {found['missing']}"
    told = {n: row for n, row in found["steps_in_a_row"].items()
            if "missing" not in row["generated"] and row["held_out"].get("value", 0.0) > 0
            and row["generated"]["high"] is not None}
    if not told:
        return None, "copying not measured: too few chords are new in held-out pieces or too few samples were made"
    n, worst = min(told.items(), key=lambda row: row[1]["generated"]["high"] / row[1]["held_out"]["value"])
    made, held = worst["generated"], worst["held_out"]
    copied = made["high"] < KNOWN * held["value"]
    figures = f"{made['value']:.1%} of {n} steps in a row are new, of held-out pieces' {held['value']:.1%}"
    return copied, f"copies: only {figures}" if copied else f"not shown to copy training pieces ({figures})"
