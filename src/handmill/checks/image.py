"""The check of an image model: likeness and variety beside real images, likelihood where there is one, and copies.

Every figure carries an interval, the number of images behind it and how the interval was found; beside every figure
of generated images stands the same of real ones (the floor). N images, H height, W width, C channels.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handmill.checks import evidence, features, fidelity, neighbours
from handmill.checks.image_pictures import draw
from handmill.checks.image_verdict import lines, verdict
from handmill.data.images import Images
from handmill.data.items import Items
from handmill.data.order import draw as number
from handmill.families import tensors, variational
from handmill.folder import Model
from handmill.media.pictures import to_uint8
from handmill.media.pixels import Pixels
from handmill.recipe import not_negative, positive

NO_TRAINING_DATA = "not measured: training data is not on this machine"
NO_SAMPLES = "not measured: check.samples is 0"

__all__ = ["Settings", "carry", "lines", "run"]


@dataclass(frozen=True)
class Settings:
    """The [check] table of an image model."""

    samples: int = 2000  # images made to be compared with held-out ones; 0: none
    images: int = 500  # held-out images whose likelihood is bounded; 0: all
    importance: int = 64  # samples of the importance-weighted bound of a variational model
    neighbours: int = 5  # k of precision, recall, density and coverage
    inception: str = ""  # safetensors file of the Inception network of the FID; empty: the product's own features alone

    def __post_init__(self) -> None:
        positive(self, "importance", "neighbours")
        not_negative(self, "samples", "images")


class Ground(NamedTuple):
    """What all parts of the check stand on."""

    model: Model
    settings: Settings
    held: Images  # the splits in the model folder
    split: str  # of it
    training: Images | None  # the prepared data; None: not on this machine
    classifier: features.Classifier | None
    progress: bool

    @property
    def seed(self) -> int:
        return abs(self.model.recipe.seed)

    @property
    def real(self) -> NDArray[np.uint8]:
        """The held-out images (N, H, W, C)."""
        return np.array(self.held.images(self.split))

    def items(self) -> Items:
        """The held-out images as a network of pixels reads them."""
        height, width, channels = self.held.shape
        pixels = Pixels((channels, height, width), self.held.classes, 1.0)
        return Items(self.held, self.split, pixels, self.model.recipe.data, self.seed)


def run(model: Model, settings: Settings, progress: bool = True) -> dict[str, Any]:
    """Check a model on its held-out images; draws into samples/ of its folder and returns the figures.

    Raises UserError when the folder has no held-out images or a setting cannot be.
    """
    started = time.perf_counter()
    ground = _ground(model, settings, progress)
    made, asked = _samples(ground)
    result: dict[str, Any] = {
        "seed": ground.seed, "settings": asdict(settings),
        "weights": model.receipt["files"]["weights.safetensors"]["sha256"],
        "held_out": {"split": ground.split, "images": ground.held.count(ground.split)},
        "samples": {"count": len(made), "what": _what(model), "sampling": asdict(model.recipe.sampling)},
        "likelihood": evidence.likelihood(model, _held_out(ground), settings.importance, ground.seed, progress),
        "codes": _codes(ground),
        "fidelity": _fidelity(ground, made), "labels": _labels(ground, made, asked),
        "copying": _copying(ground, made)}
    result["pictures"] = draw(ground, made, asked, result["copying"])
    return result | {"verdict": verdict(result), "seconds": time.perf_counter() - started}


def carry(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The result; what needs the training images is taken from an earlier check of the same weights and settings."""
    if any(earlier.get(key) != result[key] for key in ("weights", "settings", "seed")):
        return result
    parts = [name for name in ("fidelity", "labels", "copying")
             if "missing" in result[name] and "missing" not in earlier.get(name, {"missing": ""})]
    if not parts:
        return result
    carried = {"created": earlier.get("carried", earlier)["created"], "parts": parts}
    result = result | {name: earlier[name] for name in parts} | {"carried": carried}
    return result | {"verdict": verdict(result)}


def _ground(model: Model, settings: Settings, progress: bool) -> Ground:
    held = Images.open(model.path / "data")
    training = training_split(model)
    split = "test" if held.count("test") else "validation"
    return Ground(model, settings, held, split, training, _classifier(model, training, progress), progress)


def training_split(model: Model) -> Images | None:
    """The prepared data that the model was trained on, where they still lie beside the model folder."""
    return Images.beside(model.path, model.receipt.get("training", {}).get("fingerprint"))


def _classifier(model: Model, training: Images | None, progress: bool) -> features.Classifier | None:
    """The network in whose features images are compared: trained once a data set, and kept in the model folder."""
    kept = model.path / features.FEATURES
    if training is not None:
        features.of(training, progress)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(training.folder / features.FEATURES, kept)
    return features.load(kept) if kept.is_dir() else None


def _what(model: Model) -> str:
    """What is compared with real images: samples, or where a model has no way to make any, reconstructions."""
    coded = model.recipe.family == "variational" and model.network.quantiser is not None  # type: ignore[union-attr]
    return "reconstructions of held-out images" if coded else "samples"


def _samples(ground: Ground) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images to be judged, and the class that each was asked to be (the number of classes: none)."""
    model, count = ground.model, ground.settings.samples
    if not count:
        return np.zeros((0, *ground.held.shape), np.uint8), np.zeros(0, np.int64)
    if _what(model) != "samples":
        return _reconstructed(ground, count)
    asked = _asked(ground, count)
    made = tensors.make(model.network, model.codec, model.recipe, asked.tolist(), model.recipe.sampling,
                        number(ground.seed, "check") % tensors.SEEDS, progress=ground.progress)
    return made, asked


def _asked(ground: Ground, count: int) -> NDArray[np.int64]:
    """Classes in the shares that held-out images have them, so that variety can be compared."""
    classes = len(ground.model.codec.classes)
    shares = np.bincount(ground.held.labels(ground.split) + 1, minlength=classes + 1)[1:]
    if not tensors.classes(ground.model.recipe, ground.model.codec) or not shares.sum():
        return np.full(count, classes, np.int64)
    ends = np.cumsum(shares) / shares.sum()
    return np.searchsorted(ends, (np.arange(count) + 0.5) / count).astype(np.int64)


def _reconstructed(ground: Ground, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    model, batch = ground.model, ground.items().first(count)
    condition = {"label": batch["label"].to(model.device)} if model.codec.classes else {}
    again = variational.reconstruct(model.network, model.recipe.objective, batch["x"].to(model.device), condition)
    return to_uint8(again), batch["label"].numpy()


def _held_out(ground: Ground) -> dict[str, Any]:
    """Held-out images (N, C, H, W), evenly spread over the split, as the likelihood scores them."""
    items, count = ground.items(), ground.held.count(ground.split)
    wanted = min(ground.settings.images or count, count)
    return items.some(np.linspace(0, count - 1, wanted).astype(np.int64))


def _codes(ground: Ground) -> dict[str, Any]:
    """How many codes of a quantised autoencoder are in use over the held-out images."""
    model = ground.model
    if _what(model) == "samples":
        return {"missing": "not defined: no codes"}
    from handmill.networks.quantisers import perplexity

    batch = _held_out(ground)
    condition = {"label": batch["label"].to(model.device)} if model.codec.classes else {}
    used = variational.usage(variational.codes(model.network, batch["x"].to(model.device), condition),
                             model.network.vocabulary)  # type: ignore[arg-type]
    return {"codes": len(used), "used": int((used > 0).sum()), "perplexity": float(perplexity(used)),
            "images": len(batch["label"])}


def _fidelity(ground: Ground, made: NDArray[np.uint8]) -> dict[str, Any]:
    """Fréchet distance, precision, recall, density and coverage of the samples, beside those of real images."""
    missing = _missing(ground, made)
    if missing:
        return {"missing": missing}
    assert ground.classifier is not None
    pool = np.random.default_rng(features.SEED).permutation(_unseen(ground, 2 * len(made)))
    count = min(len(made), len(pool) // 2)
    real, other = pool[:count], pool[count:2 * count]
    named = {ground.classifier.name: ground.classifier.features}
    if ground.settings.inception:
        from handmill.checks import inception

        named["inception"] = inception.load(Path(ground.settings.inception)).features
    network, describe = next(iter(named.items()))
    report = fidelity.report(describe(real), describe(made), describe(other), network, ground.seed,
                             min(ground.settings.neighbours, count - 1))
    for name, more in list(named.items())[1:]:
        key = fidelity.frechet_name(name, count)
        report["generated"][key] = fidelity.frechet(more(real), more(made), ground.seed).plain()
        report["floor"][key] = fidelity.frechet(more(real), more(other), ground.seed).plain()
    return report | {"accuracy": _accuracy(ground)}


def _unseen(ground: Ground, wanted: int) -> NDArray[np.uint8]:
    """Images that neither the model nor the feature network was trained on: the split, and validation where it is few.

    Features of a network's own training images lie otherwise than those of new ones, so both sides must be new.
    """
    if len(ground.real) >= wanted or ground.split == "validation":
        return ground.real
    return np.concatenate((ground.real, ground.held.images("validation")))


def _missing(ground: Ground, made: NDArray[np.uint8]) -> str:
    if not len(made):
        return NO_SAMPLES
    return NO_TRAINING_DATA if ground.training is None or ground.classifier is None else ""


def _accuracy(ground: Ground) -> dict[str, Any] | None:
    """Of the classifier on held-out images that have a class: what label agreement could reach."""
    labels = ground.held.labels(ground.split)
    known = np.flatnonzero(labels >= 0)
    if ground.classifier is None or not ground.held.classes or not len(known):
        return None
    return ground.classifier.measure(ground.real[known], labels[known]).plain()


def _labels(ground: Ground, made: NDArray[np.uint8], asked: NDArray[np.int64]) -> dict[str, Any]:
    """How many classes the samples show, and how often the class asked for."""
    if not len(made) or ground.classifier is None:
        return {"missing": _missing(ground, made) or NO_TRAINING_DATA}
    classes = len(ground.held.classes)
    if not classes:
        return {"missing": "not defined: the data have no classes"}
    probabilities = ground.classifier.probabilities(made)
    counts = np.bincount(ground.held.labels(ground.split) + 1, minlength=classes + 1)[1:]
    known = asked < classes
    agreement = fidelity.label_agreement(probabilities[known], asked[known]).plain() if known.any() else None
    return {"modes": fidelity.mode_counts(probabilities, counts), "agreement": agreement,
            "ceiling": _accuracy(ground)}


def _copying(ground: Ground, made: NDArray[np.uint8]) -> dict[str, Any]:
    """Whether samples lie nearer to training images than held-out images do."""
    missing = _missing(ground, made)
    if missing or _what(ground.model) != "samples":
        return {"missing": missing or "not defined: reconstructions are not samples"}
    assert ground.classifier is not None
    assert ground.training is not None
    train = np.array(ground.training.images("train"))
    real = ground.real[_spread(len(ground.real), len(made))]
    return {"by": neighbours.report(made, real, train, ground.classifier)}


def _spread(size: int, count: int) -> NDArray[np.int64]:
    """`count` of `size` numbers, evenly spread."""
    return np.linspace(0, size - 1, min(count, size)).astype(np.int64)
