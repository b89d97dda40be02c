"""Which few of many to choose, when choices help or harm each other.

The best of a pair is not the pair of the best. Starting from some choice, one that is in is swapped for one that is
out, always the best such pair, and a swap that was just made may not be taken back for a while (tabu search), so the
search climbs out of a choice that no single swap improves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.solve._seeds import generator_for


def binary_quadratic(
    matrix: Tensor,
    linear: Tensor,
    ones: int,
    *,
    start: Tensor | None = None,
    restarts: int = 1,
    steps: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, float]:
    r"""The best choice of a fixed number, as far as swaps find it.

    .. math:: \min_{x \in \{0, 1\}^n} x^\top A x + b^\top x \quad \text{with} \quad \sum_i x_i = k

    Each step looks at all :math:`k (n - k)` swaps at once. What comes out is never worse than ``start``, and no single
    swap betters it. On small problems it is the optimum in practice, but nothing proves it.

    Args:
        matrix: A, ``[n, n]`` symmetric.
        linear: b, ``[n]``.
        ones: k, how many are chosen.
        start: ``[n]`` boolean, a choice of k to begin with; by default the k with the least ``b + diag(A)``.
        restarts: how many further searches begin at random choices.
        steps: swaps in each search after which it ends if nothing better was found; by default 16 and twice the root
            of n.
        seed: of the random choices.

    Returns:
        ``[n]`` boolean, and the value of the sum, computed in float64.

    Raises:
        Error: shapes that do not fit, a matrix that is not symmetric or finite, or a start without k ones.

    >>> matrix = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # the best two harm each other
    >>> binary_quadratic(matrix, torch.tensor([-3.0, -2.0, -1.0]), 2)
    (tensor([ True, False,  True]), -4.0)
    """
    size = len(linear)
    if linear.dim() != 1 or matrix.shape != (size, size):
        raise Error(
            f"a binary quadratic program is of [n, n] and [n], got {list(matrix.shape)} and {list(linear.shape)}"
        )
    if not 0 <= ones <= size:
        raise Error(f"{ones} of {size} cannot be chosen")
    pairs, singles = matrix.double(), linear.double() + matrix.diagonal().double()
    if not pairs.isfinite().all() or not singles.isfinite().all():
        raise Error("a binary quadratic program needs finite numbers")
    if not torch.allclose(pairs, pairs.T, rtol=1e-4, atol=1e-6 * max(float(pairs.abs().amax()), 1e-300) if size else 0):
        raise Error("the matrix of a binary quadratic program must be symmetric")
    pairs = (pairs + pairs.T) / 2
    pairs.fill_diagonal_(0)  # x_i^2 = x_i: the diagonal is in the linear part
    if start is None:
        start = _of(singles.argsort(stable=True)[:ones], size)
    elif start.shape != linear.shape or start.dtype != torch.bool or int(start.sum()) != ones:
        raise Error(f"the start of a binary quadratic program is [{size}] booleans of which {ones} are true")
    starts = [start]
    generator = generator_for(seed, "binary quadratic", size, ones)
    for _ in range(restarts if 0 < ones < size else 0):
        starts.append(_of(torch.randperm(size, generator=generator)[:ones].to(linear.device), size))
    patience = 16 + 2 * math.isqrt(size) if steps is None else steps
    found = [_searched(pairs, singles, one.to(linear.device), patience) for one in starts]
    return min(found, key=lambda pair: pair[1])


def _of(chosen: Tensor, size: int) -> Tensor:
    made = torch.zeros(size, dtype=torch.bool, device=chosen.device)
    made[chosen] = True
    return made


def _searched(pairs: Tensor, singles: Tensor, start: Tensor, patience: int) -> tuple[Tensor, float]:
    """The best choice met on a path of best swaps, and its value."""
    chosen, size, ones = start.clone(), len(start), int(start.sum())
    # What choosing i adds, with the others as they are: kept up to date, so that a step costs k (n - k) and no more.
    field = singles + 2 * (pairs @ chosen.to(pairs.dtype))
    value = float((singles[chosen]).sum() + pairs[chosen][:, chosen].sum())
    best, least, since = chosen.clone(), value, 0
    if not 0 < ones < size:
        return best, least
    tenure = max(1, math.isqrt(min(ones, size - ones)))
    free = torch.zeros(size, dtype=torch.long)  # the step from which on an element may move again
    step = 0
    tolerance = 1e-12 * max(float(field.abs().max()), 1e-300)
    while since <= patience and step < 100 * size:  # a bound that only rounding errors could reach
        inside, outside = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        change = field[outside][None, :] - field[inside][:, None] - 2 * pairs[inside][:, outside]
        held = (free[inside.cpu()] > step)[:, None] | (free[outside.cpu()] > step)[None, :]
        # A swap that is held is allowed where it leads to the best value so far.
        allowed = ~held.to(change.device) | (value + change < least - tolerance)
        if not allowed.any():
            free.clamp_(max=step)
            continue
        flat = int(change.masked_fill(~allowed, math.inf).argmin())
        out, into = int(inside[flat // len(outside)]), int(outside[flat % len(outside)])
        value += float(change.flatten()[flat])
        chosen[out], chosen[into] = False, True
        field += 2 * (pairs[into] - pairs[out])
        step += 1
        since += 1
        free[out] = free[into] = step + tenure
        if value < least - tolerance:
            best, least, since = chosen.clone(), value, 0
    return best, float(singles[best].sum() + pairs[best][:, best].sum())
