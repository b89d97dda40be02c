"""The point of a polyhedron that lies nearest to a given one.

The hard-margin support vector machine, projections onto half-spaces and minimum-norm solutions of inequalities are
all this one problem, and it is solved exactly in finitely many steps as a non-negative least-squares problem
(Lawson, Hanson 1974, 'Solving Least Squares Problems').
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from weightsmith.errors import Error, missing

Array = NDArray[numpy.float64]

_LEAST = 1e-12  # the residual that is left where a point exists; it falls with the square of its distance


def least_distance(
    constraints: Any, at_least: Any, origin: Any = None, purpose: str = "a least-distance problem"
) -> tuple[Array, Array]:
    r"""The nearest point that meets linear inequalities.

    .. math:: \min_x \tfrac12 \|x - o\|^2 \quad \text{with} \quad G x \ge h

    Args:
        constraints: ``G [m, n]``.
        at_least: ``h [m]``.
        origin: ``o [n]``; 0 by default.
        purpose: who needs it, for the error's text.

    Returns:
        ``x [n]``, and the multipliers ``a [m]``, not negative, with ``x = o + G' a``.

    Raises:
        Error: shapes that do not fit, values that are not finite; no point meets the inequalities, or only one about
            a million times farther away than any single one asks.
        MissingPackage: scipy is not installed.

    >>> point, multipliers = least_distance([[1.0, 0.0], [0.0, 1.0]], [1.0, -1.0])
    >>> point.round(9).tolist(), multipliers.round(9).tolist()
    ([1.0, 0.0], [1.0, 0.0])
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise missing("scipy", "inspect", purpose) from None
    bound = numpy.asarray(constraints, float)
    limit = numpy.asarray(at_least, float)
    start = numpy.zeros(bound.shape[1:]) if origin is None else numpy.asarray(origin, float)
    if bound.ndim != 2 or limit.shape != bound.shape[:1] or start.shape != bound.shape[1:]:
        raise Error(
            f"{purpose}: needs constraints [m, n], limits [m] and an origin [n]; got {list(bound.shape)}, "
            f"{list(limit.shape)} and {list(start.shape)}"
        )
    if not all(numpy.isfinite(one).all() for one in (bound, limit, start)):
        raise Error(f"{purpose}: constraints, limits and origin are not all finite numbers")
    needed = limit - bound @ start
    if not len(needed) or needed.max() <= 0:
        return start.copy(), numpy.zeros(len(limit))
    # Only the span of the constraints matters: as many coordinates as there are constraints, at most.
    basis, triangle = numpy.linalg.qr(bound.T)
    size = numpy.linalg.norm(bound, axis=1).max() or 1.0
    reach = needed.max()
    stacked = numpy.vstack([triangle / size, needed[None] / reach])
    target = numpy.zeros(len(stacked))
    target[-1] = 1
    try:
        share, _ = nnls(stacked, target, maxiter=30 * max(stacked.shape))
    except RuntimeError as error:
        raise Error(f"{purpose}: the solver gave up on {len(limit)} inequalities: {error}") from error
    left = stacked @ share - target
    if -left[-1] < _LEAST:
        raise Error(f"{purpose}: no point meets all {len(limit)} inequalities, or only one too far away for float64")
    multipliers = share / -left[-1] * reach / size**2
    return start + basis @ (triangle @ multipliers), multipliers
