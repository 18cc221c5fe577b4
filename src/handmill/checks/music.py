"""The check of a music model: likelihood beside a trigram model's, and samples beside held-out pieces.

Every figure carries an interval, the number of pieces behind it and how the interval was found; beside figures of
samples stand those of held-out pieces, cut where samples are. Pieces are compared as chords step by step: on their own
grid, or in steps of 125 ms where they are free MIDI.

N predictions of the selected pieces, P pieces.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from handmill import folder
from handmill.checks import baselines, memory, music_figures
from handmill.checks.characters import END as END_OF_TEXT
from handmill.checks.intervals import FEWEST, LEVEL, RESAMPLES, Figure, ratio, share
from handmill.checks.likelihood import (
    Selection,
    by_document,
    carries,
    each,
    figure,
    plan_for,
    select,
    take,
    targets,
)
from handmill.checks.music_verdict import lines, verdict
from handmill.data.music import Pieces
from handmill.errors import UserError
from handmill.families.autoregressive import SEEDS, Sampling
from handmill.families.composing import Wish, compose
from handmill.folder import Model
from handmill.media import midi, performing
from handmill.media.music_tokens import Frames
from handmill.media.scores import Grid, Step
from handmill.recipe import not_negative, positive

NO_TRAINING_DATA = "not measured: training data is not on this machine"
NO_SAMPLES = "not measured: check.samples is 0"
SAMPLES = "samples/check.jsonl"  # in the model folder
ROLL = "samples/check.png"
_SHOWN = 6  # samples in the picture, and as MIDI files
_AT_ONCE = 64  # samples
_DRAWS = 500  # of training pieces, for the floor
_FULL = 0.95  # of the most tokens: so long a sample is held to be cut

__all__ = ["Settings", "carry", "lines", "run", "training_split", "verdict"]


@dataclass(frozen=True)
class Settings:
    """The [check] table of a music model."""

    pieces: int = 0  # held-out pieces read, in random order; 0: all
    tokens: int = 1_000_000  # of them read, at most, the last piece being cut; 0: all
    samples: int = 32  # pieces made from nothing; 0: none
    sample_tokens: int = 1024  # at most, in each of them
    ngrams: tuple[int, ...] = (4, 8)  # steps in a row that are new or known
    trigram_tokens: int = 5_000_000  # of the training pieces that the trigram model learns from, at most
    memories: tuple[int, ...] = ()  # positions of memory that perplexity is measured at, of a network with one

    def __post_init__(self) -> None:
        positive(self, "sample_tokens", "trigram_tokens")
        not_negative(self, "pieces", "tokens", "samples")
        if not self.ngrams or min(self.ngrams) < 1:
            raise UserError(f"ngrams = {list(self.ngrams)} must name one or more lengths above 0")


class Ground(NamedTuple):
    """What all parts of the check stand on."""

    model: Model
    settings: Settings
    selection: Selection
    targets: NDArray[Any]  # (N,) tokens of the pieces, each with its closing END
    counted: NDArray[np.bool_]  # (N,) neither given nor END
    training: Pieces | None  # the prepared data; None: not on this machine
    progress: bool

    @property
    def codec(self) -> Any:
        return self.model.codec

    @property
    def seed(self) -> int:
        return abs(self.model.recipe.seed) % SEEDS

    @property
    def head(self) -> int:
        """Condition tokens, which a window that starts inside a piece is told first."""
        head = len(self.codec.asked)
        return head if 2 * head <= self.context else 0

    @property
    def context(self) -> int:
        return int(self.model.recipe.network.context)

    @property
    def stride(self) -> int:
        return max(1, self.context // 2)

    @property
    def most(self) -> int:
        """Tokens of a sample with END and its conditions."""
        return 1 + len(self.codec.asked) + self.settings.sample_tokens

    @property
    def transpose(self) -> int:
        """Semitones up and down that training moved pieces by."""
        return int(getattr(self.model.recipe.data, "transpose", 0))

    def pieces(self) -> list[NDArray[Any]]:
        """The selected pieces, each with END in front and without END behind."""
        ends = zip(self.selection.starts, self.selection.predictions, strict=True)
        return [np.asarray(self.selection.tokens[start:start + count]) for start, count in ends]


class _Music:
    """Pieces as chords, one object for the same chord, and what is measured of each."""

    def __init__(self, codec: Any, pieces: Sequence[Sequence[int] | NDArray[Any]], any_key: bool,
                 progress: bool = False) -> None:
        kept: dict[Step, Step] = {}
        self.any_key = any_key
        self.grids: list[Grid] = [
            tuple(kept.setdefault(step, step) for step in music_figures.steps_of(codec, piece))
            for piece in tqdm(pieces, desc="reading pieces", unit=" pieces", disable=not progress)]

    @cached_property
    def classes(self) -> NDArray[np.float64]:
        """In how many steps each pitch class sounds, (P, 12); with `any_key` counted from the tonic that fits best."""
        return np.array([self._classes(grid) for grid in self.grids]).reshape(-1, 12)

    @cached_property
    def in_scale(self) -> NDArray[np.float64]:
        """Scale consistency, (P,); 0 where there is no note."""
        return np.nan_to_num([music_figures.scale_consistency(music_figures.sounding(grid)) for grid in self.grids])

    @cached_property
    def notes(self) -> NDArray[np.float64]:
        """Notes of all steps, (P,)."""
        return self.classes.sum(1)

    @cached_property
    def steps(self) -> NDArray[np.float64]:
        """Steps, (P,)."""
        return np.array([len(grid) for grid in self.grids], np.float64)

    def _classes(self, grid: Grid) -> NDArray[np.float64]:
        counts = np.bincount(np.array(music_figures.sounding(grid), np.int64) % 12, minlength=12).astype(np.float64)
        tonic = music_figures.key_of_grid(grid).key % 12 if self.any_key and counts.any() else 0
        return np.roll(counts, -tonic)


def run(model: Model, settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Check a model on its held-out pieces; writes samples/check.* into its folder and returns the figures.

    Raises UserError when the folder has no held-out pieces.
    """
    started = time.perf_counter()
    ground = _ground(model, settings, progress)
    nats = _nats(ground)
    samples = _samples(ground)
    result = {
        "seed": ground.seed,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()},
        "weights": model.receipt["files"].get("weights.safetensors", {}).get("sha256"), "held_out": _held_out(ground),
        "likelihood": _per(ground, nats) | _told(ground), "baselines": _baselines(ground, nats),
        "samples": _save(ground, samples), **_compared(ground, samples),
        **memory.of(model, ground.selection, settings.memories, ground.seed, ground.counted, progress)}
    return result | {"verdict": verdict(result), "seconds": time.perf_counter() - started}


def carry(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The result, with the figures that need the training pieces taken from an earlier check where they are missing.

    Only from a check of the same weights, settings and seed; of samples only where the same ones were made.
    """
    if not earlier or any(earlier.get(key) != result[key] for key in ("weights", "settings", "seed")):
        return result
    kept, parts = dict(result), []
    same = earlier["samples"].get("sha256") == result["samples"].get("sha256")
    for section, name in (("baselines", "trigram"), ("pitch_classes", "floor"), ("novelty", "found")):
        mine, was = result[section].get(name, {}), earlier[section].get(name, {})
        if "missing" in mine and was and "missing" not in was and (same or section == "baselines"):
            kept[section] = kept[section] | {name: was}
            parts.append(f"{section.replace('_', ' ')}: {name}" if section != "novelty" else section)
    if not parts:
        return result
    kept["carried"] = {"created": earlier.get("carried", earlier)["created"], "parts": parts}
    return kept | {"verdict": verdict(kept)}


def training_split(model: Model) -> Pieces | None:
    """The prepared pieces that the model was trained on, where they still lie beside the model folder."""
    return Pieces.beside(model.path, model.receipt.get("training", {}).get("fingerprint"))


def _ground(model: Model, settings: Settings, progress: bool) -> Ground:
    selection = select(Pieces.open(model.path / "data"), settings.tokens, abs(model.recipe.seed))
    if 0 < settings.pieces < len(selection.starts):
        order = np.random.default_rng(abs(model.recipe.seed)).permutation(len(selection.starts))
        some = np.sort(order[:settings.pieces])
        selection = selection._replace(starts=selection.starts[some], predictions=selection.predictions[some],
                                       whole=False)
    wanted, codec = targets(selection, model.codec.end), model.codec
    pieces = np.split(wanted, np.cumsum(selection.predictions)[:-1])
    given = np.concatenate([codec.given(piece) for piece in pieces])
    return Ground(model, settings, selection, wanted, ~given & (wanted != codec.end), training_split(model), progress)


def _held_out(ground: Ground) -> dict[str, Any]:
    selection = ground.selection
    return {"split": selection.split, "whole": selection.whole, "pieces": len(selection.starts),
            "pieces_in_split": selection.documents_in_split, "tokens": int(ground.counted.sum()),
            "notes": int(_notes(ground).sum()), "steps": int(_steps(ground).sum()), "step": _step(ground)}


def _step(ground: Ground) -> str:
    """What a step is."""
    if not isinstance(ground.codec, Frames):
        return f"{music_figures.EVENT_STEP} ms"
    steps = ground.codec.settings.steps
    return f"1/{steps} quarter note" if steps > 1 else "a quarter note"


def _notes(ground: Ground) -> NDArray[np.bool_]:
    """Which predictions (N,) are counted and strike a note; on a grid every pitch of a step does."""
    first = ground.codec.first["pitch" if isinstance(ground.codec, Frames) else "on"]
    return ground.counted & (ground.targets >= first)


def _steps(ground: Ground) -> NDArray[np.bool_]:
    """Which predictions (N,) end a step of a grid; of free MIDI none."""
    return np.asarray(ground.targets == getattr(ground.codec, "step", -1))


def _nats(ground: Ground) -> NDArray[np.float64]:
    """The model's nats of each prediction, (N,)."""
    model, selection = ground.model, ground.selection
    plan = plan_for(model.network, selection, ground.context, ground.stride)
    return each(model.network, selection, model.codec.end, model.codec.size, plan, model.device, ground.head,
                ground.progress)


def _per(ground: Ground, nats: NDArray[np.float64]) -> dict[str, Any]:
    """Nats (N,) by what they are divided by, over all pieces; of frames also as the mean of the pieces' means."""
    nats, steps = nats * ground.counted, _steps(ground)
    below = {"nats_per_frame": steps, "nats_per_note": _notes(ground), "nats_per_token": ground.counted}
    found = {name: figure(ground.selection, nats, units, ground.seed, "pieces").plain()
             for name, units in below.items() if units.any()}
    if steps.any():
        of_piece, long = by_document(ground.selection, nats), by_document(ground.selection, steps)
        means = of_piece[long > 0] / long[long > 0]
        found["nats_per_frame_mean_of_pieces"] = ratio(means, np.ones_like(means), ground.seed, unit="pieces").plain()
    return found


def _told(ground: Ground) -> dict[str, Any]:
    """What is counted, and what it is predicted from."""
    codec, melody = ground.codec, getattr(ground.codec.settings, "melody", False)
    what = "every note and end of a step" if isinstance(codec, Frames) else "every event"
    given = [*codec.asked, *["the highest note of each step"] * melody]
    if carries(ground.model.network):
        read = f"segments of {ground.context} tokens, each going on from the state of the one before"
    else:
        head = ", after the piece's conditions" if ground.head else ""
        read = f"windows of {ground.context} tokens, {ground.stride} from one to the next{head}"
    return {"counted": f"{what} of a piece, given all before it; not the end of the piece"
                       + (f", and not what is given: {', '.join(given)}" if given else ""), "read": read}


def _baselines(ground: Ground, nats: NDArray[np.float64]) -> dict[str, Any]:
    """A trigram model of training pieces' tokens, and the entropy of single tokens as often as they stand here."""
    counts = np.bincount(ground.targets[ground.counted], minlength=ground.codec.size)
    single = -np.log(np.maximum(counts, 1) / counts.sum())[ground.targets]  # (N,)
    found = {"unigram": _per(ground, single)}
    if ground.training is None:
        return found | {"trigram": {"missing": NO_TRAINING_DATA}}
    known = take(ground.training, "train", ground.settings.trigram_tokens, ground.seed)
    trigram = baselines.Trigram(_symbols(targets(known, ground.codec.end), ground.codec.end))
    trigram.unseen = ground.codec.size - len(trigram.symbols)  # tokens, where text has characters
    reached = trigram.nats(_symbols(ground.targets, ground.codec.end))  # (N,)
    saved = figure(ground.selection, (reached - nats) * ground.counted, ground.counted, ground.seed, "pieces")
    return found | {"trigram": _per(ground, reached) | {
        "model_saves_nats_per_token": saved.plain(), "training_tokens": int(known.predictions.sum()),
        "smoothing": baselines.SMOOTHING}}


def _symbols(tokens: NDArray[Any], end: int) -> NDArray[np.int32]:
    """Tokens (N,) as the trigram model takes characters."""
    return np.where(tokens == end, END_OF_TEXT, tokens.astype(np.int32)).astype(np.int32)


def _samples(ground: Ground) -> list[list[int]]:
    """Pieces from nothing, with the recipe's own sampling but for their length."""
    wishes, model = _wishes(ground), ground.model
    made: list[list[int]] = []
    for first in range(0, len(wishes), _AT_ONCE):
        made += compose(model.network, ground.codec, wishes[first:first + _AT_ONCE], _sampling(ground), ground.seed,
                        first, ground.progress)
    return made


def _wishes(ground: Ground) -> list[Wish]:
    """Nothing; of a model that harmonises the beginnings of held-out melodies."""
    codec, count = ground.codec, ground.settings.samples
    if not getattr(codec.settings, "melody", False):
        return [Wish()] * count
    steps = max(1, ground.settings.sample_tokens // (codec.settings.voices + 1))
    return [Wish(codec.asked_of(piece), (), tuple(codec.melody(codec.decode(piece)[:steps]).tolist()))
            for piece in ground.pieces()[:count]]


def _sampling(ground: Ground) -> Sampling:
    sampling: Sampling = ground.model.recipe.sampling
    return replace(sampling, max_tokens=ground.settings.sample_tokens, stop=())


def _save(ground: Ground, samples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Write the tokens of all samples, and some as MIDI files and piano rolls."""
    file = ground.model.path / SAMPLES
    file.parent.mkdir(exist_ok=True)
    rows = ({"sample": i, "seed": ground.seed, "tokens": tokens} for i, tokens in enumerate(samples))
    folder.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    melody = getattr(ground.codec.settings, "melody", False)
    about = {"file": SAMPLES, "count": len(samples), "asked": "melodies of held-out pieces" if melody else "nothing",
             "sampling": asdict(_sampling(ground)), "files": _files(ground, samples[:_SHOWN])}
    return about | folder.fingerprint(file)


def _files(ground: Ground, samples: Sequence[Sequence[int]]) -> list[str]:
    """MIDI files of the samples and their piano rolls in one picture, as names in the folder."""
    scores = [performing.of_tokens(ground.codec, tokens) for tokens in samples]
    names = [f"samples/check-{i}.mid" for i in range(len(scores))]
    for name, score in zip(names, scores, strict=True):
        midi.write(ground.model.path / name, score)
    if scores:
        titles = [f"sample {i}" for i in range(len(scores))]
        performing.save_rolls(ground.model.path / ROLL, performing.pieces(scores, titles))
    return [*names, *[ROLL] * bool(scores)]


def _compared(ground: Ground, samples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Figures of samples beside those of held-out pieces."""
    if not samples:
        missing = {"missing": NO_SAMPLES}
        return {"pitch_classes": missing, "style": missing, "novelty": {"found": missing}}
    codec, any_key = ground.codec, ground.transpose > 0
    made, whole = _Music(codec, samples, any_key), _Music(codec, ground.pieces(), any_key)
    held = _Music(codec, [piece[:ground.most] for piece in ground.pieces()], any_key)
    training = None
    if ground.training is not None:
        pieces = np.split(ground.training.tokens("train"), ground.training.starts("train")[1:])
        training = _Music(codec, pieces, any_key, ground.progress)
    cut = sum(len(tokens) >= _FULL * ground.most for tokens in samples)
    return {"pitch_classes": _pitch_classes(ground, made, held, training),
            "style": _style(ground, made, held, whole) | {"cut": cut},
            "novelty": {"any_key": any_key, "found": _novelty(ground, made, held, training)}}


def _style(ground: Ground, made: _Music, held: _Music, whole: _Music) -> dict[str, Any]:
    """Each figure of samples and of held-out pieces: scale consistency, notes a step, steps a piece."""
    seed = ground.seed
    return {
        "scale_consistency": {name: _ratio(music.in_scale, (music.notes > 0).astype(np.float64), seed)
                              for name, music in (("generated", made), ("held_out", held))},
        "notes_per_step": {name: _ratio(music.notes, music.steps, seed)
                           for name, music in (("generated", made), ("held_out", held))},
        "steps_per_piece": {name: _ratio(music.steps, np.ones_like(music.steps), seed)
                            for name, music in (("generated", made), ("held_out", whole))}}


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """A ratio over pieces, those with nothing below left out."""
    some = bottom > 0
    if not some.any():
        return {"missing": "not measured: no piece has any"}
    return ratio(top[some], bottom[some], seed, unit="pieces").plain()


def _pitch_classes(ground: Ground, made: _Music, held: _Music, training: _Music | None) -> dict[str, Any]:
    """The shares of pitch classes by how long they sound, and the distance between samples' and held-out pieces'."""
    floor = {"missing": NO_TRAINING_DATA} if training is None else _floor(
        training.classes, held.classes, len(made.grids), ground.seed).plain()
    return {"from": "the tonic that fits a piece best" if made.any_key else "C",
            "generated": _shares(made.classes), "held_out": _shares(held.classes),
            "distance": _distance(made.classes, held.classes, ground.seed).plain(), "floor": floor}


def _shares(classes: NDArray[np.float64]) -> list[float]:
    shares: list[float] = (classes.sum(0) / max(1.0, classes.sum())).tolist()
    return shares


def _distance(made: NDArray[np.float64], held: NDArray[np.float64], seed: int) -> Figure:
    """Total variation distance of the pooled pitch classes of samples and of held-out pieces, both (P, 12)."""
    value, n = float(music_figures.total_variation(made.sum(0), held.sum(0))), len(made)
    if min(n, len(held)) < FEWEST:
        return Figure(value, None, None, n, f"no interval: only {min(n, len(held))} pieces")
    generator = np.random.default_rng(seed)
    drawn = [generator.multinomial(len(each), np.full(len(each), 1 / len(each)), RESAMPLES) @ each
             for each in (made, held)]  # (R, 12)
    low, high = np.quantile(music_figures.total_variation(*drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value, min(value, float(low)), float(high), n, "bootstrap over pieces of both (Efron 1979)")


def _floor(training: NDArray[np.float64], held: NDArray[np.float64], count: int, seed: int) -> Figure:
    """The same distance of `count` training pieces, drawn again and again: what as many real pieces come to."""
    drawn = np.random.default_rng(seed).integers(len(training), size=(_DRAWS, count))
    apart = music_figures.total_variation(training[drawn].sum(1), held.sum(0))  # (draws,)
    low, high = np.quantile(apart, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(float(apart.mean()), float(low), float(high), count,
                  f"mean and 95 % of {_DRAWS} draws of {count} training pieces")


def _novelty(ground: Ground, made: _Music, held: _Music, training: _Music | None) -> dict[str, Any]:
    """Shares of steps in a row that no training piece has, and the longest run that one has."""
    if training is None or ground.training is None:
        return {"missing": NO_TRAINING_DATA}
    both, shares = {"generated": made, "held_out": held}, {}
    for n in ground.settings.ngrams:
        known = music_figures.Novelty(training.grids, n, made.any_key)
        shares[str(n)] = {name: _new(known, music.grids, ground.seed) for name, music in both.items()}
    names, shifts = ground.training.names("train"), range(-ground.transpose, ground.transpose + 1)
    runs = {name: music_figures.longest_run(music.grids[:len(made.grids)], training.grids, shifts)
            for name, music in both.items()}  # of as many held-out pieces as there are samples
    longest = {name: run and {"steps": run.steps, "piece": run.piece, "training_piece": names[run.source]}
               for name, run in runs.items()}
    return {"steps_in_a_row": shares, "longest": longest, "training_pieces": len(names)}


def _new(known: music_figures.Novelty, grids: Sequence[Grid], seed: int) -> dict[str, Any]:
    new, grams = np.array([known.counts(grid) for grid in grids], np.int64).T  # (P,)
    if not grams.any():
        return {"missing": f"not measured: no piece has {known.n} steps"}
    return share(new[grams > 0], grams[grams > 0], seed, unit="pieces").plain()
