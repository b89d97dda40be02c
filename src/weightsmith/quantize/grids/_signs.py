"""One bit a weight, or three values: only the sign, and whether there is a weight at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids._grid import (
    Params,
    Stored,
    check_group,
    check_scale_dtype,
    check_values,
    held,
    stepped,
    weighted,
)


@dataclass(frozen=True)
class Sign:
    r"""One bit: :math:`w \approx a \operatorname{sign}(w)` with :math:`a` the mean magnitude, which errs least.

    Attributes:
        group: inputs that share a magnitude; None for whole rows.
        scale_dtype: in what magnitudes are stored.

    >>> grid = Sign()
    >>> params = grid.fit(torch.tensor([[1.0, -2.0, 6.0]]))
    >>> grid.decode(grid.encode(torch.tensor([[1.0, -2.0, 6.0]]), params), params)
    tensor([[ 3., -3.,  3.]])
    """

    group: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1

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
        """``scale [...]``, the mean magnitude, weighted by importance."""
        check_values(values)
        heed = weighted(values, importance)
        mean = (values.abs() * heed).sum(-1) / heed.sum(-1).clamp(min=torch.finfo(values.dtype).tiny)
        return {"scale": held(mean * shrink, self.scale_dtype, "a scale")}  # a magnitude of zero stays zero

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """1 where a value is not negative: uint8 of the shape of ``values``."""
        return (values >= 0).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales."""
        scale = params["scale"].unsqueeze(-1)
        return (codes.to(scale.dtype) * 2 - 1) * scale


@dataclass(frozen=True)
class Ternary:
    r"""Three values, in two bits: :math:`w \approx s\,q` with :math:`q \in \{-1, 0, 1\}`.

    Attributes:
        group: inputs that share a step; None for whole rows.
        scale: ``"least"``, the step of least squared error; ``"mean"``, the mean magnitude, with which networks are
            trained from the start (BitNet b1.58).
        scale_dtype: in what steps are stored.

    >>> grid = Ternary()
    >>> params = grid.fit(torch.tensor([[1.0, -2.0, 6.0, 0.0]]))
    >>> grid.decode(grid.encode(torch.tensor([[1.0, -2.0, 6.0, 0.0]]), params), params)
    tensor([[0., 0., 6., 0.]])
    """

    group: int | None = None
    scale: Literal["least", "mean"] = "least"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)
        if self.scale not in ("least", "mean"):
            raise Error(f"scale is 'least' or 'mean', got {self.scale!r}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 2

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
        """``scale [...]``. Of least error is the mean of some of the largest: all such means are compared."""
        check_values(values)
        if not values.shape[-1]:
            return {"scale": values.new_ones(values.shape[:-1])}
        heed, size = weighted(values, importance), values.abs()
        if self.scale == "mean":
            return {"scale": stepped((size * heed).sum(-1) / heed.sum(-1) * shrink, self.scale_dtype)}
        size, order = size.sort(-1, descending=True)
        heed = heed.gather(-1, order).double().cumsum(-1)
        total = (size.double() * heed.diff(dim=-1, prepend=torch.zeros_like(heed[..., :1]))).cumsum(-1)
        # What k of them at their mean take off the error: (sum of h |w|)^2 / sum of h.
        gain = torch.where(heed > 0, total.square() / heed.clamp(min=1e-300), torch.zeros_like(total))
        best = gain.argmax(-1, keepdim=True)
        step = (total.gather(-1, best) / heed.gather(-1, best).clamp(min=1e-300)).squeeze(-1).to(values.dtype)
        return {"scale": stepped(step * shrink, self.scale_dtype)}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """0, 1 and 2 for -1, 0 and 1: uint8 of the shape of ``values``."""
        return (values / params["scale"].unsqueeze(-1)).round_().clamp_(-1, 1).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the scales. The code 3 is never written, and is taken for 2."""
        scale = params["scale"].unsqueeze(-1)
        return (codes.to(scale.dtype) - 1).clamp_(max=1) * scale
