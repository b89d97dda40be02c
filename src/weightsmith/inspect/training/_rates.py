"""How fast weights really move: a step against the length of what it moves.

Where a norm layer follows, only the direction of a weight matters. A step then turns it by an angle that falls with
its length, so the rate that counts is the learning rate over the squared length, whatever the schedule says. Decay
shortens, steps lengthen, and the angle a step settles at the same value in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._models import parameters_of
from weightsmith.inspect._parts import Source, by_kind, grid, named
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import middle
from weightsmith.weights import Pattern, open, same_names, working


def relative_update(before: Tensor, after: Tensor) -> float:
    r"""The length of a step over the length of the weight before it, :math:`\lVert w' - w \rVert / \lVert w \rVert`.

    Infinite where a weight of zeros moves, and 0 where it does not.

    Args:
        before, after: of one shape.

    >>> relative_update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    _one_shape(before, after)
    length = float(before.double().norm())
    moved = float((after.double() - before.double()).norm())
    return moved / length if length else (math.inf if moved else 0.0)


def angular_update(before: Tensor, after: Tensor) -> float:
    r"""The angle between a weight before and after a step, in radians; NaN where one of them is zero.

    .. math:: 2 \operatorname{atan2}\left( \lVert u - v \rVert, \lVert u + v \rVert \right), \qquad
        u = w / \lVert w \rVert, \quad v = w' / \lVert w' \rVert

    exact for small angles, where the inverse cosine of their product is not.

    Args:
        before, after: of one shape.

    >>> round(angular_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])), 4)
    1.5708
    """
    _one_shape(before, after)
    a, b = before.double().flatten(), after.double().flatten()
    first, second = float(a.norm()), float(b.norm())
    if not first or not second:
        return math.nan
    u, v = a / first, b / second
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def _one_shape(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise Error(f"a weight before and after a step has one shape, got {list(before.shape)} and {list(after.shape)}")


Optimizer = Literal["sgd", "adamw"]


def equilibrium_angle(rate: float, decay: float, *, momentum: float = 0.0, optimizer: Optimizer = "sgd") -> float:
    r"""The angle a step, in radians, at which decay and steps balance for scale-invariant weights.

    .. math:: \sqrt{\frac{2 \eta \lambda}{1 + \alpha}} \text{ for SGD}, \qquad
        \sqrt{2 \eta \lambda \frac{1 - \beta_1}{1 + \beta_1}} \text{ for AdamW}

    of small :math:`\eta \lambda` and gradients that are random from step to step (Kosson, Messmer, Jaggi 2024,
    'Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks').

    Args:
        rate: the learning rate :math:`\eta`.
        decay: the weight decay :math:`\lambda`, as `torch.optim` takes it: part of SGD's gradient, beside AdamW's step.
        momentum: SGD's :math:`\alpha` (without dampening), or AdamW's :math:`\beta_1`.
        optimizer: ``"sgd"`` or ``"adamw"``.

    Raises:
        ValueError: a rate or decay below 0, a momentum outside [0, 1), another optimizer.

    >>> round(equilibrium_angle(0.1, 0.005), 4), round(equilibrium_angle(0.1, 0.005, momentum=0.9), 4)
    (0.0316, 0.0229)
    >>> round(equilibrium_angle(0.001, 0.1, momentum=0.9, optimizer="adamw"), 5)
    0.00324
    """
    if not (rate >= 0 and decay >= 0 and 0 <= momentum < 1):
        raise Error(f"rate and decay are at least 0 and momentum in [0, 1), got {rate}, {decay} and {momentum}")
    if optimizer not in get_args(Optimizer):
        raise Error(f"optimizer is one of {', '.join(get_args(Optimizer))}; got {optimizer!r}")
    slowed = (1 - momentum if optimizer == "adamw" else 1.0) / (1 + momentum)
    return math.sqrt(2 * rate * decay * slowed)


def _row(name: str, before: Tensor, after: Tensor, rate: float | None) -> dict[str, Any]:
    wide, new = working(before.detach()), working(after.detach())
    norm = float(wide.double().norm())
    return {
        **named(name),
        "norm": norm,
        "new norm": float(new.double().norm()),
        "update": float((new.double() - wide.double()).norm()),
        "relative update": relative_update(wide, new),
        "angle": angular_update(wide, new),
        "effective rate": math.nan if rate is None or not norm else rate / norm**2,
    }


@card(
    paper="van Laarhoven 2017, 'L2 Regularization versus Batch and Weight Normalization'; Kosson, Messmer, Jaggi 2024, "
    "'Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks'",
    unit="tensor",
)
def updates(checkpoints: Sequence[Source], *, pattern: Pattern = "*", rate: float | None = None) -> Report:
    r"""How far each tensor moved and turned from one checkpoint to the next.

    .. math:: \frac{\lVert \Delta w \rVert}{\lVert w \rVert}, \qquad \angle(w, w + \Delta w), \qquad
        \eta_{\text{eff}} = \frac{\eta}{\lVert w \rVert^2}

    Args:
        checkpoints: at least two, in the order of the run; anything that `weightsmith.open` opens. Three tensors are in
            memory at a time.
        pattern: names of the float tensors.
        rate: the learning rate, for the effective one.

    Returns:
        Report: a row a tensor: ``norm`` at the first checkpoint, ``new norm`` at the last; ``update``, ``relative
        update`` and ``angle`` (radians) from the first to the last; ``path``, the sum of the lengths of the single
        steps, over ``update``; ``effective rate`` at the first.

    Raises:
        ValueError: fewer than two checkpoints, tensors that differ, none that fits.

    >>> updates([{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 4.5])}])["relative update"]
    [0.1]
    """
    if len(checkpoints) < 2:
        raise Error(f"updates needs at least 2 checkpoints, got {len(checkpoints)}")
    opened = [open(one) for one in checkpoints]
    for other in opened[1:]:
        same_names(opened[0], other, "updates needs checkpoints of the same tensors")
    ties = opened[0].ties
    names = [name for name in opened[0].names(pattern, floating=True) if name not in ties]
    if not names:
        raise Error(f"no float tensor fits pattern={pattern!r}; there are {listed(opened[0])}")
    for name in names:
        shapes = list(dict.fromkeys(tuple(one.spec(name).shape) for one in opened))
        if len(shapes) > 1:
            raise Error(f"tensor {name}: shapes {list(shapes[0])} and {list(shapes[1])} differ")
    rows = []
    for name in names:
        first = previous = opened[0][name]
        lengths: list[float] = []
        for one in opened[1:]:
            now = one[name]
            lengths.append(float((working(now).double() - working(previous).double()).norm()))
            previous = now
        row = _row(name, first, previous, rate)
        rows.append({**row, "path": sum(lengths) / row["update"] if row["update"] else math.nan})
    figures = {
        "tensors": len(rows),
        "mean relative update": middle([row["relative update"] for row in rows]),
        "mean angle": middle([row["angle"] for row in rows]),
    }
    plot = grid("relative update", rows, lambda row: row["relative update"])
    return Report("Updates of weights", figures, rows, [plot])


class UpdateRates:
    """Relative and angular updates of every tensor along a run.

    Args:
        model: its parameters are read at every step; one copy of them is held.
        pattern: names of the parameters.
        decay, momentum, optimizer: for the angle at which scale-invariant weights settle, see `equilibrium_angle`.

    It keeps five numbers a tensor and step. ``step`` is called after every step of the optimizer, with the learning
    rate.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> watch = UpdateRates(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(1.25)
    >>> watch.step(0.1)
    >>> round(watch.report()["relative update"][0], 4)
    0.25
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pattern: Pattern = "*",
        decay: float | None = None,
        momentum: float = 0.0,
        optimizer: Optimizer = "sgd",
    ) -> None:
        equilibrium_angle(0.0, decay or 0.0, momentum=momentum, optimizer=optimizer)  # bad options are found here
        self.parameters = parameters_of(model, pattern)
        self.decay, self.momentum = decay, momentum
        self.optimizer: Optimizer = optimizer
        self.before = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.history: dict[str, list[dict[str, float]]] = {name: [] for name in self.parameters}
        self.rates: list[float] = []

    @torch.no_grad()
    def step(self, rate: float | Mapping[str, float]) -> None:
        """Note a step that was made with this learning rate; by parameter name where groups differ."""
        rates = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(self.parameters, rate)
        lacking = [name for name in self.parameters if name not in rates]
        if lacking:
            raise Error(f"step needs a learning rate for every parameter, got none for {listed(lacking)}")
        for name, value in self.parameters.items():
            row = _row(name, self.before[name], value, rates[name])
            self.history[name].append({key: row[key] for key in _COLUMNS})
            self.before[name].copy_(value)
        self.rates.append(middle([rates[name] for name in self.parameters]))

    def report(self, *, last: float = 0.5) -> Report:
        """Means over the last part of the run, a tensor a row.

        Args:
            last: the share of the steps that means are taken over.

        Returns:
            Report: a row a tensor: mean ``norm``, ``update``, ``relative update``, ``angle`` and ``effective rate``;
            in the figures, means over tensors, and with ``decay`` the ``angle at equilibrium`` of the mean rate.

        Raises:
            ValueError: no step was noted, a share outside (0, 1].
        """
        if not self.rates:
            raise Error("a report needs at least one step")
        if not 0 < last <= 1:
            raise Error(f"last is a share in (0, 1], got {last}")
        start = len(self.rates) - max(round(last * len(self.rates)), 1)
        rows = []
        for name, noted in self.history.items():
            means = {key: middle([one[key] for one in noted[start:]]) for key in _COLUMNS}
            rows.append({**named(name), "values": self.parameters[name].numel(), **means})
        angles = [row["angle"] for row in rows if not math.isnan(row["angle"])]
        figures: dict[str, Any] = {
            "steps": len(self.rates),
            "mean relative update": middle([row["relative update"] for row in rows]),
            "mean angle": middle(angles),
            "largest over smallest angle": max(angles) / min(angles) if angles and min(angles) else None,
        }
        if self.decay is not None:
            figures["angle at equilibrium"] = equilibrium_angle(
                middle(self.rates[start:]), self.decay, momentum=self.momentum, optimizer=self.optimizer
            )
        return Report("Rates of update", figures, rows, [self._drawn("relative update"), self._drawn("angle")])

    def _drawn(self, column: str) -> Plot:
        lines = []
        rows = [{**named(name), "values": self.parameters[name].numel()} for name in self.history]
        for kind, members in by_kind(rows).items():
            each = [[one[column] for one in self.history[row["tensor"]]] for row in members]
            lines.append(
                Line(kind, list(range(len(self.rates))), [middle(values) for values in zip(*each, strict=True)])
            )
        return Plot(f"{column} by kind".capitalize(), "step", column, lines, log="y")


_COLUMNS = ("norm", "update", "relative update", "angle", "effective rate")
