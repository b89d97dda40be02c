"""What each input adds to an answer, on the straight way from a reference to the input.

The gradient at the input says what a tiny change would do, and is zero where the network is saturated. Summed along
the way from a reference that means "nothing there" (a black image, an empty word), gradients add up to exactly the
difference that the input makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect.attribution._parts import (
    Attribution,
    Rule,
    Target,
    chosen,
    frozen,
    layer_of,
    like,
    one_each,
    quadrature,
    slope_at,
)
from weightsmith.stats.room import Batch, Forward, default_forward, mapped, size


@card(
    paper="Sundararajan, Taly, Yan 2017, 'Axiomatic Attribution for Deep Networks'",
    covers=("integrated-gradients",),
    needs=("data",),
    unit="model",
    claim="its parts sum to the difference from the reference, where gradient times input does not",
)
def integrated_gradients(
    model: nn.Module,
    inputs: Batch,
    *,
    target: Target = None,
    baselines: Tensor | float = 0.0,
    layer: str | None = None,
    steps: int = 32,
    rule: Rule = "gauss-legendre",
    at_once: int = 256,
    forward: Forward | None = None,
) -> Attribution:
    r"""The part of each input value in the difference that the input makes.

    .. math:: A_i = (x_i - x'_i) \int_0^1 \frac{\partial F}{\partial x_i}\bigl(x' + a (x - x')\bigr)\, da,
        \qquad \sum_i A_i = F(x) - F(x')

    Args:
        model: asked in evaluation mode and left as it was.
        inputs: ``[n, *shape]`` of floats; with ``layer`` anything the model takes, such as
            ``{"input_ids": ...}``.
        target: the output F that is meant: a class, a place such as ``(position, token)``, a class for each example
            ``[n]``, or ``outputs -> [n]``.
        baselines: the reference :math:`x'`: a number, ``[*shape]``, one for each example ``[n, *shape]``, or k of
            them ``[k, n, *shape]`` or ``[k, *shape]`` over which the parts are averaged. Where k could be n, it is n.
        layer: name of a module whose output takes the place of the inputs, such as a language model's embedding;
            the baselines then have the shape of that output.
        steps: gradients along the way.
        rule: how they are weighted; Gauss-Legendre needs the fewest where F is smooth.
        at_once: points on the way that are computed together.
        forward: ``(model, batch) -> outputs [n, ...]``, where the default does not fit.

    Returns:
        Attribution: ``values [n, *shape]``, ``change [n]`` and ``gap [n]``, by which the sum misses the change.

    Raises:
        ValueError: inputs that have no gradient, shapes that do not fit, outputs of several numbers without a target.

    >>> square = lambda m, x: m(x).square()
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> found = integrated_gradients(layer, torch.tensor([[1.0, 2.0]]), forward=square)    # (x + y)^2 = 9
    >>> found.values
    tensor([[3., 6.]])
    """
    if at_once < 1:
        raise Error(f"at_once is at least 1, got {at_once}")
    places, weights = quadrature(rule, steps)
    ask = _Ask(model, inputs, layer, forward or default_forward)
    one_each(target, size(inputs))
    with frozen(model):
        start = ask.start()
        references = like(start, baselines, "baselines")
        values = torch.zeros_like(start, dtype=torch.promote_types(start.dtype, torch.float32))
        count = len(references) * len(places) * len(start)
        for rows in torch.arange(count).split(at_once):
            example, place = rows % len(start), rows // len(start) % len(places)
            reference = references[rows // (len(start) * len(places)), example]
            way = start[example] - reference
            along = torch.tensor(places, dtype=values.dtype)[place].to(start).reshape(-1, *[1] * (start.dim() - 1))
            point = (reference + along * way).detach().requires_grad_()
            with torch.enable_grad():
                found = chosen(ask(example, point), target, example)
                slope = slope_at(found, point)
            share = torch.tensor(weights, dtype=values.dtype)[place].to(values).reshape_as(along) / len(references)
            values.index_add_(0, example.to(values.device), (share * way * slope).to(values.dtype))
        change = ask.change(references, target, at_once)
    return Attribution("integrated gradients", values, change)


class _Ask:
    """The model as a function of the tensor whose parts are wanted."""

    def __init__(self, model: nn.Module, inputs: Batch, layer: str | None, forward: Forward):
        self.model, self.inputs, self.forward = model, inputs, forward
        self.layer = None if layer is None else layer_of(model, layer)
        if not size(inputs):
            raise Error("attributions need at least one example, got none")

    def start(self) -> Tensor:
        """The inputs, or what the layer makes of them."""
        if self.layer is None:
            first = self.inputs if isinstance(self.inputs, Tensor) else None
            if first is None and isinstance(self.inputs, list | tuple):
                first = self.inputs[0]
            if not isinstance(first, Tensor) or not first.is_floating_point():
                what = f"{first.dtype}" if isinstance(first, Tensor) else type(self.inputs).__name__
                raise Error(f"inputs are floats [n, ...], got {what}; name the layer= that embeds them")
            return first.detach()
        seen: list[Any] = []
        hook = self.layer.register_forward_hook(lambda module, given, made: seen.append(made))
        try:
            with torch.no_grad():
                self.forward(self.model, self.inputs)
        finally:
            hook.remove()
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or len(seen[0]) != size(self.inputs):
            raise Error(f"layer= needs a module that is called once and gives one tensor [n, ...]; called {len(seen)}x")
        return seen[0].detach()

    def __call__(self, example: Tensor, point: Tensor) -> Tensor:
        if self.layer is None and not isinstance(self.inputs, Mapping):
            rest = self.inputs[1:] if isinstance(self.inputs, list | tuple) else ()
            others = tuple(mapped(lambda value: value[example.to(value.device)], one) for one in rest)
            return self.forward(self.model, (point, *others) if others else point)
        assert self.layer is not None
        hook = self.layer.register_forward_hook(lambda module, given, made: point)
        try:
            return self.forward(self.model, mapped(lambda value: value[example.to(value.device)], self.inputs))
        finally:
            hook.remove()

    @torch.no_grad()
    def change(self, references: Tensor, target: Target, at_once: int) -> Tensor:
        """``[n]``: the outputs less their mean at the references."""
        start = self.start()
        every = torch.arange(len(start))

        def outputs(points: Tensor) -> Tensor:
            parts = [chosen(self(rows, points[rows]), target, rows) for rows in every.split(at_once)]
            return torch.cat(parts).to(torch.promote_types(points.dtype, torch.float32))

        return outputs(start) - torch.stack([outputs(reference) for reference in references]).mean(dim=0)
