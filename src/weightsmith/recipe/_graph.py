"""A recipe as a drawing: what is made of what, from the inputs on the left to the places on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightsmith import page
from weightsmith.errors import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from weightsmith.recipe._schema import Recipe

_WIDE, _HIGH = 1.75, 0.62  # inches, of a column and of a row
_LETTERS = 18


def parents_of(recipe: Recipe) -> dict[str, list[str]]:
    """Input, step or place -> what it is made of, in the order of the recipe."""
    found: dict[str, list[str]] = {name: [] for name in recipe.inputs}
    found |= {name: list(dict.fromkeys(recipe.uses(name))) for name in recipe.steps}
    for output in recipe.outputs:
        found[output.path] = [output.weights.partition(".")[0]]
    return found


def levels_of(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The column of each: one right of the last of what it is made of.

    >>> levels_of({"a": [], "b": ["a"], "c": ["a", "b"]})
    {'a': 0, 'b': 1, 'c': 2}
    """
    found: dict[str, int] = {}
    for name, own in parents.items():  # what is used stands before its user
        found[name] = max((found[one] + 1 for one in own), default=0)
    return found


def drawing(recipe: Recipe, key: str) -> tuple[Figure, str]:
    """The drawing, and what it shows in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", "plot", "the drawing of a recipe") from None
    parents = parents_of(recipe)
    levels = levels_of(parents)
    columns = [[name for name in parents if levels[name] == level] for level in range(max(levels.values()) + 1)]
    tallest = max(map(len, columns))
    places = {
        name: (level, (tallest - len(names)) / 2 + row)
        for level, names in enumerate(columns)
        for row, name in enumerate(names)
    }
    with page.drawing_style(key):
        made = Figure(figsize=(_WIDE * len(columns), _HIGH * tallest + 0.1), layout="constrained")
        axes = made.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(tallest - 0.4, -0.6)
        for name, own in parents.items():
            for one in own:
                _arrow(axes, places[one], places[name])
        for name, place in places.items():
            _box(axes, place, name, recipe)
    return made, _words(parents)


def _box(axes: Axes, place: tuple[float, float], name: str, recipe: Recipe) -> None:
    step = recipe.steps.get(name)
    under = "input" if name in recipe.inputs else step.said.split("(")[0].split(" of ")[0] if step else "written"
    colour = "blue" if name in recipe.inputs else "orange" if step else "green"
    axes.annotate(
        f"{_short(name)}\n{_short(under)}",
        place,
        ha="center",
        va="center",
        fontsize=8.5,
        color=page.COLOURS["ink"],
        zorder=3,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": page.COLOURS["panel"], "edgecolor": page.COLOURS[colour]},
    )


def _arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    arrow = {"arrowstyle": "->", "color": page.COLOURS["muted"], "shrinkA": 0, "shrinkB": 42}
    axes.annotate("", stop, start, arrowprops=arrow)


def _short(text: str) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= _LETTERS else "…" + text[-_LETTERS + 1 :]


def _words(parents: Mapping[str, Sequence[str]]) -> str:
    made = [f"{name} of {', '.join(own)}" for name, own in parents.items() if own]
    return f"What is made of what: {'; '.join(made) or 'nothing is'}."
