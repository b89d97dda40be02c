"""How much the loss landscape still changes when one more example is added.

The mean loss of k + 1 examples differs from that of k by a share of 1 / (k + 1): the landscape settles. How fast,
around a minimum, is bounded by how far single examples' losses and curvatures lie apart. Where another example
changes nothing, more data of this kind will not help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress, solve
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._curvature import curvature_of
from weightsmith.inspect.landscape._parts import Loss, Source, walking
from weightsmith.stats import room
from weightsmith.weights import Pattern, Weights, open, working

Data = tuple[Tensor, Tensor]
"""``(inputs [n, ...], labels [n])``."""


@card(
    paper="Kiselev, Grabovoy 2024, 'Unraveling the Hessian: A Key to Smooth Convergence in Loss Function Landscapes'",
    covers=("unraveling-the-hessian",),
    needs=("data",),
    unit="model",
    claim="the mean change falls as 1 / k, and stays below the bound",
    departs="the bound has measured norms of single examples' Hessians in place of products of layers' norms, the "
    "factor 1/2 of the second-order term, and a term for gradients, which the paper assumes to be zero",
)
def growth(
    model: nn.Module,
    data: Data,
    loss: Loss | None = None,
    *,
    radius: float = 1.0,
    points: int = 16,
    orders: int = 16,
    directions: Sequence[Source] | None = None,
    pattern: Pattern = "*",
    curved: int = 16,
    first: int = 10,
    batch: int = 512,
    seed: int = 0,
) -> Report:
    r"""How much the loss around a minimum changes with each example that is added.

    .. math:: L_{k+1}(\theta) - L_k(\theta) = \frac{\ell_{k+1}(\theta) - L_k(\theta)}{k + 1}, \qquad
        |\cdot| \le \frac{2}{k+1} \Bigl( M_\ell + R M_g + \tfrac12 R^2 M_H \Bigr)

    for all :math:`\theta` within R of the minimum, to second order: no example's loss there is above
    :math:`M_\ell`, no gradient longer than :math:`M_g`, no Hessian's norm above :math:`M_H`.

    Args:
        model: at a minimum of the loss; asked in evaluation mode and left as it was.
        data: ``(inputs [n, ...], labels [n])``.
        loss: ``(model, (inputs, labels)) -> losses [n]``, one an example; cross-entropy by default.
        radius: R, how far from the minimum.
        points: random places at that distance.
        orders: random orders in which the examples are added.
        directions: where to look: in the space that they span (the vectors of `top_eigen`, say); by default all of
            the weights.
        pattern: names of the parameters that move.
        curved: examples whose gradients and Hessians are measured for the bound; 0 leaves the bound out.
        first: the k from which the slope is fitted.
        batch: examples that go through the model together.
        seed: of places, orders and examples.

    Returns:
        Report: ``slope`` of the mean change over k on logarithmic axes (-1 is 1 / k), the norms, how often the bound
        holds, and a row for each of some k.

    Raises:
        ValueError: fewer than ``first + 2`` examples, or a loss that is not one number an example.

    >>> net = torch.nn.Linear(1, 2)
    >>> found = growth(net, (torch.randn(40, 1), torch.arange(40) % 2), points=2, orders=2, curved=2)
    >>> -1.5 < found["slope"] < -0.5
    True
    """
    inputs, labels = data
    n = len(labels)
    if len(inputs) != n or n < first + 2 or first < 1:
        raise Error(f"growth needs inputs and labels of at least {first + 2} examples, got {len(inputs)} and {n}")
    for name, value in (("points", points), ("orders", orders), ("batch", batch)):
        if value < 1:
            raise Error(f"{name} is at least 1, got {value}")
    if not (math.isfinite(radius) and radius > 0) or curved < 0:
        raise Error(f"radius is above 0 and curved at least 0, got {radius} and {curved}")
    each = loss or _cross_entropy
    generator = torch.Generator().manual_seed(seed)
    steps = _steps(model, directions, pattern, points, radius, generator)
    table = torch.stack([_losses(model, data, each, step, batch) for step in steps])  # one place is held at a time
    centre = _losses(model, data, each, None, batch)
    mean, most = _changes(table, orders, generator)
    k = torch.arange(1, n)
    slope, height = _fit(k[first - 1 :], mean[first - 1 :])
    figures: dict[str, Any] = {"slope": slope, "height": height, "loss at the minimum": float(centre.mean())}
    lines = [Line("mean change", k.tolist(), mean.tolist()), Line("largest change", k.tolist(), most.tolist())]
    rows = _chosen(k, mean, most)
    notes = []
    if curved:
        chosen = torch.randperm(n, generator=generator)[:curved]
        gradients, hessians = _norms(model, data, each, chosen.tolist(), pattern, seed)
        highest = float(centre.max())
        bound = 2 / (k + 1.0) * (highest + radius * max(gradients) + radius**2 / 2 * max(hessians))
        paper = 2 / (k + 1.0) * (highest + radius**2 * max(hessians))
        figures |= {
            "largest loss": highest,
            "largest gradient": max(gradients),
            "largest Hessian": max(hessians),
            "share within the bound": float((most <= bound).double().mean()),
            "share of means within the bound": float((mean <= bound).double().mean()),
            "share of means within the bound without gradients": float((mean <= paper).double().mean()),
        }
        lines.append(Line("bound", k.tolist(), bound.tolist()))
        rows = [row | {"bound": float(bound[row["examples"] - 1])} for row in rows]
        notes = [f"The norms of gradients and Hessians are the largest of {len(chosen)} examples."]
    title = "Change of the loss with one more example"
    return Report(title, figures, rows, [Plot(title, "examples", "change of the loss", lines, log="xy")], notes)


def _cross_entropy(model: Any, batch: Data) -> Tensor:
    return functional.cross_entropy(working(room.default_forward(model, batch)), batch[1], reduction="none")


def _steps(
    model: nn.Module,
    directions: Sequence[Source] | None,
    pattern: Pattern,
    points: int,
    radius: float,
    generator: torch.Generator,
) -> Iterator[Weights]:
    """Places on a sphere around the model, as directions."""
    parameters = parameters_of(model, pattern)
    if directions is not None and not len(directions):
        raise Error("directions= is at least one direction, or None for all of the weights")
    spanned = [open(direction).select(floating=True) for direction in directions or ()]
    for _ in range(points):
        if directions is None:
            drawn = {
                name: torch.randn(p.shape, generator=generator).to(p.device, working(p.detach()).dtype)
                for name, p in parameters.items()
            }
            step = Weights.of(drawn)
        else:
            amounts = torch.randn(len(spanned), generator=generator).tolist()
            step = amounts[0] * spanned[0]
            for amount, direction in zip(amounts[1:], spanned[1:], strict=True):
                step = step + amount * direction
        long = math.sqrt(sum(float(step[name].double().square().sum()) for name in step))
        if not long:
            raise Error("the directions are zero")
        yield Weights.of({name: step[name] * (radius / long) for name in step})


@torch.no_grad()
def _losses(model: nn.Module, data: Data, each: Loss, step: Weights | None, batch: int) -> Tensor:
    """The examples' losses ``[n]``, float64, at the model or a step away."""
    inputs, labels = data
    with walking(model, None, [] if step is None else [step]) as walk:
        walk.go((1.0,))
        parts = [
            each(model, (inputs[first : first + batch], labels[first : first + batch]))
            for first in range(0, len(labels), batch)
        ]
    found = torch.cat([torch.atleast_1d(torch.as_tensor(part)) for part in parts]).double().cpu()
    if found.shape != labels.shape[:1]:
        raise Error(f"loss= must return one number an example, [{len(labels)}] in all; got {list(found.shape)}")
    return found


def _changes(table: Tensor, orders: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and largest ``|L_{k+1} - L_k|`` for k = 1 .. n - 1, over places ``[points, n]`` and orders."""
    n = table.shape[1]
    counts = torch.arange(1, n + 1, dtype=torch.float64)
    mean, most = torch.zeros(n - 1, dtype=torch.float64), torch.zeros(n - 1, dtype=torch.float64)
    for _ in range(orders):
        order = torch.randperm(n, generator=generator)
        means = table[:, order].cumsum(dim=1) / counts
        change = means.diff(dim=1).abs()
        mean += change.mean(dim=0) / orders
        most = torch.maximum(most, change.amax(dim=0))
    return mean, most


def _fit(k: Tensor, change: Tensor) -> tuple[float, float]:
    """Slope and height of a line on logarithmic axes, every octave of k counting the same."""
    known = change > 0
    x, y = k[known].double().log(), change[known].log()
    if len(x) < 2:
        return math.nan, math.nan
    weight = 1 / k[known].double()
    weight /= weight.sum()
    x0, y0 = float(weight @ x), float(weight @ y)
    slope = float((weight * (x - x0) * (y - y0)).sum() / (weight * (x - x0).square()).sum())
    return slope, math.exp(y0 - slope * x0)


def _chosen(k: Tensor, mean: Tensor, most: Tensor) -> list[dict[str, Any]]:
    places = sorted({round(len(k) ** (i / 20)) for i in range(21)})
    return [{"examples": p, "mean change": float(mean[p - 1]), "largest change": float(most[p - 1])} for p in places]


def _norms(
    model: nn.Module, data: Data, each: Loss, chosen: Sequence[int], pattern: Pattern, seed: int
) -> tuple[list[float], list[float]]:
    """The norms of single examples' gradients and Hessians."""
    gradients, hessians = [], []
    inputs, labels = data
    with progress.task("curvature of examples", len(chosen)) as advance:
        for index in chosen:
            one = (inputs[index : index + 1], labels[index : index + 1])
            with curvature_of(model, lambda m, one=one: each(m, one).sum(), None, "hessian", pattern) as curvature:
                parameters = list(curvature.parameters.values())
                slopes = torch.autograd.grad(each(model, one).sum(), parameters, materialize_grads=True)
                gradients.append(math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes)))
                found = solve.extreme_eigenpairs(
                    curvature, curvature.size, 1, ends="magnitude", tolerance=0.01, seed=seed, like=curvature.like
                )
                hessians.append(float(found.values.abs()[0]))
            advance(1)
    return gradients, hessians
