"""How sharp a minimum is, in one number.

A minimum is called sharp when the loss rises steeply nearby. How near depends on the scale of the weights, so that
the measures that forgive scaling (adaptive sharpness, relative flatness) are the ones to compare networks by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._report import Report
from weightsmith.inspect.landscape._curvature import curvature_of
from weightsmith.inspect.landscape._parts import Batches, Loss, Objective, borrowed, walking
from weightsmith.weights import Pattern, Weights, working


@card(
    paper="Foret, Kleiner, Mobahi, Neyshabur 2021, 'Sharpness-Aware Minimization for Efficiently Improving "
    "Generalization'; Kwon, Kim, Park, Choi 2021, 'ASAM: Adaptive Sharpness-Aware Minimization'",
    needs=("data",),
    unit="model",
    claim="adaptive sharpness does not change when a layer is scaled without changing the function",
)
def sharpness(
    model: nn.Module,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    radius: float = 0.05,
    adaptive: bool = False,
    ascents: int = 1,
    pattern: Pattern = "*",
) -> Report:
    r"""How far the loss rises within a ball around the weights, along the gradient.

    .. math:: \max_{\lVert \epsilon \rVert \le \rho} L(w + \epsilon) - L(w), \qquad
        \epsilon = \rho\, \frac{g}{\lVert g \rVert} \quad\text{or}\quad
        \epsilon = \rho\, \frac{w^2 \odot g}{\lVert w \odot g \rVert}

    Args:
        model, loss, batches: as for `line`; the gradient is that of the mean over all batches.
        radius: :math:`\rho`; with ``adaptive``, of the ball in units of each weight's size.
        adaptive: the second form, which forgives scaling.
        ascents: gradient steps in all, each of ``radius / ascents``, so that all stay in the ball; more find higher
            places.
        pattern: names of the weights that move.

    Returns:
        Report: ``sharpness``, ``loss`` and ``gradient norm``.

    Raises:
        ValueError: a radius that is not above 0, or as `line`.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> round(sharpness(net, lambda model: model.weight.square().sum(), radius=0.5)["sharpness"], 4)  # 1.5^2 - 1
    1.25
    """
    if not (math.isfinite(radius) and radius > 0) or ascents < 1:
        raise Error(f"radius is above 0 and ascents at least 1, got {radius} and {ascents}")
    objective = Objective.of(loss, batches)
    parameters = parameters_of(model, pattern)
    length = math.nan
    with walking(model, Weights.of({n: p.detach().clone() for n, p in parameters.items()}), []):
        before = objective.scalar(model)
        place = {name: working(p.detach().clone()) for name, p in parameters.items()}  # in full while it moves
        sizes = {n: value.abs() if adaptive else torch.ones_like(value) for n, value in place.items()}
        for ascent in range(ascents):
            slopes = _gradient(model, objective, parameters)
            scaled = {name: slope * sizes[name] for name, slope in slopes.items()}
            norm = math.sqrt(sum(float(value.double().square().sum()) for value in scaled.values()))
            length = norm if ascent == 0 else length
            if norm:
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        place[name].add_(scaled[name] * sizes[name], alpha=radius / ascents / norm)
                        parameter.copy_(place[name])
        after = objective.scalar(model)
    figures = {"sharpness": after - before, "loss": before, "gradient norm": length, "radius": radius}
    return Report("Adaptive sharpness" if adaptive else "Sharpness", figures)


def _gradient(model: nn.Module, objective: Objective, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of the mean loss over all batches."""
    totals = {name: torch.zeros_like(working(p.detach())) for name, p in parameters.items()}
    weights = 0.0
    with borrowed(model), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_()
        for batch in objective.each():
            value, weight = objective.loss_of(model, batch)
            slopes = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
            for name, slope in zip(parameters, slopes, strict=True):
                totals[name].add_(slope, alpha=weight)
            weights += weight
    return {name: total / weights for name, total in totals.items()}


@card(
    paper="Petzka, Kamp, Adilova, Sminchisescu, Boley 2021, 'Relative Flatness and Generalization'",
    needs=("data",),
    unit="model",
    claim="does not change when a layer is scaled without changing the function",
)
def relative_flatness(
    model: nn.Module,
    layer: str,
    loss: Loss | None = None,
    batches: Batches | None = None,
    *,
    probes: int = 100,
    seed: int = 0,
) -> Report:
    r"""How the loss bends under changes of one layer's weights, relative to their size. Smaller is flatter.

    .. math:: \kappa = \sum_{s, s'} \langle w_s, w_{s'} \rangle \operatorname{tr} H_{s, s'}
        = \mathbb E\, \langle W y z^\top,\; H\,[W y z^\top] \rangle

    with :math:`w_s` the rows of the layer, and y, z random signs.

    Args:
        model, loss, batches: as for `line`.
        layer: the name of a matrix ``[out, *in]``.
        probes: products with the Hessian.
        seed: of the signs.

    Returns:
        Report: ``relative flatness`` and its ``standard error``.

    Raises:
        ValueError: a name that is no matrix of the model, or as `hvp`.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 3.0)
    >>> relative_flatness(net, "weight", lambda model: model.weight.square().sum(), probes=2)["relative flatness"]
    18.0
    """
    if probes < 1:
        raise Error(f"probes is at least 1, got {probes}")
    generator = torch.Generator().manual_seed(seed)
    found: list[float] = []
    axes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    if axes.get(layer, 0) < 2:
        found_axes = f"has {axes[layer]} axes" if layer in axes else "is not a parameter of the model"
        raise Error(f"relative flatness is of a matrix; {layer!r} {found_axes}{did_you_mean(layer, axes)}")
    with curvature_of(model, loss, batches, "hessian", lambda name: name == layer) as curvature:
        weight = working(curvature.parameters[layer].detach())
        rows = weight.reshape(len(weight), -1)
        for _ in range(probes):
            y, z = (torch.randint(0, 2, (rows.shape[1],), generator=generator).to(rows) * 2 - 1 for _ in range(2))
            probe: Any = torch.outer(rows @ y, z).reshape(-1, 1).to(curvature.like)
            found.append(float((probe * curvature(probe)).double().sum()))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std() / math.sqrt(probes)) if probes > 1 else math.nan
    figures = {"relative flatness": float(values.mean()), "standard error": error}
    return Report(f"Relative flatness of {layer}", figures)
