"""One file a medium: what is measured of a model, recorded in its receipt and told on the screen."""

import importlib
from typing import Any


def of(medium: str) -> Any:
    """The module that checks models of a medium: Settings, run, carry, lines."""
    return importlib.import_module(f"handmill.checks.{medium}")


def lines(result: dict[str, Any]) -> list[str]:
    """A check's result for the screen."""
    told: list[str] = of(result.get("medium", "text")).lines(result)
    return told
