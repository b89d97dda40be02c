"""The two points around every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.quantize import fitted
from weightsmith.quantize._neighbours import TIE, neighbours, reach
from weightsmith.quantize.grids import Integer, Stored, named

GRIDS = [
    Integer(bits=3),
    Integer(bits=2, group=4, symmetric=False),
    Integer(bits=3, group=5, symmetric=False, zero="float"),
    Integer(bits=3, group=4, span="narrow"),
    Integer(bits=3, group=4, span="signed"),
    Integer(bits=1),
    Integer(bits=4, per_tensor=True),
    *(named(word, group=6) for word in ("nf4", "fp4", "fp8", "mxfp4", "mxint8", "nvfp4", "sign", "ternary", "power")),
    named("bitmod", bits=3, group=6),
]


def points_of(grid: Any, own: Any) -> Tensor:
    """All that are used, from low to high."""
    points = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8)[None], own)[0]
    ends = grid.decode(grid.encode(torch.tensor([[-1e9, 1e9]]), own), own)[0].sort().values
    return points[(points >= ends[0]) & (points <= ends[1])].unique()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_they_are_the_next_points_on_both_sides(grid: Any):
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    rows[0] = 0  # says nothing of an order
    params = fitted(rows, grid)
    params = {name: value * 0.8 if name == "scale" else value for name, value in params.items()}  # some lie beyond
    found = neighbours(rows, grid, params)
    least, most = reach(rows, grid, params, grid.shared(rows))
    size = grid.group or 12
    shared = grid.shared(rows)
    for row in range(5):
        for place in range(12):
            group = place // size
            own = {**shared, **{name: value[row : row + 1, group] for name, value in params.items()}}
            points = points_of(grid, own)
            weight = rows[row, place]
            below, above = points[points <= weight], points[points > weight]
            low, high = found.low[row, place], found.high[row, place]
            assert low == (below.max() if len(below) else points.min())
            assert high == (above.min() if len(above) else points.max())
            for code, value in ((found.below, low), (found.above, high)):
                assert grid.decode(code[row, place].reshape(1, 1), own) == value
            if len(points) > 1 and params:  # where the tensor has one step, so has the reach
                torch.testing.assert_close(least[row, group], points[0] - (points[1] - points[0]) / 2)
                torch.testing.assert_close(most[row, group], points[-1] + (points[-1] - points[-2]) / 2)


def test_shares_and_choices():
    rows = torch.tensor([[0.25, -0.5, 1.0, 9.0]])
    found = neighbours(rows, Integer(bits=2), {"scale": torch.ones(1, 1)})
    torch.testing.assert_close(found.share(rows)[0, ::2], torch.tensor([0.25, TIE]))  # has a slope there
    assert 0 < found.share(rows)[0, 1] - 0.5 < 1e-3  # the nearest even code is above
    assert found.chosen(torch.tensor([[True, False, True, True]])).values().tolist() == [[1.0, -1.0, 1.0, 1.0]]


@dataclass(frozen=True)
class Shuffled:
    """Points whose codes have no order."""

    bits: int = 2
    group: int | None = None
    points = (0.0, 2.0, -1.0, 1.0)

    def stored(self) -> dict[str, Stored]:
        return {}

    def shared(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def fit(self, values: Tensor, shared: Any = None, **_: Any) -> dict[str, Tensor]:
        return {}

    def encode(self, values: Tensor, params: Any) -> Tensor:
        return (values[..., None] - torch.tensor(self.points)).abs().argmin(-1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Any) -> Tensor:
        return torch.tensor(self.points)[codes.long()]


def test_codes_need_not_follow_the_order_of_points():
    rows = torch.tensor([[-3.0, -0.4, 0.3], [1.2, 2.0, 5.0]])
    found = neighbours(rows, Shuffled(), {})
    assert found.low.tolist() == [[-1, -1, 0], [1, 2, 2]]
    assert found.high.tolist() == [[-1, 0, 1], [2, 2, 2]]
    assert found.below.tolist() == [[2, 2, 0], [3, 1, 1]]


def test_nothing():
    grid = Integer(bits=2, group=4)
    for shape in ((0, 4), (3, 0)):
        rows = torch.zeros(shape)
        assert neighbours(rows, grid, fitted(rows, grid)).low.shape == shape
