"""What learns in a matrix: where it begins, which gradients it gets, and that its codes are its values."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from weightsmith.quantize import rtn
from weightsmith.quantize._flexround import over_inputs
from weightsmith.quantize._learners import Moved, Train, as_stored, learner, straight
from weightsmith.quantize.grids import Integer, named

GRIDS = [
    Integer(bits=2, group=4),
    Integer(bits=3, symmetric=False),
    Integer(bits=3, group=4, symmetric=False),
    Integer(bits=2, group=4, symmetric=False, zero="float"),
    Integer(bits=3, per_tensor=True),
    named("nf4", group=8),
]
TRAINS = get_args(Train)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def made(train: Train, grid: Any, weight: Tensor) -> Any:
    return learner(train, weight, grid, rank=2, clip=0, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("train", TRAINS)
def test_it_begins_at_nearest(train: Train, grid: Any):
    weight = rows()
    one, usual = made(train, grid, weight), rtn(weight, grid=grid)
    assert torch.equal(one.coded().values(), usual.values())
    begun = one.values(0.0)
    assert begun.requires_grad
    if "signed" in train or train in ("division", "weights and steps"):
        assert torch.equal(begun.detach(), usual.values())
    else:  # sliders begin at the weights, as far as the grid reaches
        around = one.around
        torch.testing.assert_close(begun.detach(), weight.clamp(around.low, around.high), atol=1e-3, rtol=0)
    loss = (begun * rows(1)).sum()
    leaves = [*one.moves, *one.ranges]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("train", TRAINS)
def test_codes_in_the_end_are_the_values_of_the_end(train: Train, grid: Any):
    """Whatever was learned; sliders are at their ends then."""
    one = made(train, grid, rows())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for leaf in one.moves:
            noise = torch.randn(leaf.shape, generator=generator)
            leaf.add_(20 * noise.sign() if train == "rounding" else 0.3 * noise)
        for leaf in one.ranges:
            leaf.sub_(0.2 * torch.rand(leaf.shape, generator=generator))
        one.held()
        apart = one.values(1.0) - one.coded().values()
    if train == "low-rank rounding":  # all but those that are still near the middle
        apart = apart[one.sliders().abs() > 0.1]
        assert len(apart) > 20
    torch.testing.assert_close(apart, torch.zeros_like(apart), atol=1e-6, rtol=0)


def test_gradients_are_those_of_rounding_that_gradients_pass():
    """Against autograd through the formula of integers, beyond the reach of the grid as well."""
    weight = rows().double()
    for zero in ("integer", "float"):
        grid = Integer(bits=2, group=4, symmetric=False, zero=zero, scale_dtype=torch.float64)
        one = made("weights and steps", grid, weight)
        with torch.no_grad():
            one.factor.mul_(0.6)
            one.place.add_(0.1)
            one.offset.add_(0.2)
        other = [leaf.detach().clone().requires_grad_() for leaf in (one.offset, one.factor, one.place)]
        offset, factor, place = other
        begun = {name: value.repeat_interleave(4, 1) for name, value in one.params.items()}
        scale = begun["scale"] * factor.repeat_interleave(4, 1)
        moved = weight + begun["scale"] * offset
        shift = 3 * place.repeat_interleave(4, 1)
        if zero == "integer":
            at = begun["zero_point"] + shift
            at = straight(at, at.detach().round().clamp(0, 3))
            code = moved / scale
            expected = scale * ((straight(code, code.detach().round()) + at).clamp(0, 3) - at)
        else:
            least = begun["minimum"] + shift * begun["scale"]
            code = (moved - least) / scale
            expected = scale * straight(code, code.detach().round()).clamp(0, 3) + least
        torch.testing.assert_close(one.values(0.5).detach(), expected.detach())
        for mine, theirs in zip(
            torch.autograd.grad((one.values(0.5) * rows(1)).sum(), (one.offset, one.factor, one.place)),
            torch.autograd.grad((expected * rows(1)).sum(), (offset, factor, place)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("train", TRAINS)
def test_steps_of_zero(train: Train):
    """A group of zeros has a magnitude of zero on the grid of signs."""
    weight = rows()
    weight[1] = 0
    one = made(train, named("sign"), weight)
    gradients = torch.autograd.grad(one.values(0.5).sum(), [*one.moves, *one.ranges], allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert (one.coded().values()[1] == 0).all()


def test_division_moves_large_weights_more():
    weight = torch.tensor([[4.0, 0.5, -2.0, 0.1]], dtype=torch.float64)
    one = made("division", Integer(bits=4, scale_dtype=torch.float64), weight)
    slope = torch.autograd.grad(one.values(0.0).sum(), one.divisor)[0]
    torch.testing.assert_close(slope, -weight)


def test_offsets_stay_within_half_a_step_and_ranges_do_not_grow():
    one = made("signed rounding", Integer(bits=3, group=4, symmetric=False), rows())
    with torch.no_grad():
        one.offset.add_(3)
        one.factor.add_(3)
    one.held()
    assert one.offset.max() == 0.5
    assert one.factor.max() == 1
    free: Any = made("weights and steps", Integer(bits=3, group=4), rows())
    with torch.no_grad():
        free.offset.add_(3)
    free.held()
    assert free.offset.max() == 3
    assert isinstance(free, Moved)


def test_the_pull_grows_and_the_thin_ones_are_thin():
    one: Any = made("rounding", GRIDS[0], rows())
    assert one.penalty(0.1) is None
    early, late = (float(one.penalty(at).detach()) for at in (0.3, 0.99))
    assert 0 < late < early <= 1
    with torch.no_grad():
        one.slider.add_(100)
    assert one.penalty(0.9) == 0
    one.reopened()
    assert one.soft().detach().min() > 0
    assert one.soft().detach().max() < 1
    thin: Any = made("low-rank rounding", GRIDS[0], rows())
    assert [tuple(leaf.shape) for leaf in thin.moves] == [(5, 2), (2, 8)]


def test_what_is_stored():
    grid = Integer(bits=2, group=4, scale_dtype=torch.bfloat16)
    one: Any = made("weights and steps", grid, rows())
    with torch.no_grad():
        one.factor.mul_(1.2345)
    scale = one.coded().params["scale"]
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(as_stored(scale, grid), scale)


@pytest.mark.parametrize("train", ["signed rounding", "division", "weights and steps"])
@pytest.mark.parametrize(
    "grid",
    [Integer(3, group=4), Integer(3, group=8, span="narrow"), Integer(2, group=4, span="signed"), Integer(2),
     Integer(3, group=4, symmetric=False), Integer(2, group=4, symmetric=False, zero="float")],
)  # fmt: skip
def test_the_short_way_is_the_long_way(train: Train, grid: Integer):
    """Also where weights are cut off, because steps have become smaller."""
    generator = torch.Generator().manual_seed(3)
    found: list[list[Tensor]] = []
    start = [torch.randn(64, generator=generator) for _ in range(4)]
    for short in (True, False):
        one = made(train, grid, rows())
        assert one.even
        if not short:
            one.even, one.unit = False, over_inputs(one.params["scale"], grid, one.rows.shape[1])
        with torch.no_grad():
            for leaf, by in zip((*one.moves, *one.ranges), start, strict=False):
                leaf.add_(0.1 * by[: leaf.numel()].view(leaf.shape))
            one.factor.mul_(0.7)
        values = one.values(0.5)
        weighted = (values * torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view(values.shape)).sum()
        found.append([values, *torch.autograd.grad(weighted, [*one.moves, *one.ranges])])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (found[0][0] - rows()).abs().max() > 0.3  # something is cut off
