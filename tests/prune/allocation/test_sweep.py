"""Sweeps of sparsity and their knees."""

from __future__ import annotations

import math

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import knee, sweep


def test_knee_of_a_broken_line_and_its_laws():
    places = [0.0, 0.1, 0.4, 0.6, 0.9, 1.0]
    harms = [max(0.0, place - 0.6) * 10 for place in places]
    assert knee(places, harms) == 3
    assert knee(places, [7 + 3 * harm for harm in harms]) == 3
    assert knee(places, [harm + 5 * place for place, harm in zip(places, harms, strict=True)]) == 3
    assert knee([0, 1, 2, 3], [0, 0, 0, 0]) == 1  # the first of equals
    assert knee([0, 1, 2], [0, 9, 1]) == 1  # the ends are no knee


def test_knees_that_are_none():
    for places, harms, words in (
        ([0, 1], [0, 1], "at least 3 points"),
        ([0, 1, 2], [0, 1], "at least 3 points"),
        ([0, 2, 1], [0, 1, 2], "places that rise"),
        ([0, 1, 2], [0, float("inf"), 2], "finite harms"),
    ):
        with pytest.raises(Error, match=words):
            knee(places, harms)


def test_a_sweep():
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0]])
    weights = {"a.weight": weight, "b.bias": torch.ones(3)}

    def quality(pruned: ws.Weights) -> float:
        return -float((pruned["a.weight"] - weight).square().sum())

    found = sweep(weights, quality, (0.25, 0.5, "2:4", 0.75, 1.0))
    assert found["asked"] == ["whole", 0.25, 0.5, "2:4", 0.75, 1.0]
    assert found["sparsity"] == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]
    lost = [0, 0.05, 0.3, 61.05, 61.3, 174.3]
    assert found["quality"] == pytest.approx([-value for value in lost])
    assert found["knee"] == 0.5
    assert found["quality at the knee"] == pytest.approx(-0.3)
    assert found["loss before"] == pytest.approx(0.3 / 0.5)
    assert found["loss after"] == pytest.approx(174 / 0.5)
    by_tensor = sweep(weights, quality, (0.5,), method=lambda w, s: ws.prune.magnitude(w, s, scope="row"))
    assert by_tensor["quality"] == pytest.approx([0.0, -61.05])
    assert "knee" not in by_tensor.figures
    # Shares that come to the same count once, and what has no quality left is no end of the curve.
    twice = sweep(weights, lambda w: quality(w) / bool(w["a.weight"].any()) if bool(w["a.weight"].any()) else -math.inf,
                  (0.0, 0.25, 0.5, 0.5, 0.75, 1.0))  # fmt: skip
    assert len(twice["quality"]) == 7
    assert twice["knee"] == 0.5
    assert twice["loss after"] == pytest.approx(61 / 0.25)
    half = ws.prune.magnitude(weights, 0.5)
    assert sweep(half, quality, (0.25, 0.75, 1.0))["knee"] == 0.75  # a quarter removes nothing more
    with pytest.raises(Error, match="at least 1 sparsity"):
        sweep(weights, quality, ())
