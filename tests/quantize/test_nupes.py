"""The search for an exponent."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import coded, output_error
from weightsmith.quantize._nupes import nupes
from weightsmith.quantize._rtn import rtn
from weightsmith.quantize.grids import EXPONENTS, Integer, Power


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int) -> Tensor:
    mixed = normal(300, inputs, seed=5) @ normal(inputs, inputs, seed=6)
    return mixed.t() @ mixed


def at(weight: Tensor, exponent: float, group: int | None = None, bits: int = 3) -> Tensor:
    grid = Power(bits, group, exponent)
    return coded(weight, grid, shared={"exponent": torch.tensor(exponent)}).values()


@pytest.mark.parametrize("told", [False, True])
def test_the_exponent_of_least_error(told: bool):
    weight, gram = normal(12, 64), gram_of(64) if told else None
    found = nupes(weight, gram, grid=Power(3))
    errors = {}
    for exponent in EXPONENTS:
        made = at(weight, exponent)
        errors[exponent] = float(((made - weight) ** 2).sum() if gram is None else output_error(weight, made, gram))
    best = min(errors, key=lambda exponent: errors[exponent])
    assert float(found.shared["exponent"]) == pytest.approx(best)
    torch.testing.assert_close(found.values(), at(weight, best))
    assert errors[best] < errors[1.0]


def test_it_never_errs_more_than_even_spacing():
    for seed in range(5):
        weight = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed)) - 0.5
        even = coded(weight, Integer(4, span="narrow")).values()
        own = nupes(weight, grid=Power(4)).values()
        assert (own - weight).square().sum() <= (even - weight).square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("told", [False, True])
def test_every_group_its_own(told: bool):
    even = torch.rand(6, 40, generator=torch.Generator().manual_seed(1))
    weight, gram = torch.cat([normal(6, 40), even]), gram_of(40) if told else None
    found = nupes(weight, gram, grid=Power(3, 16, each="group"))
    for i in range(12):
        for g in range(3):  # the last is shorter
            part = slice(16 * g, 16 * g + 16)
            own = weight[i : i + 1, part]
            errors = {}
            for exponent in EXPONENTS:
                away = at(own, exponent) - own
                errors[exponent] = float((away**2).sum() if gram is None else away @ gram[part, part] @ away.t())
            chosen = min(errors, key=lambda exponent: abs(exponent - float(found.params["exponent"][i, g])))
            assert errors[chosen] <= min(errors.values()) * (1 + 1e-4)


def test_a_given_exponent_is_kept():
    weight = normal(4, 32)
    assert float(nupes(weight, grid=Power(3, exponent=0.5)).shared["exponent"]) == 0.5
    torch.testing.assert_close(nupes(weight, grid=Power(3, exponent=0.5)).values(), at(weight, 0.5))


def test_narrower_ranges_and_words():
    weight, gram = normal(12, 64).pow(3), gram_of(64)
    errors = [
        float(output_error(weight, nupes(weight, gram, grid=Power(3), clip=clip).values(), gram)) for clip in (0, 8)
    ]
    assert errors[1] < errors[0]
    weights = {"a.weight": normal(4, 64)}
    made = ws.quantize.nupes(weights, bits=3, group=32)
    values = ws.quantize.nupes(weights, bits=3, group=32, action="values")
    assert torch.equal(ws.quantize.dequantize(made)["a.weight"], values["a.weight"])
    with pytest.raises(Error, match="power grids alone"):
        nupes(weight, grid=Integer())


@pytest.mark.parametrize("each", ["tensor", "group"])
def test_ranges_of_a_given_exponent_are_those_of_rounding_to_nearest(each: Literal["tensor", "group"]):
    weight, gram, grid = normal(12, 40).pow(3), gram_of(40), Power(3, 16, 0.5, each=each)
    own, nearest = (rounding(weight, gram, grid=grid, clip=8).values() for rounding in (nupes, rtn))
    assert torch.equal(own, nearest)
    assert not torch.equal(own, nupes(weight, grid=grid, clip=8).values())  # inputs that are told have a say


@pytest.mark.parametrize("exponent", [None, 0.35])
def test_exponents_of_wide_weights_are_those_that_are_stored(exponent: float | None):
    weight = normal(4, 32).double()
    whole = nupes(weight, grid=Power(3, exponent=exponent))
    each = nupes(weight, grid=Power(3, 16, exponent, each="group"))
    assert whole.shared["exponent"].dtype == each.params["exponent"].dtype == torch.float32
    assert whole.values().dtype == torch.float64


def test_edges():
    assert nupes(torch.zeros(3, 8)).values().eq(0).all()
    assert nupes(torch.zeros(0, 8)).values().shape == (0, 8)
    assert nupes(torch.zeros(3, 0)).values().shape == (3, 0)
    assert nupes(torch.zeros(3, 8), grid=Power(3, 3, each="group")).values().eq(0).all()
