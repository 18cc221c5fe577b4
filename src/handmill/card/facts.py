"""What every section of a card needs: values of a model folder as text, without paths of the machine."""

import re
from pathlib import Path
from typing import Any

from handmill.disk import parsed
from handmill.page import Block, Picture, Table, Text
from handmill.training.monitor import duration, size

NOT_CHECKED = "Not measured: run `handmill check` on this model folder."
_SOURCES = 20  # shown

Row = tuple[str, ...]


def number(value: Any) -> str:
    """A count with its thousands apart."""
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def loss(value: Any, measure: str) -> str:
    """A loss in its measure, such as "nats per token"."""
    return f"{value:.4f} {measure}".rstrip() if isinstance(value, float) else "not recorded"


def seconds(value: Any) -> str:
    """Seconds, or a table of what they were spent on."""
    if isinstance(value, dict) and value:
        return (f"{duration(sum(value.values()))} ("
                + ", ".join(f"{name} {duration(part)}" for name, part in value.items()) + ")")
    return duration(value) if isinstance(value, (int, float)) else "not recorded"


def digest(entry: dict[str, Any]) -> str:
    return str(entry.get("sha256") or "not recorded")


def weights(receipt: dict[str, Any]) -> str | None:
    """The checksum of the folder's weights."""
    value: str | None = receipt.get("files", {}).get("weights.safetensors", {}).get("sha256")
    return value


def read(file: Path) -> dict[str, Any]:
    """A JSON table, {} where there is none that can be read."""
    try:
        value = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def inside(path: Path, file: str) -> Path:
    """The file of a model folder; for a name that leads out of it the folder itself, which is no file.

    A receipt from elsewhere may name anything.
    """
    found = path / file
    return found if found.resolve().is_relative_to(path.resolve()) else path


def name(path: str) -> str:
    """A path as the user gave it, or its last part where it is absolute, which is the machine's business."""
    absolute = re.match(r"[/\\~]|[A-Za-z]:", path)
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if absolute else path


def public(sentence: str) -> str:
    """A sentence with absolute paths in it cut to their last parts."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:]+[/\\])+", "", sentence)


def picture(path: Path, file: str, alt: str, missing: str) -> Block:
    """A PNG file of the model folder, or the sentence that it is missing."""
    whole = inside(path, file)
    return Picture(file, alt) if whole.suffix == ".png" and whole.is_file() else Text(missing)


def sources(manifest: dict[str, Any]) -> Block:
    """The sources of the data with their checksums."""
    found = manifest.get("sources", [])
    if not found:
        return Text("Not recorded: the sources of the data.")
    rows: list[Row] = [(name(source.get("path", "?")), size(source.get("bytes", 0)),
                        source.get("licence", "unknown"), digest(source)) for source in found[:_SOURCES]]
    if len(found) > _SOURCES:
        rows.append((f"and {len(found) - _SOURCES:,} more, listed in data/manifest.json", "", "", ""))
    return Table([("source", "size", "licence", "sha256"), *rows])


def sampling(settings: dict[str, Any]) -> str:
    """The settings of samples in a few words."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value not in ([], ""))
