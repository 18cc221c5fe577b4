"""The check of a text model: likelihood beside what a compressor and a trigram model reach, copying, and code.

Every figure carries an interval, the number of units behind it, and how the interval was found.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from handmill import folder
from handmill.checks import baselines, code, memorisation, memory
from handmill.checks.characters import CHUNK, END, Codes, Spelling, documents, of
from handmill.checks.intervals import FEW, LEVEL, Figure, block_ratio, difference, ratio, share
from handmill.checks.likelihood import COUNTED, Scores, Selection, score, select, targets
from handmill.checks.verdict import lines, verdict
from handmill.data.packed import Packed
from handmill.errors import UserError
from handmill.families import autoregressive, filling
from handmill.folder import Model
from handmill.recipe import not_negative, positive

NO_TRAINING_DATA = "not measured: training data is not on this machine"
NO_SAMPLES = "not measured: check.samples is 0"
SAMPLES = "samples/check.jsonl"  # in the model folder
MARGIN = 0.01  # of a text's windows: every model repeats common phrases a little more often than people do
_AT_ONCE = 64  # samples
_EXCERPTS = 10_000  # at most

__all__ = ["Settings", "carry", "lines", "run", "training_split", "verdict"]


@dataclass(frozen=True)
class Settings:
    """The [check] table of a text model."""

    tokens: int = 500_000  # held-out tokens read, from documents in random order; 0: all
    stride: int = 0  # tokens from one window to the next in long documents; 0: half the context
    samples: int = 32  # texts made from nothing to look for copying; 0: none
    sample_tokens: int = 256  # at most, in each of them
    lengths: tuple[int, ...] = (16, 32, 64, 128)  # characters in a row that count as copied
    trigram_bytes: int = 10_000_000  # of the training text that the trigram model learns from, at most
    xz_bytes: int = 8_000_000  # of the training text that xz reads before the held-out text, at most
    functions: int = 0  # of held-out Python that are completed, and have a gap filled; 0: none
    function_characters: int = 1200  # of such a function, at most
    function_tokens: int = 256  # new ones of a completion or a filled gap, at most

    memories: tuple[int, ...] = ()  # positions of memory that perplexity is measured at, of a network with one

    def __post_init__(self) -> None:
        positive(self, "sample_tokens", "trigram_bytes", "xz_bytes", "function_characters", "function_tokens")
        not_negative(self, "tokens", "stride", "samples", "functions")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths = {list(self.lengths)} must name one or more lengths above 0")


class _Ground(NamedTuple):
    """What all parts of the check stand on."""

    model: Model
    settings: Settings
    spelling: Spelling
    selection: Selection
    held_out: NDArray[Any]  # tokens of the selected documents, each with its closing end
    training: NDArray[Any] | None  # tokens of the training split; None: not on this machine
    progress: bool

    @property
    def seed(self) -> int:
        return abs(self.model.recipe.seed) % autoregressive.SEEDS

    @property
    def context(self) -> int:
        return int(self.model.recipe.network.context)

    @property
    def stride(self) -> int:
        return self.settings.stride or max(1, self.context // 2)


def run(model: Model, settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Check a model on its held-out text; writes samples/check.jsonl into its folder and returns the figures.

    Raises UserError when the folder has no held-out text or a setting does not fit the network.
    """
    started = time.perf_counter()
    ground = _ground(model, settings, progress)
    scores = _score(ground)
    model_figures, baseline_figures = _likelihood(ground, scores), _baselines(ground, scores)
    samples = _samples(ground)
    result = {
        "seed": ground.seed,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()},
        "weights": _weights(model), "held_out": _held_out(ground, scores),
        "likelihood": model_figures, "baselines": baseline_figures,
        "samples": _save(model.path, samples, ground), "copying": _copying(ground, samples), **_code(ground),
        **memory.of(model, ground.selection, settings.memories, ground.seed, progress=progress),
    }
    return result | {"verdict": verdict(result), "seconds": time.perf_counter() - started}


def carry(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The result, with the figures that need the training text taken from an earlier check where they are missing.

    Only from a check of the same weights, settings and seed; copying only where the same texts were generated.
    """
    if not earlier or any(earlier.get(key) != result[key] for key in ("weights", "settings", "seed")):
        return result
    was = earlier["baselines"]
    parts = [name for name, base in result["baselines"].items() if "missing" in base and "missing" not in was[name]]
    kept: dict[str, Any] = {"baselines": result["baselines"] | {name: was[name] for name in parts}}
    if "missing" in result["copying"] and "missing" not in earlier["copying"] and (
            earlier["samples"]["sha256"] == result["samples"]["sha256"]):
        kept["copying"] = earlier["copying"]
        parts.append("copying")
    if not parts:
        return result
    carried = {"created": earlier.get("carried", earlier)["created"], "parts": parts}
    result = result | kept | {"carried": carried}
    return result | {"verdict": verdict(result)}


def training_split(model: Model) -> Packed | None:
    """The prepared data that the model was trained on, where they still lie beside the model folder."""
    return Packed.beside(model.path, model.receipt.get("training", {}).get("fingerprint"))


def _ground(model: Model, settings: Settings, progress: bool) -> _Ground:
    context = model.recipe.network.context
    if settings.stride > context:
        raise UserError(f"check.stride = {settings.stride} is above the network's context of {context}: "
                        "tokens between the windows would not be read")
    packed = Packed.open(model.path / "data")
    selection = select(packed, settings.tokens, abs(model.recipe.seed))
    train = training_split(model)
    return _Ground(model, settings, Spelling(model.codec), selection, targets(selection, model.codec.end),
                   None if train is None else train.tokens("train"), progress)


def _score(ground: _Ground) -> Scores:
    model = ground.model
    return score(model.network, ground.selection, ground.spelling, model.codec.end, ground.context,
                 ground.stride, model.device, ground.progress)


def _figure(scores: Scores, top: NDArray[Any], bottom: NDArray[Any], seed: int) -> Figure:
    """A ratio over documents, or over blocks of windows where documents are few; `top`, `bottom` are (W,)."""
    if len(np.unique(scores.document)) < FEW:
        return block_ratio(top, bottom, seed)
    return ratio(scores.by_document(top), scores.by_document(bottom), seed)


def _per_text(scores: Scores, nats: NDArray[np.float64], seed: int) -> dict[str, Any]:
    bits = nats / math.log(2)
    return {"bits_per_character": _figure(scores, bits, scores.characters, seed).plain(),
            "bits_per_byte": _figure(scores, bits, scores.bytes, seed).plain()}


def _likelihood(ground: _Ground, scores: Scores) -> dict[str, Any]:
    nats = _figure(scores, scores.nats, scores.tokens, ground.seed)
    return _per_text(scores, scores.nats, ground.seed) | {
        "nats_per_character": _figure(scores, scores.nats, scores.characters, ground.seed).plain(),
        "nats_per_token": nats.plain(), "perplexity": nats.exponential().plain(),
        "counted": COUNTED, "precision": "fp32", "context": ground.context, "stride": ground.stride}


def _held_out(ground: _Ground, scores: Scores) -> dict[str, Any]:
    unknown = getattr(ground.model.codec, "unknown", None)
    selection = ground.selection
    return {"split": selection.split, "whole": selection.whole,
            "documents": len(selection.starts), "documents_in_split": selection.documents_in_split,
            "tokens": int(scores.tokens.sum()), "bytes": int(scores.bytes.sum()),
            "characters": int(scores.characters.sum()),
            "unknown_characters": 0 if unknown is None else int((ground.held_out == unknown).sum())}


def _baselines(ground: _Ground, scores: Scores) -> dict[str, Any]:
    text = ground.spelling.spell(ground.held_out)
    found: dict[str, Any] = {"trigram": {"missing": NO_TRAINING_DATA}, "xz": _xz(scores, baselines.xz(text))}
    found["xz_trained"] = {"missing": NO_TRAINING_DATA}
    if ground.training is not None:
        found["trigram"] = _trigram(ground, ground.training, scores)
        known = ground.spelling.spell(
            baselines.excerpt(ground.training, ground.spelling, ground.settings.xz_bytes))
        found["xz_trained"] = _xz(scores, baselines.xz(text, known)) | {"training_bytes": len(known)}
    return found


def _xz(scores: Scores, bits: int) -> dict[str, Any]:
    counts = {"bits_per_character": scores.characters, "bits_per_byte": scores.bytes}
    return {name: {"value": bits / int(count.sum()), "low": None, "high": None, "n": 1,
                   "method": "the whole text at once: no interval"} for name, count in counts.items()}


def _trigram(ground: _Ground, training: NDArray[Any], scores: Scores) -> dict[str, Any]:
    packed = ground.spelling.read(baselines.excerpt(training, ground.spelling, ground.settings.trigram_bytes))
    known = np.append(packed[1:], np.int32(END))  # the ends then close documents, as in the held-out text
    each = baselines.Trigram(known).nats(ground.spelling.read(ground.held_out))
    total = np.concatenate(([0.0], np.cumsum(each)))
    ends = np.cumsum(scores.symbols)
    assert ends[-1] == len(each), "both models read the same text"
    nats = total[ends] - total[ends - scores.symbols]  # (W,)
    saved = _figure(scores, (nats - scores.nats) / math.log(2), scores.characters, ground.seed)
    return _per_text(scores, nats, ground.seed) | {
        "model_saves_bits_per_character": saved.plain(), "training_characters": int((known != END).sum()),
        "smoothing": baselines.SMOOTHING}


def _samples(ground: _Ground) -> list[str]:
    """Texts from nothing, with the recipe's own sampling but for their length and stop strings."""
    return _made(ground, [""] * ground.settings.samples, ground.settings.sample_tokens, "samples")


def _made(ground: _Ground, prompts: Sequence[str | Sequence[int]], new: int, title: str) -> list[str]:
    """What the model goes on with after each prompt, at most `new` tokens."""
    model, sampling, texts = ground.model, _sampling(ground, new), [""] * len(prompts)
    with tqdm(total=len(prompts), unit=" texts", desc=title, disable=not (ground.progress and prompts)) as bar:
        for first in range(0, len(prompts), _AT_ONCE):
            for piece in autoregressive.generate(model.network, model.codec, prompts[first:first + _AT_ONCE], sampling,
                                                 ground.seed, first=first):
                texts[first + piece.row] += piece.text
                bar.update(bool(piece.finish))
    return texts


def _sampling(ground: _Ground, new: int) -> autoregressive.Sampling:
    recipe: autoregressive.Sampling = ground.model.recipe.sampling
    return replace(recipe, max_tokens=new, stop=())


def _code(ground: _Ground) -> dict[str, Any]:
    """{"code": how many functions of the held-out text parse and compile}, or {} where it is not asked for."""
    model, settings = ground.model, ground.settings
    if not settings.functions:
        return {}

    def complete(prompts: list[str]) -> list[str]:
        # as in the midst of a file, for few begin with a function
        room = max(1, model.recipe.network.context - settings.function_tokens)
        return _made(ground, [model.codec.encode(prompt).tolist()[-room:] for prompt in prompts],
                     settings.function_tokens, "functions")

    def fill(gaps: list[tuple[str, str]]) -> list[str]:
        new = min(settings.function_tokens, filling.longest(model.recipe))
        return _made(ground, [filling.prompt(model.recipe, model.codec, *gap, new) for gap in gaps], new, "gaps")

    able = filling.taught(model.recipe, model.codec)
    try:
        return {"code": code.run(_documents(ground), settings.functions, settings.function_characters, ground.seed,
                                 complete, fill if able else None)}
    except UserError as error:
        return {"code": {"missing": f"not measured: {error}"}}


def _documents(ground: _Ground) -> list[str]:
    """The held-out documents; without those that hold a character unknown to the tokenizer."""
    codec, tokens = ground.model.codec, ground.held_out
    each = np.split(tokens, np.flatnonzero(tokens == codec.end))
    return [codec.decode(part) for part in each if codec.unknown is None or not (part == codec.unknown).any()]


def _save(path: Path, samples: Sequence[str], ground: _Ground) -> dict[str, Any]:
    file = path / SAMPLES
    file.parent.mkdir(exist_ok=True)
    rows = ({"sample": i, "seed": ground.seed, "text": text} for i, text in enumerate(samples))
    folder.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    about = {"file": SAMPLES, "count": len(samples), "prompt": "",
             "sampling": asdict(_sampling(ground, ground.settings.sample_tokens))}
    return about | folder.fingerprint(file)


def _copying(ground: _Ground, samples: list[str]) -> dict[str, Any]:
    if ground.training is None or not samples:
        return {"missing": NO_SAMPLES if ground.training is not None else NO_TRAINING_DATA}
    made = [of(text) for text in samples]
    excerpts = _excerpts(documents(ground.spelling.read(ground.held_out)), made, ground.seed)
    pieces = tqdm(ground.spelling.stream(ground.training), total=len(ground.training) // CHUNK + 1,
                  desc="training text", unit=" pieces", disable=not ground.progress)
    counts, longest = memorisation.copied([*made, *excerpts], pieces, ground.settings.lengths, len(made))
    found = {str(length): _compare(count, len(made), len(counts), ground.seed)
             for length, count in counts.items()}
    return {"unit": "characters", "samples": len(made), "held_out_excerpts": len(excerpts), "lengths": found,
            "more_at": [int(length) for length, row in found.items() if row.get("more")],
            "much_more_at": [int(length) for length, row in found.items() if row.get("much_more")], "margin": MARGIN,
            "longest": None if longest is None else longest._asdict()}


def _excerpts(texts: list[Codes], made: list[Codes], seed: int) -> list[Codes]:
    """Held-out text for comparison: from random places, as long as the samples, each within one document.

    Where no document is as long as a sample, more and shorter ones are taken.
    """
    generator = np.random.default_rng(seed)
    lengths, wanted = np.array([len(text) for text in texts], np.int64), sum(map(len, made))
    excerpts: list[Codes] = []
    while len(excerpts) < _EXCERPTS and sum(map(len, excerpts)) < wanted:
        size = min(max(1, len(made[len(excerpts) % len(made)])), int(lengths.max()))
        places = np.maximum(lengths - size + 1, 0)  # beginnings of an excerpt in each document
        text = texts[int(generator.choice(len(texts), p=places / places.sum()))]
        start = int(generator.integers(len(text) - size + 1))
        excerpts.append(text[start:start + size])
    return excerpts


def _compare(count: memorisation.Counts, made: int, lengths: int, seed: int) -> dict[str, Any]:
    """Copied shares of generated and held-out text, and whether the first is shown to be more, and much more.

    The difference has an interval so wide that it holds at all lengths together (Bonferroni).
    """
    halves = [(count.found[:made], count.windows[:made]), (count.found[made:], count.windows[made:])]
    if not all(windows.sum() for _, windows in halves):
        return {"missing": "not measured: no text is this long"}
    generated, held_out = (_share(*half, seed, LEVEL) for half in halves)
    level = 1 - (1 - LEVEL) / lengths
    apart = difference(*(_share(*half, seed, level) for half in halves))
    return {"generated": generated.plain() | {"windows": int(halves[0][1].sum())},
            "held_out": held_out.plain() | {"windows": int(halves[1][1].sum())},
            "difference": apart.plain() | {"level": level}, "more": apart.low is not None and apart.low > 0,
            "much_more": apart.low is not None and apart.low > MARGIN}


def _share(found: NDArray[np.int64], windows: NDArray[np.int64], seed: int, level: float) -> Figure:
    long = windows > 0
    return share(found[long], windows[long], seed, level, "texts")


def _weights(model: Model) -> str | None:
    digest: str | None = model.receipt["files"].get("weights.safetensors", {}).get("sha256")
    return digest
