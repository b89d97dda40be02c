"""Mixtures that were fitted on many machines become one, without the data and in one exchange.

The average of the machines' mixtures is a mixture of far too many experts. The nearest mixture of few experts is
found as in clustering: each of the many experts is moved to the one of the few that costs it least, and each of
the few becomes the centre of what was moved to it. Only inputs are needed, no targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import shares
from weightsmith.merge.moe._gaussian import Mixture, least_squares, softmax_regression, with_one

Assignment = Literal["input", "component"]


class Reduced(NamedTuple):
    """A mixture, and how far the average of the machines' mixtures is from it."""

    mixture: Mixture
    divergence: float
    """The mean over the inputs of what it costs to move the many experts to the few."""


@card(
    paper="Chamroukhi, Pham 2023, 'Distributed Learning of Mixtures of Experts'",
    covers=("distributed-learning-mixtures-experts",),
    needs=("data",),
    unit="model",
    claim="predicts about as well as one mixture fitted on all data",
    departs="starts from the experts of each machine in turn, not from random clusters of experts; the gate is "
    "fitted to where the plan moves the machines' gates, without targets",
)
def reduce_mixture(
    mixtures: Mixture,
    features: Tensor,
    *,
    weight: float | Sequence[float] | None = None,
    assignment: Assignment = "input",
    steps: int = 200,
    starts: int = 10,
) -> Reduced:
    r"""One mixture of k experts that is nearest to the average of m mixtures of k experts.

    .. math:: \min_{g}\; \mathbb E_x \sum_{l=1}^{mk} \hat\pi_l(x) \min_{j \le k}
        \mathrm{KL}\bigl(N(\hat\mu_l(x), \hat v_l) \,\|\, N(\mu_j(x), v_j)\bigr), \qquad
        \hat\pi_l = a_i\, \pi_{il}

    Every step moves each expert to the nearest, and refits: a weighted least-squares fit of the means, the mean of
    noise and distance for the variance. No step raises the divergence. The gate is the softmax regression of what
    was moved to each expert.

    Args:
        mixtures: of m machines: gates and experts ``[m, k, d + 1]``, variances ``[m, k]``.
        features: ``[n, d]``, inputs that stand for all data.
        weight: :math:`a_i`, one number >= 0 a machine, such as its examples; all equal by default.
        assignment: whether an expert may move to another at every ``"input"`` (the paper's), or moves as a whole
            to the one that is nearest on average (``"component"``).
        steps: at most, from each start.
        starts: at most; start i is the experts of machine i, and the end of least divergence counts.

    Returns:
        Reduced: the mixture, float64, its experts ordered by their mean prediction, and its divergence. The order
        of experts within a machine makes no difference.

    Raises:
        ValueError: no machine, shapes that do not fit, variances that are not positive, or negative weights.

    >>> experts = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[-1.0, 0.2], [1.0, 0.2]]])      # the same two, swapped
    >>> machines = Mixture(torch.zeros(2, 2, 2), experts, torch.ones(2, 2))
    >>> reduce_mixture(machines, torch.tensor([[1.0], [2.0]])).mixture.experts.round(decimals=2)
    tensor([[-1.0000,  0.1000],
            [ 1.0000,  0.1000]], dtype=torch.float64)
    """
    given = _checked(mixtures, features, weight, assignment)
    if steps < 1 or starts < 1:
        raise Error(f"reduce_mixture needs steps >= 1 and starts >= 1, got {steps} and {starts}")
    rows = with_one(features)
    local = ordered(Mixture(*(part.double() for part in mixtures)), rows)
    machines = len(local.variances)
    # The average of all: [n, m k].
    likely = (torch.einsum("mkd,nd->nmk", local.gates, rows).softmax(-1) * given[:, None]).flatten(1)
    many = Mixture(*(part.flatten(0, 1) for part in local))
    best: tuple[Mixture, Tensor, float] | None = None
    for machine in range(min(starts, machines)):
        few = Mixture(*(part[machine] for part in local))
        before = math.inf
        for _ in range(steps):
            plan, divergence = transport(many, few, likely, rows, assignment)
            if best is None or divergence < best[2]:
                best = (few, plan, divergence)
            if not divergence < before - 1e-12 * (1 + abs(divergence)):
                break
            few, before = barycentres(many, few, plan, rows), divergence
    assert best is not None
    few, plan, divergence = best
    moved = plan.sum(1)
    few = few._replace(gates=softmax_regression(rows, moved / moved.sum(1, keepdim=True)))
    return Reduced(ordered(few, rows), divergence)


def transport(
    many: Mixture, few: Mixture, likely: Tensor, rows: Tensor, assignment: Assignment
) -> tuple[Tensor, float]:
    """The cheapest plan ``[n, many, few]`` that moves all of ``likely [n, many]``, and its mean cost."""
    cost = costs(many, few, rows)
    scale = cost if assignment == "input" else (likely[..., None] * cost).mean(0, keepdim=True).expand_as(cost)
    target = torch.nn.functional.one_hot(scale.argmin(-1), cost.shape[-1])
    plan = likely[..., None] * target
    return plan, float((plan * cost).sum() / len(rows))


def costs(many: Mixture, few: Mixture, rows: Tensor) -> Tensor:
    """Kullback-Leibler divergences ``[n, many, few]`` of the experts' Gaussians at every input."""
    means, centres = rows @ many.experts.T, rows @ few.experts.T
    distances = (means[:, :, None] - centres[:, None, :]).square()
    ratio = many.variances[:, None] / few.variances
    return 0.5 * (ratio - ratio.log() - 1 + distances / few.variances)


def barycentres(many: Mixture, few: Mixture, plan: Tensor, rows: Tensor) -> Mixture:
    """The experts of least cost under a plan. One to which nothing is moved stays where it was."""
    means = rows @ many.experts.T
    moved = plan.sum(1)
    experts = least_squares(rows, moved, torch.einsum("nlk,nl->nk", plan, means))
    distances = (means[:, :, None] - (rows @ experts.T)[:, None, :]).square() + many.variances[:, None]
    total = moved.sum(0)
    variances = (plan * distances).sum((0, 1)) / total.clamp(min=torch.finfo(total.dtype).tiny)
    there = total > 0
    return Mixture(
        few.gates, torch.where(there[:, None], experts, few.experts), torch.where(there, variances, few.variances)
    )


def ordered(mixture: Mixture, rows: Tensor) -> Mixture:
    """Each mixture's experts from the lowest mean prediction to the highest."""
    order = (mixture.experts @ rows.mean(0)).argsort(dim=-1, stable=True)
    return Mixture(
        mixture.gates.take_along_dim(order[..., None], -2),
        mixture.experts.take_along_dim(order[..., None], -2),
        mixture.variances.take_along_dim(order, -1),
    )


def _checked(
    mixtures: Mixture, features: Tensor, weight: float | Sequence[float] | None, assignment: Assignment
) -> Tensor:
    gates, experts, variances = mixtures
    if experts.dim() != 3 or gates.shape != experts.shape or variances.shape != experts.shape[:2] or not len(experts):
        raise Error(
            "reduce_mixture needs gates and experts [m, k, d + 1] and variances [m, k] of at least 1 machine, got "
            f"{list(gates.shape)}, {list(experts.shape)} and {list(variances.shape)}"
        )
    if features.dim() != 2 or not len(features) or features.shape[1] + 1 != experts.shape[2]:
        raise Error(f"reduce_mixture needs features [n, {experts.shape[2] - 1}], got {list(features.shape)}")
    if not (variances > 0).all() or not all(part.isfinite().all() for part in mixtures):
        raise Error("reduce_mixture needs positive variances and finite gates and experts")
    if assignment not in get_args(Assignment):
        raise Error(f"assignment is one of {', '.join(get_args(Assignment))}; got {assignment!r}")
    given = shares(weight, len(experts), normalize=True)
    if min(given) < 0:
        raise Error(f"reduce_mixture needs weights that are not negative, got {given}")
    return torch.tensor(given, dtype=torch.float64, device=experts.device)
