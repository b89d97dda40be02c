"""The report's drawings: narrow enough for a phone, in the colours of the page.

Each function returns a matplotlib figure and a sentence that says what is to be seen in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.demo._task import unpacked
from weightsmith.page import COLOURS, drawing_style
from weightsmith.weights import open as open_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from weightsmith.demo._measure import Share
    from weightsmith.demo._run import Outcome, Row

WIDTH = 4.2  # inches; at 72 points an inch the text is legible from 320 pixels on

Drawn = tuple["Figure", str]


def _figure(key: str, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    with drawing_style(key):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = drawing.subplots(panels, 1, squeeze=False, sharex=panels > 1)
    return drawing, list(axes[:, 0])


def accuracies(outcome: Outcome, rows: Sequence[Row], key: str) -> Drawn:
    """Accuracy with its interval, one line a checkpoint, on plain and shifted test pictures."""
    drawing, (axes,) = _figure(key, 0.9 + 0.3 * len(rows))
    with drawing_style(key):
        places = np.arange(len(rows))
        for part, offset, colour, marker in (("test", -0.14, "blue", "o"), ("shifted", 0.14, "orange", "D")):
            shares = [getattr(row, part) for row in rows]
            label = {"test": "as they are", "shifted": "shifted"}[part]
            _whiskers(axes, shares, places + offset, colour, marker, label)
        axes.set_yticks(places, [row.made.title for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("accuracy on test pictures, %")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        drawing.legend(loc="outside upper right", ncols=2, handletextpad=0.3, columnspacing=1.2)
    said = "; ".join(f"{row.made.title} {_percent(row.test.value)} and {_percent(row.shifted.value)}" for row in rows)
    return drawing, f"Accuracy on test pictures as they are and shifted, in per cent: {said}."


def _whiskers(axes: Axes, shares: Sequence[Share], places: Any, colour: str, marker: str, label: str) -> None:
    values = np.array([100 * one.value for one in shares])
    low, high = (np.array([100 * one.interval[end] for one in shares]) for end in (0, 1))
    axes.errorbar(
        values,
        places,
        xerr=[values - low, high - values],
        fmt=marker,
        markersize=4,
        color=COLOURS[colour],
        elinewidth=1.4,
        capsize=2.5,
        label=label,
    )


def sizes(outcome: Outcome, key: str) -> Drawn:
    """Bytes on disk against accuracy: one line a model, one point a number of bits."""
    soup, repaired, small = outcome.row("greedy-soup"), outcome.row("repaired"), outcome.settings.small_bits
    series = [
        (
            "greedy soup",
            "blue",
            "o",
            4,
            [(outcome.row(f"{bits}-bit"), f"{bits}-bit") for bits in outcome.settings.bits],
        ),
        ("pruned, repaired", "orange", "D", -11, [(outcome.row(f"repaired-{small}-bit"), f"{small}-bit")]),
        ("pruned", "green", "s", 4, []),
    ]
    firsts = [soup, repaired, outcome.row("pruned")]
    drawing, (axes,) = _figure(key, 3.1)
    said = []
    with drawing_style(key):
        for first, (label, colour, marker, offset, others) in zip(firsts, series, strict=True):
            rows = sorted([(first, "32-bit"), *others], key=lambda pair: pair[0].nbytes)
            _curve(axes, rows, label, COLOURS[colour], marker, offset)
            said += [f"{label} {bits} {kilobytes(row.nbytes)} kB, {_percent(row.test.value)}" for row, bits in rows]
        axes.set_xlim(0, 1.12 * soup.nbytes / 1000)
        axes.margins(y=0.15)
        axes.set_xlabel("weight files, kB")
        axes.set_ylabel("test accuracy, %")
        drawing.legend(loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)
    return drawing, f"Size of the weight files and accuracy in per cent: {'; '.join(said)}."


def _curve(axes: Axes, rows: Sequence[tuple[Row, str]], label: str, colour: str, marker: str, offset: int) -> None:
    values = np.array([100 * row.test.value for row, _ in rows])
    low, high = (np.array([100 * row.test.interval[end] for row, _ in rows]) for end in (0, 1))
    places = [row.nbytes / 1000 for row, _ in rows]
    error = [values - low, high - values]
    axes.errorbar(
        places, values, yerr=error, color=colour, marker=marker, markersize=4, capsize=2.5, elinewidth=1.2, label=label
    )
    for place, value, (_, bits) in zip(places, values, rows, strict=True):
        side = -1 if bits == "32-bit" else 1  # away from the edge of the drawing
        axes.annotate(
            bits,
            (place, value),
            (5 * side, offset),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            fontsize=8,
            color=colour,
        )


def zeros(outcome: Outcome, rows: Sequence[Row], key: str) -> Drawn:
    """The share of zeros in every matrix and convolution."""
    drawing, (axes,) = _figure(key, 2.9)
    names = [name for name in rows[0].zeros if name.endswith(".weight")]
    shares = {row.made.key: [100 * row.zeros[name][0] / row.zeros[name][1] for name in names] for row in rows}
    thick = 0.8 / len(rows)
    colours = ("blue", "orange", "green", "violet")
    with drawing_style(key):
        places = np.arange(len(names))
        for number, row in enumerate(rows):
            offset = (number - (len(rows) - 1) / 2) * thick
            colour = COLOURS[colours[number % len(colours)]]
            axes.barh(places + offset, shares[row.made.key], 0.85 * thick, color=colour, label=row.made.title)
        axes.set_yticks(places, [name.removesuffix(".weight") for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("values that are exactly zero, %")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        drawing.legend(loc="outside upper left", ncols=2, handletextpad=0.4, columnspacing=1.2)
    said = "; ".join(
        f"{row.made.title}: "
        + ", ".join(f"{name} {value:.0f}" for name, value in zip(names, shares[row.made.key], strict=True))
        for row in rows
    )
    return drawing, f"Share of zeros by layer, in per cent. {said}."


def histograms(outcome: Outcome, rows: Sequence[Row], name: str, key: str) -> Drawn:
    """How often each value occurs in one tensor, one panel a checkpoint."""
    drawing, panels = _figure(key, 0.5 + 1.05 * len(rows), len(rows))
    values = [unpacked(open_weights(outcome.folder / row.made.key))[name].flatten().numpy() for row in rows]
    reach = max(float(np.abs(one).max()) for one in values)
    edges = np.linspace(-reach, reach, 82)
    distinct = [len(np.unique(one)) for one in values]
    with drawing_style(key):
        for axes, row, one, count in zip(panels, rows, values, distinct, strict=True):
            axes.hist(one, edges.tolist(), color=COLOURS["blue"], log=True)
            axes.set_title(f"{row.made.title}: {count:,} different values", loc="left")
            axes.grid(axis="x", visible=False)
        panels[-1].set_xlabel(f"value in {name}")
        drawing.supylabel("how many (logarithmic)", fontsize=9, color=COLOURS["ink"])
    said = "; ".join(f"{row.made.title} has {count:,}" for row, count in zip(rows, distinct, strict=True))
    return drawing, f"Histograms of {name}. Different values among {values[0].size:,}: {said}."


def line(outcome: Outcome, key: str) -> Drawn:
    """Accuracy along the line between two siblings."""
    drawing, (axes,) = _figure(key, 2.9)
    first, second = outcome.ends
    places = [point.place for point in outcome.line]
    with drawing_style(key):
        for part, colour, marker, label in (
            ("test", "blue", "o", "as they are"),
            ("shifted", "orange", "D", "shifted"),
        ):
            values = [100 * getattr(point, part) for point in outcome.line]
            axes.plot(places, values, color=COLOURS[colour], marker=marker, markersize=3, label=label)
        axes.axvline(0.5, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks([0, 0.5, 1], [f"sibling {first.number}", "their mean", f"sibling {second.number}"])
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[2].set_horizontalalignment("right")
        axes.set_ylabel("accuracy, %")
        drawing.legend(loc="outside upper right", ncols=2, handletextpad=0.4, columnspacing=1.2)
    at = {0.0: f"sibling {first.number}", 0.5: "their mean", 1.0: f"sibling {second.number}"}
    said = "; ".join(
        f"{at[point.place]} {_percent(point.test)} and {_percent(point.shifted)}"
        for point in outcome.line
        if point.place in at
    )
    return drawing, f"Accuracy between two siblings on test pictures as they are and shifted, in per cent: {said}."


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def kilobytes(nbytes: int) -> str:
    """Thousands of bytes with one decimal."""
    return f"{nbytes / 1000:,.1f}"
