"""Mixtures of linear experts that are few enough numbers to be plain tensors.

Each expert predicts a number by a line with Gaussian noise, and a softmax gate says by the input how likely each
expert is. They are what `reduce_mixture` takes and gives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.errors import Error

RIDGE = 1e-6
"""Share of a unit example that each gate is pulled to zero with, so that gates of separable data stay finite."""

NEWTON_STEPS, HALVINGS = 50, 30


class Mixture(NamedTuple):
    r"""``p(y | x) = sum_k softmax_k(gates [x, 1]) N(y; experts_k [x, 1], variances_k)``.

    Leading dimensions stand for several mixtures side by side.
    """

    gates: Tensor
    """``[..., k, features + 1]``, the constant last."""
    experts: Tensor
    """``[..., k, features + 1]``, the constant last."""
    variances: Tensor
    """``[..., k]``, positive."""


def with_one(features: Tensor) -> Tensor:
    """``[n, d]`` with a column of ones as the last, in float64."""
    if features.dim() != 2:
        raise Error(f"features are [n, d], got {list(features.shape)}")
    return torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], dim=1)


def expected(mixture: Mixture, features: Tensor) -> Tensor:
    r"""What a mixture predicts, ``[..., n]``: :math:`\sum_k \pi_k(x)\, \mu_k(x)`.

    >>> one = Mixture(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.ones(2))
    >>> expected(one, torch.tensor([[5.0]]))                    # two constants, equally likely
    tensor([2.], dtype=torch.float64)
    """
    rows = with_one(features)
    shares = (mixture.gates.double() @ rows.T).softmax(-2)
    return (shares * (mixture.experts.double() @ rows.T)).sum(-2)


def log_likelihood(mixture: Mixture, features: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the density ``[..., n]`` that a mixture gives each target ``[n]``."""
    return _joint(mixture, with_one(features), targets.double()).logsumexp(-2)


def _joint(mixture: Mixture, rows: Tensor, targets: Tensor) -> Tensor:
    """``log pi_k(x) N(y; mu_k(x), v_k)``: ``[..., k, n]``."""
    variances = mixture.variances.double()[..., None]
    distances = (targets - mixture.experts.double() @ rows.T).square()
    densities = -0.5 * (math.log(2 * math.pi) + variances.log() + distances / variances)
    return (mixture.gates.double() @ rows.T).log_softmax(-2) + densities


def fit(features: Tensor, targets: Tensor, count: int, *, steps: int = 100, starts: int = 5, seed: int = 0) -> Mixture:
    """A mixture of ``count`` experts by expectation maximisation: what each machine does with its own data.

    Args:
        features: ``[n, d]``, best of unit size.
        targets: ``[n]``.
        count: of experts.
        steps: at most.
        starts: random ones; that of the highest likelihood counts.
        seed: of the starts.

    Returns:
        Mixture: float64.

    Raises:
        ValueError: fewer examples than experts, or shapes that do not fit.
    """
    if targets.shape != features.shape[:1] or not 0 < count <= len(targets):
        raise Error(f"fit needs features [n, d], targets [n] and n >= {count}, got {list(features.shape)}"
                    f" and {list(targets.shape)}")  # fmt: skip
    rows, goals = with_one(features), targets.double()
    generator = torch.Generator().manual_seed(seed)
    best, highest = None, -math.inf
    for _ in range(starts):
        centres = torch.randperm(len(goals), generator=generator)[:count].to(rows.device)
        points = torch.cat([rows, goals[:, None] / goals.std(correction=0).clamp(min=1e-12)], dim=1)
        shares = torch.nn.functional.one_hot(torch.cdist(points, points[centres]).argmin(1), count).double()
        gates, before = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device), -math.inf
        for _ in range(steps):
            gates = softmax_regression(rows, shares, gates)
            mixture = Mixture(gates, *_experts(rows, goals, shares))
            joint = _joint(mixture, rows, goals)
            height = float(joint.logsumexp(0).sum())
            if best is None or height > highest:
                best, highest = mixture, height
            if height - before < 1e-8 * len(goals):
                break
            shares, before = joint.softmax(0).T, height
    assert best is not None
    return best


def _experts(rows: Tensor, goals: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    floor = 1e-4 * goals.var(correction=0).clamp(min=1e-12)  # an expert of one example must not be infinitely sure
    experts = least_squares(rows, shares, shares * goals[:, None])
    errors = (goals[:, None] - rows @ experts.T).square()
    return experts, ((shares * errors).sum(0) / shares.sum(0).clamp(min=1e-12)).clamp(min=floor)


def least_squares(rows: Tensor, weight: Tensor, weighted: Tensor) -> Tensor:
    """``[k, d]`` that minimise ``sum_n weight[n, k] (target[n, k] - rows[n] b_k)^2``.

    Args:
        rows: ``[n, d]``.
        weight: ``[n, k]``, not negative.
        weighted: ``[n, k]``, weight times target.
    """
    grams = torch.einsum("nk,ni,nj->kij", weight, rows, rows)
    return (torch.linalg.pinv(grams, hermitian=True) @ (rows.T @ weighted).T[..., None]).squeeze(-1)


def softmax_regression(rows: Tensor, shares: Tensor, start: Tensor | None = None) -> Tensor:
    """Gates ``[k, d]`` whose softmax comes nearest to ``shares [n, k]`` in cross-entropy, by Newton's method.

    Shifts of all gates by one vector change nothing; the gates returned sum to zero.
    """
    count, width = shares.shape[1], rows.shape[1]
    gates = rows.new_zeros(count, width) if start is None else start
    pull = RIDGE * len(rows)

    def height(at: Tensor) -> Tensor:
        return -(shares * (rows @ at.T).log_softmax(1)).sum() + 0.5 * pull * at.square().sum()

    value = height(gates)
    for _ in range(NEWTON_STEPS):
        found = (rows @ gates.T).softmax(1)
        totals = shares.sum(1, keepdim=True)
        slope = (totals * found - shares).T @ rows + pull * gates
        diagonal = torch.diag_embed(totals * found) - totals[..., None] * found[:, :, None] * found[:, None, :]
        curvature = torch.einsum("nkl,ni,nj->kilj", diagonal, rows, rows).reshape(count * width, count * width)
        curvature.diagonal().add_(pull)
        move = torch.linalg.solve(curvature, slope.flatten()).reshape(count, width)
        for _ in range(HALVINGS):
            lower = height(gates - move)
            if lower <= value:
                break
            move = move / 2
        else:
            break
        gates, gain, value = gates - move, value - lower, lower
        if gain <= 1e-12 * (1 + value.abs()):
            break
    return gates - gates.mean(0)
