"""Rounding to shifted points against its formula, and its mean."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.codecs import onto_lattice


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.24])
def test_the_formula(shift: float):
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = values.clone()
    assert onto_lattice([found], 0.5, shift=shift) == shift
    expected = [0.5 * round((float(value) - shift) / 0.5) + shift for value in values]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert float((found - values).abs().max()) <= 0.25


def test_it_is_right_in_the_mean_and_never_far():
    values = torch.tensor([0.03, -0.2, 0.9, 12.34])
    generator = torch.Generator().manual_seed(1)
    total, square = torch.zeros(4), torch.zeros(4)
    for _ in range(5000):
        found = values.clone()
        shift = onto_lattice([found], 0.5, generator=generator)
        assert -0.25 <= shift < 0.25
        assert float((found - values).abs().max()) <= 0.25 + 1e-5
        total += found
        square += (found - values).square()
    assert float((total / 5000 - values).abs().max()) < 5 * 0.5 / math.sqrt(12 * 5000)
    torch.testing.assert_close(square / 5000, torch.full((4,), 0.25 / 12), rtol=0.1, atol=0)


def test_one_shift_for_all_tensors_in_place():
    model = torch.nn.Linear(5, 3)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    shift = onto_lattice(model.parameters(), 0.125, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        whole = (parameter.detach().double() - shift) / 0.125
        torch.testing.assert_close(whole, whole.round(), atol=1e-5, rtol=0)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_low_precision_strides_and_nothing():
    low = torch.tensor([0.3, -1.2], dtype=torch.bfloat16)
    onto_lattice(low, 0.25, shift=0.0)  # a tensor by itself
    assert low.tolist() == [0.25, -1.25]
    turned = torch.tensor([[0.3, 0.6], [0.9, 1.2]]).t()
    onto_lattice([turned], 0.5, shift=0.0)
    assert turned.tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert -0.25 <= onto_lattice([], 0.5) <= 0.25
    assert torch.equal(onto_lattice_of(torch.empty(0, 3)), torch.empty(0, 3))


def onto_lattice_of(values: torch.Tensor) -> torch.Tensor:
    onto_lattice([values], 1.0)
    return values


def test_a_seed_is_a_shift():
    one, same, other = (onto_lattice([], 1.0, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert one == same != other


def test_refusals_change_nothing():
    good = torch.tensor([0.3])
    for spacing in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(Error, match="a spacing above 0"):
            onto_lattice([good], spacing)
    for bad in (torch.tensor([1]), torch.tensor([torch.nan])):
        with pytest.raises(Error, match="tensor 1"):
            onto_lattice([good, bad], 0.5)
    assert float(good) == pytest.approx(0.3)
