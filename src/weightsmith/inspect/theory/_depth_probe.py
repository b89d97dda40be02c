"""What depth does to signals and gradients of real networks at their start, layer by layer.

A single network tells of sizes; how far it is from Gaussian shows only over many networks, drawn together here and
run as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import untouched
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.theory._criticality import depth_theory
from weightsmith.inspect.theory._parts import Activation, function_of
from weightsmith.stats.room import Batch, Forward, default_forward

_AT_ONCE = 1 << 23  # weights of one layer in all networks that are drawn together: 32 MiB a layer


@card(
    paper="Roberts, Yaida, Hanin 2022, 'The Principles of Deep Learning Theory'",
    covers=("principles-deep-learning-theory",),
    unit="model",
    claim="excess kurtosis grows with depth over width at the rate that the theory gives for the activation",
)
def depth_ensemble(
    widths: Sequence[int],
    activation: Activation,
    *,
    networks: int = 500,
    weight_scale: float | None = None,
    bias_variance: float | None = None,
    kernel: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Report:
    r"""Sizes, gradients and non-Gaussianity of many fully connected networks at their start, beside the theory.

    .. math:: \frac{E[z^4]}{3\,E[z^2]^2} - 1 \quad\text{over networks, for one input}

    Args:
        widths: of the input, of every hidden layer and of the output.
        activation: a name or an elementwise function.
        networks: how many are drawn.
        weight_scale, bias_variance, kernel: as in `depth_theory`; critical by default.
        seed: of the weights.
        device: where they are drawn and run, in float32; sums are taken in float64.

    Returns:
        Report: a row for every layer: ``kernel``, ``gradient`` and ``excess kurtosis``, each with what theory expects,
        ``gradient spread`` (standard deviation over mean of the squared norms), and ``tangent share``: the layer's
        part in the tangent kernel with the theory's learning rates; equal parts are 1 / depth.

    Raises:
        Error: as `depth_theory`; fewer than two networks.

    >>> found = depth_ensemble([10, 40, 40, 40, 1], "relu", networks=400)
    >>> 0.5 < found["kernel"][-1] < 2
    True
    """
    if networks < 2:
        raise Error(f"an ensemble has at least 2 networks, got {networks}")
    theory = depth_theory(widths, activation, weight_scale=weight_scale, bias_variance=bias_variance, kernel=kernel)
    scale, bias, function = theory["weight_scale"], theory["bias_variance"], function_of(activation)
    generator = torch.Generator(device=device).manual_seed(seed)
    start = torch.full((widths[0],), math.sqrt((theory["kernel"][0] - bias) / scale), device=device)
    largest = max(one * other for one, other in itertools.pairwise(widths))
    together = max(_AT_ONCE // largest, 1)
    sums = torch.zeros(5, len(widths) - 1, dtype=torch.float64)
    with torch.enable_grad():
        for first in range(0, networks, together):
            count = min(together, networks - first)
            sums += _sums(widths, function, start.expand(count, -1), scale, bias, generator)
    second, fourth, gradient, gradient_square, tangent = sums / networks
    excess = fourth / (3 * second.square()) - 1
    spread = (gradient_square / gradient.square() - 1).clamp(min=0).sqrt()
    rates = torch.tensor(theory["rate"], dtype=torch.float64)
    share = rates * tangent
    rows = [
        {"layer": i + 1, "kernel": float(second[i]), "kernel, theory": theory["kernel"][i],
         "gradient": float(gradient[i]), "gradient, theory": theory["gradient"][i],
         "excess kurtosis": float(excess[i]), "excess kurtosis, theory": theory["excess kurtosis"][i],
         "gradient spread": float(spread[i]), "tangent share": float(share[i] / share.sum())}
        for i in range(len(widths) - 1)
    ]  # fmt: skip
    layers = [row["layer"] for row in rows]
    scales: tuple[tuple[str, Literal["", "y"]], ...] = (("kernel", "y"), ("gradient", "y"), ("excess kurtosis", ""))
    plots = tuple(
        Plot(what, "layer", what,
             [Line("measured", layers, [row[what] for row in rows]),
              Line("theory", layers, [row[f"{what}, theory"] for row in rows])], log=log)
        for what, log in scales
    )  # fmt: skip
    kurtosis_slope, determination = _line_through_first(layers, excess.tolist())
    figures = {
        "networks": networks,
        "kernel, last over first": float(second[-1] / second[0]),
        "gradient, first over last": float(gradient[0] / gradient[-1]),
        "excess kurtosis a layer": kurtosis_slope,
        "its R2": determination,
        "aspect ratio": theory["aspect ratio"],
        "best aspect ratio": theory["best aspect ratio"],
    }
    notes = (
        "Theory is of first order in depth over width; higher orders add to the kurtosis of deep, narrow networks.",
    )
    return Report(f"{networks} networks of {len(widths) - 1} layers", figures, rows, plots, notes)


def _sums(widths: Sequence[int], function: Any, inputs: Tensor, scale: float, bias: float, generator: Any) -> Tensor:
    """Over networks, ``[5, layers]``: z^2, z^4 (means over units), |gradient|^2, its square, |gradient|^2 <sigma^2>."""
    device = inputs.device
    signal, count = inputs[..., None], len(inputs)
    preactivations, squares = [], []
    for before, after in itertools.pairwise(widths):
        weight = torch.randn(count, after, before, generator=generator, device=device)
        squares.append(signal.detach().square().mean(dim=(1, 2)))
        made = weight.mul_(math.sqrt(scale / before)) @ signal
        if bias:
            made = made + math.sqrt(bias) * torch.randn(count, after, 1, generator=generator, device=device)
        if not preactivations:
            made.requires_grad_()
        preactivations.append(made)
        signal = function(made)
    gradients = torch.autograd.grad(preactivations[-1][:, 0].sum(), preactivations)
    values = [one.detach().double().cpu() for one in preactivations]
    lengths = [one.double().square().sum(dim=(1, 2)).cpu() for one in gradients]
    rows = [
        [value.square().mean(dim=(1, 2)).sum() for value in values],
        [value.pow(4).mean(dim=(1, 2)).sum() for value in values],
        [length.sum() for length in lengths],
        [length.square().sum() for length in lengths],
        [(length * square.double().cpu()).sum() for length, square in zip(lengths, squares, strict=True)],
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _line_through_first(layers: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Slope and R2 of a line that is 0 at the first layer."""
    steps = torch.tensor([layer - layers[0] for layer in layers], dtype=torch.float64)
    heights = torch.tensor(values, dtype=torch.float64)
    slope = (steps @ heights) / (steps @ steps)
    total = (heights - heights.mean()).square().sum()
    left = (heights - slope * steps).square().sum()
    return float(slope), float(1 - left / total) if total > 0 else math.nan


@card(
    paper="Roberts, Yaida, Hanin 2022, 'The Principles of Deep Learning Theory'",
    covers=("principles-deep-learning-theory",),
    needs=("data",),
    unit="model",
    claim="a start that is 10 % off the critical one shows as sizes that change exponentially with depth",
)
def depth_probe(model: nn.Module, batch: Batch, *, forward: Forward | None = None) -> Report:
    """Sizes of signals and gradients at every linear or convolutional layer of a model.

    Args:
        model: any module; asked in evaluation mode and left as it was.
        batch: ``inputs``, ``(inputs, labels)`` or a mapping; labels are not used. Gradients are of half the
            squared norm of an example's outputs.
        forward: ``(model, batch) -> outputs``, where the default does not fit.

    Returns:
        Report: a row for every layer in the order it is called: ``kernel`` (mean square of its outputs),
        ``gradient`` (mean over examples of the squared norm), ``kurtosis`` of its outputs less 3, ``fan in``, and
        ``weight scale`` (the weights' variance times their fan-in).

    Raises:
        Error: a model without such layers, or whose outputs do not come from them.

    >>> layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(3)]
    >>> depth_probe(torch.nn.Sequential(*layers), torch.randn(8, 64))["layer"]
    ['0', '1', '2']
    """
    watched = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]  # fmt: skip
    if not watched:
        raise Error("depth_probe reads linear and convolutional layers; the model has none")
    seen: list[tuple[str, nn.Module, Tensor]] = []

    def keep(name: str, module: nn.Module, made: Any) -> Tensor:
        made = made if made.requires_grad else made.requires_grad_()
        seen.append((name, module, made))
        return made.clone()  # what follows may write into it

    hooks = [
        module.register_forward_hook(lambda module, given, made, name=name: keep(name, module, made))
        for name, module in watched
    ]
    try:
        with untouched(model), torch.enable_grad():
            outputs = (forward or default_forward)(model, batch)
            total = outputs.float().square().sum() / 2
            if not seen or not total.requires_grad:
                raise Error("depth_probe: the outputs do not come from a call of the model's layers; give forward=")
            gradients = torch.autograd.grad(total, [made for _, _, made in seen], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    rows = [_row(*one, gradient, len(outputs)) for one, gradient in zip(seen, gradients, strict=True)]
    layers = list(range(1, len(rows) + 1))
    plots = (
        Plot("Sizes through the model", "layer", "mean square, squared norm",
             [Line(what, layers, [row[what] for row in rows]) for what in ("kernel", "gradient")], log="y"),
    )  # fmt: skip
    first, last = rows[0], rows[-1]
    figures = {
        "kernel, last over first": last["kernel"] / first["kernel"] if first["kernel"] else math.nan,
        "gradient, first over last": first["gradient"] / last["gradient"] if last["gradient"] else math.nan,
    }
    return Report(f"Signals and gradients at {len(rows)} layers", figures, rows, plots)


def _row(name: str, module: nn.Module, made: Tensor, gradient: Tensor | None, examples: int) -> dict[str, Any]:
    value = made.detach().double()
    square, spread = value.square().mean(), (value - value.mean()).square().mean()
    fourth = (value - value.mean()).pow(4).mean()
    weight: Any = module.weight
    fan_in = weight[0].numel()
    return {
        "layer": name,
        "kernel": float(square),
        "gradient": 0.0 if gradient is None else float(gradient.double().square().sum()) / examples,
        "kurtosis": float(fourth / spread.square() - 3) if spread > 0 else math.nan,
        "fan in": fan_in,
        "weight scale": float(weight.detach().double().var(correction=0)) * fan_in,
    }
