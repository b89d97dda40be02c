"""Division before rounding: the gradients by hand, what it reaches, and the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize._posed import best_of_all, posed
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize import Coded, _flexround, coded, fitted, flexround, output_error, rtn
from weightsmith.quantize._flexround import learns_steps, over_inputs, reached, slopes
from weightsmith.quantize.grids import GRIDS, Integer, named

GRID = Integer(bits=2, symmetric=False)


def test_better_than_the_best_of_up_and_down():
    """The grid learns too, and weights may move further than to the next point."""
    ratios = []
    for seed in range(12):
        weight, gram = posed(seed)
        found = flexround(weight, gram, grid=GRID, damp=0)
        error = float(output_error(weight, found.values(), gram))
        assert error <= float(output_error(weight, rtn(weight, grid=GRID).values(), gram)) * (1 + 1e-5)
        ratios.append(error / best_of_all(weight, gram, GRID))
    assert torch.tensor(ratios).median() < 1


@pytest.mark.parametrize(
    "grid",
    [
        Integer(bits=3, group=4, symmetric=False),
        Integer(bits=3, group=4, symmetric=False, zero="float"),
        Integer(bits=2, group=4),
        Integer(bits=3, per_tensor=True),
        Integer(bits=3, span="signed"),
        named("nf4", group=8),
    ],
    ids=str,
)
def test_no_row_is_worse_than_nearest_and_most_are_better(grid: Any):
    weight, gram = posed(4, rows=8, inputs=16)
    found, usual = flexround(weight, gram, grid=grid, damp=0), rtn(weight, grid=grid)
    errors = [((one.values() - weight) @ gram * (one.values() - weight)).sum(1) for one in (found, usual)]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert torch.equal(coded(found.values(), grid, found.params, found.shared).values(), found.values())


def test_slopes_are_those_of_the_formula():
    """Against autograd through a rounding that gradients pass."""
    weight, gram = posed(6, rows=3, inputs=8)
    weight, gram = weight.double(), gram.double()
    grid = Integer(bits=2, group=4, scale_dtype=torch.float64)
    params = fitted(weight, grid)
    params["scale"] = params["scale"] * 0.7  # so that some weights lie beyond the grid
    generator = torch.Generator().manual_seed(1)
    divisor, of_rows, factor = (
        (torch.rand(shape, dtype=torch.float64, generator=generator) + 0.6).requires_grad_()
        for shape in ((3, 8), (3, 1), (3, 2))
    )
    scale = (params["scale"] * factor).repeat_interleave(4, 1)
    moved = weight / divisor / of_rows / scale + 2
    code = (moved + (moved.round() - moved).detach()).clamp(0, 3)
    error = scale * (code - 2) - weight
    loss = ((error @ gram) * error).sum()
    expected = torch.autograd.grad(loss, (divisor, of_rows, factor))
    with torch.no_grad():
        divided = weight / divisor / of_rows
        found = coded(divided, grid, {"scale": params["scale"] * factor})
        torch.testing.assert_close(found.values(), error + weight)
        mine = slopes(2 * error @ gram, divided, found.values(), found, divisor, of_rows, factor)
        within = reached(divided, grid, found.params, {})
        assert not within.all()
        assert within.any()
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(slopes(error.detach(), divided, found.values(), found, divisor, of_rows, None)) == 2


def test_the_loss_and_the_rate(monkeypatch: pytest.MonkeyPatch):
    """What the kernel takes the slopes of, and how far it goes against them."""
    weight, gram = posed(6, rows=3, inputs=8)
    weight, gram = weight.double(), gram.double()
    grid, seen = Integer(bits=2, group=4, scale_dtype=torch.float64), []
    usual = _flexround.slopes

    def noted(gradient: Tensor, moved: Tensor, values: Tensor, found: Any, *leaves: Tensor) -> Any:
        seen.append((gradient.clone(), values.clone(), [leaf.clone() for leaf in leaves]))
        assert torch.equal(values, coded(weight / leaves[0] / leaves[1], grid, found.params).values())
        return usual(gradient, moved, values, found, *leaves)

    monkeypatch.setattr(_flexround, "slopes", noted)
    flexround(weight, gram, grid=grid, damp=0, steps=3, lr=1e-3)
    nearest = rtn(weight, grid=grid).values() - weight
    errors = ((nearest @ gram) * nearest).sum(1, keepdim=True)
    assert len(seen) == 3
    for gradient, values, _ in seen:
        torch.testing.assert_close(gradient, 2 * (values - weight) @ gram / errors)
    for one, other in zip(seen[0][2], seen[1][2], strict=True):
        assert torch.equal(one, torch.ones_like(one))
        moved = (other - one).abs()
        assert ((moved - 1e-3).abs() < 1e-9).logical_or(moved == 0).all()
        assert moved.max() > 0


def test_steps_are_those_that_are_stored():
    weight, gram = posed(1, rows=4, inputs=16)
    found = flexround(weight, gram, grid=Integer(bits=2, group=8, scale_dtype=torch.bfloat16), steps=30)
    scale = found.params["scale"]
    assert torch.equal(scale, scale.bfloat16().float())
    assert not torch.equal(scale, fitted(weight, found.grid)["scale"])
    assert learns_steps(Integer())
    assert not learns_steps(Integer(per_tensor=True))


@pytest.mark.parametrize("word", sorted(set(GRIDS) - {"billm", "two_four"}))  # those two are not fitted to weights
def test_steps_that_learn_are_factors(word: str):
    """All but where the least value is kept: what learns counts on it."""
    grid: Any = named(word, group=8)
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    grids = [grid, Integer(bits=3, group=8, symmetric=False, zero="float")] if word == "int" else [grid]
    for one in grids:
        if not learns_steps(one):
            continue
        found = coded(rows, one)
        least = found.params.get("minimum", torch.zeros(3, 1))
        base = over_inputs(least, one, 16)
        twice = Coded(found.codes, {**found.params, "scale": 2 * found.params["scale"]}, one, found.shared)
        torch.testing.assert_close(twice.values() - base, 2 * (found.values() - base))


def test_one_point_further():
    """A large weight beside a small one makes up for it by more than one point."""
    weight, gram = torch.tensor([[3.0, 0.45, 0.45, 0.45]]), torch.full((4, 4), 0.99) + 0.01 * torch.eye(4)
    grid = Integer(bits=3, span="signed")
    nearest = rtn(weight, grid=grid)
    found = flexround(weight, gram, grid=grid, damp=0, steps=400)
    assert output_error(weight, found.values(), gram) < 0.1 * output_error(weight, nearest.values(), gram)


def test_steps_grow_to_where_they_fit():
    """The highest of four points lies at two thirds of a lone weight; only a larger step brings it there."""
    weight = torch.tensor([[3.0], [0.5]])
    found = flexround(weight, torch.ones(1, 1), grid=Integer(bits=2), steps=400)
    torch.testing.assert_close(found.values(), weight, atol=0.02, rtol=0.02)
    assert rtn(weight, grid=Integer(bits=2)).values()[0] == 2


def test_edges():
    weight, gram = posed(0, rows=3)
    before = weight.clone(), gram.clone()
    for other in (gram.diagonal().clone(), torch.stack([gram[:4, :4], gram[4:, 4:]]), torch.zeros(8, 8)):
        assert flexround(weight, other, grid=GRID, steps=5).values().isfinite().all()
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert flexround(weight.bfloat16(), gram, grid=GRID, steps=5).values().dtype == torch.float32
    assert flexround(torch.zeros(2, 8), gram, grid=GRID, steps=3).values().abs().sum() == 0
    assert flexround(torch.zeros(0, 8), gram, grid=GRID, steps=3).codes.shape == (0, 8)
    assert flexround(weight[:, :5], gram[:5, :5], grid=Integer(bits=2, group=3), steps=5).params["scale"].shape == (
        3,
        2,
    )
    for wrong in ({"steps": 0}, {"lr": 0.0}):
        with pytest.raises(Error, match="flexround needs"):
            flexround(weight, gram, grid=GRID, **wrong)
    with pytest.raises(Error, match="finite"):
        flexround(weight * torch.inf, gram, grid=GRID)
