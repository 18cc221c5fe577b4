"""The loss curve of a run as a picture, drawn from metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from handmill.disk import parsed

_TRAIN, _VALIDATION, _QUIET = "#2f6f9f", "#d1622b", "#8a8f98"
_SHADES = (_TRAIN, _VALIDATION, "#5a8f4f", "#8a5a9f", "#b08a2f")
_SHARES = {"validation_coverage": "coverage", "validation_recall": "recall", "validation_precision": "precision",
           "discriminator_certainty": "discriminator's certainty"}
_WINDOWS = 50  # the smoothed line averages about this share of the run: 1/50

Series = NDArray[np.float64]


def draw(metrics: Path, png: Path, measure: str = "nats per token", training_measure: str = "") -> None:
    """Draw training loss (raw pale, smoothed dark), validation loss and learning rate over the steps.

    `metrics` holds one JSON object a line: step, loss, rate (a share of its peak), validation_loss; losses in
    `measure`. Where training has a measure of its own, the validation, its shares, and the losses of all phases stand
    apart. A line cut short by a crash is passed over; without any line the picture says so.
    """
    rows = read(metrics)
    heights = (4, 3, 3, 1) if training_measure else (5, 1)
    figure = Figure(figsize=(8, 0.8 * sum(heights)), dpi=150, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e7e9ec", linewidth=0.8)
        axes.set_axisbelow(True)
    if training_measure:
        _validation(panels[0], rows, measure)
        _lines(panels[1], rows, _SHARES, "share")
        _lines(panels[2], rows, {key: key.removesuffix("_loss").replace("loss", "generator") for key in
                                 ("loss", "discriminator_loss")}, "loss")
    else:
        _losses(panels[0], rows, measure)
    _rates(panels[-1], rows)
    figure.align_ylabels()
    figure.savefig(png)


def read(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl by rising step, lines of one step joined into one."""
    rows: dict[int, dict[str, Any]] = {}
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for line in text.splitlines():
        try:
            row = parsed(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def column(rows: list[dict[str, Any]], key: str) -> tuple[Series, Series]:
    """Steps and values of the rows that hold a finite number at `key`, both (N,)."""
    pairs = [(row["step"], row[key]) for row in rows
             if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def smoothed(values: Series) -> Series:
    """Means of the values around each, over about 1/50 of the run, fewer at its ends; (N,)."""
    half = max(1, len(values) // (2 * _WINDOWS))
    total = np.concatenate(([0.0], np.cumsum(values)))
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    mean: Series = (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)
    return mean


def _losses(axes: Axes, rows: list[dict[str, Any]], measure: str) -> None:
    steps, losses = column(rows, "loss")
    at, validation = column(rows, "validation_loss")
    axes.set_ylabel(f"loss, {measure}")
    if not len(steps):
        axes.set_title("no loss recorded yet", loc="left", fontsize=11)
        return
    axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
    line = smoothed(losses)
    axes.plot(steps, line, color=_TRAIN, linewidth=1.8, label=f"training {line[-1]:.3f}")
    if len(at):
        axes.plot(at, validation, color=_VALIDATION, linewidth=1.2, marker="o", markersize=4, clip_on=False,
                  label=f"validation {validation[-1]:.3f}, lowest {validation.min():.3f}")
    _limit(axes, losses, validation)
    final = f"validation {validation[-1]:.3f}" if len(at) else f"training {line[-1]:.3f}"
    axes.set_title(f"{final} {measure} after {steps[-1]:,.0f} steps", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper right")


def _validation(axes: Axes, rows: list[dict[str, Any]], measure: str) -> None:
    """What evaluations found, over a scale of powers."""
    at, validation = column(rows, "validation_loss")
    axes.set_ylabel(measure)
    if not len(at):
        axes.set_title("nothing evaluated yet", loc="left", fontsize=11)
        return
    axes.set_yscale("log")
    axes.plot(at, validation, color=_VALIDATION, linewidth=1.4, marker="o", markersize=4, clip_on=False)
    said = f"{measure} {validation[-1]:.3f} after {at[-1]:,.0f} steps, lowest {validation.min():.3f}"
    axes.set_title(said, loc="left", fontsize=11)


def _lines(axes: Axes, rows: list[dict[str, Any]], names: dict[str, str], label: str) -> None:
    """Some columns, smoothed where there is a value a step, each by its name."""
    axes.set_ylabel(label)
    for (key, name), shade in zip(names.items(), _SHADES, strict=False):
        steps, values = column(rows, key)
        if len(steps):
            axes.plot(steps, smoothed(values) if len(steps) > _WINDOWS else values, color=shade, linewidth=1.4,
                      label=f"{name} {values[-_WINDOWS:].mean() if len(steps) > _WINDOWS else values[-1]:.2f}")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right")


def _limit(axes: Axes, losses: Series, validation: Series) -> None:
    """Leave spikes out of the picture: the end of the run, where losses differ little, needs the room."""
    shown = np.concatenate((losses, validation))
    low, high = shown.min(), max(float(np.quantile(shown, 0.995)), float(losses[0]))
    room = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - room, high + room)


def _rates(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, rates = column(rows, "rate")
    axes.plot(steps, rates, color=_QUIET, linewidth=1.4)
    axes.set_ylabel("rate, share\nof its peak", fontsize=8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 1])
    if len(rows) > 1:
        axes.set_xlim(rows[0]["step"], rows[-1]["step"])
