"""Round to nearest, against a loop written from the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith import quantize
from weightsmith.errors import Error
from weightsmith.quantize import Coded
from weightsmith.quantize.grids import Integer


def rtn(weight: Tensor, **options: Any) -> Coded:
    return quantize.rtn(weight, **options)


def signed(found: Coded) -> tuple[Tensor, Tensor]:
    """Codes around zero, and steps."""
    return found.codes.int() - 2 ** (found.grid.bits - 1), found.params["scale"]


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
    codes, scale = signed(rtn(weight, bits=bits, group=group))
    inputs = weight[0].numel()
    expected_codes, expected_scale = by_hand(weight, bits, group or inputs)
    assert codes.shape == (shape[0], inputs)
    assert scale.shape == (shape[0], inputs // (group or inputs))
    torch.testing.assert_close(scale, torch.tensor(expected_scale))
    # The largest of a group lies halfway beyond the last code: which way it is rounded hangs on the last bit.
    assert (codes - torch.tensor(expected_codes)).abs().sum() <= scale.numel()


def test_codes_where_nothing_hangs_on_the_last_bit():
    weight = torch.tensor([[7.5, 3.2, -3.8, 0.4, -0.6, 2.5, 3.5, -7.5]])
    codes, scale = signed(rtn(weight, bits=4))
    assert scale.tolist() == [[1]]
    assert codes.tolist() == [[7, 3, -4, 0, -1, 2, 4, -8]]  # 2.5 and 3.5 go to the even neighbour


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_weight_moves_by_more_than_half_a_step(bits: int):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    codes, scale = signed(rtn(weight, bits=bits, group=16))
    step = scale.repeat_interleave(16, dim=1)
    assert ((rtn(weight, bits=bits, group=16).values() - weight).abs() <= step * 0.50001).all()
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1


def test_more_bits_and_smaller_groups_are_nearer():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))

    def error(**options: int) -> float:
        return float((rtn(weight, **options).values() - weight).square().mean())

    by_bits = [error(bits=bits) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[0] > 1000 * by_bits[-1]
    by_group = [error(bits=4, group=group) for group in (256, 64, 16, 4)]
    assert by_group == sorted(by_group, reverse=True)


def test_values_on_the_grid_come_back_exactly():
    on_grid = torch.tensor([[-7.5, 3.0, 0.0, 7.0, -1.0, 5.0]]) * 0.25
    found = rtn(on_grid, bits=4)
    assert found.params["scale"].item() == 0.25
    assert torch.equal(found.values()[0, 1:], on_grid[0, 1:])  # -7.5 itself lies between two codes


def test_zeros_stay_zeros():
    assert torch.equal(rtn(torch.zeros(2, 4)).values(), torch.zeros(2, 4))


def test_the_codes_fit_the_scale_that_is_stored():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    codes, scale = signed(rtn(weight, scale_dtype=torch.bfloat16))
    assert torch.equal(scale, scale.bfloat16().float())
    step = scale.expand_as(weight)
    inside = weight.abs() < 7 * step
    assert (((codes * scale) - weight).abs() <= 0.50001 * step)[inside].all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (5,), (1, 1), (0, 2, 2)])
def test_shapes_at_the_edge(shape: tuple[int, ...]):
    codes, scale = signed(rtn(torch.ones(shape)))
    inputs = torch.Size(shape[1:]).numel()
    assert codes.shape == (shape[0], inputs)
    assert scale.shape == (shape[0], 1)
    expected = torch.full((shape[0], inputs), 14 / 15)  # 7.5 steps of 2/15 make one, and 7 is the last code
    torch.testing.assert_close(codes * scale, expected)


def test_narrower_ranges_are_taken_where_they_leave_less_error():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)).pow(3)
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(6)) * torch.linspace(0.1, 2, 64)
    gram = rows.T @ rows
    for grid in (Integer(2, 16), Integer(3, 16, symmetric=False)):
        plain, clipped = quantize.rtn(weight, grid=grid), quantize.rtn(weight, grid=grid, clip=8)
        by_outputs = quantize.rtn(weight, gram, grid=grid, clip=8)

        def error(found: Coded) -> Tensor:
            return (found.values() - weight).square().unflatten(1, (4, 16)).sum(-1)

        assert (error(clipped) <= error(plain) + 1e-6).all()
        assert error(clipped).sum() < 0.95 * error(plain).sum()
        blocks = torch.stack([gram[i : i + 16, i : i + 16] for i in range(0, 64, 16)])
        errors = [
            torch.einsum("rgi,gij,rgj->rg", e, blocks, e)
            for e in ((found.values() - weight).unflatten(1, (4, 16)) for found in (plain, clipped, by_outputs))
        ]
        assert (errors[2] <= torch.minimum(*errors[:2]) * (1 + 1e-4) + 1e-4).all()
        assert torch.equal(
            quantize.rtn(weight, gram.diagonal(), grid=grid, clip=8).codes,
            quantize.rtn(weight, torch.diag(gram.diagonal()), grid=grid, clip=8).codes,
        )
        assert torch.equal(quantize.rtn(weight, blocks, grid=grid, clip=8).codes, by_outputs.codes)


def test_refusals():
    with pytest.raises(Error, match="bits must be a whole number from 1 to 8, got 0"):
        rtn(torch.ones(2, 4), bits=0)
    with pytest.raises(Error, match="not finite"):
        rtn(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(Error, match="needs a Gram matrix"):
        quantize.rtn(torch.ones(2, 4), torch.eye(3), clip=2)


def test_a_last_group_may_be_shorter():
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(7))
    found = rtn(weight, group=4)
    assert found.params["scale"].shape == (3, 3)
    pieces = [rtn(weight[:, i : i + 4]).values() for i in (0, 4, 8)]
    assert torch.equal(found.values(), torch.cat(pieces, 1))
