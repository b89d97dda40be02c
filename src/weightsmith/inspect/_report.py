"""What was found, as data: a few figures, a table, series to be drawn, and what to keep in mind.

A report prints as text, draws itself, shows itself in a notebook, and writes itself to whatever
kind of file its name says. All functions of this room that speak to people return one, or an object
with a ``report()``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightsmith import page
from weightsmith._version import __version__
from weightsmith.errors import Error, did_you_mean, missing
from weightsmith.inspect._plain import plain
from weightsmith.text import laid_out, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".html", ".svg", ".png", ".json", ".csv", ".txt")
"""Files that `Report.save` writes."""

_HUES = ("blue", "orange", "green", "violet")
_MARKERS = "oDs^vP"
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT = 4.6, 3.1  # inches, of one plot


@dataclass(frozen=True)
class Line:
    """One series of a plot: ``y`` over ``x``, both of n values; ``x`` may be words."""

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower ends of intervals; given together with ``high``."""
    high: Sequence[float] | None = None
    style: Literal["line", "points", "bars"] = "line"

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) > 1 or (self.low is None) != (self.high is None):
            raise Error(f"line {self.label!r}: x, y, low and high have different lengths: {sorted(lengths)}")


@dataclass(frozen=True)
class Surface:
    """Values over a grid: ``z[i][j]`` at ``y[i]`` and ``x[j]``."""

    x: Sequence[Any]
    y: Sequence[Any]
    z: Sequence[Sequence[float]]
    style: Literal["heat", "contour"] = "heat"
    log: bool = False
    """Whether colours stand for the logarithm; every value must then be above 0."""

    def __post_init__(self) -> None:
        if len(self.z) != len(self.y) or any(len(row) != len(self.x) for row in self.z):
            raise Error(f"a surface over {len(self.y)} x {len(self.x)} places has as many rows and columns")


@dataclass(frozen=True)
class Plot:
    """A drawing, as data: lines, or a surface with lines and points over it."""

    title: str
    x: str
    """What the horizontal axis shows, with its unit."""
    y: str
    lines: Sequence[Line] = ()
    surface: Surface | None = None
    log: Literal["", "x", "y", "xy"] = ""

    def said(self) -> str:
        """What is to be seen, in words, for who does not see it."""
        parts = [_said(line) for line in self.lines]
        if self.surface is not None:
            values = [value for row in self.surface.z for value in row if math.isfinite(value)]
            span = f"from {number(min(values))} to {number(max(values))}" if values else "nowhere finite"
            parts.insert(0, f"a grid of {len(self.surface.y)} by {len(self.surface.x)} values {span}")
        return f"{self.title}: {self.y} over {self.x}; {'; '.join(parts) or 'nothing'}."


@dataclass(frozen=True)
class Report:
    """What a function of this room found."""

    title: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The few numbers that matter, by name."""
    table: Sequence[Mapping[str, Any]] = ()
    """Flat records with the keys of the first. ``x low`` and ``x high`` are the ends of an interval around ``x``."""
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    """What to keep in mind when reading this, a sentence each."""

    def __post_init__(self) -> None:
        if any(list(row) != list(self.table[0]) for row in self.table):
            raise Error(f"report {self.title!r}: the rows of its table have different columns")

    def __getitem__(self, name: str) -> Any:
        """A figure; without one of that name, a column of the table as a list."""
        if name in self.figures:
            return self.figures[name]
        if self.table and name in self.table[0]:
            return [row[name] for row in self.table]
        known = [*self.figures, *(self.table[0] if self.table else ())]
        raise Error(f"report {self.title!r} has no {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain data."""
        return [plain(row) for row in self.table]

    def to_json(self) -> dict[str, Any]:
        """All of it as data that JSON can hold. What is not finite becomes None."""
        return plain(self)

    def __str__(self) -> str:
        parts = [self.title]
        if self.figures:
            wide = max(map(len, self.figures))
            parts.append("\n".join(f"{name:<{wide}}  {_text(value)}" for name, value in self.figures.items()))
        if self.table:
            columns = _columns(self.table[0])
            body = [[_with_ends(row, name) for name in columns] for row in self.table]
            left = next((i for i, name in enumerate(columns) if not isinstance(self.table[0][name], str)), len(columns))
            parts.append("\n".join(laid_out(columns, body, max(left, 1))))
        return "\n\n".join([*parts, *self.notes])

    def draw(self) -> Figure:
        """All plots beside each other, as a matplotlib figure.

        Raises:
            Error: there is nothing to draw.
            MissingPackage: matplotlib is not installed.
        """
        if not self.plots:
            raise Error(f"report {self.title!r} has no plots")
        across = min(len(self.plots), 3)
        return _drawing(self.plots, page.LIGHT, across)

    def html(self, heading: str = "h3") -> str:
        """The report as a piece of a page: HTML of headings, tables and drawings."""
        return f"<{heading}>{escape(self.title)}</{heading}>\n{self.body()}"

    def body(self, key: str = "report") -> str:
        """`html` without its heading; ``key`` is a word that nothing else on the page has."""
        parts = [page.paragraph(note, "note") for note in self.notes]
        if self.figures:
            rows = [[page.Cell(name), _cell(value)] for name, value in self.figures.items()]
            parts.append(page.table(f"{key}-figures", "Figures", ("", "value"), rows))
        if self.plots:
            drawn = [_figure(plot, f"{key}-plot-{index}") for index, plot in enumerate(self.plots)]
            parts.append(page.figures(drawn))
        if self.table:
            rows = [_cells(row) for row in self.table]
            caption = f"{len(rows)} row{'s' * (len(rows) > 1)}"
            parts.append(page.table(f"{key}-table", caption, _columns(self.table[0]), rows))
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>" + (_alone(self.plots, "report") if self.plots else "")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a file of the kind that its name says: .html, .svg, .png, .json, .csv (the table), .txt.

        Raises:
            Error: another kind, a table or plots that are not there.
            MissingPackage: drawings without matplotlib.
        """
        place = Path(path)
        if place.suffix not in KINDS:
            raise Error(f"{place}: a report is written as one of {', '.join(KINDS)}")
        if place.suffix == ".csv" and not self.table:
            raise Error(f"{place}: report {self.title!r} has no table")
        return page.written(place, self._content(place.suffix))

    def _content(self, kind: str) -> bytes:
        if kind == ".png":
            buffer = io.BytesIO()
            self.draw().savefig(buffer, format="png", dpi=150, facecolor=page.LIGHT["paper"])
            return buffer.getvalue()
        if kind == ".csv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(self.table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())
            return text.getvalue().encode()
        made = {
            ".svg": lambda: _svg(self.draw()),
            ".json": lambda: json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n",
            ".txt": lambda: f"{self}\n",
            ".html": lambda: page_of([self]),
        }
        return made[kind]().encode()


def page_of(reports: Sequence[Report], title: str | None = None) -> str:
    """One self-contained HTML page of several reports, a section each."""
    headings = ["What was found"] if len(reports) == 1 else [one.title for one in reports]
    sections = [
        page.Section(f"part-{i}", heading, one.body(f"part-{i}"))
        for i, (heading, one) in enumerate(zip(headings, reports, strict=True))
    ]
    return page.page(title or reports[0].title, "", sections, page.paragraph(f"weightsmith {__version__}"))


# Text


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {True: "yes", False: "no", None: "-"}.get(value, value)  # type: ignore[call-overload]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return " ".join(_text(one) for one in value)
    return str(value)


def _cell(value: Any) -> page.Cell:
    return page.Cell(_text(value), is_words=isinstance(value, str))


def _columns(row: Mapping[str, Any]) -> list[str]:
    """The columns to show: the ends of an interval stand beside their figure."""
    return [name for name in row if not (name.endswith((" low", " high")) and name.rpartition(" ")[0] in row)]


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row.get(f"{name} low"), row.get(f"{name} high")
    return "" if low is None or high is None else f"[{_text(low)}, {_text(high)}]"


def _with_ends(row: Mapping[str, Any], name: str) -> str:
    return f"{_text(row[name])} {_interval(row, name)}".rstrip()


def _cells(row: Mapping[str, Any]) -> list[page.Cell]:
    first, *others = _columns(row)
    cells = [page.Cell(_text(row[name]), _interval(row, name), isinstance(row[name], str)) for name in others]
    return [page.Cell(_text(row[first])), *cells]


def _said(line: Line) -> str:
    finite = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not finite:
        return f"{line.label}: no finite value"
    low, high = min(finite, key=lambda pair: pair[1]), max(finite, key=lambda pair: pair[1])
    first, last = finite[0][1], finite[-1][1]
    ends = f"from {number(first)} to {number(last)}"
    return (
        f"{line.label}: {ends}, least {number(low[1])} at {_text(low[0])}, most {number(high[1])} at {_text(high[0])}"
    )


# Drawings


def _figure(plot: Plot, key: str) -> str:
    colours = page.COLOURS
    return page.figure(_drawing([plot], colours, 1, key), key, plot.title, plot.said())


def _alone(plots: Sequence[Plot], key: str) -> str:
    drawing = _drawing(plots, page.LIGHT, min(len(plots), 3), key)
    return page.themed_svg(drawing, key, " ".join(plot.said() for plot in plots))


def _svg(drawing: Figure) -> str:
    buffer = io.StringIO()
    with page.drawing_style("report", page.LIGHT):
        drawing.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=page.LIGHT["paper"])
    return buffer.getvalue()


def _drawing(plots: Sequence[Plot], colours: Mapping[str, str], across: int, key: str = "report") -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", "plot", "drawing a report") from None
    down = -(-len(plots) // across)
    with page.drawing_style(key, colours):
        drawing = Figure(figsize=(_WIDTH * across, _HEIGHT * down), layout="constrained")
        panels = list(drawing.subplots(down, across, squeeze=False).flat)
        for axes, plot in zip(panels, plots, strict=False):
            _draw(axes, plot, colours, titled=len(plots) > 1)
        for axes in panels[len(plots) :]:
            axes.set_visible(False)
    return drawing


def _draw(axes: Axes, plot: Plot, colours: Mapping[str, str], titled: bool) -> None:
    if plot.surface is not None:
        _draw_surface(axes, plot.surface, colours)
    bars = [line for line in plot.lines if line.style == "bars"]
    for index, line in enumerate(plot.lines):
        colour = colours[_HUES[index % len(_HUES)]]
        if line.style == "bars":
            _draw_bars(axes, line, colour, colours["ink"], bars.index(line), len(bars))
        else:
            _draw_line(axes, line, colour, index)
    if titled:
        axes.set_title(_shown(plot.title))
    axes.set_xlabel(_shown(plot.x))
    axes.set_ylabel(_shown(plot.y))
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
    if bars:
        axes.grid(False, axis="x")
        count = max(len(line.x) for line in bars)
        axes.set_xlim(-max(0.5, 1.5 - count / 2), count - 1 + max(0.5, 1.5 - count / 2))  # few bars stay narrow
    if len(plot.lines) > 4:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    elif len(plot.lines) > 1:
        axes.legend()


def _draw_line(axes: Axes, line: Line, colour: str, index: int) -> None:
    joined = line.style == "line"
    marker = _MARKERS[index % len(_MARKERS)] if not joined or len(line.x) <= 30 else ""
    dashes = _DASHES[(index // len(_HUES)) % len(_DASHES)] if joined else ""
    axes.plot(
        list(line.x),
        list(line.y),
        color=colour,
        marker=marker,
        markersize=4,
        linestyle=dashes,
        label=_shown(line.label),
    )
    if line.low is not None and line.high is not None:
        if joined:
            axes.fill_between(list(line.x), list(line.low), list(line.high), color=colour, alpha=0.2, linewidth=0)
        else:
            axes.vlines(list(line.x), list(line.low), list(line.high), color=colour, linewidth=1.2)


def _draw_bars(axes: Axes, line: Line, colour: str, ink: str, index: int, count: int) -> None:
    wide = 0.8 / count
    places = [place + (index - (count - 1) / 2) * wide for place in range(len(line.x))]
    axes.bar(places, list(line.y), width=wide, color=colour, label=_shown(line.label))
    if line.low is not None and line.high is not None:
        axes.vlines(places, list(line.low), list(line.high), color=ink, linewidth=1.2)
    _label(axes, *_some(line.x, 24, 0.0))


def _label(axes: Axes, places: Sequence[float], words: Sequence[Any]) -> None:
    """Words under an axis, slanted where they would meet."""
    crowded = sum(len(_text(word)) + 1 for word in words) > 55
    slant: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(places, [_shown(_text(word)) for word in words], **slant)


def _draw_surface(axes: Axes, surface: Surface, colours: Mapping[str, str]) -> None:
    import numpy as np

    values = np.array(surface.z, dtype=float)
    shown = np.log10(values) if surface.log else values
    numeric = all(isinstance(place, int | float) for place in [*surface.x, *surface.y])
    if surface.style == "contour" and numeric and min(values.shape) > 1:
        levels = axes.contour(list(surface.x), list(surface.y), shown, levels=12, cmap="viridis", linewidths=1.1)
        axes.clabel(levels, fontsize=7)
        return
    axes.grid(False)
    fine = shown.size > 2500  # an image inside the drawing, so that a fine grid makes no large file
    if numeric:
        image = axes.pcolormesh(
            list(surface.x), list(surface.y), shown, cmap="viridis", shading="nearest", rasterized=fine
        )
    else:
        image = axes.pcolormesh(shown, cmap="viridis", rasterized=fine)
        _label(axes, *_some(surface.x, 12))
        places, names = _some(surface.y, 24)
        axes.set_yticks(places, [_shown(_text(name)) for name in names])
    bar = axes.figure.colorbar(image, ax=axes)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if surface.log:
        bar.set_label("log10")


def _some(words: Sequence[Any], most: int, middle: float = 0.5) -> tuple[list[float], Sequence[Any]]:
    """The middles of cells and their words: every so many where there are more than can be read."""
    step = max(-(-len(words) // most), 1)
    return [index + middle for index in range(0, len(words), step)], words[::step]


def _shown(text: str) -> str:
    """Text in a drawing: matplotlib takes what stands between dollars for mathematics."""
    return re.sub(r"\$", r"\\$", text)
