"""Sliders between two points: against all choices, by the slope of the loss, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize._posed import best_of_all, posed
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize import _adaround, adaround, fitted, output_error, rtn
from weightsmith.quantize._adaround import Adam, inverse_slid, pulled, slid, steady
from weightsmith.quantize._neighbours import neighbours
from weightsmith.quantize.grids import Integer, named

GRID = Integer(bits=2, symmetric=False)


def test_near_the_best_of_all_choices():
    ratios, of_nearest = [], []
    for seed in range(12):
        weight, gram = posed(seed)
        best = best_of_all(weight, gram, GRID)
        found = float(output_error(weight, adaround(weight, gram, grid=GRID, damp=0, steps=300).values(), gram))
        nearest = float(output_error(weight, rtn(weight, grid=GRID).values(), gram))
        assert best * (1 - 1e-4) <= found <= nearest * (1 + 1e-5)
        ratios.append(found / best)
        of_nearest.append(nearest / best)
    assert torch.tensor(ratios).median() < 1.05
    assert torch.tensor(ratios).log().mean().exp() < 1.2 < 1.4 < torch.tensor(of_nearest).log().mean().exp()


def test_every_weight_has_one_of_its_two_neighbours():
    weight, gram = posed(3, rows=6, inputs=16)
    grid = Integer(bits=3, group=8, symmetric=False)
    found = adaround(weight, gram, grid=grid, steps=60).values()
    around = neighbours(weight, grid, fitted(weight, grid))
    assert ((found == around.low) | (found == around.high)).all()
    assert not torch.equal(found, rtn(weight, grid=grid).values())


@pytest.mark.parametrize("diagonal", [torch.rand(10) + 0.1, torch.diag(torch.rand(10) + 0.1)])
def test_inputs_that_have_nothing_to_do_with_each_other_leave_nearest(diagonal: Tensor):
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adaround(weight, diagonal, grid=GRID).codes, rtn(weight, grid=GRID).codes)


@pytest.mark.parametrize(
    "grid",
    [named("nf4", group=8), Integer(bits=3, span="signed"), Integer(bits=2, zero="float", symmetric=False)],
    ids=str,
)
def test_any_grid_with_an_order(grid: Any):
    weight, gram = posed(1, rows=8, inputs=16)
    found = output_error(weight, adaround(weight, gram, grid=grid, damp=0, steps=200).values(), gram)
    assert found < 0.9 * output_error(weight, rtn(weight, grid=grid).values(), gram)


def test_slopes():
    slider = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    soft = (slider.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    value, slope = slid(slider.detach())
    torch.testing.assert_close(value, soft.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(soft.sum(), slider)[0])
    inside = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(slid(inverse_slid(inside))[0], inside)
    inside = torch.linspace(0.01, 0.93, 12, dtype=torch.float64, requires_grad=True)
    for beta in (2.0, 3.5, 20.0):
        (expected,) = torch.autograd.grad((1 - (2 * inside - 1).abs() ** beta).sum(), inside)
        torch.testing.assert_close(pulled(inside.detach(), beta), expected)


def test_every_step_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch):
    """Against autograd, where the sliders stand; nothing pulls in the first fifth of the steps."""
    seen: list[tuple[Tensor, Tensor, float]] = []

    class Noted(Adam):
        def step(self, gradient: Tensor, factor: float = 1.0) -> None:
            seen.append((self.value.clone(), gradient.clone(), factor))
            super().step(gradient, factor)

    monkeypatch.setattr(_adaround, "Adam", Noted)
    weight, gram = posed(5, rows=3, inputs=6)
    weight, gram = weight.double(), gram.double()
    adaround(weight, gram, grid=GRID, steps=10, damp=0, pull=7, beta=(5.0, 3.0), lr=0.2)
    around = neighbours(weight, GRID, fitted(weight, GRID))
    nearest = rtn(weight, grid=GRID).values() - weight
    usual = ((nearest @ gram) * nearest).sum(1)
    assert len(seen) == 10
    for step, (value, gradient, factor) in enumerate(seen):
        slider = value.requires_grad_()
        soft = (slider.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        error = around.low + soft * (around.high - around.low) - weight
        loss = (((error @ gram) * error).sum(1) / usual).sum()
        if step >= 2:
            loss = loss + 7 * (1 - (2 * soft - 1).abs() ** (5 - 2 * (step - 2) / 8)).mean(1).sum()
        inside = (soft > 0) & (soft < 1) & (around.high > around.low)
        (expected,) = torch.autograd.grad(loss, slider)
        torch.testing.assert_close(gradient, expected * inside)
        assert factor == 1 - step / 10


def test_adam_is_that_of_pytorch():
    value = torch.randn(5, generator=torch.Generator().manual_seed(0))
    other = value.clone().requires_grad_()
    mine, theirs = Adam(value, 0.1), torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for step in range(5):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step))
        other.grad = gradient.clone()
        theirs.step()
        mine.step(gradient)
    torch.testing.assert_close(value, other.detach())


def test_blocks_and_rows_are_problems_of_their_own():
    weight, gram = posed(2, rows=4, inputs=12)
    blocks = torch.stack([gram[:6, :6], gram[6:, 6:]])
    whole = adaround(weight, torch.block_diag(*blocks), grid=GRID, steps=40)
    assert torch.equal(adaround(weight, blocks, grid=GRID, steps=40).codes, whole.codes)
    assert torch.equal(adaround(weight[1:2], torch.block_diag(*blocks), grid=GRID, steps=40).codes, whole.codes[1:2])


def test_gram_matrices_of_all_forms_are_steadied():
    diagonal = torch.rand(6, generator=torch.Generator().manual_seed(0))
    diagonal[1] = 0
    whole = steady(diagonal.diag(), 0.1, 0.5)
    torch.testing.assert_close(steady(diagonal, 0.1, 0.5), whole.diagonal())
    torch.testing.assert_close(steady(diagonal.diag()[None], 0.1, 0.5)[0], whole)
    assert whole.diagonal().min() > 0
    assert steady(torch.ones(5000), 0.5, 0.0).eq(1.5).all()


def test_what_overflows_stays_nearest():
    weight, gram = posed(2, rows=4, inputs=12)
    found = adaround(weight * 1e15, gram * 1e20, grid=GRID, steps=3)
    assert torch.equal(found.codes, rtn(weight * 1e15, grid=GRID).codes)


def test_scales_do_not_matter():
    """Errors of each row are measured in its own error of rounding to nearest."""
    weight, gram = posed(2, rows=4, inputs=12)
    usual = adaround(weight, gram, grid=GRID, steps=60)
    larger = weight * torch.tensor([1.0, 2.0**8, 1.0, 2.0**-8])[:, None]
    assert torch.equal(adaround(larger, gram * 2.0**20, grid=GRID, steps=60).codes, usual.codes)


def test_edges():
    weight, gram = posed(0, rows=3)
    before = weight.clone(), gram.clone()
    dead = gram.clone()
    dead[2], dead[:, 2] = 0, 0
    found = adaround(weight, dead, grid=GRID, steps=30)
    assert torch.equal(found.codes[:, 2], rtn(weight, grid=GRID).codes[:, 2])
    assert torch.equal(adaround(weight, torch.zeros(8, 8), grid=GRID).codes, rtn(weight, grid=GRID).codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    half = adaround(weight.bfloat16(), gram, grid=GRID, steps=5).values()
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert torch.equal(
        adaround(strided, gram, grid=GRID, steps=30).codes, adaround(weight, gram, grid=GRID, steps=30).codes
    )
    assert adaround(torch.zeros(2, 8), gram, grid=GRID, steps=3).values().abs().sum() == 0
    assert adaround(torch.zeros(0, 8), gram, grid=GRID, steps=3).codes.shape == (0, 8)
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"pull": -1.0}, {"beta": (2.0, 0.5)}):
        with pytest.raises(Error, match="adaround needs"):
            adaround(weight, gram, grid=GRID, **wrong)
    with pytest.raises(Error, match="needs a Gram matrix"):
        adaround(weight, gram[:4, :4], grid=GRID)
    with pytest.raises(Error, match="finite"):
        adaround(weight * torch.nan, gram, grid=GRID)
    with pytest.raises(Error, match="NaN"):
        adaround(weight, gram * torch.nan, grid=GRID)
