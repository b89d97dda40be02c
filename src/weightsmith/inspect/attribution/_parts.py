"""What several attributions share: which output is meant, how a path is integrated, what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy
import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._models import untouched
from weightsmith.inspect._report import Line, Plot, Report

Target = int | tuple[int, ...] | Tensor | Callable[[Tensor], Tensor] | None
"""Which output is meant: one class for all, a place in outputs of more axes, a class for each example ``[n]``,
a function of the outputs ``[n, ...] -> [n]``, or None where the model gives one number an example."""

Rule = Literal["gauss-legendre", "trapezoid", "middle", "left", "right"]
"""How an integral over [0, 1] becomes a weighted sum."""


@dataclass(frozen=True)
class Attribution:
    """Whom a difference of outputs is due to."""

    method: str
    values: Tensor
    """``[n, *shape]``: the part of each input, or of each value that a layer gives."""
    change: Tensor
    """``[n]``: the output less the output at the reference: what the values should sum to."""

    @property
    def gap(self) -> Tensor:
        """``[n]``: the sum of the values less the change; 0 where the attribution is complete."""
        return self.values.double().reshape(len(self.values), -1).sum(dim=1) - self.change.double()

    def report(self) -> Report:
        """How complete the attribution is, an example a row."""
        gap, change = self.gap, self.change.double()
        scale = change.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        rows = [
            {"example": i, "change": float(c), "sum of parts": float(c + g), "gap": float(g)}
            for i, (c, g) in enumerate(zip(change, gap, strict=True))
        ]
        sums = [row["sum of parts"] for row in rows]
        plot = Plot(
            "Completeness",
            "change of the output",
            "sum of parts",
            [Line("example", change.tolist(), sums, style="points")],
        )
        figures = {
            "examples": len(rows),
            "mean change": float(change.mean()),
            "largest gap": float(gap.abs().max()),
            "largest gap over largest change": float(gap.abs().max() / scale),
        }
        return Report(f"Attribution by {self.method}", figures, rows, [plot])


def quadrature(rule: Rule, steps: int) -> tuple[list[float], list[float]]:
    """Places in [0, 1] and their weights, which sum to 1.

    >>> quadrature("middle", 2)
    ([0.25, 0.75], [0.5, 0.5])
    >>> quadrature("trapezoid", 3)
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    if rule not in get_args(Rule):
        raise Error(f"rule is one of {', '.join(get_args(Rule))}; got {rule!r}")
    least = 2 if rule == "trapezoid" else 1
    if steps < least:
        raise Error(f"steps is at least {least} for {rule}, got {steps}")
    if rule == "gauss-legendre":
        places, weights = numpy.polynomial.legendre.leggauss(steps)
        return ((places + 1) / 2).tolist(), (weights / 2).tolist()
    if rule == "trapezoid":
        ends = [0.5, *[1.0] * (steps - 2), 0.5]
        return [i / (steps - 1) for i in range(steps)], [end / (steps - 1) for end in ends]
    shift = {"middle": 0.5, "left": 0.0, "right": 1.0}[rule]
    return [(i + shift) / steps for i in range(steps)], [1 / steps] * steps


def chosen(outputs: Tensor, target: Target, rows: Tensor | None = None) -> Tensor:
    """The number that is meant of each example's outputs.

    Args:
        outputs: ``[n, ...]``.
        target: see `Target`.
        rows: ``[n]`` which example each row is, where a target for each example is given.

    Returns:
        ``[n]``.
    """
    if callable(target):
        found = target(outputs)
    elif target is None:
        found = outputs.reshape(len(outputs), -1)[:, 0] if outputs[0].numel() == 1 else outputs
    elif isinstance(target, Tensor):
        wanted = target if rows is None else target.to(rows.device)[rows]
        if outputs.dim() != 2 or wanted.shape != outputs.shape[:1]:
            raise Error(f"a target for each example fits outputs [n, classes], got {list(outputs.shape)}")
        found = outputs.gather(1, wanted.to(outputs.device)[:, None])[:, 0]
    else:
        place = target if isinstance(target, tuple) else (target,)
        if len(place) != outputs.dim() - 1:
            raise Error(f"target {target} names {len(place)} places, the outputs are {list(outputs.shape)}")
        found = outputs[(slice(None), *place)]
    if found.shape != outputs.shape[:1]:
        raise Error(f"the outputs are {list(outputs.shape)}: say with target= which number of each example is meant")
    return found


def one_each(target: Target, count: int) -> None:
    """An error if a target for each example is not one for each."""
    if isinstance(target, Tensor) and target.shape != (count,):
        raise Error(f"a target for each of {count} examples is [{count}], got {list(target.shape)}")


def slope_at(found: Tensor, at: Tensor, what: str = "the inputs") -> Tensor:
    """The gradient of a sum of outputs, or an error where they have nothing to do with each other."""
    slope = torch.autograd.grad(found.sum(), at, allow_unused=True)[0] if found.requires_grad else None
    if slope is None:
        raise Error(f"the chosen output does not depend on {what}")
    return slope


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for parameters; afterwards all is as it was."""
    with untouched(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """A module by its name, or an error that says which there are."""
    known: dict[str, Any] = dict(model.named_modules())
    if name not in known:
        raise Error(f"the model has no layer {name!r}{did_you_mean(name, known)}")
    return known[name]


def like(inputs: Tensor, given: Tensor | float, what: str) -> Tensor:
    """References ``[k, n, *shape]`` from a number, one for all ``[*shape]``, one each ``[n, *shape]``, or k of them."""
    if not isinstance(given, Tensor):
        return torch.full_like(inputs, given)[None]
    given = given.to(inputs)
    if given.shape == inputs.shape[1:]:
        return given.expand_as(inputs)[None]
    if given.shape == inputs.shape:
        return given[None]
    if given.shape[1:] == inputs.shape:
        return given
    if given.shape[1:] == inputs.shape[1:]:
        return given[:, None].expand(-1, *inputs.shape)
    raise Error(f"{what} {list(given.shape)} do not fit inputs {list(inputs.shape)}")


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's, along the last axis; NaN where one side does not vary."""
    first, second = (one.double() - one.double().mean(dim=-1, keepdim=True) for one in (first, second))
    scale = (first.square().sum(dim=-1) * second.square().sum(dim=-1)).sqrt()
    return (first * second).sum(dim=-1) / torch.where(scale > 0, scale, torch.nan)


def interval_of_mean(values: Tensor, seed: int, draws: int = 2000) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean, by a bootstrap; nothing for fewer than two values."""
    if len(values) < 2:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    known, means = values.cpu().double(), torch.empty(draws, dtype=torch.float64)
    for part in torch.arange(draws).split(max(1, 2**22 // len(values))):  # memory does not grow with the draws
        rows = torch.randint(len(values), (len(part), len(values)), generator=generator)
        means[part] = known[rows].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
