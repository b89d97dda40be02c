"""Ratings that copies cannot move: agents against tasks as a game, rated by what they earn against its solution.

A mean over tasks changes when a task is added twice. Let one player choose among agents and another among
tasks: the flattest best mixture of tasks weighs only what tells good agents apart, and splits the weight
of a task among its copies. Cycles (rock, paper, scissors) come out even, as they should.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Report
from weightsmith.inspect.ranking._parts import drawn_weights, ranking_report, score_table
from weightsmith.solve import linear_program, max_entropy

_SLACK = 1e-9  # by which the value of a game, found by a linear program, may be off, relative to the largest payoff


def _flattest_best(payoffs: numpy.ndarray) -> tuple[numpy.ndarray, float]:
    """The best mixture of rows against every column, of greatest entropy, and what it earns at least."""
    rows, columns = payoffs.shape
    at_most = (numpy.hstack([-payoffs.T, numpy.ones((columns, 1))]), numpy.zeros(columns))
    total = (numpy.array([[1.0] * rows + [0.0]]), numpy.ones(1))
    bounds: list[tuple[float | None, float | None]] = [*((0.0, None) for _ in range(rows)), (None, None)]
    _, cost = linear_program([0.0] * rows + [-1.0], at_most=at_most, equal=total, bounds=bounds, purpose="nash_average")
    slack = _SLACK * max(float(numpy.abs(payoffs).max()), 1e-12)
    return max_entropy(-payoffs.T, numpy.full(columns, cost + slack), "nash_average"), -cost


@card(
    paper="Balduzzi, Tuyls, Pérolat, Graepel 2018, 'Re-evaluating Evaluation'",
    covers=("re-evaluating-evaluation",),
    unit="model",
    claim="ratings do not change when an agent or a task is there twice, where the mean over tasks does",
    departs="the two mixtures against tasks are solved for one by one, each the flattest of the best: the flattest "
    "solution of the paper's one game over agents and tasks together, for payoffs of value 0",
)
def nash_average(
    scores: Any,
    *,
    against: str = "tasks",
    names: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    higher_is_better: bool = True,
    standardise: bool = True,
    confidence: float = 0.95,
    samples: int = 0,
    seed: int = 0,
) -> Report:
    r"""Rate agents by what they earn against the flattest solution of the game.

    .. math:: p^\star = \arg\max_p H(p) \text{ among } \arg\max_p \min_j (p^\top S)_j, \qquad r = S q^\star

    with :math:`q^\star` the same for the tasks, which want the scores low. Among agents, S is antisymmetric and
    :math:`q^\star = p^\star`.

    Args:
        scores: ``[s, t]`` against tasks; or ``[s, s]`` antisymmetric against agents, such as the log-odds of winning;
            or ``{name: row}``.
        against: ``tasks`` or ``agents``.
        names: of the agents.
        tasks: names of the columns, for the notes.
        higher_is_better: of scores against tasks.
        standardise: bring every task to mean 0 and spread 1 first, without which the hardest scale decides. Only
            against tasks.
        confidence, samples, seed: resamples of the tasks, by default none: each is several linear programs.

    Returns:
        Report: a row per agent: ``rating``, ``weight`` in the flattest best mixture of agents; ``value`` of the game;
        ``effective agents`` and ``effective tasks``, the exponentials of the entropies; the tasks' weights as a figure.

    Raises:
        Error: scores missing, or not antisymmetric against agents.
        MissingPackage: scipy is not installed.

    >>> rock_paper_scissors = [[0, -1, 1], [1, 0, -1], [-1, 1, 0]]
    >>> found = nash_average(rock_paper_scissors, against="agents")
    >>> [round(x, 6) + 0.0 for x in found["rating"]], [round(x, 4) for x in found["weight"]]
    ([0.0, 0.0, 0.0], [0.3333, 0.3333, 0.3333])
    """
    if against not in ("tasks", "agents"):
        raise Error(f"nash_average is against tasks or agents, not {against!r}")
    called, table = score_table(
        scores, names, "nash_average", higher_is_better=higher_is_better or against == "agents", complete=True
    )
    payoffs = table.numpy()
    if against == "agents":
        return _among(called, payoffs, samples)
    if standardise:
        spread = payoffs.std(0)
        payoffs = (payoffs - payoffs.mean(0)) / numpy.where(spread > 1e-12 * numpy.abs(payoffs).max(0), spread, 1.0)
    count = payoffs.shape[1]
    labels = [str(one) for one in (tasks if tasks is not None else range(count))]
    if len(labels) != count:
        raise Error(f"nash_average: {len(labels)} names for {count} tasks")
    agents, value = _flattest_best(payoffs)
    chosen, _ = _flattest_best(-payoffs.T)
    rating = torch.from_numpy(payoffs @ chosen)
    drawn = _resampled(payoffs, drawn_weights(torch.ones(count, dtype=torch.float64), samples, seed))
    figures = {
        "value": value,
        "effective agents": _effective(agents),
        "effective tasks": _effective(chosen),
        "weights of tasks": [float(one) for one in chosen],
    }
    heavy = sorted(range(len(labels)), key=lambda t: -chosen[t])[:5]
    notes = ["Tasks that weigh most: " + ", ".join(f"{labels[t]} {chosen[t]:.2g}" for t in heavy) + "."]
    return ranking_report(
        "Nash average against tasks", called, rating, drawn, word="rating", confidence=confidence, figures=figures,
        notes=notes, columns={"weight": agents.tolist()},
    )  # fmt: skip


def _among(called: list[str], payoffs: numpy.ndarray, samples: int) -> Report:
    if payoffs.shape[0] != payoffs.shape[1] or not numpy.allclose(
        payoffs, -payoffs.T, atol=1e-9 * numpy.abs(payoffs).max()
    ):
        raise Error("nash_average: payoffs among agents are antisymmetric [s, s]: what one wins the other loses")
    if samples:
        raise Error("nash_average: payoffs among agents have no tasks to resample; leave samples at 0")
    agents, value = _flattest_best(payoffs)
    figures = {"value": value, "effective agents": _effective(agents), **_hodge_figures(payoffs)}
    rating = torch.from_numpy(payoffs @ agents)
    # Ratings of exactly 0 come out as a rounding of it, which is no order.
    rating = torch.where(rating.abs() < 1e-6 * max(float(numpy.abs(payoffs).max()), 1e-12), 0.0, rating)
    return ranking_report(
        "Nash average among agents", called, rating, torch.zeros(0, len(called), dtype=torch.float64), word="rating",
        figures=figures, columns={"weight": agents.tolist()},
    )  # fmt: skip


def _resampled(payoffs: numpy.ndarray, chunks: Iterable[Tensor]) -> Tensor:
    """Ratings over resamples of tasks: which tasks are there matters, how often does not."""
    found = []
    for row in itertools.chain.from_iterable(chunks):
        there = row.numpy() > 0
        chosen, _ = _flattest_best(-payoffs[:, there].T)
        found.append(torch.from_numpy(payoffs[:, there] @ chosen))
    return torch.stack(found) if found else torch.zeros(0, len(payoffs), dtype=torch.float64)


def _effective(mixture: numpy.ndarray) -> float:
    some = mixture[mixture > 0]
    return float(numpy.exp(-(some * numpy.log(some)).sum()))


def _hodge_figures(payoffs: numpy.ndarray) -> dict[str, float]:
    rating = payoffs.mean(1)
    whole = float((payoffs**2).sum())
    left = float(((payoffs - (rating[:, None] - rating[None])) ** 2).sum())
    return {"transitive": 1 - left / whole if whole else 1.0, "cyclic": left / whole if whole else 0.0}


@card(
    paper="Balduzzi, Tuyls, Pérolat, Graepel 2018, 'Re-evaluating Evaluation'; Jiang, Lim, Yao, Ye 2011, "
    "'Statistical ranking and combinatorial Hodge theory'",
    covers=("re-evaluating-evaluation",),
    unit="model",
    claim="the two parts add up to the payoffs and are orthogonal",
)
def hodge(payoffs: Any, *, names: Sequence[str] | None = None, weights: Any = None) -> Report:
    r"""Split payoffs among agents into what a rating explains and what runs in cycles.

    .. math:: A = (r_i - r_j) + C, \qquad r = \arg\min_r \sum_{i<j} w_{ij} (A_{ij} - r_i + r_j)^2

    Args:
        payoffs: ``[s, s]`` antisymmetric; NaN where two never met.
        names: of the agents.
        weights: ``[s, s]`` symmetric, how much each payoff counts, such as games played; 1 by default.

    Returns:
        Report: a row per agent: ``rating`` (of mean 0) and ``unexplained``, the root mean square of what it leaves;
        ``transitive`` and ``cyclic``, shares of the squares of all payoffs.

    Raises:
        Error: payoffs that are not antisymmetric, or agents that no chain of games connects.

    >>> found = hodge([[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    >>> [round(x, 6) for x in found["rating"]], found["transitive"]
    ([1.0, 0.0, -1.0], 1.0)
    """
    called, table = score_table(payoffs, names, "hodge")
    count = len(called)
    met = ~table.isnan()
    filled = table.nan_to_num(0.0)
    if table.shape != (count, count) or not torch.allclose(filled, -filled.T, atol=1e-9 * float(filled.abs().max())):
        raise Error("hodge: payoffs are antisymmetric [s, s]: what one wins the other loses")
    weight = torch.ones_like(filled) if weights is None else torch.tensor(numpy.asarray(weights, dtype=float))
    if weight.shape != filled.shape or not torch.equal(weight, weight.T) or not bool((weight >= 0).all()):
        raise Error("hodge: weights are symmetric [s, s], 0 or more")
    weight = weight * (met & met.T)
    weight.fill_diagonal_(0)
    laplacian = torch.diag(weight.sum(1)) - weight
    if int((torch.linalg.eigvalsh(laplacian) > 1e-12 * float(weight.max().clamp(min=1e-300))).sum()) < count - 1:
        raise Error("hodge: the games do not connect all agents; rate the connected groups one by one")
    # The Laplacian knows the rating up to a constant; the mean is 0.
    rating = torch.linalg.solve(laplacian + weight.max() / count, (weight * filled).sum(1))
    rating = rating - rating.mean()
    left = weight * (filled - rating[:, None] + rating[None]).square()
    whole = float((weight * filled.square()).sum())
    each = (left.sum(1) / weight.sum(1).clamp(min=1e-300)).sqrt()
    cyclic = float(left.sum()) / whole if whole else 0.0
    return ranking_report(
        "what a rating explains", called, rating, torch.zeros(0, count, dtype=torch.float64), word="rating",
        figures={"transitive": 1 - cyclic, "cyclic": cyclic}, columns={"unexplained": each.tolist()},
    )  # fmt: skip
