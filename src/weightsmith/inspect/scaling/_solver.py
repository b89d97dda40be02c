"""Least Huber loss of many small non-linear fits at once.

Starts, bootstraps and leave-one-out fits of one law differ in their starting points and in how often each run
counts; so they are rows of one batch. A step is Levenberg's and Marquardt's (damped normal equations). With an
outlier threshold far below the noise, the loss is nearly one of absolute values, and the usual reweighted
normal equations (an upper bound of the loss) crawl, while those of the runs inside the threshold (its exact second
derivative along the model's tangent) leap and may overshoot: both steps are tried, and the better one taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Residuals = Callable[[Tensor], Tensor]
"""``theta [b, p] -> residuals [b, n]``, float64; row by row, so that rows of theta may be anything."""

_STALLED = 6  # accepted steps in a row that gain nothing worth having
_WORTH = 1e-10  # of the objective


def huber(residuals: Tensor, delta: float) -> Tensor:
    """Half the square up to ``delta``, then a line of slope ``delta``.

    >>> huber(torch.tensor([0.5, -3.0]), delta=1.0)
    tensor([0.1250, 2.5000])
    """
    size = residuals.abs()
    return torch.where(size <= delta, residuals.square() / 2, delta * (size - delta / 2))


def objective(residuals: Tensor, counts: Tensor | None, delta: float) -> Tensor:
    """The **sum** of Huber losses, ``[b, n] -> [b]``; infinite where a residual is not finite.

    Summed, not averaged: a mean over runs makes every gradient n times smaller, and an optimizer that stops at a
    fixed gradient then stops early.
    """
    losses = huber(residuals, delta)
    if counts is not None:
        losses = torch.where(counts > 0, counts * losses, 0.0)
    total = losses.sum(dim=1)
    return torch.where(total.isfinite(), total, torch.inf)


def jacobian(residuals: Residuals, theta: Tensor) -> tuple[Tensor, Tensor]:
    """``residuals [b, n]`` and their derivatives ``[b, n, p]``, by forward differentiation."""
    columns, value = [], torch.empty(0)
    for index in range(theta.shape[1]):
        direction = torch.zeros_like(theta)
        direction[:, index] = 1
        with forward_ad.dual_level():
            value, along = forward_ad.unpack_dual(residuals(forward_ad.make_dual(theta, direction)))
        columns.append(torch.zeros_like(value) if along is None else along)
    return value, torch.stack(columns, dim=2)


def minimise(
    residuals: Callable[[Tensor, Tensor], Tensor],
    starts: Tensor,
    *,
    counts: Tensor | None = None,
    delta: float,
    steps: int = 300,
) -> tuple[Tensor, Tensor]:
    """Descend from every start to a local least of the summed Huber loss.

    Args:
        residuals: ``(theta [b, p], rows [b]) -> [b, n]``; ``rows`` says which rows of the batch are asked for, as
            those that have arrived are asked no more.
        starts: ``[b, p]`` float64.
        counts: ``[b, n]``, how often each run counts in each row; once each if None.
        delta: threshold of the Huber loss.
        steps: the most that are taken.

    Returns:
        ``[b, p]`` parameters and ``[b]`` objectives.
    """
    theta, damping = starts.clone(), torch.full((len(starts),), 1e-2, dtype=starts.dtype)
    stalled = torch.zeros(len(starts), dtype=torch.long)
    everyone = torch.arange(len(starts))
    value = objective(residuals(theta, everyone), counts, delta)
    for _ in range(steps):
        rows = everyone[value.isfinite() & (value > 1e-26) & (stalled < _STALLED) & (damping < 1e12)]
        if not len(rows):
            break
        some = None if counts is None else counts[rows]
        here, now = theta[rows], value[rows]
        proposals = _proposals(lambda at: residuals(at, rows), here, some, delta, damping[rows])  # noqa: B023
        new, gained = here, now
        for proposal in proposals:
            reached = objective(residuals(proposal, rows), some, delta)
            better = reached < gained
            new = torch.where(better[:, None], proposal, new)
            gained = torch.where(better, reached, gained)
        moved = gained < now
        theta[rows], value[rows] = new, gained
        damping[rows] = torch.where(moved, (damping[rows] / 4).clamp(min=1e-12), damping[rows] * 5)
        stalled[rows] = torch.where(moved & (now - gained > _WORTH * now), 0, stalled[rows] + moved.long())
    return theta, value


def _proposals(
    residuals: Residuals, theta: Tensor, counts: Tensor | None, delta: float, damping: Tensor
) -> list[Tensor]:
    """Where the two damped steps lead to, ``[b, p]`` each."""
    value, slopes = jacobian(residuals, theta)
    slopes = slopes.nan_to_num(0.0, 0.0, 0.0)
    once = torch.ones_like(value) if counts is None else counts
    value = torch.where(once > 0, value, 0.0)
    gradient = torch.einsum("bnp,bn->bp", slopes, once * value.clamp(-delta, delta))
    size = value.abs()
    bound = once * delta / size.clamp(min=delta)
    scale = torch.einsum("bnp,bn->bp", slopes.square(), bound)
    ridge = torch.diag_embed(damping[:, None] * (scale + 1e-12 * scale.amax(dim=1, keepdim=True) + 1e-300))
    found = []
    for weight in (bound, once * (size <= delta)):
        normal = torch.einsum("bnp,bn,bnq->bpq", slopes, weight, slopes) + ridge
        step, _ = torch.linalg.solve_ex(normal, -gradient)
        found.append(theta + step.nan_to_num(0.0, 0.0, 0.0).clamp(-20, 20))
    return found
