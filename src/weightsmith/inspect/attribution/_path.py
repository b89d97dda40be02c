"""Which tensors the change of the loss between two checkpoints is due to.

The gradient of the loss, multiplied with the difference of two checkpoints and summed along the line between them, is
the change of the loss, tensor by tensor: what fine-tuning won, and where; what pruning cost, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._parts import Rule, quadrature
from weightsmith.stats import fitted
from weightsmith.stats.room import Batch, Loss, default_loss, restored, size
from weightsmith.weights import Pattern, matches, working

BUFFERS = "(buffers)"
_STEP = 1e-3  # of the way between the checkpoints, for what has no gradient


@card(
    paper="Sundararajan, Taly, Yan 2017, 'Axiomatic Attribution for Deep Networks', in weight space",
    covers=("integrated-gradients",),
    needs=("data",),
    unit="model",
    claim="the parts of all tensors sum to the difference of the two losses",
    departs="the path runs between weights, not inputs; running statistics count as one, by central differences",
)
def path_attribution(
    model: nn.Module,
    first: Any,
    second: Any,
    batches: Iterable[Batch],
    *,
    steps: int = 16,
    rule: Rule = "gauss-legendre",
    pattern: Pattern = "*",
    loss: Loss | None = None,
) -> Report:
    r"""Each tensor's part in the change of the loss from one checkpoint to another.

    .. math:: A_t = \int_0^1 \bigl\langle \nabla_t L(\theta_0 + a (\theta_1 - \theta_0)),\,
        \theta_{1,t} - \theta_{0,t} \bigr\rangle\, da, \qquad \sum_t A_t = L(\theta_1) - L(\theta_0)

    Args:
        model: the architecture; its own weights are neither used nor changed.
        first, second: checkpoints :math:`\theta_0` and :math:`\theta_1`: anything that `weightsmith.open` opens.
            Both are held in memory, with one more copy for the gradients.
        batches: gone through once for every step; those that are not a list are first made one.
        steps: points on the line. ReLU networks are not smooth and take more.
        rule: how the points are weighted.
        pattern: names of the tensors that the table shows; the others are summed up in one row.
        loss: ``(model, batch) -> number``, summed over the examples; the default is cross-entropy.

    Returns:
        Report: ``loss, first``, ``loss, second``, ``change`` and ``gap`` in nats an example, and a row a tensor.

    Raises:
        ValueError: no batch, checkpoints that do not fit the model, a model with nothing to move.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> ends = {"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[3.0]])}
    >>> found = path_attribution(layer, *ends, [torch.ones(1, 1)], loss=lambda m, x: m(x).square().sum())
    >>> round(found["change"], 4), found["tensor"]
    (8.0, ['weight'])
    """
    places, weights = quadrature(rule, steps)
    data = list(batches)
    examples = sum(map(size, data))
    if not examples:
        raise Error("path_attribution needs at least one example, got none")
    start, end = fitted(model, first), fitted(model, second)
    ask = _Line(model, start, end, data, loss or default_loss, examples)
    parts = dict.fromkeys(ask.parameters, 0.0)
    buffers = 0.0
    with restored(model), progress.task("path attribution", steps) as advance:
        for place, weight in zip(places, weights, strict=True):
            for name, slope in ask.slopes(place).items():
                parts[name] += weight * slope
            if ask.buffers_move:
                buffers += weight * (ask.loss(place, place + _STEP) - ask.loss(place, place - _STEP)) / (2 * _STEP)
            advance(1)
        losses = ask.loss(0.0, 0.0), ask.loss(1.0, 1.0)
    return _report(ask, parts, buffers, losses, pattern)


class _Line:
    """The loss and its slopes on the line between two checkpoints."""

    def __init__(self, model: nn.Module, start: dict, end: dict, data: list, loss: Loss, examples: int):
        self.model, self.start, self.end, self.data, self.asked, self.examples = model, start, end, data, loss, examples
        own = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
        self.parameters = [name for name in start if name in own]
        if not self.parameters:
            raise Error("path_attribution: the model has no float parameters")
        others = [name for name in start if name not in own]
        self.buffers_move = any(not torch.equal(start[name], end[name]) for name in others)

    def at(self, place: float, buffers_at: float) -> dict[str, Tensor]:
        """The weights at a place of the line, and the buffers at another."""
        found = {}
        for name, value in self.start.items():
            where = place if name in self.parameters else buffers_at
            other = self.end[name]
            if value.is_floating_point():
                found[name] = torch.lerp(working(value), working(other), where).to(value.dtype)
            else:
                found[name] = (other if where >= 0.5 else value).clone()
        return found

    def _losses(self, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        def called(*inputs: Any, **named: Any) -> Any:
            return functional_call(self.model, weights, inputs, named)

        for batch in self.data:
            yield self.asked(called, batch) / self.examples

    @torch.no_grad()
    def loss(self, place: float, buffers_at: float) -> float:
        """The mean loss of an example."""
        return sum(float(value.double()) for value in self._losses(self.at(place, buffers_at)))

    def slopes(self, place: float) -> dict[str, float]:
        """The derivative along the line, tensor by tensor."""
        weights = self.at(place, place)
        moving = [weights[name].requires_grad_() for name in self.parameters]
        with torch.enable_grad():
            for value in self._losses(weights):
                value.backward(inputs=moving)
        pairs = zip(self.parameters, moving, strict=True)
        return {name: 0.0 if one.grad is None else self._along(name, one.grad) for name, one in pairs}

    def _along(self, name: str, slope: Tensor) -> float:
        return float((slope.double() * (self.end[name].double() - self.start[name].double())).sum())


def _report(
    ask: _Line, parts: dict[str, float], buffers: float, losses: tuple[float, float], pattern: Pattern
) -> Report:
    change = losses[1] - losses[0]
    share: Callable[[float], float | None] = lambda part: part / change if change else None  # noqa: E731
    rows, rest = [], 0.0
    for name, part in parts.items():
        if not matches(pattern, name):
            rest += part
            continue
        moved = float((ask.end[name].double() - ask.start[name].double()).norm())
        rows.append({"tensor": name, "part": part, "share": share(part), "distance": moved})
    for name, part in (("(others)", rest), (BUFFERS, buffers)):
        if (name == BUFFERS and ask.buffers_move) or (name != BUFFERS and len(rows) < len(parts)):
            rows.append({"tensor": name, "part": part, "share": share(part), "distance": None})
    total = sum(parts.values()) + buffers
    figures = {
        "loss, first": losses[0],
        "loss, second": losses[1],
        "change": change,
        "sum of parts": total,
        "gap": total - change,
    }
    bars = Line("part", [row["tensor"] for row in rows], [row["part"] for row in rows], style="bars")
    notes = ["A part below 0 lowered the loss. Parts depend on the path: this is the straight line."]
    return Report(
        "What each tensor did to the loss", figures, rows, [Plot("Parts", "tensor", "loss, nats", [bars])], notes
    )
