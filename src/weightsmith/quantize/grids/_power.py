"""Points that lie closer together near zero, where most weights are: whole numbers seen through a power.

Powers are the maps under which products stay products, so that whole numbers are still all that is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.errors import Error
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
    stepped,
    weighted,
)

EXPONENTS = tuple(round(0.3 + 0.05 * step, 2) for step in range(19))
"""Those that a search looks at, from 0.3 to 1.2; 1 is among them."""

LOOKED_AT = 2**20
"""Weights of a tensor that a search for its exponent looks at, in whole rows."""


@dataclass(frozen=True)
class Power:
    r"""Whole numbers of which a power is taken.

    .. math:: w \approx s \operatorname{sign}(q) \Big(\frac{|q|}{2^{b-1} - 1}\Big)^{1/a}

    With :math:`a = 1` the points are evenly spaced: the symmetric integers of span ``"narrow"``.

    Attributes:
        bits: :math:`b`, from 2 to 8.
        group: inputs that share a scale; None for whole rows.
        exponent: :math:`a`; None for the one of `EXPONENTS` whose nearest points leave the least squared error.
        each: which weights are looked at for it, and have it in common: those of the ``"tensor"`` (at most `LOOKED_AT`
            of them) or of each ``"group"``.
        scale_dtype: in what scales are stored.

    >>> grid = Power(bits=3, exponent=0.5)
    >>> params = {**grid.shared(torch.ones(1)), **grid.fit(torch.tensor([[9.0, -3.5, 0.9]]))}
    >>> grid.decode(grid.encode(torch.tensor([[9.0, -3.5, 0.9]]), params), params)
    tensor([[ 9., -4.,  1.]])
    """

    bits: int = 4
    group: int | None = None
    exponent: float | None = None
    each: Literal["tensor", "group"] = "tensor"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits, 2)
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)
        if self.each not in ("tensor", "group"):
            raise Error(f"each is 'tensor' or 'group', got {self.each!r}")
        if self.exponent is not None and not 0.05 <= self.exponent <= 20:
            raise Error(f"an exponent lies between 0.05 and 20, got {self.exponent!r}")

    @property
    def most(self) -> int:
        """The largest whole number."""
        return 2 ** (self.bits - 1) - 1

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {
            "scale": Stored((), self.scale_dtype),
            "exponent": Stored((), torch.float32, shared=self.each == "tensor"),
        }

    def shared(self, weight: Tensor) -> Params:
        """``exponent``, if the tensor has one; what a search looks at are weights, not what they do."""
        if self.each == "group":
            return {}
        if self.exponent is not None:
            return {"exponent": weight.new_tensor(self.exponent, dtype=torch.float32)}
        check_values(weight)
        rows = weight.reshape(-1, weight.shape[-1]) if weight.dim() and weight.numel() else weight.reshape(1, -1)
        rows = rows[:: max(rows.numel() // LOOKED_AT, 1)]
        size = min(self.group or rows.shape[1], rows.shape[1])
        runs = rows[:, : rows.shape[1] - rows.shape[1] % size if size else 0].reshape(-1, max(size, 1))
        return {"exponent": self._searched(runs, largest(runs), None, together=True)}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]``, the largest magnitude, and ``exponent [...]`` where each group has its own."""
        check_values(values)
        scale = stepped(largest(values) * shrink, self.scale_dtype)
        if self.each == "tensor":
            return {"scale": scale}
        if self.exponent is not None:
            return {"scale": scale, "exponent": torch.full_like(scale, self.exponent, dtype=torch.float32)}
        return {"scale": scale, "exponent": self._searched(values, scale, importance, together=False)}

    def _searched(self, values: Tensor, scale: Tensor, importance: Tensor | None, together: bool) -> Tensor:
        """The exponent of least error: one of all groups, or ``[...]``."""
        heed = weighted(values, importance)
        best, least = torch.ones_like(scale), torch.full_like(scale, float("inf"))
        if together:
            best, least = best.new_ones(()), least.new_full((), float("inf"))
        for exponent in EXPONENTS:
            params = {"scale": scale, "exponent": scale.new_tensor(exponent)}
            error = (self.decode(self.encode(values, params), params) - values).square_().mul_(heed).sum(-1)
            error = error.sum() if together else error
            best = torch.where(error < least, torch.full_like(best, exponent), best)
            least = torch.minimum(error, least)
        return best.float()

    def levels(self, exponent: Tensor) -> Tensor:
        """Magnitudes for a scale of 1, from 0 to 1: ``[..., 2**(bits - 1)]`` of ``[...]``."""
        steps = torch.arange(self.most + 1, device=exponent.device, dtype=torch.float64) / self.most
        return steps.pow(1 / exponent.double().clamp(min=0.05).unsqueeze(-1))

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        scaled = values / params["scale"].unsqueeze(-1)
        step = nearest(scaled.abs(), self.levels(params["exponent"]).to(scaled.dtype)).to(torch.int16)
        return (torch.where(scaled < 0, -step, step) + self.most + 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        step = codes.to(torch.int16) - self.most - 1
        levels = self.levels(params["exponent"]).to(scale.dtype)
        size = looked_up(step.abs().clamp_(max=self.most), levels)
        return size.copysign_(step.to(scale.dtype)) * scale
