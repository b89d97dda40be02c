"""Four points a row and block, placed otherwise in a few columns than in the rest.

In most columns a weight is its sign times one of two magnitudes; in those that matter most it is a sum of two signs
with a magnitude each. Both are four points, so a code has two bits; a bit a column says which four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._parts import pack, packed_width, unpack
from weightsmith.quantize.grids._grid import Params, Stored, check_group, check_scale_dtype, looked_up

LARGE, POSITIVE, SALIENT = 1, 2, 4
"""Bits of a code: the larger of two magnitudes, above zero, in a salient column (not written)."""


@dataclass(frozen=True)
class Residual:
    r"""Codes of two bits: :math:`w \approx \pm m_{c,0}` or :math:`\pm m_{c,1}`, with c whether the column is salient.

    Stored are the codes, four magnitudes a row and block, and a byte a column; of 128 columns and in 16 bits that is
    2.5 bits a weight.

    Attributes:
        group: columns of a block; None for whole rows.
        scale_dtype: in what magnitudes are stored.

    >>> grid = Residual()
    >>> salient = torch.tensor([0, 1], dtype=torch.uint8)
    >>> params = {"magnitudes": torch.tensor([[1.0, 3.0, 0.5, 5.0]]), "salient": salient}
    >>> grid.decode(grid.encode(torch.tensor([[-2.5, 0.2]]), params), params)
    tensor([[-3.0000,  0.5000]])
    """

    group: int | None = 128
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)

    @property
    def bits(self) -> int:
        """Width of a code as it is written."""
        return 2

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes: ``magnitudes`` are the smaller and the larger one of plain columns, then
        those of salient ones."""
        return {
            "magnitudes": Stored((4,), self.scale_dtype),
            "salient": Stored(("inputs",), torch.uint8, shared=True),
        }

    def shared(self, weight: Tensor) -> Params:
        """Refused: see `fit`."""
        raise Error("which columns are salient is found from the inputs of a layer: use quantize.billm")

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """Refused: values alone do not say which columns are salient."""
        raise Error("which columns are salient is found from the inputs of a layer: use quantize.billm")

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``; ``params["salient"]`` broadcasts to it."""
        salient = params["salient"] != 0
        pairs = params["magnitudes"].unflatten(-1, (2, 2)).mean(-1)
        middle = torch.where(salient, pairs[..., 1:], pairs[..., :1])
        large = (values.abs() > middle).to(torch.uint8)
        return large * LARGE + (values >= 0).to(torch.uint8) * POSITIVE + salient.to(torch.uint8) * SALIENT

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the magnitudes."""
        size = looked_up((codes & LARGE) + 2 * (codes & SALIENT != 0), params["magnitudes"])
        return torch.where(codes & POSITIVE != 0, size, -size)

    def words(self, inputs: int) -> int:
        """int32 words of a row."""
        return packed_width(inputs, 2)

    def packed(self, codes: Tensor, params: Params) -> Tensor:
        """int32 ``[out, words]`` of codes ``[out, in]``."""
        return pack(codes & (LARGE | POSITIVE), 2)

    def unpacked(self, packed: Tensor, inputs: int, params: Params) -> Tensor:
        """uint8 ``[out, in]``."""
        return unpack(packed, 2, inputs) + (params["salient"] != 0).to(torch.uint8) * SALIENT
