"""The report of a recipe: one self-contained HTML file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith import page
from weightsmith._version import __version__
from weightsmith.errors import missing
from weightsmith.recipe._model_card import written as as_yaml
from weightsmith.weights import Saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightsmith.recipe._run import Row
    from weightsmith.recipe._schema import Recipe

WIDTH = 4.2  # inches
MOST_LINES = 12


def page_of(recipe: Recipe, saved: Sequence[Saved], rows: Sequence[Row], best: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = []
    if rows:
        sections.append(page.Section("measured", "What was measured", _measured(recipe, rows, best)))
    if saved:
        sections.append(page.Section("written", "What was written", _written(saved)))
    sections.append(page.Section("recipe", "The recipe", page.code(as_yaml(recipe.document))))
    title = recipe.title or os.path.basename(recipe.name)
    lead = page.paragraph(_lead(recipe, rows, best), "lead")
    return page.page(title, lead, sections, page.paragraph(f"weightsmith {__version__}"))


def _lead(recipe: Recipe, rows: Sequence[Row], best: Mapping[str, Any]) -> str:
    steps = ", then ".join(step.said for step in recipe.steps.values()) or "no step"
    text = f"From {', '.join(recipe.inputs)}: {steps}."
    if best and recipe.measures:
        chosen = ", ".join(f"{key} = {value}" for key, value in best.items())
        text += f" Of {len(rows)} measured, the best by {recipe.measures[0].name} was kept: {chosen}."
    return text


def _measured(recipe: Recipe, rows: Sequence[Row], best: Mapping[str, Any]) -> str:
    names = [measure.name for measure in recipe.measures]
    swept = list(recipe.sweep)
    columns = ["checkpoint", *swept, *names, "seconds"]
    body = [
        [
            page.Cell(row.weights, "kept" if best and row.values and row.values.items() <= best.items() else ""),
            *(page.Cell(str(row.values.get(key, ""))) for key in swept),
            *(page.Cell(_number(row.figures.get(name))) for name in names),
            page.Cell(f"{row.seconds:.1f}"),
        ]
        for row in rows
    ]
    table = page.table("table-measured", "Higher is better.", columns, body)
    drawn = [page.figure(*drawing) for name in names for drawing in _drawings(recipe, rows, name)]
    return table + (page.figures(drawn) if drawn else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _drawings(recipe: Recipe, rows: Sequence[Row], measure: str) -> list[tuple[Figure, str, str, str]]:
    """A drawing of a figure against the first swept option, a line for each of the others' values."""
    numeric = [key for key in recipe.sweep if all(_is_number(row.values.get(key, 0)) for row in rows)]
    if not numeric:
        return []
    lines = series(rows, numeric[0], measure)
    if not any(len(points) > 1 for points in lines.values()):
        return []
    key = f"figure-{[one.name for one in recipe.measures].index(measure)}-" + re.sub(r"[^A-Za-z0-9]+", "-", measure)
    drawing = curve(lines, numeric[0], measure, key)
    said = "; ".join(f"{label or measure}: " + ", ".join(f"{x:g} gives {y:.4g}" for x, y in points)
                     for label, points in lines.items())  # fmt: skip
    return [(drawing, key, f"{measure} against {numeric[0]}.", f"{measure} against {numeric[0]}. {said}.")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def series(rows: Sequence[Row], along: str, measure: str) -> dict[str, list[tuple[float, float]]]:
    """What else was chosen -> points ``(swept value, figure)``, in the order of the values."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        figure = row.figures.get(measure, math.nan)
        if along in row.values and math.isfinite(figure):
            others = ", ".join(f"{key}={value}" for key, value in row.values.items() if key != along)
            label = ", ".join(word for word in (row.weights, others) if word)
            lines.setdefault(label, []).append((float(row.values[along]), figure))
    return {label: sorted(points) for label, points in list(lines.items())[:MOST_LINES]}


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, key: str) -> Figure:
    """Lines with markers, in the colours of a page."""
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise missing("matplotlib", "plot", "the plot of a sweep") from None
    colours = [page.COLOURS[name] for name in ("blue", "orange", "green", "violet")]
    with page.drawing_style(key):
        drawing = Drawing(figsize=(WIDTH, 2.8), layout="constrained")
        axes = drawing.subplots()
        for number, (label, points) in enumerate(lines.items()):
            marker = "oDs^vP"[number % 6]
            axes.plot(
                *zip(*points, strict=True), marker=marker, markersize=4, color=colours[number % 4], label=_shown(label)
            )
        axes.set_xlabel(_shown(x))
        axes.set_ylabel(_shown(y))
        if len(lines) > 1:
            drawing.legend(loc="outside upper left", ncols=1)
    return drawing


def _shown(text: str) -> str:
    """Text in a drawing: matplotlib takes what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def _written(saved: Sequence[Saved]) -> str:
    rows = [
        [
            page.Cell(one.path),
            page.Cell(f"{one.tensors:,}"),
            page.Cell(f"{one.nbytes:,}"),
            page.Cell(str(len(one.files))),
        ]
        for one in saved
    ]
    return page.table("table-written", "One row a place.", ["place", "tensors", "bytes", "files"], rows)
