"""Spectra of checkpoints: every figure against a decomposition, and what cannot be told is None."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import power_law, spectra
from weightsmith.progress import listening
from weightsmith.weights import _lazy


def checkpoint():
    generator = torch.Generator().manual_seed(0)
    return {
        "h.0.q.weight": torch.randn(6, 9, generator=generator),
        "h.0.k.weight": torch.randn(9, 4, generator=generator).bfloat16(),
        "h.1.q.weight": torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 10)),
        "h.1.k.weight": torch.randn(3, 2, 2, generator=generator),
        "h.0.bias": torch.ones(3),
    }


def test_every_figure_is_that_of_the_decomposition():
    weights = checkpoint()
    for row in spectra(weights).table:
        matrix = weights[row["tensor"]].double().flatten(1)
        values = torch.linalg.svdvals(matrix)
        assert (row["rows"], row["columns"], row["of"]) == (*matrix.shape, len(values))
        assert row["norm"] == pytest.approx(float(matrix.norm()))
        assert row["largest"] == pytest.approx(float(values[0]))
        assert row["stable rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2))
        shares = values[values > 1e-9] / values.sum()
        assert row["effective rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
        assert row["rank"] == int(torch.linalg.matrix_rank(matrix.float()))
        assert row["condition"] == pytest.approx(float(values[0] / values[row["rank"] - 1]), rel=1e-5)
        law = power_law(values[: row["rank"]].square())
        assert row["alpha"] == (law and pytest.approx(law.exponent))


def test_the_rank_is_what_float32_can_tell():
    levels = torch.tensor([1.0, 1e-3, 1e-5, 1e-8], dtype=torch.float64)
    (row,) = spectra({"w": levels.diag()}).table
    assert (row["rank"], row["condition"]) == (3, pytest.approx(1e5))
    assert row["alpha"] == pytest.approx(power_law(levels[:3].square()).exponent)


def test_ranks_that_fall_short_are_counted():
    found = spectra(checkpoint())
    assert found["matrices"] == 4
    assert found["matrices of less than full rank"] == 1
    assert found.figures["values"] == 54 + 36 + 54 + 12


def test_values_that_are_not_finite_and_zeros():
    found = spectra({"bad": torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "nothing": torch.zeros(2, 3)})
    bad, nothing = found.table
    assert bad["norm"] is bad["rank"] is bad["alpha"] is bad["spikes"] is None
    assert (nothing["norm"], nothing["rank"], nothing["condition"], nothing["stable rank"]) == (0.0, 0, None, 0.0)
    assert "bad" in found.notes[-1]
    assert str(found)


def test_plots_and_progress(tmp_path):
    pytest.importorskip("matplotlib")
    events = []
    with listening(events.append):
        found = spectra(checkpoint(), threads=1)
    assert events[-1].done == events[-1].total
    assert [line.label for line in found.plots[0].lines] == ["q", "k"]
    assert found.plots[1].surface.z[0][1] == pytest.approx(1 / 6, rel=1e-4)  # effective rank of an outer product
    assert found.save(tmp_path / "r.html").stat().st_size > 1000


def test_what_fits_nothing_is_refused():
    with pytest.raises(Error, match="no float matrix"):
        spectra({"b": torch.ones(3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tall_matrix_is_read_by_rows_and_never_held(monkeypatch, dtype):
    monkeypatch.setattr(_lazy, "UNIT", 64)  # many units, more than are added up at once
    tall = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    row, other = spectra({"embed": tall, "turned": tall.T.contiguous()}, threads=2).table
    for key in ("norm", "largest", "stable rank", "effective rank", "rank", "condition", "alpha", "edge", "spikes"):
        assert row[key] == pytest.approx(other[key], rel=1e-9), key
    assert row["norm"] == pytest.approx(float(tall.double().norm()))
    tall[150, 2] = math.nan
    assert spectra({"embed": tall}).table[0]["norm"] is None


def test_what_rounding_leaves_stands_out_of_no_noise():
    left = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    right = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    (row,) = spectra({"w": left @ right}).table
    assert (row["rank"], row["spikes"], row["edge"]) == (3, 3, 0.0)
