"""Fixed tables of points under a scale: one for normal weights, and several of which each group takes its best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.quantize.grids._grid import (
    Params,
    Stored,
    check_bits,
    check_group,
    check_scale_dtype,
    check_values,
    largest,
    looked_up,
    nearest,
    needed,
    stepped,
    weighted,
)

NORMAL = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The points of NF4: averages of neighbouring quantiles of a normal distribution, eight above zero and seven below it
with zero between them, over the largest."""


@dataclass(frozen=True)
class NormalFloat:
    r"""NF4 of Dettmers et al. 2023, 'QLoRA': :math:`w \approx s\,n_q`, :math:`s = \max |w|`, `NORMAL` the points.

    Attributes:
        group: inputs that share a scale; None for whole rows.
        scale_dtype: in what scales are stored.

    >>> grid = NormalFloat()
    >>> params = grid.fit(torch.tensor([[2.0, -0.1, 0.3]]))
    >>> grid.encode(torch.tensor([[2.0, -0.1, 0.3]]), params)
    tensor([[15,  6,  9]], dtype=torch.uint8)
    """

    group: int | None = 64
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {"scale": Stored((), self.scale_dtype)}

    def shared(self, weight: Tensor) -> Params:
        """Nothing."""
        return {}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]``, the largest magnitude."""
        check_values(values)
        return {"scale": stepped(largest(values) * shrink, self.scale_dtype)}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        scaled = values / params["scale"].unsqueeze(-1)
        return nearest(scaled, scaled.new_tensor(NORMAL))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        return looked_up(codes, scale.new_tensor(NORMAL)) * scale


BASES = {
    3: (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
    4: (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
}
SPECIALS = {3: (3.0, -3.0, 6.0, -6.0), 4: (10.0, -10.0, 16.0, -16.0)}
FINEST = 255  # steps of a group's scale


@dataclass(frozen=True)
class MixedTypes:
    r"""BitMoD: a table of small floats in which a special value takes the place of the second zero, chosen by group.

    .. math:: w \approx u\,f\,t^{(k)}_q, \qquad k = \operatorname{arg\,min}_k \sum_i h_i (w_i - u f t^{(k)}_{q_i})^2

    with four tables :math:`t^{(k)}`: at 3 bits 0, 1, 2, 4 with both signs and one of 3, -3, 6, -6; at 4 bits those of
    E2M1, in half steps, and one of 10, -10, 16, -16. :math:`f` is a whole number up to 255, :math:`u` the tensor's.

    Attributes:
        bits: 3 or 4.
        group: inputs that share a table and a scale; None for whole rows.

    >>> grid = MixedTypes(bits=3)
    >>> values = torch.tensor([[6.0, 2.0, 1.0, -4.0, 0.0]])
    >>> params = {**grid.shared(values), **grid.fit(values, grid.shared(values))}
    >>> params["special"], grid.decode(grid.encode(values, params), params)
    (tensor([2], dtype=torch.uint8), tensor([[ 6.,  2.,  1., -4.,  0.]]))
    """

    bits: int = 4
    group: int | None = 128

    def __post_init__(self) -> None:
        check_bits(self.bits, 3, 4)
        check_group(self.group)

    def tables(self, like: Tensor) -> Tensor:
        """``[4, 2**bits]``, each from low to high."""
        return like.new_tensor([sorted((*BASES[self.bits], special)) for special in SPECIALS[self.bits]])

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {
            "factor": Stored((), torch.uint8),
            "special": Stored((), torch.uint8),
            "unit": Stored((), torch.float32, shared=True),
        }

    def shared(self, weight: Tensor) -> Params:
        """``unit``, of which the scale of the largest group is 255."""
        check_values(weight)
        return {"unit": stepped(largest(weight.flatten()) / (max(BASES[self.bits]) * FINEST), torch.float32)}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``factor [...]`` and ``special [...]``, uint8: of the table that errs least. Four copies of the values."""
        check_values(values)
        unit = needed(shared, "unit", "bitmod")
        heed, most = weighted(values, importance), largest(values) * shrink
        best: dict[str, Tensor] = {}
        least = None
        for index, table in enumerate(self.tables(values)):
            factor = (most / (table.abs().max() * unit)).round().clamp(1, FINEST).to(torch.uint8)
            one = {"factor": factor, "special": torch.full_like(factor, index), "unit": unit}
            scaled = values / self._step(one)
            error = (looked_up(nearest(scaled, table), table) - scaled).square().mul_(heed).sum(-1)
            error = error * self._step(one).squeeze(-1).square()
            if least is None:
                best, least = one, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = {name: torch.where(better, one[name], best[name]) for name in ("factor", "special")} | {"unit": unit}
        return {name: best[name] for name in ("factor", "special")}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        scaled = values / self._step(params)
        return nearest(scaled, self._levels(scaled, params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the unit."""
        step = self._step(params)
        return looked_up(codes, self._levels(step, params)) * step

    def _levels(self, like: Tensor, params: Params) -> Tensor:
        return self.tables(like)[params["special"].long().clamp(max=len(SPECIALS[self.bits]) - 1)]

    @staticmethod
    def _step(params: Params) -> Tensor:
        return (params["factor"].to(params["unit"].dtype) * params["unit"]).unsqueeze(-1)
