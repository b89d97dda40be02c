"""How much room there is around a solution: the prior mass of weights that are nearly as good.

A learner that mixes all models by their prior pays the logarithm of the mass that lies near the truth. A flat
solution with much room is thus a simple one. The room is measured along rays: along each, the loss is followed to
where it has risen by eps, and the prior integrated up to there. Rays into narrow directions count as little as
they should, since a ray's mass is a power of its length with as many factors as there are weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, deviations, walking
from weightsmith.weights import Pattern, PerTensor, Weights, working_dtype

NODES = 96
"""Of the integral along a ray: its logarithm is then exact to about 1e-10."""

DEEP = 45.0  # what is exp(-45) of the largest is left out


@card(
    paper="Feder, Urbanke, Fogel 2025, 'The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well'; "
    "Scherlis, Belrose 2025, 'Estimating the Probability of Sampling a Trained Neural Network at Random'",
    covers=("the-universality-lens",),
    needs=("data",),
    unit="model",
    claim="networks fitted to true labels have more room than those fitted to random ones",
    departs="the paper defines the mass and does not compute it; only what can be seen from the solution along "
    "straight rays is counted, up to where the loss first exceeds the level",
)
def local_log_volume(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    eps: float = 0.1,
    prior: PerTensor[float] = 1.0,
    rays: int = 64,
    shape: Mapping[str, Tensor] | None = None,
    pattern: Pattern = "*",
    precision: float = 0.01,
    seed: int = 0,
) -> Report:
    r"""The logarithm of the prior mass of the region around a solution where the loss is at most eps higher.

    .. math:: \log \int_B \mathcal N(w;\, 0, \sigma^2)\, dw
        \approx \log \frac1m \sum_{i=1}^m \frac{S_D}{p(u_i)}
        \int_0^{R(u_i)} r^{D-1}\, \mathcal N(\theta + r u_i;\, 0, \sigma^2)\, dr

    with directions :math:`u_i` of density p against the uniform one, :math:`S_D` the sphere's area, and R(u) where the
    loss has risen by eps.

    Args:
        model, loss, batches: as for `line`.
        eps: the rise of the mean loss, in its unit (nats), above 0.
        prior: standard deviation of each weight around 0: that of the initialisation, say; it may differ by tensor.
        rays: m. With few, and in many dimensions, the widest rays make up the sum and wider ones are missed: the
            figure is then too low. Compare figures of one number of rays.
        shape: how wide the region is thought to be along each weight, up to a factor, such as ``1 / sqrt(h + c)``
            of `diagonal`: rays are drawn accordingly and weighted back, which lets fewer miss less.
        pattern: names of the weights that vary.
        precision: of a ray's share of the logarithm, in nats.
        seed: of the rays.

    Returns:
        Report: ``log volume`` (nats, below 0), its ``standard error`` over rays, how many rays make it up
        (``effective rays``), ``nats a weight``, and a row a ray. ``nats by the distance from 0`` is half the squared
        length of the weights in units of the prior: large weights alone make a mass small.

    Raises:
        ValueError: options that are not above 0, a solution whose loss is not finite, or a shape that does not fit.

    >>> net = torch.nn.Linear(2, 1, bias=False).double()
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> found = local_log_volume(net, lambda model: model.weight.square().sum() / 2, eps=0.5, precision=1e-6)
    >>> round(found["log volume"], 4)              # log(1 - exp(-1/2)), the chance of a length below 1
    -0.9328
    """
    for name, value in (("eps", eps), ("rays", rays), ("precision", precision)):
        if not (math.isfinite(value) and value > 0):
            raise Error(f"{name} is above 0, got {value}")
    parameters = parameters_of(model, pattern)
    spreads = deviations(prior, parameters)
    scales = _scales(parameters, shape, spreads)
    size = sum(p.numel() for p in parameters.values())
    # In units of the prior it is a standard Gaussian.
    centre = {n: p.detach().double() / spreads[n] for n, p in parameters.items()}
    centre_square = sum(float(value.square().sum()) for value in centre.values())
    objective = Objective.of(loss, batches)
    generator = torch.Generator().manual_seed(seed)
    found: list[_Ray] = []
    guess = 1.0
    with progress.task("rays", rays) as advance:
        base = _loss_at(model, objective, {}, 0.0)
        if not math.isfinite(base):
            raise Error(f"the loss of the model is {base}: there is no region around it")
        for _ in range(rays):
            drawn = {
                n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) * scales[n]
                for n, p in parameters.items()
            }
            stretched = math.sqrt(sum(float(d.square().sum()) for d in drawn.values()))
            unit = {n: d / stretched for n, d in drawn.items()}
            whitened = sum(float((unit[n] / scales[n]).square().sum()) for n in unit)
            weight = size / 2 * math.log(whitened)  # minus the logarithm of the density of the direction
            along = sum(float((centre[n] * unit[n]).sum()) for n in unit)
            step = {n: (d * spreads[n]).to(working_dtype(parameters[n].dtype)) for n, d in unit.items()}
            radius, calls = _radius(model, objective, step, base, eps, guess, precision / size, along, size)
            guess = radius if math.isfinite(radius) else guess
            found.append(_Ray(radius, _log_ray(radius, along, size) - centre_square / 2, weight, calls))
            advance(1)
    return _said(found, size, base, eps, centre_square / 2)


@dataclass(frozen=True)
class _Ray:
    radius: float
    mass: float
    """Logarithm of the integral along it."""
    weight: float
    calls: int


def _said(found: list[_Ray], size: int, base: float, eps: float, away: float) -> Report:
    area = math.log(2) + size / 2 * math.log(math.pi) - math.lgamma(size / 2) - size / 2 * math.log(2 * math.pi)
    logs = torch.tensor([area + ray.mass + ray.weight for ray in found], dtype=torch.float64)
    total = float(torch.logsumexp(logs, 0)) - math.log(len(logs))
    shares = (logs - torch.logsumexp(logs, 0)).exp()
    relative = float((logs - total).exp().std()) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    figures = {
        "log volume": total,
        "standard error": relative,
        "effective rays": 1 / float(shares.square().sum()),
        "nats a weight": total / size,
        "mean of the rays' logarithms": float(logs.mean()),
        "nats by the distance from 0": away,
        "loss": base,
        "eps": eps,
        "weights": size,
        "evaluations": sum(ray.calls for ray in found),
    }
    rows = [
        {"ray": i + 1, "radius": ray.radius, "by it alone": value}
        for i, (ray, value) in enumerate(zip(found, logs.tolist(), strict=True))
    ]
    order = logs.sort(descending=True).values.tolist()
    drawn = Line("ray", list(range(1, len(order) + 1)), order, style="points")
    notes = []
    if figures["effective rays"] < 0.2 * len(found):
        notes.append("A few rays make up the sum: wider ones are missed, and the volume is larger than this.")
    title = "Prior mass around a solution"
    return Report(title, figures, rows, [Plot(title, "rank of the ray", "log volume by it alone", [drawn])], notes)


def _scales(
    parameters: Mapping[str, Tensor], shape: Mapping[str, Tensor] | None, spreads: Mapping[str, float]
) -> dict[str, Tensor]:
    """The rays' standard deviations in units of the prior. Their product is one, as the density of directions wants."""
    if shape is None:
        return {n: torch.ones(p.shape, dtype=torch.float64, device=p.device) for n, p in parameters.items()}
    found = {}
    for name, parameter in parameters.items():
        given = shape.get(name)
        if given is None or given.shape != parameter.shape or not bool(((given > 0) & given.isfinite()).all()):
            raise Error(f"shape= needs finite numbers above 0 for {name} {list(parameter.shape)}")
        found[name] = given.detach().double().to(parameter.device) / spreads[name]
    middle = sum(float(s.log().sum()) for s in found.values()) / sum(s.numel() for s in found.values())
    return {name: scale / math.exp(middle) for name, scale in found.items()}


def _loss_at(model: nn.Module, objective: Objective, step: Mapping[str, Tensor], amount: float) -> float:
    with walking(model, None, [Weights.of(step)] if step else []) as walk:
        walk.go((amount,))
        return objective.scalar(model)


def _radius(
    model: nn.Module,
    objective: Objective,
    step: Mapping[str, Tensor],
    base: float,
    eps: float,
    guess: float,
    tolerance: float,
    along: float,
    size: int,
) -> tuple[float, int]:
    """Where the loss has risen by eps, to a relative tolerance, and how often it was computed; infinite if beyond
    what the prior reaches."""
    furthest = _peak(along, size) + 10.0
    with walking(model, None, [Weights.of(step)]) as walk:

        def rise(r: float) -> float:
            walk.go((r,))
            value = objective.scalar(model) - base - eps
            return value if math.isfinite(value) else math.inf

        low, high, value_low, value_high, calls = 0.0, min(guess, furthest), -eps, 0.0, 0
        while True:  # inwards first, then outwards: the first crossing, as far as factors of two tell
            value_high, calls = rise(high), calls + 1
            if value_high >= 0:
                break
            low, value_low = high, value_high
            if high >= furthest:
                return math.inf, calls
            high = min(2 * high, furthest)
        while low == 0.0:
            middle = high / 2
            value, calls = rise(middle), calls + 1
            if value < 0:
                low, value_low = middle, value
            else:
                high, value_high = middle, value
            if high < 1e-12:
                return high, calls
        side = 0
        while high - low > tolerance * high and calls < 200:
            # False position on the square of the radius (a quadratic loss is a line there), or halving where that lags.
            a, b = low**2, high**2
            share = value_low / (value_low - value_high) if math.isfinite(value_high) else 0.5
            middle = math.sqrt(a + min(max(share, 0.02), 0.98) * (b - a)) if calls % 4 else (low + high) / 2
            if not low < middle < high:
                break
            value, calls = rise(middle), calls + 1
            if value < 0:
                low, value_low = middle, value
                value_high, side = (value_high / 2 if side == -1 else value_high), -1
            else:
                high, value_high = middle, value
                value_low, side = (value_low / 2 if side == 1 else value_low), 1
            if not value:
                return middle, calls
    return (low + high) / 2, calls


def _peak(along: float, size: int) -> float:
    """Where ``r ** (size - 1) * exp(-r * r / 2 - along * r)`` is largest."""
    return (-along + math.sqrt(along**2 + 4 * (size - 1))) / 2


def _log_ray(radius: float, along: float, size: int) -> float:
    r"""The logarithm of :math:`\int_0^R r^{D-1} e^{-r^2/2 - b r} dr`, by Gauss and Legendre where it matters."""

    def log_value(r: float) -> float:
        return (size - 1) * math.log(r) - r * r / 2 - along * r if r > 0 else (-math.inf if size > 1 else 0.0)

    peak = min(_peak(along, size), radius)
    peak = max(peak, 1e-300)
    top = log_value(peak)
    reach = peak + math.sqrt(2 * DEEP) + 1.0  # the curvature of the logarithm is at least one
    low = _where(log_value, top - DEEP, 0.0, peak)
    high = min(_where(log_value, top - DEEP, reach, peak), radius) if radius > peak else radius
    places, weights = _legendre()
    r = low + (high - low) * (places + 1) / 2
    logs = (size - 1) * r.log() - r * r / 2 - along * r
    return float(torch.logsumexp(logs + weights.log(), 0)) + math.log((high - low) / 2)


def _where(log_value: Any, level: float, outside: float, inside: float) -> float:
    """Where a function that rises from outside to inside crosses a level."""
    if log_value(outside) >= level:
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        if log_value(middle) < level:
            outside = middle
        else:
            inside = middle
    return outside


def _legendre() -> tuple[Tensor, Tensor]:
    """Places and weights on [-1, 1]."""
    k = torch.arange(1, NODES, dtype=torch.float64)
    beside = k / (4 * k * k - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return values, 2 * vectors[0].square()
