"""Evenly spaced points: what most hardware computes with.

Symmetric grids store a step; affine ones also where zero lies, either as a code of the grid, so that zero is exact, or
as the smallest value, which loses nothing to rounding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

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
    held,
    stepped,
)

Span = Literal["full", "narrow", "signed"]
"""How a symmetric grid covers its largest magnitude: ``full``, half a step beyond its lowest and highest point;
``narrow``, with its highest point and without its lowest; ``signed``, with its lowest point, the step taking the
sign."""


@dataclass(frozen=True)
class Integer:
    r"""Codes of whole numbers.

    .. math:: w \approx s\,(q - z), \qquad q \in \{0, \dots, 2^b - 1\}

    with :math:`z = 2^{b-1}` for symmetric grids, a whole number for affine ones, or :math:`w \approx s\,q + m` where
    the smallest value is kept as a float.

    Attributes:
        bits: :math:`b`, from 1 to 8.
        group: inputs that share a step; None for whole rows.
        symmetric: whether zero lies in the middle.
        zero: of affine grids: ``"integer"`` (a code stands for exactly zero) or ``"float"`` (the smallest value is
            stored).
        span: of symmetric grids, see `Span`.
        per_tensor: one step for the whole tensor; ``group`` is then None.
        scale_dtype: in what steps are stored.

    >>> grid = Integer(bits=4)
    >>> values = torch.tensor([[7.5, -7.5, 1.0, 0.4]])
    >>> params = grid.fit(values)
    >>> grid.encode(values, params), grid.decode(grid.encode(values, params), params)
    (tensor([[15,  0,  9,  8]], dtype=torch.uint8), tensor([[ 7., -8.,  1.,  0.]]))
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = True
    zero: Literal["integer", "float"] = "integer"
    span: Span = "full"
    per_tensor: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group(self.group)
        if self.span not in get_args(Span) or self.zero not in ("integer", "float"):
            raise Error(
                f"span is one of {', '.join(get_args(Span))} and zero 'integer' or 'float'; got {self.span!r} and "
                f"{self.zero!r}"
            )
        if self.per_tensor and self.group is not None:
            raise Error(f"per_tensor=True has one step for all, so group={self.group} does not go with it")
        check_scale_dtype(self.scale_dtype)
        if self.bits == 1 and self.symmetric and self.span != "full":
            raise Error('1 bit has two points; only span="full" puts them evenly around zero')

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return int(self.symmetric and self.span == "narrow"), 2**self.bits - 1

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        step = {"scale": Stored((), self.scale_dtype, shared=self.per_tensor)}
        if self.symmetric:
            return step
        if self.zero == "integer":
            return step | {"zero_point": Stored((), torch.uint8, shared=self.per_tensor)}
        return step | {"minimum": Stored((), self.scale_dtype, shared=self.per_tensor)}

    def shared(self, weight: Tensor) -> Params:
        """The step of the whole tensor, if it has one."""
        return self._fit(weight.flatten()) if self.per_tensor else {}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``scale [...]`` and, on affine grids, ``zero_point [...]`` or ``minimum [...]``, just wide enough."""
        return {} if self.per_tensor else self._fit(values, shrink)

    def _fit(self, values: Tensor, shrink: float | Tensor = 1.0) -> Params:
        check_values(values)
        if self.symmetric:
            return {"scale": self._symmetric(values, shrink)}
        if not values.shape[-1]:
            low = high = values.new_zeros(values.shape[:-1])
        else:
            low, high = torch.aminmax(values, dim=-1)
        if self.zero == "float":
            centre, half = (high + low) / 2, (high - low) / 2 * shrink
            minimum = held(centre - half, self.scale_dtype, "a smallest value")
            scale = stepped((centre + half - minimum).clamp(min=0) / (2**self.bits - 1), self.scale_dtype)
            return {"scale": scale, "minimum": minimum}
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = stepped((high - low) / (2**self.bits - 1), self.scale_dtype)
        return {"scale": scale, "zero_point": (-low / scale).round().clamp(0, 2**self.bits - 1)}

    def _symmetric(self, values: Tensor, shrink: float | Tensor) -> Tensor:
        if not values.shape[-1]:
            return values.new_ones(values.shape[:-1])
        if self.span == "signed":
            low, high = torch.aminmax(values, dim=-1)
            extreme = torch.where(high > -low, high, low)
            return stepped(extreme * shrink / -self.middle, self.scale_dtype)
        points = (2**self.bits - 1) / 2 if self.span == "full" else self.middle - 1
        return stepped(values.abs().amax(dim=-1) * shrink / points, self.scale_dtype)

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        scale = params["scale"].unsqueeze(-1)
        if "minimum" in params:
            codes = (values - params["minimum"].unsqueeze(-1)).div_(scale).round_()
        else:
            zero = params["zero_point"].unsqueeze(-1) if "zero_point" in params else self.middle
            codes = (values / scale).round_().add_(zero)
        return codes.clamp_(*self.ends()).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        if "minimum" in params:
            return codes.to(scale.dtype).mul_(scale).add_(params["minimum"].unsqueeze(-1))
        zero = params["zero_point"].unsqueeze(-1).to(scale.dtype) if "zero_point" in params else self.middle
        return codes.to(scale.dtype).sub_(zero).mul_(scale)
