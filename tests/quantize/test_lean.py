"""Grids fitted where errors cost most."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._coded import output_error
from weightsmith.quantize._gptq import column_by_column, gptq
from weightsmith.quantize._lean import NARROWEST, importance, leanquant
from weightsmith.quantize.grids import GRIDS, Integer, Levels
from weightsmith.solve import steadied

PLAIN = sorted(set(GRIDS) - {"billm", "two_four"})  # these two are fitted to inputs, by roundings of their own


def problem(rows: int = 8, inputs: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(inputs, generator=generator).mul(1.5).exp()
    data = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    data = data * size
    return torch.randn(rows, inputs, generator=generator), data.T @ data


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_the_importance(power: float, order):
    _, gram = problem()
    inverse = steadied(gram, damp=0.01, shrink=0.1).inverse().diagonal()
    expected = inverse.pow(-power)
    found = importance(gram, power, damp=0.01, shrink=0.1, order=order, dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.max())


def test_inputs_that_were_always_zero_are_of_no_importance():
    _, gram = problem(inputs=6)
    gram[2], gram[:, 2] = 0, 0
    found = importance(gram, 2.0, damp=0.01, shrink=0.0, dtype=torch.float32)
    assert found[2] == 0
    assert (found > 0).sum() == 5
    assert leanquant(torch.randn(2, 6), torch.zeros(6, 6)).values().isfinite().all()


def test_tables_are_weighted_k_means_and_codes_are_those_of_gptq_on_them():
    weight, gram = problem()
    grid = Levels(bits=2)
    heed = importance(gram, 2.0, damp=0.1, shrink=0.0, dtype=torch.float32)
    params = {"levels": grid.fit(weight[:, None], importance=heed)["levels"]}
    expected = column_by_column(weight, gram, grid, params, shared={}, damp=0.1)
    found = leanquant(weight, gram, grid=grid)
    assert torch.equal(found.params["levels"], params["levels"])
    assert torch.equal(found.codes, expected.codes)
    assert not torch.equal(found.params["levels"], leanquant(weight, gram, grid=grid, power=0).params["levels"])


def test_ranges_of_other_grids_are_the_best_of_those_that_are_narrower_at_either_end():
    weight, gram = problem(rows=4, inputs=12)
    grid, steps = Integer(bits=2, group=6, symmetric=False), 3
    heed = importance(gram, 1.0, damp=0.1, shrink=0.0, dtype=torch.float32)
    found = leanquant(weight, gram, grid=grid, power=1.0, steps=steps)
    ends = [1 - (1 - NARROWEST) * step / steps for step in range(steps + 1)]
    narrower = 0
    for row, group in itertools.product(range(4), range(2)):
        own = weight[row, 6 * group : 6 * group + 6]
        tried = []
        for lower, upper in itertools.product(ends, ends):
            low, high = own.min() * lower, own.max() * upper
            params = grid.fit(torch.minimum(torch.maximum(own, low), high))
            apart = grid.decode(grid.encode(own, params), params) - own
            error = float((apart.square() * heed[6 * group : 6 * group + 6]).sum())
            tried.append((error, float(params["scale"]), float(params["zero_point"])))
        least = min(tried)
        now = {name: value[row, group] for name, value in found.params.items()}
        apart = grid.decode(grid.encode(own, now), now) - own
        assert float((apart.square() * heed[6 * group : 6 * group + 6]).sum()) == pytest.approx(least[0], rel=1e-5)
        narrower += least[0] < tried[0][0]
    assert narrower > 2


def test_without_power_and_steps_it_is_gptq_on_the_plain_grid():
    weight, gram = problem()
    for grid in (Integer(bits=3, group=4), Levels(bits=2, group=8)):
        found = leanquant(weight, gram, grid=grid, power=0, steps=0)
        assert torch.equal(found.codes, gptq(weight, gram, grid=grid, static=True, clip=0).codes)


@pytest.mark.parametrize("word", PLAIN)
def test_every_grid_goes_through(word: str):
    grid = GRIDS[word]()
    weight, gram = problem(inputs=2 * (grid.group or 8))
    found = leanquant(weight, gram, grid=grid, steps=2)
    assert found.values().shape == weight.shape
    assert found.values().isfinite().all()


def test_with_costly_weights_outputs_are_nearer():
    weight, gram = problem(rows=64, inputs=64)
    for grid in (Integer(bits=3, symmetric=False), Levels(bits=3)):
        plain = output_error(weight, gptq(weight, gram, grid=grid, clip=0).values(), gram)
        assert output_error(weight, leanquant(weight, gram, grid=grid, power=1.0).values(), gram) < 0.95 * plain


def test_runs_of_rows_and_edges():
    weight, gram = problem(rows=4, inputs=8)
    runs = leanquant(weight, torch.stack([gram, torch.eye(8)]), grid=Integer(bits=3))
    assert torch.equal(runs.codes[:2], leanquant(weight[:2], gram, grid=Integer(bits=3)).codes)
    assert torch.equal(runs.codes[2:], leanquant(weight[2:], torch.eye(8), grid=Integer(bits=3)).codes)
    for shape in ((0, 4), (3, 0), (1, 1)):
        for grid in (Integer(bits=3, group=2), Levels(bits=2)):
            assert leanquant(torch.ones(shape), torch.eye(shape[1]), grid=grid).values().shape == shape
    with pytest.raises(Error, match="power is 0 or more"):
        leanquant(weight, gram, power=-1.0)
    with pytest.raises(Error, match="steps a whole number"):
        leanquant(weight, gram, steps=-1)
    with pytest.raises(Error, match="needs a Gram matrix"):
        leanquant(weight, torch.eye(3))
