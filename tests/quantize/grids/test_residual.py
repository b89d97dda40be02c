"""Four points a row and block, one set for plain columns and one for salient ones."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.grids import Packing, Residual, described, restored

MAGNITUDES = torch.tensor([[1.0, 3.0, 0.5, 5.0]])
SALIENT = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.uint8)
VALUES = torch.tensor([[0.4, 0.4, -2.1, -2.1, 1.9, -9.0, -9.0]])


def test_each_column_has_its_points():
    params = {"magnitudes": MAGNITUDES, "salient": SALIENT}
    grid = Residual()
    codes = grid.encode(VALUES, params)
    assert grid.decode(codes, params).tolist() == [[1.0, 0.5, -3.0, -0.5, 1.0, -3.0, -5.0]]


def test_two_bits_are_written_and_the_column_tells_the_rest():
    params = {"magnitudes": MAGNITUDES, "salient": SALIENT}
    grid = Residual()
    codes = grid.encode(VALUES, params)
    packed = grid.packed(codes, params)
    assert isinstance(grid, Packing)
    assert packed.shape == (1, grid.words(7)) == (1, 1)
    assert torch.equal(grid.unpacked(packed, 7, params), codes)
    assert codes.max() > 3


def test_every_code_decodes():
    made = Residual().decode(torch.arange(8, dtype=torch.uint8).unsqueeze(0), {"magnitudes": MAGNITUDES})
    assert made.tolist() == [[-1, -3, 1, 3, -0.5, -5, 0.5, 5]]


def test_other_roundings_are_refused():
    for call in (lambda: Residual().fit(torch.ones(1, 32)), lambda: Residual().shared(torch.ones(1, 32))):
        with pytest.raises(Error, match=r"use quantize\.billm"):
            call()
    assert restored(described(Residual(64))) == Residual(64)
