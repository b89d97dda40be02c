"""The loss on the way from one checkpoint to another: paths, barriers, and planes that checkpoints span.

Two solutions belong to one basin when the loss does not rise on the straight way between them. How far it rises
above the line between the two losses is the barrier.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._directions import between, inner, principal
from weightsmith.inspect.landscape._lines import surface
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, Source
from weightsmith.inspect.landscape._sweep import Sweep, spread
from weightsmith.weights import open

Curve = Literal["polyline", "bezier"]

MARGIN = 0.2
"""How far a plane reaches beyond the checkpoints that it shows, as a share of their extent."""


@card(
    paper="Garipov, Izmailov, Podoprikhin, Vetrov, Wilson 2018, 'Loss Surfaces, Mode Connectivity, and Fast "
    "Ensembling of DNNs'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="at the corners of a polyline it is the loss of the checkpoints, but for rounding",
)
def path(
    model: nn.Module,
    checkpoints: Sequence[Source],
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    curve: Curve = "polyline",
    steps: int = 21,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    r"""The loss along a path through checkpoints.

    .. math:: \theta(t) = \sum_i \binom{n}{i} (1 - t)^{n - i} t^i\, \theta_i \quad\text{(Bézier)}

    Args:
        model, loss, batches, recalibrate, at_once: as for `line`; the model lends its form alone.
        checkpoints: at least two. Their floating buffers are mixed as weights are, unless ``recalibrate`` is given.
        curve: ``"polyline"`` goes straight from each to the next; ``"bezier"`` starts at the first and ends at the
            last, drawn towards those between.
        steps: points of each straight piece, or of the whole Bézier curve. Corners count once.
        resume: with several straight pieces, one file for each, which ends in its number.

    Returns:
        Report: a row a point, at ``t`` from 0 to 1. ``highest rise`` is that above the line between the losses
        of the ends.

    Raises:
        ValueError: fewer than two checkpoints, or as `line`.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> ends = [{"weight": torch.tensor([[x]])} for x in (-1.0, 1.0)]
    >>> path(net, ends, lambda model: 1 - model.weight.square().sum(), steps=3)["loss"]
    [0.0, 1.0, 0.0]
    """
    if curve not in get_args(Curve):
        raise Error(f"curve is one of {', '.join(get_args(Curve))}; got {curve!r}")
    if len(checkpoints) < 2:
        raise Error(f"a path needs at least 2 checkpoints, got {len(checkpoints)}")
    objective, found = Objective.of(loss, batches), _empty()
    sweep = Sweep(recalibrate, resume, at_once)
    if curve == "bezier" or len(checkpoints) == 2:
        places = spread((0.0, 1.0), steps, "a path")
        directions = [between(checkpoints[0], other) for other in checkpoints[1:]]
        points = [_bernstein(place, len(directions)) for place in places]
        found = sweep(model, objective, checkpoints[0], directions, points, "path")
    else:
        pieces = len(checkpoints) - 1
        inside = spread((0.0, 1.0), steps, "a path")
        places = [(piece + place) / pieces for piece in range(pieces) for place in (inside[1:] if piece else inside)]
        for piece, (a, b) in enumerate(itertools.pairwise(checkpoints)):
            points = [(place,) for place in (inside[1:] if piece else inside)]
            kept = None if resume is None else f"{os.fspath(resume)}.{piece}"
            part = replace(sweep, resume=kept)(model, objective, a, [between(a, b)], points, "path")
            for name, values in part.items():
                found.setdefault(name, []).extend(values)
    return _on_the_way("Loss along a path", places, found)


def _empty() -> dict[str, list[float]]:
    return {}


def _bernstein(place: float, degree: int) -> tuple[float, ...]:
    """The amounts of all checkpoints but the first; of two, that is the place itself."""
    return tuple(math.comb(degree, i) * (1 - place) ** (degree - i) * place**i for i in range(1, degree + 1))


@card(
    paper="Frankle, Dziugaite, Roy, Carbin 2020, 'Linear Mode Connectivity and the Lottery Ticket Hypothesis'; "
    "Entezari et al. 2022, 'The Role of Permutation Invariance in Linear Mode Connectivity'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="zero where the loss is convex between the two",
)
def barrier(
    model: nn.Module,
    first: Source,
    second: Source,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    steps: int = 21,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    r"""How far the loss rises on the straight way between two checkpoints.

    .. math:: \max_t \bigl[ L(\theta_t) - (1 - t) L(\theta_0) - t L(\theta_1) \bigr], \qquad
        \theta_t = (1 - t)\, \theta_0 + t\, \theta_1

    Args:
        model, loss, batches, recalibrate, resume, at_once: as for `line`. The default loss measures the barrier of
            the error as well. With batch norm, the mixed running statistics are wrong: give ``recalibrate``.
        first, second: what lies at 0 and at 1.
        steps: points; an even number has none in the middle.

    Returns:
        Report: ``barrier`` (of the loss), one for each other figure, where it is highest, and a row a point.

    Raises:
        ValueError: as `line`.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> a, b = ({"weight": torch.tensor([[x]])} for x in (-1.0, 1.0))
    >>> found = barrier(net, a, b, lambda model: (model.weight.square() - 1).square().sum(), steps=5)
    >>> found["barrier"], found["barrier at"]
    (1.0, 0.5)
    """
    places = spread((0.0, 1.0), steps, "a barrier")
    sweep = Sweep(recalibrate, resume, at_once)
    points = [(place,) for place in places]
    found = sweep(model, Objective.of(loss, batches), first, [between(first, second)], points, "barrier")
    return _on_the_way("Barrier between two checkpoints", places, found)


def _on_the_way(title: str, places: Sequence[float], found: dict[str, list[float]]) -> Report:
    figures: dict[str, Any] = {}
    plots, notes = [], []
    main = next(iter(found))
    for name, values in found.items():
        rise = [value - (1 - t) * values[0] - t * values[-1] for t, value in zip(places, values, strict=True)]
        finite = [(r, t) for r, t in zip(rise, places, strict=True) if math.isfinite(r)]
        highest, at = max(finite, default=(math.nan, math.nan), key=lambda pair: pair[0])
        word = "barrier" if name == main else f"barrier of {name}"
        figures |= {word: highest, f"{word} at": at, f"{name} at 0": values[0], f"{name} at 1": values[-1]}
        if len(finite) < len(values):
            notes.append(f"At {len(values) - len(finite)} of {len(values)} points the {name} is not finite.")
        straight = Line("between the ends", [places[0], places[-1]], [values[0], values[-1]])
        plots.append(Plot(f"{title}: {name}", "share of the way", name, [Line(name, list(places), values), straight]))
    rows = [{"at": place} | {key: found[key][i] for key in found} for i, place in enumerate(places)]
    return Report(title, figures, rows, plots, notes)


@card(
    paper="Garipov, Izmailov, Podoprikhin, Vetrov, Wilson 2018, 'Loss Surfaces, Mode Connectivity, and Fast "
    "Ensembling of DNNs'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="distances in the drawing are distances between weights",
)
def plane_through(
    model: nn.Module,
    checkpoints: Sequence[Source],
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    steps: int = 21,
    margin: float = MARGIN,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    r"""The loss over the plane through three checkpoints, in true distances.

    .. math:: u = \theta_2 - \theta_1, \qquad
        v = (\theta_3 - \theta_1) - \frac{\langle \theta_3 - \theta_1, u \rangle}{\lVert u \rVert^2}\, u

    Args:
        model, loss, batches, recalibrate, resume, at_once: as for `line`; the model lends its form alone.
        checkpoints: three that do not lie on one line.
        steps: points along each axis.
        margin: how far the drawing reaches beyond them, as a share of its extent.

    Returns:
        Report: as `plane`; ``checkpoints`` says where the three lie.

    Raises:
        ValueError: not three, or three on one line, or as `line`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> corners = [{"weight": torch.tensor([x])} for x in ([0.0, 0.0], [3.0, 0.0], [1.0, 2.0])]
    >>> plane_through(net, corners, lambda model: model.weight.square().sum(), steps=3)["checkpoints"]
    [[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]
    """
    if len(checkpoints) != 3:
        raise Error(f"a plane goes through 3 checkpoints, got {len(checkpoints)}")
    if not (math.isfinite(margin) and margin >= 0):
        raise Error(f"margin is at least 0, got {margin}")
    u, w = (between(checkpoints[0], other) for other in checkpoints[1:])
    wide, mixed, long = math.sqrt(inner(u, u)), inner(u, w), inner(w, w)
    tall = math.sqrt(max(long - mixed**2 / wide**2, 0.0)) if wide else 0.0
    if tall <= 1e-6 * math.sqrt(long):
        raise Error("the three checkpoints lie on one line; see path=")
    x = u / wide
    y = (w - (mixed / wide) * x) / tall
    corners = [(0.0, 0.0), (wide, 0.0), (mixed / wide, tall)]
    points = [Line("checkpoints", [c[0] for c in corners], [c[1] for c in corners], style="points")]
    found = _map(model, Objective.of(loss, batches), checkpoints[0], (x, y), corners, steps, margin,
                 Sweep(recalibrate, resume, at_once), ("distance", "distance"), points)  # fmt: skip
    figures = {"checkpoints": [list(corner) for corner in corners]} | dict(found.figures)
    return Report("Loss over the plane through three checkpoints", figures, found.table, found.plots, found.notes)


@card(
    paper="Li, Xu, Taylor, Studer, Goldstein 2018, 'Visualizing the Loss Landscape of Neural Nets'",
    covers=("loss-landscape",),
    needs=("data",),
    unit="model",
    claim="a few directions hold most of a run's movement",
)
def trajectory(
    model: nn.Module,
    checkpoints: Sequence[Source],
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    steps: int = 21,
    margin: float = MARGIN,
    recalibrate: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
) -> Report:
    """The loss over the plane nearest to a run of checkpoints, with the run drawn into it.

    Args:
        model, loss, batches, recalibrate, resume, at_once: as for `line`; the model lends its form alone.
        checkpoints: at least three, in the order of training. The plane goes through the last.
        steps: points along each axis.
        margin: how far the drawing reaches beyond them, as a share of its extent.

    Returns:
        Report: as `plane`, with ``checkpoints`` and the share of the run's variance that each axis explains.
        The loss at a drawn checkpoint is that of its shadow in the plane, and not its own.

    Raises:
        ValueError: as `principal` and `line`.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> run = [{"weight": torch.tensor([x])} for x in ([2.0, 0.0], [1.0, 1.0], [0.0, 0.0])]
    >>> found = trajectory(net, run, lambda model: model.weight.square().sum(), steps=3)
    >>> round(found["explained by x"] + found["explained by y"], 4)
    1.0
    """
    axes = principal(checkpoints)
    corners = [(row[0], row[1]) for row in axes.coordinates]
    run = [Line("checkpoints", [c[0] for c in corners], [c[1] for c in corners])]
    labels = tuple(f"principal direction {i + 1} ({share:.0%})" for i, share in enumerate(axes.explained))
    found = _map(model, Objective.of(loss, batches), checkpoints[-1], axes.directions, corners, steps, margin,
                 Sweep(recalibrate, resume, at_once), (labels[0], labels[1]), run)  # fmt: skip
    figures = {
        "explained by x": axes.explained[0],
        "explained by y": axes.explained[1],
        "checkpoints": [list(corner) for corner in corners],
    }
    title = "Loss over the plane of a trajectory"
    notes = [*found.notes, "Checkpoints are drawn where their shadow falls; the map shows the loss in the plane."]
    return Report(title, figures | dict(found.figures), found.table, found.plots, notes)


def _map(
    model: nn.Module,
    objective: Objective,
    origin: Source,
    directions: Sequence[Source],
    corners: Sequence[tuple[float, float]],
    steps: int,
    margin: float,
    sweep: Sweep,
    axes: tuple[str, str],
    over: Sequence[Line],
) -> Report:
    """The loss over a plane, as far as it takes to show some of its points."""
    ends = []
    for axis in (0, 1):
        low, high = min(c[axis] for c in corners), max(c[axis] for c in corners)
        room = margin * (high - low) or 1e-6
        ends.append((low - room, high + room))
    xs, ys = (spread(end, steps, "a plane") for end in ends)
    found = sweep(model, objective, open(origin), directions, [(x, y) for y in ys for x in xs], "plane")
    return surface("Loss over the plane", xs, ys, found, axes, over)
