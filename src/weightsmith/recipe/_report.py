"""The report of a recipe: one self-contained HTML file."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith import page
from weightsmith._version import __version__
from weightsmith.errors import missing
from weightsmith.inspect import Line, Plot, Report, Surface, diff
from weightsmith.recipe._graph import drawing, parents_of
from weightsmith.recipe._model_card import written as as_yaml
from weightsmith.weights import Saved, open

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightsmith.recipe._run import Row
    from weightsmith.recipe._schema import Recipe

WIDTH = 4.2  # inches
MOST_LINES = 12
MOST_ROWS = 200


def page_of(recipe: Recipe, saved: Sequence[Saved], rows: Sequence[Row], best: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = [page.Section("made", "What is made of what", _graph(recipe))]
    if rows:
        sections.append(page.Section("measured", "What was measured", _measured(recipe, rows, best)))
    if saved:
        sections.append(page.Section("written", "What was written", _written(saved)))
    changed = _changed(recipe, saved)
    if changed:
        sections.append(page.Section("changed", "What changed, layer by layer", changed))
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
    costs = Report("", plots=_costs(names, rows)).body("costs") if len(rows) > 1 else ""
    return table + (page.figures(drawn) if drawn else "") + costs


def _graph(recipe: Recipe) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return page.bullets([f"{name}: of {', '.join(own)}" for name, own in parents_of(recipe).items() if own])
    drawn, said = drawing(recipe, "graph")
    return page.figure(drawn, "graph", "Inputs, steps and places.", said, wide=True)


def _costs(names: Sequence[str], rows: Sequence[Row]) -> list[Plot]:
    """Each figure against the size of a checkpoint and against the time that measuring it took."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    kinds = list(dict.fromkeys(row.weights for row in rows))[:MOST_LINES]
    plots = []
    for name in names:
        for axis, along in (("size, MB", lambda row: row.nbytes / 1e6), ("seconds to make and measure", _seconds)):
            lines = []
            for kind in kinds:
                own = [row for row in rows if row.weights == kind and math.isfinite(row.figures.get(name, math.nan))]
                if own:
                    places, values = [along(row) for row in own], [row.figures[name] for row in own]
                    lines.append(Line(kind, places, values, style="points"))
            if len({place for line in lines for place in line.x}) > 1:
                plots.append(Plot(f"{name} against {axis.partition(',')[0]}", axis, name, lines))
    return plots


def _seconds(row: Row) -> float:
    return row.seconds


def _changed(recipe: Recipe, saved: Sequence[Saved]) -> str:
    """How far each output lies from the input that it shares most with, as a heat map of layers."""
    origin = _origin(recipe)
    if origin is None or not saved:
        return ""
    start, path = origin
    before = open(path)
    columns: dict[str, dict[str, float]] = {}
    for one in saved[:MOST_LINES]:
        after = open(one.path)
        if not any(name in before for name in after):
            continue
        layers = diff(before, after).layers()
        columns[one.path] = {layer.name: layer.sums.distance for layer in layers if layer.sums.count}
    layers = sorted({name for column in columns.values() for name in column}, key=_by_number)
    if not layers or not any(any(column.values()) for column in columns.values()):
        return ""
    grid = [[column.get(layer, math.nan) for layer in layers] for column in columns.values()]
    parts = [layer.split(".") for layer in layers]
    alike = 0
    while len({tuple(one[: alike + 1]) for one in parts}) == 1 and all(len(one) > alike + 1 for one in parts):
        alike += 1
    shown = [".".join(one[alike:]) for one in parts]
    surface = Surface(shown, [os.path.basename(path.rstrip("/")) or path for path in columns], grid)
    plot = Plot(f"Distance from {start}", "layer", "output", surface=surface)
    rows = [{"layer": layer} | {path: columns[path].get(layer) for path in columns} for layer in layers]
    note = f"The length of the change, over the length of {start}, of all tensors of a layer together."
    plots = [plot] if importlib.util.find_spec("matplotlib") else []
    return Report("", table=rows if len(layers) <= MOST_ROWS else (), plots=plots, notes=[note]).body("changed")


def _by_number(name: str) -> list[Any]:
    """For sorting: layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _origin(recipe: Recipe) -> tuple[str, str] | None:
    """The name and path of the input that a step calls its base, or else of the first."""
    named = [node.value for step in recipe.steps.values() for key, node in step.arguments.items() if key == "base"]
    name = next((one for one in [*named, *recipe.inputs] if isinstance(one, str) and one in recipe.inputs), None)
    if name is None or recipe.inputs[name].options:
        return None
    path = recipe.inputs[name].path.value
    return (name, path) if isinstance(path, str) and os.path.exists(path) else None


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
