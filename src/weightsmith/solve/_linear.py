"""Linear programs, and the flattest distribution within linear bounds.

Among the points of a polytope that are distributions, the one of greatest entropy is unique. It spreads
its mass over everything that the bounds do not forbid, so copies of a thing share what the thing had.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from weightsmith.errors import Error, missing

Array = NDArray[numpy.float64]

_STEEPEST = 1e-11  # weight of the barrier at which a bound counts as met exactly
_LARGEST = 1e5  # of a coefficient in the cone: probabilities below its inverse count as nothing


def linear_program(
    costs: Any,
    *,
    at_most: tuple[Any, Any] | None = None,
    equal: tuple[Any, Any] | None = None,
    bounds: Any = (0, None),
    purpose: str = "a linear program",
) -> tuple[Array, float]:
    r"""The vertex that costs least.

    .. math:: \min_x c^\top x \quad \text{with} \quad A x \le b, \; E x = d, \; l \le x \le u

    Args:
        costs: ``[n]``.
        at_most: ``(A [m, n], b [m])``.
        equal: ``(E [e, n], d [e])``.
        bounds: one pair for all, or a pair each; None is no bound.
        purpose: who needs it, for the error's text.

    Returns:
        ``x`` and what it costs.

    Raises:
        Error: no point meets the bounds, or the costs have no least value.
        MissingPackage: scipy is not installed.

    >>> linear_program([-1.0, -2.0], equal=([[1.0, 1.0]], [1.0]))[0].tolist()
    [0.0, 1.0]
    """
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise missing("scipy", "inspect", purpose) from None
    upper, total = at_most or (None, None), equal or (None, None)
    found = linprog(costs, A_ub=upper[0], b_ub=upper[1], A_eq=total[0], b_eq=total[1], bounds=bounds, method="highs")
    if found.status:
        raise Error(f"{purpose}: the linear program has no solution ({found.message.strip()})")
    return numpy.asarray(found.x, float), float(found.fun)


def max_entropy(bound: Any, limit: Any, purpose: str = "a distribution of greatest entropy") -> Array:
    r"""The distribution of greatest entropy within linear bounds.

    .. math:: \max_p -\sum_i p_i \log p_i \quad \text{with} \quad G p \le h, \; p \ge 0, \; \sum_i p_i = 1

    What every feasible point leaves at nothing (a probability, the slack of a bound) is found first, by one linear
    program over the cone of feasible points; the rest has an interior, in which a barrier method is exact.

    Args:
        bound: ``G [m, n]``; may have no rows.
        limit: ``h [m]``.

    Returns:
        ``[n]``.

    Raises:
        Error: no distribution meets the bounds.
        MissingPackage: scipy is not installed.

    >>> max_entropy([[1.0, 0.0, 0.0]], [0.2]).round(6).tolist()
    [0.2, 0.4, 0.4]
    """
    bound, limit = numpy.asarray(bound, float), numpy.asarray(limit, float)
    if bound.ndim != 2 or len(bound) != len(limit):
        raise Error(f"{purpose}: bounds {list(bound.shape)} and limits {list(limit.shape)} are not [m, n] and [m]")
    start, slack = _inside(bound, limit, purpose)
    support, loose = start > 0, slack > 0
    inner, tight = bound[loose][:, support], bound[~loose][:, support]
    equal = numpy.vstack([numpy.ones((1, int(support.sum()))), tight])
    found = numpy.zeros(len(support))
    found[support] = _flattest(start[support], inner, limit[loose], equal)
    return found / found.sum()


def _inside(bound: Array, limit: Array, purpose: str) -> tuple[Array, Array]:
    """A feasible point and its slacks in which everything is positive that can be."""
    rows, columns = bound.shape
    total = rows + columns
    # Over (x [n], s [m], t, u [n + m]): G x + s = h t, sum x = t, u <= (x, s), u <= 1, most u.
    size = total + 1 + total
    equal = numpy.zeros((rows + 1, size))
    equal[:rows, :columns], equal[:rows, columns:total] = bound, numpy.eye(rows)
    equal[:rows, total] = -limit
    equal[rows, :columns], equal[rows, total] = 1, -1
    at_most = numpy.zeros((total, size))
    at_most[:, :total], at_most[:, total + 1 :] = -numpy.eye(total), numpy.eye(total)
    costs = numpy.concatenate([numpy.zeros(total + 1), -numpy.ones(total)])
    bounds = [(0, _LARGEST)] * total + [(1, _LARGEST)] + [(0, 1)] * total
    point, _ = linear_program(
        costs, at_most=(at_most, numpy.zeros(total)), equal=(equal, numpy.zeros(rows + 1)), bounds=bounds,
        purpose=purpose,
    )  # fmt: skip
    scale, some = point[total], point[total + 1 :] > 0.5
    point = numpy.where(some, point[:total] / scale, 0.0)
    return point[:columns], point[columns:]


def _flattest(point: Array, bound: Array, limit: Array, equal: Array) -> Array:
    """Newton's method in the null space of the equalities, with a barrier on the bounds that vanishes."""
    _, sizes, rows = numpy.linalg.svd(equal)
    free = rows[int((sizes > 1e-9 * sizes.max()).sum()) :].T  # [n, directions]
    weight = 1.0 if len(limit) else 0.0
    while free.shape[1]:
        point = _centred(point, bound, limit, free, weight)
        if weight <= _STEEPEST:
            break
        weight *= 0.1
    return point


def _centred(point: Array, bound: Array, limit: Array, free: Array, weight: float) -> Array:
    def value(at: Array) -> float:
        slack = limit - bound @ at
        if (at <= 0).any() or (slack <= 0).any():
            return numpy.inf
        return float((at * numpy.log(at)).sum() - weight * numpy.log(slack).sum())

    for _ in range(100):
        slack = limit - bound @ point
        # Newton's step as least squares, whose matrix is the root of the curvature: half of the digits are kept.
        root = numpy.sqrt(point)
        matrix = numpy.vstack([free / root[:, None], math.sqrt(weight) * (bound @ free) / slack[:, None]])
        pull = numpy.concatenate([root * (numpy.log(point) + 1), numpy.full(len(slack), math.sqrt(weight))])
        step = -numpy.linalg.lstsq(matrix, pull, rcond=None)[0]
        decrement = -float(pull @ (matrix @ step))
        if decrement < 1e-20:
            break
        now, length, direction = value(point), 1.0, free @ step
        while value(point + length * direction) > now - 0.25 * length * decrement and length > 1e-12:
            length /= 2
        if length <= 1e-12:
            break
        point = point + length * direction
    return point
