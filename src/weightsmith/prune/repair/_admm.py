"""Fit what is left and choose what goes by turns, with one inverse for the whole layer.

Weights that fit the outputs best are not sparse, and sparse ones do not fit best. Two copies of the weights, one for
each wish, are drawn together by what they still disagree on (the alternating direction method of multipliers). Each
step is one product with a matrix that all rows share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune._select import kept_of_groups
from weightsmith.prune.repair._parts import Budget, Problem, chosen, lowest, posed
from weightsmith.solve import cholesky


@card(
    paper="Boža 2024, 'Fast and Effective Weight Update for Pruned Large Language Models'",
    covers=("admm-pruning",),
    needs=("stats.gram",),
    unit="tensor",
    claim="the outputs of a layer change less than with Wanda or magnitude at the same sparsity",
    departs="inputs that were always zero go first",
)
def admm(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
    *,
    sparsity: float | str | None = None,
    steps: int = 20,
    choosing: int = 15,
    rho: float = 1.0,
    damp: float = 0.1,
    shrink: float = 0.0,
) -> Tensor:
    r"""Weights with a mask that give nearly the same outputs, by turns of fitting and masking.

    .. math:: Z \leftarrow M \odot (W + U), \quad U \leftarrow U + W - Z, \quad
        W \leftarrow \left(W_0 H + \rho (Z - U)\right) (H + \rho I)^{-1}

    with all inputs brought to norm 1 before and back after, and ``damp`` added to the diagonal that is then 1. Where
    no mask is given, it keeps the largest :math:`|W + U|` in each of the first ``choosing`` steps; the share that
    goes grows as :math:`s (1 - (1 - t / T)^3)`. At norm 1 that is the score of `weightsmith.prune.wanda` at first.

    Args:
        weight: ``[out, in]``, before pruning.
        gram: ``[in, in]`` or blocks ``[in / b, b, b]`` (`weightsmith.stats.gram`).
        mask: ``[out, in]``, true for what is kept; or None where ``sparsity`` is given.
        sparsity: the share to remove of the whole matrix, or a pattern such as ``"2:4"``.
        steps: of both turns together; for a mask that stands, more of them come ever closer to `least_squares`.
        choosing: steps in which the mask is chosen anew.
        rho: how strongly the copies are drawn together.
        damp: what is added to the diagonal of the Gram matrix, as a share of it.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1.

    Returns:
        ``[out, in]`` in the dtype of ``weight``, exact zeros where the mask is false. Memory: the Gram matrix
        three times in float64, then the weight eight times.

    Raises:
        Error: neither a mask nor a sparsity, or both; shapes that do not fit; NaN; options out of their range.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> admm(torch.tensor([[1.0, 1.0]]), gram, torch.tensor([[False, True]]), damp=0, steps=60)
    tensor([[0.0000, 1.5000]])
    """
    if steps < 1 or not rho > 0 or not 0 <= choosing <= steps or not damp >= 0:
        raise Error(
            f"admm needs at least 1 step, choosing from 0 to steps, rho above 0 and damp from 0; got {steps=}, "
            f"{choosing=}, {rho=}, {damp=}"
        )
    problem = posed("admm", weight, gram, mask, sparsity, damp=0.0, shrink=shrink, chooses=True)
    keep: Any = problem.mask
    budget, dead = problem.budget, problem.dead
    now, wanted, inverse, norm = _brought_to_norm_one(problem, rho, damp)
    del problem  # and its matrix
    apart: Tensor = torch.zeros_like(now)
    for step in range(steps):
        both = now.add_(apart)
        if budget is not None and (step < choosing or keep is None):
            score = both.abs().masked_fill_(dead, 0)
            keep = ramped(score, budget, (step + 1) / choosing if choosing else 1.0)
            del score
        apart.copy_(both).masked_fill_(keep, 0)
        now = (both.sub_(apart, alpha=2).mul_(rho).add_(wanted)) @ inverse  # both - 2 apart is Z - U
    return now.add_(apart).masked_fill_(~keep, 0).div_(norm).to(weight.dtype)


def _brought_to_norm_one(problem: Problem, rho: float, damp: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights, their product with the matrix, the inverse of what all steps share, and the norms of the inputs."""
    norm = problem.matrix.diagonal().sqrt()
    matrix = problem.matrix.div_(norm).div_(norm[:, None])
    matrix.diagonal().add_(damp)
    norm = norm.to(problem.weight.dtype)
    now = problem.weight * norm
    wanted = (now.to(matrix.dtype) @ matrix).to(now.dtype)
    matrix.diagonal().add_(rho)
    return now, wanted, torch.cholesky_inverse(cholesky(matrix)).to(now.dtype), norm


def ramped(score: Tensor, budget: Budget, progress: float) -> Tensor:
    """The mask on the way to a budget: what goes first goes soon, and of the last little goes at a time.

    Of a pattern, what it keeps at this moment is safe, and of the rest the lowest go.
    """
    part = 1 - (1 - progress) ** 3
    if not isinstance(budget, tuple):
        return chosen(score, budget * part)
    safe = kept_of_groups(score, keep=budget[0], group=budget[1])
    share = 1 - budget[0] / budget[1]
    return ~lowest(score.masked_fill(safe, torch.inf), round(share * part * score.numel()))
