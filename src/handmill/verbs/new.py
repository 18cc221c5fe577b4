"""`new`: a shipped recipe, comments and all, pointed at the user's files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from handmill import recipe as recipes
from handmill.data.sources import STDLIB, STDLIB_LICENCE
from handmill.errors import UserError


def new(shipped: str, files: Sequence[str], out: Path, name: str | None = None) -> Path:
    """Write the shipped recipe `shipped` to `out` with data.paths = `files` and the given name (default: out's stem).

    "python:stdlib" passes as a file. Without files the recipe keeps the paths it has, and their licence.
    Raises UserError when there is no such recipe, `out` exists already, or a file is missing.
    """
    source = recipes.find(shipped)
    if out.exists():
        raise UserError(f"{out} exists already: choose another file with --out, or edit that one")
    for file in files:
        if file != STDLIB and not any(c in file for c in "*?[") and not Path(file).exists():
            raise UserError(f"{file} does not exist: name files, folders or globs in quotes")
    text = source.read_text(encoding="utf-8")
    paths = json.dumps(list(files), ensure_ascii=False)
    if files:
        licence = STDLIB_LICENCE if {*files} == {STDLIB} else "unknown"  # not that of the recipe's own paths
        text = re.sub(r"(?m)^paths = \[[^\]]*\]", lambda _: f"paths = {paths}", text, count=1)
        text = re.sub(r'(?m)^licence = "[^"]*"', f'licence = "{licence}"', text, count=1)
    text = re.sub(r'(?m)^name = "[^"]*"', lambda _: f"name = {json.dumps(name or out.stem)}", text, count=1)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from None
    return out
