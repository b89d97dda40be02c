"""Linear programs, and the flattest distribution: by the conditions that a solution meets."""

from __future__ import annotations

import numpy
import pytest

from weightsmith.errors import Error
from weightsmith.solve import linear_program, max_entropy


def test_linear_program():
    point, cost = linear_program([1.0, 1.0], at_most=([[-1.0, -2.0]], [-2.0]))
    assert (point.tolist(), cost) == ([0.0, 1.0], 1.0)
    with pytest.raises(Error, match="mine: the linear program has no solution"):
        linear_program([-1.0], purpose="mine")


def test_max_entropy_meets_its_conditions():
    generator = numpy.random.default_rng(0)
    for _ in range(10):
        bound = generator.normal(size=(4, 7))
        inside = generator.dirichlet(numpy.ones(7))
        limit = bound @ inside + generator.choice([0.0, 0.05, 1.0], 4)
        found = max_entropy(bound, limit)
        assert found.sum() == pytest.approx(1)
        assert (bound @ found <= limit + 1e-7).all()
        # No feasible direction raises the entropy: the best linear gain is none.
        slope = -(numpy.log(numpy.maximum(found, 1e-12)) + 1)
        _, cost = linear_program(-slope, at_most=(bound, limit + 1e-12), equal=(numpy.ones((1, 7)), [1.0]))
        assert -cost - slope @ found < 1e-5
    assert max_entropy(numpy.zeros((0, 3)), []).tolist() == pytest.approx([1 / 3] * 3)
    assert max_entropy([[-1.0, 0, 0]], [-1.0]).tolist() == pytest.approx([1, 0, 0])
    with pytest.raises(Error, match="not"):
        max_entropy([1.0, 0.0], [0.5, 0.5])
    with pytest.raises(Error, match="no solution"):
        max_entropy([[1.0, 1.0]], [0.5])
