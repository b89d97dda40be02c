"""Two bits for most groups of a row and four for a few, as many in every row.

A group of wide range loses most to two bits. With as many such groups in each row all rows are equally long, so that
they can be read side by side. Scales are themselves whole numbers of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.quantize._parts import pack, packed_width, unpack
from weightsmith.quantize.grids._grid import Params, Stored, check_group, check_values, stepped

FINE = 16  # what is added to the zero point of a group of 4 bits
FINEST = 255  # steps of a group's scale


@dataclass(frozen=True)
class TwoFour:
    r"""Codes of two bits, or of four in some groups: :math:`w \approx u\,f\,(q - z)`.

    Attributes:
        group: inputs that share a scale and a width.
        share: of the groups of a row that have 4 bits, from 0 to 1.
        multiple: their count in a row is a multiple of this.

    >>> grid, runs = TwoFour(group=4, share=0.5), torch.tensor([[[0.0, 1.0, 2.0, 2.6], [-7.0, 8.0, 0.4, 1.0]]])
    >>> params, shared = grid.ranges(runs, torch.tensor([[False, True]]))
    >>> grid.encode(runs, {**params, **shared})
    tensor([[[ 0,  1,  2,  3],
             [ 0, 15,  7,  8]]], dtype=torch.uint8)
    """

    group: int | None = 32
    share: float = 0.1
    multiple: int = 1

    def __post_init__(self) -> None:
        check_group(self.group)
        if not 0 <= self.share <= 1 or not isinstance(self.multiple, int) or self.multiple < 1:
            raise Error(
                f"share lies between 0 and 1 and multiple is a whole number above 0, got {self.share!r} and "
                f"{self.multiple!r}"
            )

    @property
    def bits(self) -> int:
        """Width of most codes as they are written."""
        return 2

    def size(self, inputs: int) -> int:
        """Inputs of a group."""
        return max(self.group or inputs, 1)

    def count(self, inputs: int) -> int:
        """Groups of 4 bits in a row of so many inputs.

        >>> TwoFour(group=32, share=0.1, multiple=2).count(1024)
        4
        """
        groups = -(-inputs // self.size(inputs))
        return min(round(self.share * groups / self.multiple) * self.multiple, groups)

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes: ``zero_point`` also says which groups have 4 bits (`FINE` more)."""
        return {
            "factor": Stored((), torch.uint8),
            "zero_point": Stored((), torch.uint8),
            "unit": Stored((), torch.float32, shared=True),
        }

    def shared(self, weight: Tensor) -> Params:
        """Refused: see `fit`."""
        raise Error("which groups have 4 bits is found among those of a row: use quantize.two_four")

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """Refused: one group alone does not say how many bits it has."""
        raise Error("which groups have 4 bits is found among those of a row: use quantize.two_four")

    def ranges(self, runs: Tensor, fine: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters of groups, and those of the tensor.

        Args:
            runs: ``[..., n]``, the values of each group, float32 or float64.
            fine: ``[...]`` boolean, which groups have 4 bits.
        """
        check_values(runs)
        low, high = torch.aminmax(runs, dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        points = torch.where(fine, 15.0, 3.0).to(runs.dtype)
        step = (high - low) / points
        most = step.amax() if step.numel() else step.new_zeros(())
        unit = stepped(most / FINEST, torch.float32)
        factor = (step / unit).ceil().clamp(1, FINEST)  # so that the whole range is held
        zero = (-low / (factor * unit)).round().clamp_(min=0)
        zero = torch.minimum(zero, points) + FINE * fine
        return {"factor": factor.to(torch.uint8), "zero_point": zero.to(torch.uint8)}, {"unit": unit}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``, up to 3 or 15."""
        zero, most = _zero(params)
        codes = (values / _step(params)).round_().add_(zero.to(values.dtype))
        return torch.minimum(codes.clamp_(min=0), most.to(values.dtype)).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the unit."""
        step = _step(params)
        return (codes.to(step.dtype) - _zero(params)[0].to(step.dtype)) * step

    def words(self, inputs: int) -> int:
        """int32 words of a row: two bits of every code, then the upper two of those that have four."""
        return packed_width(inputs, 2) + packed_width(self.count(inputs) * self.size(inputs), 2)

    def packed(self, codes: Tensor, params: Params) -> Tensor:
        """int32 ``[out, words]`` of codes ``[out, in]``."""
        inputs = codes.shape[1]
        chosen = self._chosen(params["zero_point"], inputs)
        upper = torch.zeros(*params["zero_point"].shape, self.size(inputs), dtype=torch.uint8, device=codes.device)
        upper.flatten(1)[:, :inputs] = codes >> 2
        taken = upper.gather(1, chosen.unsqueeze(-1).expand(-1, -1, upper.shape[-1])).flatten(1)
        return torch.cat([pack(codes & 3, 2), pack(taken, 2)], 1)

    def unpacked(self, packed: Tensor, inputs: int, params: Params) -> Tensor:
        """uint8 ``[out, in]``."""
        chosen = self._chosen(params["zero_point"], inputs)
        first = packed_width(inputs, 2)
        size = self.size(inputs)
        lower = unpack(packed[:, :first].contiguous(), 2, inputs)
        taken = unpack(packed[:, first:].contiguous(), 2, chosen.shape[1] * size).unflatten(1, (chosen.shape[1], size))
        upper = torch.zeros(*params["zero_point"].shape, size, dtype=torch.uint8, device=packed.device)
        upper.scatter_(1, chosen.unsqueeze(-1).expand(-1, -1, size), taken)
        return lower | (upper.flatten(1)[:, :inputs] << 2)

    def _chosen(self, zero_point: Tensor, inputs: int) -> Tensor:
        """``[out, count]``, the groups of 4 bits."""
        fine = zero_point >= FINE
        count = self.count(inputs)
        if not bool((fine.sum(1) == count).all()):
            raise FormatError(f"every row has {count} groups of 4 bits on this grid, but here are rows that have not")
        return fine.nonzero()[:, 1].reshape(len(fine), count)


def _zero(params: Params) -> tuple[Tensor, Tensor]:
    """The zero point and the largest code, ``[..., 1]``, int16."""
    said = params["zero_point"].to(torch.int16).unsqueeze(-1)
    fine = said >= FINE
    return said - FINE * fine, torch.where(fine, 15, 3)


def _step(params: Params) -> Tensor:
    return (params["factor"].to(params["unit"].dtype) * params["unit"]).unsqueeze(-1)
