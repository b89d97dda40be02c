"""Mixed tables as a rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import coded, fitted, output_error
from weightsmith.quantize._bitmod import bitmod
from weightsmith.quantize.grids import Integer, MixedTypes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int) -> Tensor:
    mixed = normal(300, inputs, seed=5) @ normal(inputs, inputs, seed=6) * (1 + 5 * (normal(inputs, seed=7) > 1))
    return mixed.t() @ mixed


def test_without_inputs_it_is_rounding_to_nearest():
    weight, grid = normal(6, 64), MixedTypes(3, 16)
    assert torch.equal(bitmod(weight, grid=grid).values(), coded(weight, grid).values())


def test_inputs_weigh_the_choice():
    weight, grid, gram = normal(40, 64), MixedTypes(3, 16), gram_of(64)
    told, plain = bitmod(weight, gram, grid=grid), bitmod(weight, grid=grid)
    heed = gram.diagonal()
    errors = [float(((one.values() - weight).square() * heed).sum()) for one in (told, plain)]
    assert errors[0] < errors[1]
    assert not torch.equal(told.params["special"], plain.params["special"])
    for form in (heed, torch.stack([gram[:32, :32], gram[32:, 32:]])):
        assert torch.equal(bitmod(weight, form, grid=grid).codes, told.codes)


def test_narrower_ranges_are_chosen_by_outputs():
    weight, grid, gram = normal(40, 64).pow(3), MixedTypes(3, 16), gram_of(64)
    heed = gram.diagonal()
    made = [bitmod(weight, heed, grid=grid, clip=clip).values() for clip in (0, 8)]
    params = fitted(weight, grid, clip=8, shared=grid.shared(weight), importance=heed)  # ranges by the weights alone
    made.append(coded(weight, grid, params).values())
    errors = [float(output_error(weight, one, heed)) for one in made]
    assert errors[1] < errors[0]
    assert errors[1] < errors[2]


def test_less_error_than_integers_of_as_many_bits():
    weight = normal(64, 128)
    own = (bitmod(weight, grid=MixedTypes(3)).values() - weight).square().mean()
    even = (coded(weight, Integer(3, 128, symmetric=False)).values() - weight).square().mean()
    assert own < even


def test_words_reach_it():
    weights = {"a.weight": normal(4, 256).bfloat16()}
    made = ws.quantize.bitmod(weights, bits=3)
    assert sorted(made) == [f"a.weight_{end}" for end in ("factor", "packed", "shape", "special", "unit")]
    torch.testing.assert_close(
        ws.quantize.dequantize(made)["a.weight"].bfloat16(),
        ws.quantize.bitmod(weights, bits=3, action="values")["a.weight"],
    )
    with pytest.raises(Error, match="mixed tables alone"):
        bitmod(normal(2, 8), grid=Integer())
