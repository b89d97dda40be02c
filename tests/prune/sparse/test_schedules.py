"""Shares removed and exchanged along a run."""

from __future__ import annotations

import itertools
import math

import pytest

from weightsmith.prune.sparse import cosine, cubic


def test_cubic_is_the_formula_and_stays_at_its_ends():
    for step in range(10, 21):
        expected = 0.9 + (0.5 - 0.9) * (1 - (step - 10) / 10) ** 3
        assert cubic(step, 0.5, 0.9, 10, 20) == pytest.approx(expected, abs=1e-12)
    assert cubic(3, 0.5, 0.9, 10, 20) == 0.5
    assert cubic(33, 0.5, 0.9, 10, 20) == 0.9


def test_cubic_takes_most_away_at_first():
    shares = [cubic(step, 0, 0.9, 0, 10) for step in range(11)]
    steps = [b - a for a, b in itertools.pairwise(shares)]
    assert steps == sorted(steps, reverse=True)


def test_cosine_falls_from_its_amount_to_nothing():
    for step in range(5, 26):
        assert cosine(step, 0.3, 5, 25) == pytest.approx(0.15 * (1 + math.cos(math.pi * (step - 5) / 20)), abs=1e-12)
    assert cosine(0, 0.3, 5, 25) == 0.3
    assert cosine(99, 0.3, 5, 25) == pytest.approx(0.0, abs=1e-12)
