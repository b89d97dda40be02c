"""Two bits, and four in some groups: codes and how they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.quantize._parts import packed_width
from weightsmith.quantize.grids import Packing, TwoFour, described, restored


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(rows: int, groups: int, count: int, seed: int = 0) -> Tensor:
    order = torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < count


def test_points_by_hand():
    grid, values = TwoFour(8), normal(6, 5, 8)
    fine = chosen(6, 5, 2)
    params, shared = grid.ranges(values, fine)
    unit = float(shared["unit"])
    both = {**shared, **params}
    codes = grid.encode(values, both)
    made = grid.decode(codes, both)
    for i in range(6):
        for j in range(5):
            run, most = values[i, j].tolist(), 15 if fine[i, j] else 3
            low, high = min(*run, 0.0), max(*run, 0.0)
            step = unit * int(params["factor"][i, j])
            assert (high - low) / most <= step * (1 + 1e-5)
            assert step < (high - low) / most + unit * (1 + 1e-5)
            zero = min(round(-low / step), most)
            assert int(params["zero_point"][i, j]) == zero + (16 if fine[i, j] else 0)
            expected = [min(max(round(v / step) + zero, 0), most) for v in run]
            assert codes[i, j].tolist() == expected
            assert made[i, j].tolist() == pytest.approx([(code - zero) * step for code in expected], abs=1e-6)
    assert int(params["factor"].max()) == 255


def test_values_are_within_half_a_step():
    grid, values = TwoFour(16), normal(20, 4, 16)
    params, shared = grid.ranges(values, chosen(20, 4, 1))
    both = {**shared, **params}
    step = (params["factor"].float() * shared["unit"]).unsqueeze(-1)
    assert ((grid.decode(grid.encode(values, both), both) - values).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("inputs", [1, 24, 64, 70])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_codes_lie_as_many_bits_as_they_have(inputs: int, share: float):
    grid = TwoFour(8, share)
    groups = -(-inputs // 8)
    assert isinstance(grid, Packing)
    fine = chosen(5, groups, grid.count(inputs))
    params, shared = grid.ranges(normal(5, groups, 8), fine)
    codes = torch.randint(0, 16, (5, groups, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    codes = torch.where(fine.unsqueeze(-1), codes, codes & 3).flatten(1)[:, :inputs]
    packed = grid.packed(codes, {**shared, **params})
    assert packed.shape == (5, grid.words(inputs))
    assert packed.dtype == torch.int32
    assert grid.words(inputs) == packed_width(inputs, 2) + packed_width(8 * grid.count(inputs), 2)
    assert torch.equal(grid.unpacked(packed, inputs, {**shared, **params}), codes)


def test_the_count_is_a_multiple():
    assert [TwoFour(32, 0.1, multiple).count(1024) for multiple in (1, 2, 4, 8)] == [3, 4, 4, 0]
    assert TwoFour(32, 1.0, 3).count(64) == 2
    assert TwoFour(None, 1.0).count(77) == 1


def test_files_that_lie_about_the_count():
    grid = TwoFour(8, 0.5)
    params, shared = grid.ranges(normal(3, 4, 8), chosen(3, 4, 2))
    packed = torch.zeros(3, grid.words(32), dtype=torch.int32)
    params["zero_point"][1] = 17
    with pytest.raises(FormatError, match="every row has 2 groups"):
        grid.unpacked(packed, 32, {**shared, **params})


def test_other_roundings_are_refused():
    for call in (lambda: TwoFour().fit(torch.ones(1, 32)), lambda: TwoFour().shared(torch.ones(1, 32))):
        with pytest.raises(Error, match=r"use quantize\.two_four"):
            call()
    with pytest.raises(Error, match="share lies between"):
        TwoFour(share=1.5)
    assert restored(described(TwoFour(64, 0.2, 2))) == TwoFour(64, 0.2, 2)


def test_zeros():
    grid = TwoFour(8)
    params, shared = grid.ranges(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    both = {**shared, **params}
    assert not grid.decode(grid.encode(torch.zeros(2, 3, 8), both), both).any()
    values = normal(2, 3, 8)
    values[0, 1] = values[1, 2] = 0
    params, shared = grid.ranges(values, torch.zeros(2, 3, dtype=torch.bool))
    assert params["factor"].min() == 1  # a step of zero divides by zero
    made = grid.decode(grid.encode(values, {**shared, **params}), {**shared, **params})
    assert made.isfinite().all()
    assert not made[0, 1].any()
