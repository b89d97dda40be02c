"""Rank by ranks: on each task a system earns a point for every system that it beats.

Means of scores let the task with the widest scale decide. Ranks do not know the scale, and their sum is
never far from the order that disagrees least with all tasks (Kemeny), which is found exactly for few systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Report
from weightsmith.inspect.ranking._parts import (
    beats,
    competition_ranks,
    places,
    ranking_report,
    resampled,
    score_table,
    task_weights,
)
from weightsmith.solve import grouped

MOST = 16  # systems whose orders are all considered: 2 ** n sets of them


@card(
    paper="Kendall 1945, 'The treatment of ties in ranking problems'",
    covers=("what-best-systems-new",),
    unit="model",
)
def kendall_tau(first: Any, second: Any) -> Tensor:
    r"""How far two sets of numbers order the same things alike, from -1 to 1; ties are corrected for (tau-b).

    .. math:: \frac{\sum_{i<j} \operatorname{sign}(a_i - a_j) \operatorname{sign}(b_i - b_j)}
        {\sqrt{\#\{a_i \ne a_j\} \#\{b_i \ne b_j\}}}

    Args:
        first, second: ``[..., n]``, broadcast.

    Returns:
        ``[...]`` in float64; NaN where all numbers of one are equal.

    Raises:
        Error: different numbers of things, or fewer than two.

    >>> kendall_tau([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]).item().__round__(4)
    0.3333
    """
    one, other = (
        torch.as_tensor(numpy.asarray(x) if not isinstance(x, Tensor) else x).double() for x in (first, second)
    )
    if not one.ndim or not other.ndim or one.shape[-1] != other.shape[-1] or one.shape[-1] < 2:
        raise Error(f"kendall_tau needs numbers [..., n] of one n >= 2, got {list(one.shape)} and {list(other.shape)}")
    signs = [(x[..., :, None] - x[..., None, :]).sign() for x in (one, other)]
    product = (signs[0] * signs[1]).sum((-1, -2))
    sizes = [x.abs().sum((-1, -2)) for x in signs]
    return product / (sizes[0] * sizes[1]).sqrt()


@card(
    paper="Kemeny 1959, 'Mathematics without numbers'; Held, Karp 1962 for the recursion over sets",
    covers=("what-best-systems-new",),
    unit="model",
)
def kemeny_order(against: Any) -> tuple[list[int], float]:
    r"""The order that disagrees least, over all orders.

    .. math:: \arg\min_\sigma \sum_{\sigma(i) < \sigma(j)} P_{ji}

    By the best order of every set of systems, built up one by one: :math:`2^n n` steps.

    Args:
        against: ``[s, s]``, P: how much speaks for i before j; the diagonal does not matter.

    Returns:
        Systems from first to last, and what speaks against them. Of equally good orders, the one found first.

    Raises:
        Error: more than 16 systems, another shape, or entries that are not finite.

    >>> kemeny_order([[0, 2, 2], [1, 0, 3], [1, 0, 0]])
    ([0, 1, 2], 2.0)
    """
    found = numpy.asarray(against, dtype=float)
    count = len(found)
    if found.shape != (count, count) or not 1 <= count <= MOST:
        raise Error(f"kemeny_order finds orders of 1 to {MOST} systems from [s, s], got {list(found.shape)}")
    if not numpy.isfinite(found).all():
        raise Error(f"kemeny_order: {int((~numpy.isfinite(found)).sum())} of {found.size} entries are not finite")
    # lost[j, mask]: what speaks for j before those of the mask, lost when they come before it.
    lost = numpy.zeros((count, 1))
    for i in range(count):
        lost = numpy.concatenate([lost, lost + found[:, i : i + 1]], axis=1)
    sets = numpy.arange(2**count)
    size = numpy.array([int(one).bit_count() for one in sets])
    cost, last = numpy.full(2**count, numpy.inf), numpy.zeros(2**count, dtype=int)
    cost[0] = 0
    for width in range(1, count + 1):
        layer = sets[size == width]
        for j in range(count):
            inside = layer[(layer >> j & 1) == 1]
            without = inside ^ (1 << j)
            tried = cost[without] + lost[j, without]
            better = tried < cost[inside] - 1e-12
            cost[inside[better]], last[inside[better]] = tried[better], j
    order, left = [], 2**count - 1
    while left:
        order.append(int(last[left]))
        left ^= 1 << order[-1]
    return order[::-1], float(cost[-1])


def _borda_points(table: Tensor) -> Tensor:
    """``[s, t]``: the share of the systems there that a system beats on a task; NaN where missing."""
    there = (~table.isnan()).double().sum(0)
    place = places(table)
    return torch.where(there > 1, (there - place) / (there - 1).clamp(min=1), 0.5 + 0 * place)


def _weighted(points: Tensor) -> Any:
    """The rule that averages points over the tasks where there are any."""
    there = (~points.isnan()).double()
    filled = points.nan_to_num(0.0)
    return lambda weights: (weights @ filled.T) / (weights @ there.T)


@card(
    paper="Colombo, Noiry, Irurozki, Clémençon 2022, 'What are the best systems? New perspectives on NLP Benchmarking'",
    covers=("what-best-systems-new",),
    unit="model",
    claim="nearer to the true order than the mean of scores where tasks have different scales or one is an outlier",
    departs="points are shares of the systems that were there, so that scores may be missing; resampling shows how "
    "stable the ranking is",
)
def borda(
    scores: Any,
    *,
    names: Sequence[str] | None = None,
    tasks: Any = None,
    weights: Any = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Report:
    r"""Rank systems by the mean share of the others that they beat.

    .. math:: B_i = \frac{1}{T} \sum_t
        \frac{\#\{j : s_{jt} < s_{it}\} + \frac12 \#\{j \ne i : s_{jt} = s_{it}\}}{n_t - 1}

    Args:
        scores: ``[s, t]`` by task, or by instance with ``tasks``; NaN is missing; or ``{name: [t]}``.
        names: of the systems.
        tasks: ``[t]``: the task of each column. Instances are then ranked into one order for each task, and these
            orders into one (two levels). None: every column speaks for itself (one level).
        weights: of the tasks, in the order of their first column.
        higher_is_better: of scores.
        confidence, samples, seed: tasks are drawn with replacement; 0 samples for none.

    Returns:
        Report: a row per system, the best first: ``rank``, ``points`` with interval, the ranks over resamples,
        ``first`` (share of resamples that it leads) and the ``mean`` score. ``tau with the mean`` says how much the
        order differs from that by mean scores.

    Raises:
        Error: fewer than two systems, a task or system without scores.

    >>> found = borda([[0.9, 100.0, 0.8], [0.8, 300.0, 0.7], [0.1, 200.0, 0.9]], samples=0)
    >>> found["system"], [round(x, 2) for x in found["points"]]
    (['0', '1', '2'], [0.5, 0.5, 0.5])
    """
    called, table = score_table(scores, names, "borda", higher_is_better=higher_is_better)
    points = _borda_points(table)
    if tasks is not None:
        number, count = grouped(tasks, table.shape[1])
        within = torch.nn.functional.one_hot(number, count).double()
        there = (~points.isnan()).double()
        by_task = torch.where(
            there @ within > 0, (points.nan_to_num(0.0) @ within) / (there @ within).clamp(min=1), torch.nan
        )
        points = _borda_points(by_task)
    weight = task_weights(weights, points.shape[1], "borda")
    rule = _weighted(points)
    found = rule(weight[None])[0]
    if bool(found.isnan().any()):
        raise Error(f"borda: {called[int(found.isnan().nonzero()[0])]} has no score on any task of weight above 0")
    drawn = resampled(rule, weight, samples, seed, len(called))
    mean = table.nanmean(1) if higher_is_better else -table.nanmean(1)
    tau = float(kendall_tau(found, table.nanmean(1)))
    figures = {"systems": len(called), "tasks": points.shape[1], "tau with the mean": tau}
    notes = [] if not bool(table.isnan().any()) else [f"{int(table.isnan().sum())} scores are missing."]
    return ranking_report(
        "Borda ranking", called, found, drawn, confidence=confidence, figures=figures, notes=notes,
        columns={"mean": mean.tolist()},
    )  # fmt: skip


@card(
    paper="Kemeny 1959, 'Mathematics without numbers'; Colombo, Noiry, Irurozki, Clémençon 2022, 'What are the best "
    "systems? New perspectives on NLP Benchmarking'",
    covers=("what-best-systems-new",),
    unit="model",
    claim="no order of the systems disagrees less with the tasks",
)
def kemeny(
    scores: Any, *, names: Sequence[str] | None = None, weights: Any = None, higher_is_better: bool = True
) -> Report:
    """The order of at most 16 systems that disagrees least with all tasks, exactly.

    Args:
        scores: ``[s, t]``; NaN is missing: what was not measured together does not speak.
        names, weights, higher_is_better: as in `borda`.

    Returns:
        Report: a row per system in order; ``disagreement``, weighted pairs of systems and tasks against the order;
        ``Borda's disagreement``, that of the Borda order; ``tau with Borda``.

    Raises:
        Error: more than 16 systems, or as `borda`.

    >>> kemeny([[3.0, 3.0, 1.0], [2.0, 2.0, 3.0], [1.0, 1.0, 2.0]])["system"]
    ['0', '1', '2']
    """
    called, table = score_table(scores, names, "kemeny", higher_is_better=higher_is_better)
    weight = task_weights(weights, table.shape[1], "kemeny")
    against = (beats(table).nan_to_num(0.0) * weight).sum(2)
    against.fill_diagonal_(0)
    order, cost = kemeny_order(against)
    points = _weighted(_borda_points(table))(weight[None])[0].nan_to_num(0.0)
    by_borda = sorted(range(len(called)), key=lambda i: (-float(points[i]), i))
    borda_cost = sum(float(against[b, a]) for k, a in enumerate(by_borda) for b in by_borda[k + 1 :])
    position = torch.empty(len(called), dtype=torch.float64)
    position[order] = torch.arange(len(called), dtype=torch.float64)
    borda_rank = competition_ranks(points).tolist()
    rows = [{"system": called[i], "rank": k + 1, "Borda rank": borda_rank[i]} for k, i in enumerate(order)]
    figures = {
        "disagreement": cost,
        "Borda's disagreement": borda_cost,
        "tau with Borda": float(kendall_tau(-position, points)),
    }
    return Report("Kemeny order", figures, rows)
