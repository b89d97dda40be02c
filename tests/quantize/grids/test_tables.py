"""NF4 and mixed tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.quantize.grids import Float, MixedTypes, NormalFloat, Params
from weightsmith.quantize.grids._tables import NORMAL


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nf4_is_made_of_quantiles():
    """Eight quantiles above zero and seven below, evenly spaced in probability up to an offset, over the largest."""
    norm = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above = norm.icdf(torch.linspace(offset, 0.5, 9).double())[:-1]
    below = -norm.icdf(torch.linspace(offset, 0.5, 8).double())[:-1]
    points = torch.cat([above, torch.zeros(1).double(), below]).sort().values
    torch.testing.assert_close(torch.tensor(NORMAL).double(), points / points.max(), rtol=0, atol=2e-6)


def test_nf4_by_hand():
    values = normal(6, 64)
    grid = NormalFloat()
    params = grid.fit(values)
    assert torch.equal(params["scale"], values.abs().amax(1))
    made = grid.decode(grid.encode(values, params), params)
    for row, found, scale in zip(values.tolist(), made.tolist(), params["scale"].tolist(), strict=True):
        for value, got in zip(row, found, strict=True):
            assert got == pytest.approx(min((p * scale for p in NORMAL), key=lambda p: abs(p - value)), abs=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_tables_of_mixed_types(bits: int):
    tables = MixedTypes(bits).tables(torch.zeros(()))
    assert tables.shape == (4, 2**bits)
    assert torch.equal(tables, tables.sort(1).values)
    sides = {3: [0, 1, 2, 4], 4: [0, 1, 2, 3, 4, 6, 8, 12]}[bits]
    both = {*map(float, sides), *(-float(x) for x in sides)}
    extra = [sorted(set(table.tolist()) - both) for table in tables]
    assert extra == {3: [[3], [-3], [6], [-6]], 4: [[10], [-10], [16], [-16]]}[bits]


def values_of(grid: MixedTypes, values: Tensor, params: Params) -> Tensor:
    return grid.decode(grid.encode(values, params), params)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_table_of_least_error_is_taken(bits: int, weighted: bool):
    values = normal(50, 32, seed=bits) * torch.rand(50, 1, generator=torch.Generator().manual_seed(1))
    heed = normal(32, seed=2).square() if weighted else None
    grid = MixedTypes(bits, 32)
    shared = grid.shared(values)
    params = {**shared, **grid.fit(values, shared, importance=heed)}
    assert params["factor"].dtype == params["special"].dtype == torch.uint8
    assert len(params["special"].unique()) == 4
    weights = torch.ones(32) if heed is None else heed
    mixed = (weights * (values_of(grid, values, params) - values).square()).sum(1)
    for special in range(4):
        largest = grid.tables(values)[special].abs().max()
        factor = (values.abs().amax(1) / (largest * shared["unit"])).round().clamp(1, 255)
        one = {**shared, "factor": factor, "special": torch.full((50,), special)}
        error = (weights * (values_of(grid, values, one) - values).square()).sum(1)
        assert (mixed <= error * (1 + 1e-5)).all()
        assert torch.allclose(mixed[params["special"] == special], error[params["special"] == special], rtol=1e-4)


def test_scales_are_whole_numbers_of_the_tensors_unit():
    values = normal(9, 32)
    grid = MixedTypes(4, 32)
    shared = grid.shared(values)
    assert float(shared["unit"]) == pytest.approx(float(values.abs().max()) / (12 * 255))
    step = grid.fit(values, shared)["factor"].float() * shared["unit"]
    reach = grid.tables(values)[grid.fit(values, shared)["special"].long()].abs().amax(1)
    assert ((step * reach / values.abs().amax(1) - 1).abs() < 0.01).all()


def test_four_bits_of_mixed_types_err_less_than_the_float_they_extend():
    values = normal(64, 128)
    grid, plain = MixedTypes(4), Float("e2m1", 128)
    shared = grid.shared(values)
    params = {**shared, **grid.fit(values, shared)}
    other = plain.fit(values)
    without = (plain.decode(plain.encode(values, other), other) - values).square().mean()
    assert (values_of(grid, values, params) - values).square().mean() < 0.95 * without
