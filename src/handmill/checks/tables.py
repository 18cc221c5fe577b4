"""Figures as text, and rows of them under one another."""

from collections.abc import Callable, Sequence
from typing import Any

Row = tuple[str, str, str]


def shown(figure: dict[str, Any]) -> str:
    """A figure as text: 1.470 [1.455, 1.483]."""
    return _interval(figure, lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3f}")


def percent(figure: dict[str, Any]) -> str:
    """A share as text: 1.25 % [0.80 %, 1.90 %]."""
    return _interval(figure, lambda x: f"{100 * x:.2f} %")


def aligned(table: Sequence[Row]) -> list[str]:
    """Rows of three cells under one another."""
    widths = [max(len(row[column]) for row in table if row[2]) for column in (0, 1)]
    return [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in table]


def _interval(figure: dict[str, Any], form: Callable[[float], str]) -> str:
    value = form(figure["value"])
    return value if figure["low"] is None else f"{value} [{form(figure['low'])}, {form(figure['high'])}]"
