"""The two points of a grid between which each weight lies: what a rounding that learns chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.quantize._coded import Coded, coded
from weightsmith.quantize.grids import Grid, Params

TIE = 1e-4
"""How far a weight is put from where it has no side: from the middle, towards the point that counts as its nearest, and
from a point, so that it has a slope there."""

LOOKED_AT = 64
"""Rows of which the order of points is read; that of the widest of them, so that no row of zeros counts."""


@dataclass(frozen=True)
class Neighbours:
    """Codes and values below and above every weight, and whether the one above is the nearest: ``[out, in]`` each.

    A weight beyond the reach of its group has the outermost point on both sides.
    """

    below: Tensor
    above: Tensor
    low: Tensor
    high: Tensor
    up: Tensor
    params: Params
    shared: Params
    grid: Grid

    def share(self, weight: Tensor) -> Tensor:
        """How far each weight lies from the lower to the higher point: 0 to 1, never quite at an end or the middle."""
        apart = self.high - self.low
        share = ((weight - self.low) / torch.where(apart > 0, apart, 1)).clamp_(TIE, 1 - TIE)
        return torch.where(self.up, share.clamp(min=0.5 + TIE), share.clamp(max=0.5 - TIE))

    def chosen(self, up: Tensor) -> Coded:
        """Codes of a choice: true for the higher point."""
        return Coded(torch.where(up, self.above, self.below), self.params, self.grid, self.shared)


def neighbours(weight: Tensor, grid: Grid, params: Params, shared: Params | None = None) -> Neighbours:
    """The points of a grid around every weight.

    Args:
        weight: ``[out, in]``, float32 or wider.
        grid: its points have one order of codes in all groups, or its reverse.
        params, shared: what the groups and the tensor have (`fitted`).

    >>> from weightsmith.quantize.grids import Integer
    >>> found = neighbours(torch.tensor([[0.3, -0.6]]), Integer(bits=2), {"scale": torch.ones(1, 1)})
    >>> found.low, found.high
    (tensor([[ 0., -1.]]), tensor([[1., 0.]]))
    """
    shared = grid.shared(weight) if shared is None else shared
    near = coded(weight, grid, params, shared)
    value = near.values().to(weight.dtype)
    order = ordered(grid, params, shared, weight.device)
    lowest, highest = (order.place(one.codes) for one in ends(weight, grid, params, shared))
    # The next point down, and up; the outermost have themselves. Points may fall where steps are negative.
    first, last = torch.minimum(lowest, highest), torch.maximum(lowest, highest)
    group = weight.shape[1] if grid.group is None else grid.group
    first, last = (one.repeat_interleave(max(group, 1), 1)[:, : weight.shape[1]] for one in (first, last))
    place = order.place(near.codes)
    down = Coded(order.code(place - (place > first).to(torch.uint8)), params, grid, shared)
    up = Coded(order.code(place + (place < last).to(torch.uint8)), params, grid, shared)
    falls, rises = down.values().to(weight.dtype), up.values().to(weight.dtype)
    falling = (falls > value) | (rises < value)
    down_value, up_value = torch.where(falling, rises, falls), torch.where(falling, falls, rises)
    down_code, up_code = torch.where(falling, up.codes, down.codes), torch.where(falling, down.codes, up.codes)
    over = value > weight
    return Neighbours(
        torch.where(over, down_code, near.codes), torch.where(over, near.codes, up_code),
        torch.where(over, down_value, value), torch.where(over, value, up_value), over, params, shared, grid,
    )  # fmt: skip


def ends(weight: Tensor, grid: Grid, params: Params, shared: Params) -> tuple[Coded, Coded]:
    """The codes of the lowest and the highest point of every group: ``[out, groups]``."""
    groups = next((value.shape[1] for value in params.values()), None)
    if groups is None:
        groups = 1 if grid.group is None else max(-(-weight.shape[1] // grid.group), 1)
    spread = [value.abs().amax() for value in (*params.values(), *shared.values()) if value.numel()]
    far = 2.0 ** (grid.bits + 2) * (1 + sum((one.to(weight.dtype) for one in spread), weight.new_zeros(())))
    far = far.clamp(max=torch.finfo(weight.dtype).max / 4).expand(len(weight), groups, 1)
    both = {**shared, **params}
    low, high = (grid.encode(sign * far, both)[..., 0] for sign in (-1, 1))
    return Coded(low, params, grid, shared), Coded(high, params, grid, shared)


def reach(weight: Tensor, grid: Grid, params: Params, shared: Params) -> tuple[Tensor, Tensor]:
    """Half a point beyond the lowest and the highest point of every group: ``[out, groups]``.

    What lies between is rounded; what lies beyond is cut off.
    """
    order = ordered(grid, params, shared, weight.device)
    lowest, highest = (order.place(one.codes).to(torch.int16) for one in ends(weight, grid, params, shared))
    inward = (highest - lowest).sign()

    def value(places: Tensor) -> Tensor:
        return grid.decode(order.code(places.to(torch.uint8))[..., None], {**shared, **params})[..., 0]

    low, high = value(lowest), value(highest)
    return low - (value(lowest + inward) - low) / 2, high + (high - value(highest - inward)) / 2


@dataclass(frozen=True)
class Order:
    """Places of points from low to high, ``[codes]``, and codes of places; None where one is the other."""

    places: Tensor | None = None
    codes: Tensor | None = None

    def place(self, codes: Tensor) -> Tensor:
        """uint8, of codes of any shape."""
        return codes if self.places is None else self.places[codes.int()]

    def code(self, places: Tensor) -> Tensor:
        """uint8, of places of any shape."""
        return places if self.codes is None else self.codes[places.int()]


def ordered(grid: Grid, params: Params, shared: Params, device: torch.device) -> Order:
    """The order of a grid's points; codes of floats, with a sign before their magnitude, do not follow it."""
    some = {name: value[:LOOKED_AT, :1] for name, value in params.items()}
    rows = min((len(value) for value in some.values()), default=1)
    every = torch.arange(2**grid.bits, device=device, dtype=torch.uint8)
    if not rows:
        return Order()
    points = grid.decode(every.expand(rows, 1, -1), {**shared, **some}).flatten(0, -2)
    finite = torch.where(points.isfinite(), points, 0)
    widest = points[(finite.amax(1) - finite.amin(1)).argmax()]
    steps = widest.diff()
    if (steps >= 0).all() or (steps <= 0).all():
        return Order()
    used = widest.isfinite()
    values, place = widest[used].unique(return_inverse=True)
    places = torch.zeros_like(every)
    places[used] = place.to(torch.uint8)
    codes = torch.zeros(len(values), dtype=torch.int32, device=device)
    codes.scatter_reduce_(0, place, every[used].int(), "amin", include_self=False)  # of two zeros the first
    return Order(places, codes.to(torch.uint8))
