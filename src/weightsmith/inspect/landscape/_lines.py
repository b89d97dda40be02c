"""The loss along a line and over a plane of weight space.

What a network's loss looks like nearby shows whether its minimum is sharp or flat, alone or in a valley. With
directions that are scaled filter by filter, drawings of different networks can be compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report, Surface
from weightsmith.inspect.landscape._directions import random_direction
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, Source, opened
from weightsmith.inspect.landscape._sweep import Sweep, spread


@card(
    paper="Li, Xu, Taylor, Studer, Goldstein 2018, 'Visualizing the Loss Landscape of Neural Nets'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="scaling a layer before batch norm leaves the curve along a filter-normalised direction as it is",
)
def line(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    direction: Source | None = None,
    origin: Source | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    steps: int = 41,
    seed: int = 0,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    r"""The loss along a line, :math:`L(\theta + \alpha d)`.

    Args:
        model: asked in evaluation mode and left as it was. Its tensors are written to, one point after the other,
            so beside the model only its weights and the direction are held in float32.
        loss: ``(model, batch) -> number``, the mean over the batch's examples; ``(model) -> number`` without
            batches; either may return several numbers by name, the loss first. By default cross-entropy, and the
            share of errors, of batches ``(inputs, labels)``.
        batches: any iterable; one that can be read only once is kept in memory.
        direction: `Weights` of some of the model's tensors, or what `weightsmith.open` opens; by default
            `random_direction` of ``seed``.
        origin: the checkpoint at 0; by default the model's own weights.
        span: the coefficients at the ends.
        steps: points, the ends included.
        seed: of the direction.
        recalibrate: batches from which the running statistics of batch norm are estimated anew at every point.
        resume: a small file that keeps the points found so far; given again, only the others are computed. It does
            not know the loss and the data.
        at_once: points to be tried together, by vectorising. By default many where the work of one is tiny.

    Returns:
        Report: a row a point, the curve, and how much of it is convex.

    Raises:
        ValueError: a direction that does not fit, a loss that is no number, or a ``resume`` file of something else.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> found = line(net, lambda model: model.weight.square().sum(), direction={"weight": torch.ones(1, 1)}, steps=5)
    >>> found["at"], found["loss"]
    ([-1.0, -0.5, 0.0, 0.5, 1.0], [0.0, 0.25, 1.0, 2.25, 4.0])
    """
    places = spread(span, steps, "a line")
    way = random_direction(_start(model, origin), seed=seed) if direction is None else direction
    sweep = Sweep(recalibrate, resume, at_once)
    found = sweep(model, Objective.of(loss, batches), origin, [way], [(place,) for place in places], "line")
    return curve("Loss along a line", places, found, "coefficient of the direction")


def _start(model: nn.Module, origin: Source | None) -> Any:
    """The weights that a random direction is scaled by."""
    if origin is None:
        return model
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    given = opened(origin, dict(model.state_dict(keep_vars=True)), "origin")
    return given.select(lambda name: name in names)


def curve(title: str, places: Sequence[float], found: dict[str, list[float]], along: str) -> Report:
    """A report on what was measured along one axis."""
    name, values = next(iter(found.items()))
    finite = [(value, place) for value, place in zip(values, places, strict=True) if math.isfinite(value)]
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:])]  # noqa: B905 - shifted on purpose
    known = [bend for bend in bends if math.isfinite(bend)]
    low, high = min(finite, default=(math.nan, math.nan)), max(finite, default=(math.nan, math.nan))
    figures: dict[str, Any] = {
        f"least {name}": low[0],
        "least at": low[1],
        f"most {name}": high[0],
        "most at": high[1],
        "share convex": sum(bend >= 0 for bend in known) / len(known) if known else math.nan,
    }
    rows = [{"at": place} | {key: found[key][i] for key in found} for i, place in enumerate(places)]
    plots = [Plot(f"{title}: {key}", along, key, [Line(key, list(places), found[key])]) for key in found]
    return Report(title, figures, rows, plots, _unfinite(values))


def _unfinite(values: Sequence[float]) -> list[str]:
    count = sum(not math.isfinite(value) for value in values)
    return [f"At {count} of {len(values)} points the loss is not finite."] if count else []


@card(
    paper="Li, Xu, Taylor, Studer, Goldstein 2018, 'Visualizing the Loss Landscape of Neural Nets'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="a deep network with shortcuts shows less negative curvature around its minimum than one without",
)
def plane(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    directions: tuple[Source, Source] | None = None,
    origin: Source | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    across: tuple[float, float] | None = None,
    steps: int | tuple[int, int] = 21,
    seed: int = 0,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    r"""The loss over a plane, :math:`L(\theta + \alpha d_1 + \beta d_2)`, as a map with contours.

    Args:
        model, loss, batches, origin, recalibrate, resume, at_once: as for `line`.
        directions: two; by default `random_direction` of ``seed`` and of the next number that follows it.
        span: the coefficients of the first direction at the ends.
        across: of the second; by default the same.
        steps: points along each direction.
        seed: of the directions.

    Returns:
        Report: a row a point. ``share with negative curvature`` is that of the inner points at which the Hessian
        within the plane, from differences of neighbours, has an eigenvalue below 0.

    Raises:
        ValueError: as `line`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> axes = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 1.0]])}]
    >>> found = plane(net, lambda model: (model.weight * model.weight.flip(1)).sum(), directions=axes, steps=3)
    >>> found["loss"][0], found["share with negative curvature"]               # the saddle 2 x y
    (2.0, 1.0)
    """
    across_steps, along_steps = (steps, steps) if isinstance(steps, int) else (steps[1], steps[0])
    xs, ys = spread(span, along_steps, "a plane"), spread(across or span, across_steps, "a plane")
    if directions is None:
        start = _start(model, origin)
        directions = (random_direction(start, seed=seed), random_direction(start, seed=seed + 1))
    if len(directions) != 2:
        raise Error(f"a plane has 2 directions, got {len(directions)}")
    points = [(x, y) for y in ys for x in xs]
    sweep = Sweep(recalibrate, resume, at_once)
    found = sweep(model, Objective.of(loss, batches), origin, directions, points, "plane")
    return surface("Loss over a plane", xs, ys, found, ("first direction", "second direction"))


def surface(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    found: dict[str, list[float]],
    axes: tuple[str, str],
    over: Sequence[Line] = (),
) -> Report:
    """A report on what was measured over a grid, row by row of ``ys``; ``over`` is drawn on top."""
    grids = {key: [values[i * len(xs) : (i + 1) * len(xs)] for i in range(len(ys))] for key, values in found.items()}
    name, values = next(iter(found.items()))
    points = [(x, y) for y in ys for x in xs]
    finite = [(value, point) for value, point in zip(values, points, strict=True) if math.isfinite(value)]
    low, high = (pick(finite, default=(math.nan, (math.nan, math.nan))) for pick in (min, max))
    figures: dict[str, Any] = {
        f"least {name}": low[0],
        "least at": list(low[1]),
        f"most {name}": high[0],
        "share with negative curvature": _negative(grids[name], xs, ys),
    }
    rows = [{"x": x, "y": y} | {key: found[key][i] for key in found} for i, (x, y) in enumerate(points)]
    plots = []
    for key, grid in grids.items():
        log = key == name and all(value > 0 and math.isfinite(value) for row in grid for value in row)
        plots.append(Plot(f"{title}: {key}", *axes, over, Surface(list(xs), list(ys), grid, "heat", log)))
    whole = Surface(list(xs), list(ys), grids[name], "contour")
    plots.append(Plot(f"{title}: contours of {name}", *axes, over, whole))
    return Report(title, figures, rows, plots, _unfinite(values))


def _negative(grid: Sequence[Sequence[float]], xs: Sequence[float], ys: Sequence[float]) -> float:
    """The share of inner points at which the smaller eigenvalue of the 2 x 2 Hessian is below rounding."""
    if len(xs) < 3 or len(ys) < 3:
        return math.nan
    dx, dy = xs[1] - xs[0], ys[1] - ys[0]
    counted = negative = 0
    for i in range(1, len(ys) - 1):
        for j in range(1, len(xs) - 1):
            near = [value for row in grid[i - 1 : i + 2] for value in row[j - 1 : j + 2]]
            if not all(map(math.isfinite, near)):
                continue
            middle = grid[i][j]
            a = (grid[i][j - 1] - 2 * middle + grid[i][j + 1]) / dx**2
            c = (grid[i - 1][j] - 2 * middle + grid[i + 1][j]) / dy**2
            b = (grid[i + 1][j + 1] - grid[i + 1][j - 1] - grid[i - 1][j + 1] + grid[i - 1][j - 1]) / (4 * dx * dy)
            least = (a + c) / 2 - math.hypot((a - c) / 2, b)
            rounding = 1e-6 * max(map(abs, near)) / min(dx, dy) ** 2
            counted += 1
            negative += least < -rounding
    return negative / counted if counted else math.nan
