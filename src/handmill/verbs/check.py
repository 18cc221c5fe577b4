"""`handmill check`: honest figures for a model folder, recorded in its receipt."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from handmill import checks, folder
from handmill import recipe as recipes


def check(path: Path | str, progress: bool = True, **overrides: Any) -> dict[str, Any]:
    """Check a model folder and record the result as receipt["check"]; returns it.

    `overrides` replace values of the recipe's [check] table, such as samples. What needs the training data is carried
    over from an earlier check of the same weights and settings where those data are gone. Raises UserError for a
    wrong setting, and for a folder that is not as it was written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = folder.load(path, device)
    table = model.recipe.table()["check"] | overrides
    module = checks.of(model.recipe.medium)
    result = module.run(model, recipes.build(module.Settings, table, "check"), progress and sys.stderr.isatty())
    result = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": device.type,
              "medium": model.recipe.medium} | result
    result = module.carry(result, model.receipt.get("check") or {})
    folder.record(model.path, "check", result)
    return result
