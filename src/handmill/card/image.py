"""The sections of a card that only images have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from handmill.card import facts
from handmill.card.facts import NOT_CHECKED, Row, number
from handmill.checks.image_verdict import copying_rows, fidelity_rows, likelihood_rows
from handmill.checks.verdict import carried_lines, percent
from handmill.families import tensors
from handmill.page import Block, Points, Section, Table, Text
from handmill.recipe import Recipe
from handmill.training import curve

DATA, SEEN = "images", "Beside images it has not seen"
NEAREST = "nearest training images"  # the picture of suspicious samples
_CLASSES = 20  # named
_EVALUATIONS = 12  # of training, shown
_LOSSES = {"nonsaturating": "non-saturating (Goodfellow et al. 2014)", "hinge": "hinge (Lim and Ye 2017)",
           "wasserstein": "Wasserstein (Arjovsky et al. 2017)"}
_HISTORY = {"coverage": "validation_coverage", "recall": "validation_recall", "precision": "validation_precision",
            "Fréchet distance": "validation_loss"}
_SHOWN = {"samples": "Samples, the classes in their order", "held out": "Real images held out, to compare with",
          "reconstructions": "Held-out images and what the model makes of them",
          "interpolation": "On the way from one held-out image to another", "latent map": "What the latent's units do",
          "truncation": "The same samples at several truncations: 1 as trained, towards 0 nearer to the centre of what "
                        "it knows, above 1 further out"}
_OF_A_GENERATOR = {"interpolation": "On the way from one sample to another, a row each, of one class where it has any"}


def head(path: Path, recipe: Recipe) -> list[Row]:
    """Rows of the first table."""
    shape = facts.read(path / "codec" / "codec.json").get("shape", ["?", "?", "?"])  # C, H, W
    colour = {1: "grey", 3: "RGB"}.get(shape[0], f"{shape[0]} channels")
    classes = _classes(path, recipe)
    rows: list[Row] = [("image", f"{shape[2]} x {shape[1]} pixels, {colour}"),
                       ("classes", f"{len(classes):,}" if classes else "none: it cannot be asked for one")]
    if recipe.codec.kind == "model":
        rows.append(("codec", "a trained autoencoder, which is in codec/model"))
    return [*rows, ("sampling", facts.sampling(recipe.table()["sampling"]))]


def limits(path: Path, recipe: Recipe, report: dict[str, Any], check: dict[str, Any]) -> list[str]:
    """What it is for, and what it cannot do."""
    made = ["It turns images like its training images into codes and back. It makes none by itself: that takes a "
            "second model, trained on its codes."] if _of_codes(recipe) else [
            "It makes images like its training images and nothing else; what is rare among them it makes badly or "
            "never.", _asked(_classes(path, recipe))]
    return [*made,
            "Whether it shows real people, and how it treats groups of people, was not measured. Where faces or other "
            "personal data are among its training images, look at the copies below before sharing anything.",
            "Its images are not photographs and are not to be passed off as such: the PNG files that `handmill "
            "generate` writes say in their metadata that a model made them, and which."]


def data(path: Path, report: dict[str, Any]) -> list[Block]:
    """What was read, kept and held out, and a sheet of the images."""
    if not report:
        return [Text("Not recorded: how the images were chosen and split.")]
    images, copies = report.get("images", {}), report.get("duplicates", {})
    rows: list[Row] = [
        ("images read", number(images.get("read"))), ("images kept", number(images.get("kept"))),
        ("left out", _left_out(report.get("sources", {}))),
        ("exact copies removed", number(copies.get("exact"))),
        (f"near copies removed (up to {copies.get('bits', '?')} of 64 bits of a hash apart)",
         number(copies.get("near"))),
        ("copies of test images removed", number(copies.get("of_test_images"))),
        ("size, height by width", _sizes(report)),
        ("changed in decoding", ", ".join(f"{count:,} {what}" for what, count in report.get("decoding", {}).items())
         or "none"),
        ("captions", number(report.get("captions")))]
    splits: list[Row] = [("split", "images"), *((name, number(part.get("images")))
                                                for name, part in report.get("splits", {}).items())]
    remarks = [facts.public(remark) for remark in report.get("remarks", [])]
    sheet = facts.picture(path, "data/contact.png", "Some of the images, class by class",
                          "Not drawn: a sheet of images.")
    return [Table([("", ""), *rows]), Table(splits), *_shares(report.get("classes", {})),
            *([Points(remarks)] if remarks else []), sheet]


def measured(path: Path, recipe: Recipe, check: dict[str, Any]) -> list[Section]:
    """How an adversarial training went, and what the check found."""
    return [*_taught(path, recipe),
            Section("Quality beside real images", _quality(check) if check else [Text(NOT_CHECKED)]),
            Section("Copying from the training images", _copying(path, check) if check else [Text(NOT_CHECKED)]),
            Section("Samples", _samples(path, recipe, check))]


def _of_codes(recipe: Recipe) -> bool:
    """Whether it is an autoencoder without a prior to sample from."""
    return recipe.family == "variational" and recipe.network.bottleneck != "gaussian"


def _classes(path: Path, recipe: Recipe) -> tuple[str, ...]:
    """What it can be asked for."""
    named = facts.read(path / "codec" / "codec.json").get("classes", [])
    return tensors.classes(recipe, SimpleNamespace(classes=named))


def _asked(classes: tuple[str, ...]) -> str:
    if not classes:
        return "It was not told classes and cannot be asked for anything: every image is drawn from all it knows."
    named = ", ".join(classes[:_CLASSES])
    more = f" and {len(classes) - _CLASSES:,} more" if len(classes) > _CLASSES else ""
    return f"It can be asked for one of {len(classes):,} classes and for nothing else: {named}{more}."


def _left_out(sources: dict[str, Any]) -> str:
    if "left_out" not in sources:
        return "not recorded"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sources.get("kinds", {}).items())
    return (f"{sources['left_out']:,} files{f' ({kinds})' if kinds else ''}, {sources.get('records_left_out', 0):,} "
            f"lines of tables, {sources.get('other_files', 0):,} files that are no images")


def _sizes(report: dict[str, Any]) -> str:
    sizes, shape = report.get("sizes"), report.get("shape")
    if not sizes or not shape:
        return "not recorded"
    read = " x ".join(map(str, sizes["smallest"]))
    if sizes["distinct"] > 1:
        read += f" to {' x '.join(map(str, sizes['largest']))} ({sizes['distinct']:,} sizes)"
    return f"{shape[0]} x {shape[1]}, from {read}"


def _shares(classes: dict[str, Any]) -> list[Block]:
    """How many images each class has, the largest first."""
    counts = sorted(classes.get("images", {}).items(), key=lambda pair: -pair[1])
    if not counts:
        return [Text("The images have no classes.")]
    rows: list[Row] = [("class", "images"), *((name, f"{count:,}") for name, count in counts[:_CLASSES])]
    if rest := counts[_CLASSES:]:
        rows.append((f"and {len(rest):,} more, at least {rest[-1][1]:,} each", f"{sum(n for _, n in rest):,}"))
    if without := classes.get("unlabelled"):
        rows.append(("without a class", f"{without:,}"))
    return [Table(rows)]


def _taught(path: Path, recipe: Recipe) -> list[Section]:
    """The game of an adversarial model, how it went, and what went wrong in it."""
    if recipe.family != "adversarial":
        return []
    faults = facts.read(path / "receipt.json").get("training", {}).get("faults")
    wrong: list[Block] = [Text("Found in training, and what was done:"),
                          Points([facts.public(fault) for fault in faults])] if faults else []
    return [Section("Generator and discriminator", [
        Text("Two networks taught each other: the discriminator to tell images from real ones, the generator, which "
             "is the model, to be taken for real."), Table([("", ""), *_game(recipe.objective)]), *_history(path),
        *wrong])]


def _game(objective: Any) -> list[Row]:
    """Losses and penalties, each with its weight and how often it is taken."""
    o = objective
    rows: list[tuple[str, Any, str]] = [
        ("loss", o.loss, _LOSSES[o.loss]),
        ("gradient penalty", o.gradient_penalty, f"{o.gradient_penalty:g} (Gulrajani et al. 2017)"),
        ("R1 penalty", o.r1, f"{o.r1:g}, every {o.r1_every} steps (Mescheder et al. 2018)"),
        ("path length penalty", o.path_length, f"{o.path_length:g}, every {o.path_every} steps (Karras et al. 2020)"),
        ("steps of the discriminator", True,
         f"{o.discriminator_steps} for each of the generator's, at {o.discriminator_rate:g} times its rate"),
        ("images of two styles", o.mixing, f"{o.mixing:.0%}"),
        ("changes to what the discriminator sees", o.augment, f"{', '.join(o.augment)}, as far as it overfits")]
    return [(name, told if used else "none") for name, used, told in rows]


def _history(path: Path) -> list[Block]:
    """Figures of the evaluations in training, evenly spread over them."""
    rows = [row for row in curve.read(path / "metrics.jsonl") if row.keys() >= set(_HISTORY.values())]
    if not rows:
        return [Text("Not recorded: the evaluations in training.")]
    last, count = len(rows) - 1, min(len(rows), _EVALUATIONS)
    chosen = [rows[round(i * last / max(1, count - 1))] for i in range(count)]
    some = f", {count} of them here" if count < len(rows) else ""
    lines: list[Row] = [(f"{row['step']:,}", *(f"{row[key]:.3f}" for key in _HISTORY.values())) for row in chosen]
    return [Text(f"Samples beside real images, {len(rows):,} times in training{some}; without intervals."),
            Table([("step", *_HISTORY), *lines])]


def _quality(check: dict[str, Any]) -> list[Block]:
    held, samples = check["held_out"], check["samples"]
    return [Text(f"{samples['count']:,} {samples['what']} beside the {held['images']:,} images of the {held['split']} "
                 "split; in brackets intervals of 95 %."),
            *_fidelity(check["fidelity"]), *_labels(check["labels"]), *_likelihood(check["likelihood"]),
            *_codes(check.get("codes", {"missing": ""})),
            *map(Text, carried_lines(check)), Text(f"Verdict: {check['verdict']['text']}.")]


def _fidelity(fidelity: dict[str, Any]) -> list[Block]:
    if "missing" in fidelity:
        return [_missing("likeness and variety", fidelity)]
    told = (f"Likeness and variety in the features of the network {fidelity.get('network', '?')}, trained on the same "
            f"data, n = {fidelity['n']:,} of each. The column of real images, which compares training with held-out "
            "images, is what a perfect model would reach. The Fréchet distance (fd) is better where it is lower, and "
            "compares only at equal n and in the same features.")
    return [Text(told), Table([*fidelity_rows(fidelity)])]


def _labels(labels: dict[str, Any]) -> list[Block]:
    if "missing" in labels:
        return [_missing("classes", labels)]
    modes = labels["modes"]
    told = (f"Classes seen among the samples: {modes['modes']} of {len(modes['counts'])}; KL divergence from the "
            f"data's shares {modes['kl']:.4f} nats (by chance {modes['kl_by_chance']:.4f}).")
    if labels.get("agreement"):
        ceiling = f"; of real images, its ceiling, {percent(labels['ceiling'])}" if labels.get("ceiling") else ""
        told += f" A classifier sees the class asked for in {percent(labels['agreement'])} of them{ceiling}."
    return [Text(told)]


def _likelihood(found: dict[str, Any]) -> list[Block]:
    if "missing" in found:
        return [_missing("likelihood", found)]
    return [Text(f"Likelihood of {found['images']:,} held-out images: {found['kind']}. Counted: {found['counted']}. "
                 "Lower is better."), Table([("", "mean over images"), *likelihood_rows(found)])]


def _codes(codes: dict[str, Any]) -> list[Block]:
    if "missing" in codes:
        return []
    return [Text(f"Codes in use over {codes['images']:,} held-out images: {codes['used']:,} of {codes['codes']:,}, "
                 f"perplexity {codes['perplexity']:.1f}.")]


def _copying(path: Path, check: dict[str, Any]) -> list[Block]:
    if "missing" in check["copying"]:
        return [_missing("", check["copying"])]
    drawn = facts.picture(path, check.get("pictures", {}).get(NEAREST, ""), "The most suspicious samples, and the "
                          "training images nearest to each", "Not drawn: the training images nearest to samples.")
    return [Text("The share of samples that stand out as near to one training image, and of held-out images by the "
                 "same limit: about 1 %, where nothing is copied. Below it, how far samples lie from the nearest "
                 "training image, over the same of held-out images: 1 where nothing is copied, 0 for copies. "
                 "Intervals of 95 %."),
            Table([*copying_rows(check["copying"])]), drawn]


def _samples(path: Path, recipe: Recipe, check: dict[str, Any]) -> list[Block]:
    drawn: dict[str, str] = {what: file for what, file in check.get("pictures", {}).items() if what != NEAREST}
    if not drawn:
        return [facts.picture(path, "samples/training.png", "Samples drawn during training, the classes in turn",
                              "None recorded: `handmill check` makes them.")]
    how = facts.sampling(check["samples"].get("sampling", {}))
    shown = _SHOWN | (_OF_A_GENERATOR if recipe.family == "adversarial" else {})
    return [Text(f"Not chosen; made with seed {check['seed']} ({how})."),
            *(facts.picture(path, file, shown.get(what, what), f"Not there any more: {what}.")
              for what, file in drawn.items())]


def _missing(what: str, part: dict[str, Any]) -> Block:
    said = f"{what} {part['missing']}".strip()
    return Text(f"{said[0].upper()}{said[1:]}.")
