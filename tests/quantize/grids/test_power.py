"""Whole numbers under a power."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize.grids import EXPONENTS, Integer, Power, _power


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(grid: Power, values: Tensor, **options: Tensor) -> Tensor:
    shared = grid.shared(values)
    params = {**shared, **grid.fit(values, shared, **options)}
    return grid.decode(grid.encode(values, params), params)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_exponent_of_one_is_the_integer_grid(bits: int):
    values = normal(10, 33, seed=bits)
    grid, even = Power(bits, exponent=1.0), Integer(bits, span="narrow")
    params, other = {**grid.shared(values), **grid.fit(values)}, even.fit(values)
    assert torch.equal(grid.encode(values, params), even.encode(values, other))
    torch.testing.assert_close(made(grid, values), even.decode(even.encode(values, other), other))


@pytest.mark.parametrize("exponent", [0.4, 0.75, 2.0])
def test_points_by_the_formula(exponent: float):
    values = normal(4, 20)
    points = {(sign * (step / 7) ** (1 / exponent)) for sign in (-1, 1) for step in range(8)}
    found = made(Power(4, exponent=exponent), values)
    for row, got in zip(values, found, strict=True):
        most = float(row.abs().max())
        for value, one in zip(row.tolist(), got.tolist(), strict=True):
            assert one == pytest.approx(min((p * most for p in points), key=lambda p: abs(p - value)), abs=1e-5)


def test_the_search_of_the_tensor_and_of_groups():
    values = torch.cat([normal(6, 64), torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) - 0.5])
    errors = {a: (made(Power(3, 64, exponent=a), values) - values).square().sum(1) for a in EXPONENTS}
    table = torch.stack([errors[a] for a in EXPONENTS])
    together, each = Power(3, 64), Power(3, 64, each="group")
    assert float(together.shared(values)["exponent"]) == pytest.approx(EXPONENTS[int(table.sum(1).argmin())])
    found = each.fit(values)["exponent"]
    assert found.tolist() == pytest.approx([EXPONENTS[k] for k in table.argmin(0).tolist()])
    assert found[:6].mean() < found[6:].mean()  # a bell wants its points nearer to zero than an even spread does
    for own, least in ((together, table.sum(1).min()), (each, table.min(0).values.sum())):
        assert float((made(own, values) - values).square().sum()) == pytest.approx(float(least), rel=1e-5)
    assert 1.0 in EXPONENTS  # so no search errs more than even spacing


def test_the_search_of_the_tensor_looks_at_its_groups():
    """Each group is an even spread, and all of a row together are a crowd around zero."""
    spread = torch.tensor([0.01, 0.1, 1.0, 3.0]).repeat_interleave(16)
    values = (torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) - 0.5) * spread
    runs = values.unflatten(1, (4, 16))
    errors = {a: float((made(Power(3, 16, exponent=a), runs) - runs).square().sum()) for a in EXPONENTS}
    best = min(errors, key=lambda a: errors[a])
    assert float(Power(3, 16).shared(values)["exponent"]) == pytest.approx(best)
    assert float(Power(3).shared(values)["exponent"]) < best
    ragged = torch.cat([values, values[:, :5]], 1)
    assert torch.equal(Power(3, 16).shared(ragged)["exponent"], Power(3, 16).shared(values)["exponent"])


def test_of_a_large_tensor_some_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    values = normal(12, 64) * 2.0 ** torch.arange(12).unsqueeze(1)
    expected = Power(3).shared(values[::4])["exponent"]
    assert not torch.equal(Power(3).shared(values[:1])["exponent"], expected)
    monkeypatch.setattr(_power, "LOOKED_AT", 3 * 64)
    assert torch.equal(Power(3).shared(values)["exponent"], expected)


def test_importance_moves_the_exponent_of_a_group():
    values = normal(1, 200)
    far = (values.abs() > 1.5).float()
    near = 1 - far
    grid = Power(3, each="group")
    assert grid.fit(values, importance=near)["exponent"] < grid.fit(values, importance=far)["exponent"]


def test_an_exponent_from_a_file_that_is_none():
    params = {"scale": torch.ones(1), "exponent": torch.tensor(0.0)}
    assert Power(4).decode(torch.arange(16, dtype=torch.uint8).unsqueeze(0), params).isfinite().all()


def test_settings_that_there_are_not():
    with pytest.raises(Error, match="exponent"):
        Power(exponent=0)
    with pytest.raises(Error, match="from 2 to 8"):
        Power(bits=1)
