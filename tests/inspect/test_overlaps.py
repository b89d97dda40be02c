"""Cosines of rows against all pairs, the bound of Welch, and what centring does."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import overlaps
from weightsmith.weights import _lazy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(matrix):
    rows = [row / row.norm() for row in matrix.double() if row.any()]
    cosines = [float(a @ b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return sum(cosines) / len(cosines), sum(c * c for c in cosines) / len(cosines)


@pytest.mark.parametrize("shape", [(30, 5), (5, 30), (2, 3)])
def test_the_mean_is_over_all_pairs(shape):
    matrix = normal(*shape) + 0.3
    matrix[1] = 0 if shape[0] > 2 else matrix[1]
    row = overlaps(matrix).table[0]
    mean, squared = by_hand(matrix)
    assert row["mean cosine"] == pytest.approx(mean, abs=1e-6)
    assert row["mean squared cosine"] == pytest.approx(squared, abs=1e-6)
    assert row["times 1/m"] == pytest.approx(squared * shape[1], abs=1e-5)
    lengths = matrix.double().norm(dim=1)
    assert row["length"] == pytest.approx(float(lengths.mean()))
    assert row["spread"] == pytest.approx(float(lengths.std(correction=0) / lengths.mean()), rel=1e-5)
    assert row["zero"] == int(shape[0] > 2)


def test_the_bound_holds_and_a_tight_frame_reaches_it():
    angles = torch.arange(7, dtype=torch.float64) * (2 * math.pi / 7)
    frame = overlaps(torch.stack([angles.cos(), angles.sin()], dim=1)).table[0]
    assert frame["mean squared cosine"] == pytest.approx(frame["bound"], abs=1e-7)
    assert frame["bound"] == pytest.approx((7 - 2) / (2 * 6))
    random = overlaps(normal(40, 10)).table[0]
    assert random["bound"] < random["mean squared cosine"]
    assert overlaps(torch.eye(4)).table[0]["bound"] == 0.0


def test_random_rows_have_one_over_the_columns():
    row = overlaps(normal(3000, 50).bfloat16()).table[0]  # several runs of rows
    assert row["times 1/m"] == pytest.approx(1.0, abs=0.02)


def test_centring_takes_away_what_all_rows_share():
    matrix = normal(400, 20) + 5
    assert overlaps(matrix).table[0]["times 1/m"] > 10
    found = overlaps({"head": matrix, "other": normal(30, 4)}, center=True, pattern="head").table[0]
    mean, squared = by_hand(matrix - matrix.mean(dim=0))
    assert found["mean squared cosine"] == pytest.approx(squared, abs=1e-5)
    assert found["mean cosine"] == pytest.approx(mean, abs=1e-5)


def test_which_matrices_of_a_checkpoint():
    weights = {"embed": normal(9, 3), "wide": normal(3, 9), "bias": normal(9)}
    assert overlaps(weights)["tensor"] == "embed"
    assert [row["tensor"] for row in overlaps(weights, pattern="*").table] == ["embed", "wide"]
    with pytest.raises(Error, match="no matrix has more rows"):
        overlaps({"wide": normal(3, 9)})


def test_what_cannot_be_told_is_none(tmp_path):
    pytest.importorskip("matplotlib")
    bad = overlaps({"n": torch.tensor([[1.0, math.nan], [1.0, 2.0]]), "z": torch.zeros(3, 2)}, pattern="*")
    assert [row["mean squared cosine"] for row in bad.table] == [None, None]
    assert overlaps(torch.ones(1, 2)).table[0]["bound"] is None
    assert bad.save(tmp_path / "r.html").exists()


def test_a_length_is_counted_once():
    line = overlaps(2.0 * torch.eye(5)).plots[1].lines[0]
    assert sum(line.y) == 5
    assert line.x[0] == pytest.approx(2.0, rel=0.1)


def test_many_runs_of_rows_say_the_same(monkeypatch):
    matrix = normal(300, 6)
    expected = overlaps(matrix).table[0]
    monkeypatch.setattr(_lazy, "UNIT", 60)  # 30 of them, more than are added up at once
    found = overlaps(matrix, threads=2).table[0]
    for key in ("length", "spread", "mean cosine", "mean squared cosine"):
        assert found[key] == pytest.approx(expected[key], abs=1e-7), key
