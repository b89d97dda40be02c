"""Round to nearest, against a loop written from the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._parts import decode
from weightsmith.quantize._rtn import rtn


def by_hand(weight: Tensor, bits: int, group: int) -> tuple[list[list[int]], list[list[float]]]:
    """With numpy-like half-to-even rounding, as IEEE and torch do."""
    codes, scales = [], []
    for row in weight.flatten(1).tolist():
        runs = [row[i : i + group] for i in range(0, len(row), group)]
        steps = [2 * max(map(abs, run)) / (2**bits - 1) or 1.0 for run in runs]
        scales.append(steps)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes.append([min(max(round(w / s), low), high) for run, s in zip(runs, steps, strict=True) for w in run])
    return codes, scales


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 4, 12])
@pytest.mark.parametrize("shape", [(5, 12), (3, 2, 6), (1, 24)])
def test_the_formula(shape: tuple[int, ...], group: int | None, bits: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    codes, scale = rtn(weight, bits=bits, group=group)
    inputs = weight[0].numel()
    expected_codes, expected_scale = by_hand(weight, bits, group or inputs)
    assert codes.dtype == torch.int8
    assert codes.shape == (shape[0], inputs)
    assert scale.shape == (shape[0], inputs // (group or inputs))
    torch.testing.assert_close(scale, torch.tensor(expected_scale))
    # The largest of a group lies halfway beyond the last code: which way it is rounded hangs on the last bit.
    assert (codes - torch.tensor(expected_codes)).abs().sum() <= scale.numel()


def test_codes_where_nothing_hangs_on_the_last_bit():
    weight = torch.tensor([[7.5, 3.2, -3.8, 0.4, -0.6, 2.5, 3.5, -7.5]])
    codes, scale = rtn(weight, bits=4)
    assert scale.tolist() == [[1]]
    assert codes.tolist() == [[7, 3, -4, 0, -1, 2, 4, -8]]  # 2.5 and 3.5 go to the even neighbour


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_weight_moves_by_more_than_half_a_step(bits: int):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    codes, scale = rtn(weight, bits=bits, group=16)
    step = scale.repeat_interleave(16, dim=1)
    assert ((decode(codes, scale) - weight).abs() <= step * 0.50001).all()
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1


def test_more_bits_and_smaller_groups_are_nearer():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))

    def error(**options: int) -> float:
        return float((decode(*rtn(weight, **options)) - weight).square().mean())

    by_bits = [error(bits=bits) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[0] > 1000 * by_bits[-1]
    by_group = [error(bits=4, group=group) for group in (256, 64, 16, 4)]
    assert by_group == sorted(by_group, reverse=True)


def test_values_on_the_grid_come_back_exactly():
    on_grid = torch.tensor([[-7.5, 3.0, 0.0, 7.0, -1.0, 5.0]]) * 0.25
    found, scale = rtn(on_grid, bits=4)
    assert scale.item() == 0.25
    assert torch.equal(decode(found, scale)[0, 1:], on_grid[0, 1:])  # -7.5 itself lies between two codes


def test_zeros_stay_zeros():
    codes, scale = rtn(torch.zeros(2, 4))
    assert torch.equal(decode(codes, scale), torch.zeros(2, 4))


def test_the_codes_fit_the_scale_that_is_stored():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    codes, scale = rtn(weight, scale_dtype=torch.bfloat16)
    assert torch.equal(scale, scale.bfloat16().float())
    step = scale.expand_as(weight)
    inside = weight.abs() < 7 * step
    assert ((decode(codes, scale) - weight).abs() <= 0.50001 * step)[inside].all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (5,), (1, 1), (0, 2, 2)])
def test_shapes_at_the_edge(shape: tuple[int, ...]):
    codes, scale = rtn(torch.ones(shape))
    inputs = torch.Size(shape[1:]).numel()
    assert codes.shape == (shape[0], inputs)
    assert scale.shape == (shape[0], 1)
    expected = torch.full((shape[0], inputs), 14 / 15)  # 7.5 steps of 2/15 make one, and 7 is the last code
    torch.testing.assert_close(decode(codes, scale), expected)


def test_refusals():
    with pytest.raises(Error, match="bits must be a whole number from 2 to 8, got 1"):
        rtn(torch.ones(2, 4), bits=1)
    with pytest.raises(Error, match="groups of 3 do not fill a row of 4 inputs"):
        rtn(torch.ones(2, 4), group=3)
    with pytest.raises(Error, match="not finite"):
        rtn(torch.tensor([[1.0, float("nan")]]))
