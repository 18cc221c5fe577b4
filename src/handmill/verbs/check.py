"""`handmill check`: honest figures for a model folder, recorded in its receipt."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from handmill import folder
from handmill import recipe as recipes
from handmill.checks import text


def check(path: Path | str, progress: bool = True, **overrides: Any) -> dict[str, Any]:
    """Check a model folder and record the result as receipt["check"]; returns it.

    `overrides` replace values of the recipe's [check] table: tokens, stride, samples, sample_tokens, lengths,
    trigram_bytes, xz_bytes. What needs the training text is carried over from an earlier check of the same
    weights and settings where that text is gone. Raises UserError for a wrong setting, and for a folder that is
    not as it was written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = folder.load(path, device)
    table = model.recipe.table()["check"] | overrides
    settings: text.Settings = recipes.build(text.Settings, table, "check")
    result = text.run(model, settings, progress and sys.stderr.isatty())
    result = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": device.type} | result
    result = text.carry(result, model.receipt.get("check") or {})
    folder.record(model.path, "check", result)
    return result
