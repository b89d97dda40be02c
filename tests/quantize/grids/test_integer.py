"""Evenly spaced points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids import Integer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(grid: Integer, values: Tensor) -> Tensor:
    params = {**grid.shared(values), **grid.fit(values)}
    return grid.decode(grid.encode(values, params), params)


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_grids_by_hand(bits: int):
    values = normal(8, 20, seed=bits) + 0.4
    for row, found in zip(values.tolist(), made(Integer(bits, symmetric=False), values).tolist(), strict=True):
        low, high = min(*row, 0.0), max(*row, 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        assert found == pytest.approx(
            [(min(max(round(v / step) + zero, 0), 2**bits - 1) - zero) * step for v in row], abs=1e-5
        )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grids_from_the_smallest_to_the_largest(bits: int):
    values = normal(8, 20, seed=bits) + 5
    found = made(Integer(bits, symmetric=False, zero="float"), values)
    torch.testing.assert_close(found.amin(1), values.amin(1))
    torch.testing.assert_close(found.amax(1), values.amax(1))
    step = (values.amax(1) - values.amin(1)) / (2**bits - 1)
    assert ((found - values).abs() <= step.unsqueeze(1) / 2 * 1.0001).all()


def test_zero_is_exact_where_it_is_a_code():
    values = torch.cat([normal(5, 9), torch.zeros(5, 1)], 1)
    for grid in (Integer(3, symmetric=False), Integer(3), Integer(3, span="narrow"), Integer(3, span="signed")):
        assert not made(grid, values)[:, -1].any()


def test_spans():
    values = torch.tensor([[8.0, -3.0, 1.0]])
    assert made(Integer(4, span="narrow"), values)[0, 0].item() == pytest.approx(8.0)
    signed = Integer(4, span="signed")
    assert signed.fit(values)["scale"].item() == -1.0  # the lowest code stands for the largest value
    assert made(signed, values).tolist() == [[8, -3, 1]]
    assert made(signed, -values).tolist() == [[-8, 3, -1]]
    assert Integer(4).fit(values)["scale"].item() == pytest.approx(8 / 7.5)


def test_a_smallest_value_that_its_dtype_cannot_hold():
    grid = Integer(4, symmetric=False, zero="float", scale_dtype=torch.float16)
    for sign in (1, -1):
        with pytest.raises(Error, match="too large for a smallest value in float16"):
            grid.fit(sign * torch.tensor([[1e5, 1e5 + 8]]))


def test_a_grid_of_the_tensor():
    values = normal(4, 10)
    grid = Integer(4, per_tensor=True)
    assert grid.fit(values) == {}
    assert grid.shared(values)["scale"].item() == pytest.approx(float(values.abs().max()) / 7.5)
    with pytest.raises(Error, match="one step for all"):
        Integer(4, 8, per_tensor=True)


def test_settings_that_there_are_not():
    with pytest.raises(Error, match="span is one of"):
        Integer(span="wide")  # type: ignore[arg-type]
    with pytest.raises(Error, match="1 bit has two points"):
        Integer(1, span="narrow")
