"""Roundings that know the loss of the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import guidedquant
from weightsmith.quantize._gptq import gptq
from weightsmith.quantize._guided import guidedquant as itself
from weightsmith.quantize.grids import Integer


def small(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
    data = [(torch.randn(40, 12) @ torch.randn(12, 12), torch.randint(0, 6, (40,))) for _ in range(3)]
    return model, data


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_each_run_of_rows_is_rounded_by_its_own_matrix(at_once: int | None):
    model, data = small()
    found = guidedquant(model, data, "gptq", groups=4, at_once=at_once, bits=3, action="values")
    layer: Any = model[2]
    slopes, inputs = [], []
    for x, labels in data:  # by hand, from the definition
        hidden = model[1](model[0](x)).detach()
        out = layer(hidden).detach().requires_grad_()
        loss = functional.cross_entropy(model[4](model[3](out)), labels, reduction="sum")
        slopes.append(torch.autograd.grad(loss, out)[0])
        inputs.append(hidden)
    slope, given = torch.cat(slopes), torch.cat(inputs)
    grid = Integer(bits=3)
    for run in range(4):
        rows = slice(2 * run, 2 * run + 2)
        heed = slope[:, rows].square().mean(1)
        gram = given.T @ (given * heed[:, None])
        expected = gptq(layer.weight[rows].detach(), gram, grid=grid).values()
        torch.testing.assert_close(found["2.weight"][rows], expected)


def test_it_is_the_rounding_with_these_statistics():
    model, data = small()
    grams = ws.stats.guided_gram(model, data, groups=2)
    for method in ("gptq", "lnq", "coordinate_descent", "leanquant"):
        found = guidedquant(model, data, method, groups=2, bits=2)
        expected = ws.quantize.METHODS[method](model, stats=grams, bits=2)
        assert set(found) == set(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name]), (method, name)
        assert torch.equal(ws.quantize.dequantize(found)["2.weight"], ws.quantize.dequantize(expected)["2.weight"])


def test_groups_that_do_not_divide_the_outputs_are_fewer():
    model, data = small()
    found = itself(model, data, "gptq", groups=4, bits=3)  # 6 outputs: 3 runs
    expected = ws.quantize.gptq(model, stats=ws.stats.guided_gram(model, data, groups={"4.*": 3, "*": 4}), bits=3)
    assert torch.equal(found["4.weight_packed"], expected["4.weight_packed"])


def test_padding_goes_with_matrices_of_runs():
    model, data = small()
    found = guidedquant(model, data, "gptq", groups=2, bits=3, group=5, indivisible="pad", action="values")
    assert found["2.weight"].shape == (8, 16)
    ragged = guidedquant(model, data, "gptq", groups=2, bits=3, group=5, indivisible="ragged", action="values")
    torch.testing.assert_close(found["2.weight"][:, :15], ragged["2.weight"][:, :15], rtol=0.3, atol=0.3)


def test_the_model_is_left_as_it_was():
    model, data = small()
    model.train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    guidedquant(model, data, "gptq", bits=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals():
    model, data = small()
    with pytest.raises(Error, match="groups is a whole number from 1, got 0"):
        guidedquant(model, data, groups=0)
    with pytest.raises(Error, match="at_once is a whole number from 1"):
        guidedquant(model, data, at_once=0)
    with pytest.raises(Error, match="action is 'codes' or 'values'"):
        guidedquant(model, data, action="x")  # type: ignore[arg-type]
    with pytest.raises(Error, match="there is no rounding 'gtpq'"):
        guidedquant(model, data, "gtpq")
    with pytest.raises(Error, match=r"does not depend on the outputs of 4\.weight"):
        guidedquant(model, data, "gptq", loss=lambda called, batch: model[:4](batch[0]).sum())
