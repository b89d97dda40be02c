"""The nearest point of a polyhedron: optimality conditions, projections that are known, and no point at all."""

from __future__ import annotations

import numpy
import pytest

from weightsmith.errors import Error
from weightsmith.solve import least_distance


@pytest.mark.parametrize("shape", [(3, 8), (12, 4), (30, 3), (5, 5)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_conditions_of_the_least(shape: tuple[int, int], scale: float):
    rng = numpy.random.default_rng(sum(shape))
    bound, inside, origin = rng.normal(size=shape) * scale, rng.normal(size=shape[1]), rng.normal(size=shape[1])
    limit = bound @ inside - scale * rng.uniform(0, 0.5, size=shape[0])  # so that a point exists
    point, multipliers = least_distance(bound, limit, origin)
    slack = (bound @ point - limit) / scale
    assert slack.min() > -1e-8
    assert multipliers.min() >= 0
    assert numpy.allclose(origin + bound.T @ multipliers, point, atol=1e-8)
    assert numpy.abs(multipliers * scale * slack).max() < 1e-7


def test_known_projections():
    point, _ = least_distance([[3.0, 4.0]], [10.0])
    assert numpy.allclose(point, [1.2, 1.6])
    inside = numpy.array([5.0, 5.0])
    point, multipliers = least_distance([[1.0, 0.0]], [1.0], inside)
    assert numpy.array_equal(point, inside)
    assert multipliers.tolist() == [0.0]


def test_no_point():
    with pytest.raises(Error, match=r"needs constraints \[m, n\]"):
        least_distance([[1.0, 0.0], [0.0, 1.0]], [1.0])
    with pytest.raises(Error, match="not all finite"):
        least_distance([[numpy.nan, 0.0]], [1.0])
    with pytest.raises(Error, match="no point meets all 1"):
        least_distance([[0.0, 0.0]], [1.0])
    assert least_distance(numpy.zeros((0, 2)), [])[0].tolist() == [0, 0]
    with pytest.raises(Error, match="no point meets all 2"):
        least_distance([[1.0, 0.0], [-1.0, 0.0]], [1.0, 1.0])
