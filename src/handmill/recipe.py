"""The recipe: one TOML file that says everything about a model, parsed into frozen typed dataclasses.

Six tables carry a `kind` (or take the recipe's medium or family) that chooses their dataclass; each dataclass
lives beside the code it sets up. A new network, codec, medium or family adds a line to `KINDS` and to `FITS`.
"""

import dataclasses
import difflib
import importlib
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from handmill.errors import UserError

SHIPPED = Path(__file__).parent / "recipes"

# table -> kind -> module holding a dataclass of the given name
KINDS: dict[str, dict[str, str]] = {
    "data": {"text": "handmill.media.text:Data", "image": "handmill.media.image:Data",
             "music": "handmill.media.music:Data"},
    "codec": {
        "character": "handmill.media.tokenizers:CharacterSettings",
        "byte": "handmill.media.tokenizers:ByteSettings",
        "bpe": "handmill.media.tokenizers:BPESettings",
        "pixels": "handmill.media.pixels:Settings",
        "model": "handmill.media.latents:Settings",
        "frames": "handmill.media.music_tokens:FrameSettings",
        "events": "handmill.media.music_tokens:EventSettings",
    },
    "network": {
        "decoder": "handmill.networks.decoder:Settings",
        "recurrent": "handmill.networks.recurrent:Settings",
        "autoencoder": "handmill.networks.autoencoder:Settings",
        "unet": "handmill.networks.unet:Settings",
        "dit": "handmill.networks.dit:Settings",
        "dcgan": "handmill.networks.dcgan:Settings",
        "stylegan2": "handmill.networks.stylegan2:Settings",
    },
    "objective": {
        "autoregressive": "handmill.families.autoregressive:Objective",
        "variational": "handmill.families.variational:Objective",
        "adversarial": "handmill.families.adversarial.objective:Objective",
        "diffusion": "handmill.families.diffusion.noise_levels:Objective",
    },
    "sampling": {
        "autoregressive": "handmill.families.autoregressive:Sampling",
        "variational": "handmill.families.variational:Sampling",
        "adversarial": "handmill.families.adversarial.making:Sampling",
        "diffusion": "handmill.families.diffusion.making:Sampling",
    },
    "check": {"text": "handmill.checks.text:Settings", "image": "handmill.checks.image:Settings",
              "music": "handmill.checks.music:Settings"},
}

# what goes together: (table, its kind) -> the families or media that it can be part of
FITS: dict[tuple[str, str], tuple[str, ...]] = {
    ("codec", "character"): ("text",), ("codec", "byte"): ("text",), ("codec", "bpe"): ("text",),
    ("codec", "pixels"): ("image",), ("codec", "model"): ("image",),
    ("codec", "frames"): ("music",), ("codec", "events"): ("music",),
    ("network", "decoder"): ("autoregressive",), ("network", "recurrent"): ("autoregressive",),
    ("network", "autoencoder"): ("variational",),
    ("network", "unet"): ("diffusion",), ("network", "dit"): ("diffusion",),
    ("network", "dcgan"): ("adversarial",), ("network", "stylegan2"): ("adversarial",),
}


@dataclass(frozen=True)
class Training:
    """The [training] table: one run of the loop."""

    steps: int = 1000  # optimizer steps
    batch: int = 32  # sequences (or images) per optimizer step, over all processes
    micro_batch: int = 0  # sequences (or images) per forward pass and process; 0: the whole share at once
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    learning_rate: float = 3e-3  # AdamW's peak rate
    matrix_rate: float = 0.02  # Muon's peak rate
    weight_decay: float = 0.1  # decoupled, on matrices only
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    momentum: float = 0.95  # Muon (Nesterov)
    warmup: int = 50  # steps of linear warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_rate: float = 0.1  # last rate as a share of the peak
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    ema: float = 0.0  # decay of the averaged weights (0: none); the model folder then holds the average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: probed in the first steps
    compile: Literal["auto", "yes", "no"] = "auto"  # auto: only where it pays within the run
    shard: bool = False  # weights, gradients and optimizer states are split over the processes (FSDP2)
    evaluate_every: int = 250  # steps
    evaluate_items: int = 100_000  # tokens (or images) of the validation set, at most; 0: all of it
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints
    weights: Literal["best", "last"] = "best"  # what the model folder gets: of the lowest validation loss, or the last
    sample_every: float = 10.0  # seconds between samples on the screen; 0: none
    stop_at: float = 0.0  # end early once the validation loss is at or below this; 0: never

    def __post_init__(self) -> None:
        positive(self, "steps", "batch", "learning_rate", "matrix_rate", "evaluate_every", "save_every", "keep")
        within(self, 0.0, 1.0, "final_rate", "ema", "momentum")
        not_negative(self, "micro_batch", "weight_decay", "warmup", "clip", "evaluate_items", "sample_every",
                     "stop_at")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {list(self.betas)} must both lie in [0, 1)")
        if self.micro_batch and self.batch % self.micro_batch:
            raise UserError(f"training.batch = {self.batch} cannot be cut into micro-batches of {self.micro_batch}: "
                            "choose a training.micro_batch that divides it")


@dataclass(frozen=True)
class Recipe:
    """Everything about a model. Its tables but `training` are the dataclasses of their kinds."""

    name: str
    medium: str
    family: str
    seed: int
    data: Any
    codec: Any
    network: Any
    objective: Any
    training: Training
    sampling: Any
    check: Any

    def table(self) -> dict[str, Any]:
        """The recipe as nested plain values, every default filled in; `parse` reads it back to an equal recipe."""
        return _plain(self)


def positive(settings: Any, *names: str) -> None:
    """Raise UserError unless every named setting is above zero and finite."""
    for name in names:
        if not 0 < getattr(settings, name) < float("inf"):
            raise UserError(f"{name} = {getattr(settings, name)!r} must be above 0")


def not_negative(settings: Any, *names: str) -> None:
    """Raise UserError unless every named setting is zero or above, and finite."""
    for name in names:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise UserError(f"{name} = {getattr(settings, name)!r} must be 0 or more")


def within(settings: Any, low: float, high: float, *names: str) -> None:
    """Raise UserError unless every named setting lies in [low, high]."""
    for name in names:
        if not low <= getattr(settings, name) <= high:
            raise UserError(f"{name} = {getattr(settings, name)!r} must lie between {low:g} and {high:g}")


def read(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name ("gpt"), with `key.sub=value` overrides.

    Raises UserError naming the file, the line and the key.
    """
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    overrides = list(overrides)
    for override in overrides:
        _override(table, override)
    try:
        return parse(table)
    except UserError as error:
        given = {override.partition("=")[0].strip() for override in overrides}
        raise UserError(f"{path}{_line_of(text, str(error), given)}: {error}") from None


def find(path: Path | str) -> Path:
    """The path of a recipe file, or of the shipped recipe of that name. Raises UserError when there is neither."""
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = SHIPPED / f"{candidate.name.removesuffix('.toml')}.toml"
    if candidate.parent == Path(".") and shipped.is_file():
        return shipped
    names = shipped_names()
    hint = difflib.get_close_matches(shipped.stem, names, 1)
    raise UserError(f"no recipe {str(path)!r} here"
                    + (f", did you mean {hint[0]!r}?" if hint else f"; the shipped ones are {', '.join(names)}"))


def shipped_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.toml"))


def parse(table: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values. Raises UserError naming the key."""
    table = dict(table)
    medium = _choice(table, "medium", KINDS["data"])
    family = _choice(table, "family", KINDS["sampling"])
    chosen = {"data": medium, "check": medium, "objective": family, "sampling": family}
    for key in ("codec", "network"):
        inner = table.get(key)
        if not isinstance(inner, dict):
            raise UserError(f"the recipe needs a table [{key}]")
        chosen[key] = _choice(inner, "kind", KINDS[key], f"{key}.")
    _fit(chosen, medium, family)
    classes = {key: _load(KINDS[key][kind]) for key, kind in chosen.items()} | {"training": Training}
    _no_unknown(table, [f.name for f in dataclasses.fields(Recipe)], "")
    values: dict[str, Any] = {k: _convert(table.get(k, d), t, k)
                              for k, t, d in (("name", str, "model"), ("seed", int, 1))}
    if not values["name"] or values["name"] != Path(values["name"]).name or values["name"].startswith("."):
        raise UserError(f"name = {values['name']!r} must be a plain file name, because the model folder is runs/NAME")
    for key, cls in classes.items():
        values[key] = build(cls, table.get(key, {}), key)
    if family == "adversarial" and values["training"].shard:
        raise UserError("training.shard = true splits one network that has one loss, and family = 'adversarial' trains "
                        "two against each other: set it to false")
    return Recipe(medium=medium, family=family, **values)


def build(cls: type, table: Any, where: str) -> Any:
    """An instance of the settings dataclass `cls` from the TOML table `where`."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table, written [{where}]")
    hints = get_type_hints(cls)
    _no_unknown(table, list(hints), f"{where}.")
    values = {key: _convert(value, hints[key], f"{where}.{key}") for key, value in table.items()}
    missing = [f.name for f in dataclasses.fields(cls)
               if f.name not in values and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}.{missing[0]} is missing from the recipe")
    try:
        return cls(**values)
    except UserError as error:  # the dataclass's own rules name the bare key
        raise UserError(f"[{where}] {error}") from None


def _choice(table: Mapping[str, Any], key: str, options: Iterable[str], prefix: str = "") -> str:
    options = list(options)
    value = table.get(key)
    if value not in options:
        hint = difflib.get_close_matches(str(value), options, 1)
        said = "is missing" if value is None else f"= {value!r} is not known"
        raise UserError(f"{prefix}{key} {said}: "
                        + (f"did you mean {hint[0]!r}?" if hint else f"choose one of {', '.join(options)}"))
    assert isinstance(value, str)
    return value


def _fit(chosen: Mapping[str, str], medium: str, family: str) -> None:
    """Raise UserError where a codec is not of the medium, or a network cannot be taught by the family."""
    for key, whole, value in (("codec", "medium", medium), ("network", "family", family)):
        if value not in FITS[key, chosen[key]]:
            fitting = [kind for (table, kind), of in FITS.items() if table == key and value in of]
            raise UserError(f"{key}.kind = {chosen[key]!r} does not go with {whole} = {value!r}: "
                            f"choose one of {', '.join(fitting)}")
    if medium != "image" and family != "autoregressive":
        raise UserError(f"medium = {medium!r} is learnt as tokens: set family = 'autoregressive'")
    if family == "autoregressive" and chosen["codec"] == "pixels":
        raise UserError("codec.kind = 'pixels' does not go with family = 'autoregressive', which predicts tokens: "
                        "choose model, and a trained VQ-VAE as its path")


def _load(where: str) -> type:
    module, _, name = where.partition(":")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def _no_unknown(table: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in table:
        if key not in known:
            hint = difflib.get_close_matches(key, known, 1)
            raise UserError(f"unknown key {prefix}{key}"
                            + (f", did you mean {prefix}{hint[0]}?" if hint else f"; known: {', '.join(known)}"))


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The TOML value as the annotated type; integers pass for floats, lists for tuples."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        _choice({where: value}, where, args)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} = {value!r} must be a list")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise UserError(f"{where} = {value!r} must have {len(inner)} values")
        return tuple(_convert(v, t, where) for v, t in zip(value, inner, strict=True))
    if origin in (Union, types.UnionType):
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
        raise UserError(f"{where} = {value!r} must be {names.get(hint, hint)}")
    return value


def _override(table: dict[str, Any], text: str) -> None:
    """Set `key.sub=value` in the table; the value is read as TOML, and as plain text where it is not TOML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} is not an override: write key.sub=value, for example training.steps=500")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"{key} cannot be set: {parent} is not a table")
    table[last] = parsed


def _line_of(text: str, message: str, overridden: set[str]) -> str:
    """`, line N` for the first dotted key that the message complains of and the text holds, else nothing."""
    complaint = re.split(r", did you mean|; known|: did you mean|: choose", message)[0]
    for dotted in re.findall(r"[a-z_]+(?:\.[a-z_]+)*|\[[a-z_]+\] [a-z_]+", complaint):
        *tables, key = re.findall(r"[a-z_]+", dotted)
        if ".".join([*tables, key]) in overridden:
            continue
        current = ""
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*\[([\w.]+)\]", line):
                current = match[1]
            elif re.match(rf"\s*{key}\s*=", line) and current == ".".join(tables):
                return f", line {number}"
    return ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
