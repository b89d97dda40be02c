"""Points that lie where the weights are: a table for each group, each row or the whole tensor.

The points are the centres that leave the least squared error, found by letting them and the weights that are nearest
to each take turns, all groups at once. On sorted values a turn is a look-up in running sums.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    looked_up,
    nearest,
    weighted,
)

TURNS = 50  # at most; most groups stand still after ten to thirty
AT_ONCE = 2**22  # weights that are clustered at once, with some 50 bytes each


@dataclass(frozen=True)
class Levels:
    r"""Codes of a table that was fitted to the weights.

    .. math:: w \approx \ell_q, \qquad \ell = \operatorname{arg\,min} \sum_i h_i \min_q (w_i - \ell_q)^2

    with :math:`h` the importance of each weight, 1 by default. Started from quantiles of the weights, from those of the
    cube root of their density and from even spacing; the best of the three is kept.

    Attributes:
        bits: width of a code, from 1 to 8; the table has ``2**bits`` levels.
        group: inputs that share a table; None for whole rows.
        per_tensor: one table for the whole tensor; ``group`` is then None.
        scale_dtype: in what levels are stored.

    >>> grid = Levels(bits=1)
    >>> params = grid.fit(torch.tensor([[0.0, 1.0, 5.0, 6.0, 7.0]]))
    >>> params["levels"]
    tensor([[0.5000, 6.0000]])
    >>> grid.encode(torch.tensor([[2.0, 4.0]]), params)
    tensor([[0, 1]], dtype=torch.uint8)
    """

    bits: int = 4
    group: int | None = None
    per_tensor: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group(self.group)
        check_scale_dtype(self.scale_dtype)
        if self.per_tensor and self.group is not None:
            raise Error(f"per_tensor=True has one table for all, so group={self.group} does not go with it")

    def stored(self) -> dict[str, Stored]:
        """What is written beside the codes."""
        return {"levels": Stored((2**self.bits,), self.scale_dtype, shared=self.per_tensor)}

    def shared(self, weight: Tensor) -> Params:
        """The table of the whole tensor, if it has one."""
        return self._fit(weight.flatten()) if self.per_tensor else {}

    def fit(
        self,
        values: Tensor,
        shared: Params | None = None,
        *,
        shrink: float | Tensor = 1.0,
        importance: Tensor | None = None,
    ) -> Params:
        """``levels [..., 2**bits]``, from low to high."""
        return {} if self.per_tensor else self._fit(values, shrink, importance)

    def _fit(self, values: Tensor, shrink: float | Tensor = 1.0, importance: Tensor | None = None) -> dict[str, Tensor]:
        check_values(values)
        if isinstance(shrink, Tensor) or shrink != 1.0:
            most = (values.abs().amax(-1) * shrink).unsqueeze(-1) if values.shape[-1] else values
            values = values.clamp(-most, most)
        levels = centres(values, 2**self.bits, importance)
        return {"levels": held(levels, self.scale_dtype, "levels")}

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest code of each value: uint8 of the shape of ``values``."""
        return nearest(values, params["levels"])

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values of codes, in the dtype of the levels."""
        return looked_up(codes, params["levels"])


def centres(values: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """The points nearest to the values of each group, in squared error: k-means along a line.

    Args:
        values: ``[..., n]``, finite; each group is clustered on its own.
        count: of points.
        importance: at least 0, broadcasts to the values; a group of zeros counts all alike.

    Returns:
        ``[..., count]`` from low to high, in the dtype of the values. Where there are no more values than points, the
        values themselves.

    Raises:
        Error: importance that is negative or not finite.

    >>> centres(torch.tensor([0.0, 1.0, 5.0, 7.0]), 2, torch.tensor([1.0, 3.0, 1.0, 1.0]))
    tensor([0.7500, 6.0000])
    """
    lead, size = values.shape[:-1], values.shape[-1]
    if not values.numel():
        return values.new_zeros(*lead, count)
    if importance is not None:
        importance = weighted(values, importance).reshape(lead.numel(), size)
    rows = values.reshape(lead.numel(), size)
    run = max(AT_ONCE // size, 1)
    found = [
        _centres(part, count, None if importance is None else importance[start : start + run])
        for start, part in zip(range(0, len(rows), run), rows.split(run), strict=True)
    ]
    return torch.cat(found).to(values.dtype).reshape(*lead, count)


def _centres(rows: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """``[groups, n]`` to ``[groups, count]``, float64."""
    rows, order = rows.double().contiguous().sort(-1)
    size = rows.shape[1]
    if size <= count:
        return torch.cat([rows, rows[:, -1:].expand(-1, count - size)], 1)
    heed = torch.ones_like(rows) if importance is None else importance.double().gather(1, order)
    middle = (rows[:, :1] + rows[:, -1:]) / 2
    rows = rows - middle  # squares of what is far from zero would cancel
    sums = torch.nn.functional.pad(torch.stack([heed, heed * rows, heed * rows.square()]).cumsum(-1), (1, 0))
    part = (torch.arange(count, device=rows.device, dtype=rows.dtype) + 0.5) / count
    # Of many levels the density is best the cube root of that of the values: h^(1/3) over a gap^(1/3), times the gap.
    gaps = rows.diff(dim=1, prepend=rows[:, :1])
    crowd = (heed.pow(1 / 3) * gaps.pow(2 / 3)).cumsum(1)
    best, least = _settled(rows, sums, _quantiles(rows, sums[0, :, 1:], part))
    for start in (_quantiles(rows, crowd, part), torch.lerp(rows[:, :1], rows[:, -1:], part)):
        other, error = _settled(rows, sums, start)
        best = torch.where((error < least).unsqueeze(1), other, best)
        least = torch.minimum(error, least)
    return best + middle


def _quantiles(rows: Tensor, mass: Tensor, part: Tensor) -> Tensor:
    """The values at which running sums reach some parts of their last."""
    place = torch.searchsorted(mass.contiguous(), part * mass[:, -1:])
    return rows.gather(1, place.clamp(max=rows.shape[1] - 1))


def _settled(rows: Tensor, sums: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels that stand still, and their errors ``[groups]``.

    ``sums [3, groups, n + 1]``: running sums of 1, w and w^2, weighted. Groups that stand still are left out of later
    turns, as soon as they are half of those that are looked at.
    """
    found, own, here, those = levels.clone(), rows, sums, torch.arange(len(rows), device=rows.device)
    for _ in range(TURNS):
        weight, first, _second = _cells(own, here, levels)
        moved = torch.where(weight > 0, first / weight.clamp(min=torch.finfo(weight.dtype).tiny), levels)
        moving = (moved != levels).any(1)
        levels, left = moved, int(moving.sum())
        if not left:
            break
        if 2 * left <= len(levels):
            found[those] = levels
            own, here, those, levels = own[moving], here[:, moving], those[moving], levels[moving]
    found[those] = levels
    weight, first, second = _cells(rows, sums, found)
    return found, (second - 2 * found * first + found.square() * weight).sum(-1)


def _cells(rows: Tensor, sums: Tensor, levels: Tensor) -> Tensor:
    """Sums of 1, w and w^2, weighted, of what is nearest to each level: ``[3, groups, levels]``."""
    none = rows.new_zeros(len(rows), 1, dtype=torch.long)
    places = torch.searchsorted(rows, (levels[:, 1:] + levels[:, :-1]) / 2)
    ends = torch.cat([none, places, torch.full_like(none, rows.shape[1])], 1)
    return sums.gather(-1, ends.expand(3, *ends.shape)).diff(dim=-1)
