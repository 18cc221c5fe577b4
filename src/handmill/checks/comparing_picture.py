"""The picture of a comparison: samples of every model, and figures with their intervals as points.

N images, H height, W width, C channels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from handmill.media import pictures

_MODEL, _REFERENCE = "#2f6f9f", "#8a8f98"
_WIDTH = 9.0  # inches

Images = NDArray[np.uint8]


def draw(result: dict[str, Any], samples: Mapping[str, Images], png: Path) -> None:
    """Draw a row of `samples` (N, H, W, C) for each model that has some, above points of what compares most.

    `result` is that of comparing.compare: of images Fréchet distance and coverage are drawn, of text bits per
    character.
    """
    charts = [row for row in result["rows"] if _telling(row["what"])]
    sheets = {name: pictures.grid(images, len(images), gap=1, scale=1) for name, images in samples.items()}
    heights = [_WIDTH * sheet.shape[0] / sheet.shape[1] + 0.35 for sheet in sheets.values()]
    heights.append(0.9 + 0.3 * len(result["columns"]))
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=150, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, sheet) in zip(parts, sheets.items(), strict=False):
        axes = part.subplots()
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=10)
        axes.axis("off")
    drawn = parts[-1].subplots(1, max(1, len(charts)), sharey=True, squeeze=False)[0]
    for axes, row in zip(drawn, charts, strict=False):
        _points(axes, row, result["columns"], len(result["models"]))
    if not charts:
        drawn[0].axis("off")
        drawn[0].text(0, 0.5, "no figure was measured", fontsize=10)
    figure.savefig(png)


def _telling(what: str) -> bool:
    return what in ("coverage", "bits per character") or (what.startswith("Fréchet") and "infinity" not in what)


def _points(axes: Axes, row: dict[str, Any], columns: list[str], models: int) -> None:
    """A point and its interval for each column, the first on top."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e7e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for place, figure in enumerate(row["figures"]):
        if figure is None:
            axes.annotate(row["cells"][place], (0.02, place), xycoords=("axes fraction", "data"), fontsize=8,
                          color=_REFERENCE, va="center")
            continue
        colour = _MODEL if place < models else _REFERENCE
        if figure["low"] is not None:
            axes.plot([figure["low"], figure["high"]], [place, place], color=colour, linewidth=1.6)
        axes.plot([figure["value"]], [place], marker="o", markersize=5, color=colour)
    axes.set_yticks(range(len(columns)), columns, fontsize=9)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.tick_params(left=False, labelsize=9)
    axes.set_title(row["what"], loc="left", fontsize=9)
    better = f"{row['better']} is better; " if row["better"] else ""
    axes.set_xlabel(f"{better}intervals of 95 %", fontsize=8)
