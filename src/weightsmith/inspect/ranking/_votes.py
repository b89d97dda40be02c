"""Tasks as voters: the rules of social choice on a table of scores.

Every rule answers another question (who wins most tasks, who loses to nobody, who is never last), so a
system that several of them put first is ahead in more than one sense. Where it is not, one may ask which
weights of the tasks would put it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Report
from weightsmith.inspect.ranking._parts import (
    beats,
    places,
    ranking_report,
    resampled,
    score_table,
    shared_places,
    task_weights,
)
from weightsmith.solve import linear_program

RULES = ("mean", "plurality", "borda", "dowdall", "copeland", "minimax", "threshold", "baldwin")
LINEAR = ("mean", "plurality", "borda", "dowdall", "condorcet")
"""Rules whose points add up over tasks, or pairs of systems."""

COMPLETE = ("mean", "threshold")
"""Rules that need every score."""


def _by_place(table: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """``[s, t]``: the mean value of the places that a system shares; 0 where missing."""
    first, sharing = shared_places(table)
    upto = torch.nn.functional.pad(value(torch.arange(1.0, len(table) + 1, dtype=torch.float64)).cumsum(0), (1, 0))
    shared = (upto[first - 1 + sharing] - upto[first - 1]) / sharing
    return torch.where(table.isnan(), 0.0, shared)


def _plurality(table: Tensor) -> Tensor:
    return _by_place(table, lambda place: (place == 1).double())


def _borda(table: Tensor) -> Tensor:
    there = (~table.isnan()).double()
    return ((there.sum(0) - places(table)).nan_to_num(0.0)) * there


def _dowdall(table: Tensor) -> Tensor:
    return _by_place(table, lambda place: 1 / place)


def _additive(points: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weights: weights @ points.T


def _pairwise(table: Tensor) -> Callable[[Tensor], Tensor]:
    """``[b, t] -> [b, s, s]``: the weight of the tasks on which the row's system is better."""
    against = beats(table).nan_to_num(0.0)
    count = len(table)
    against[torch.arange(count), torch.arange(count)] = 0
    return lambda weights: (weights @ against.flatten(0, 1).T).unflatten(1, (count, count))


def _copeland(table: Tensor) -> Callable[[Tensor], Tensor]:
    pairs = _pairwise(table)

    def rule(weights: Tensor) -> Tensor:
        won = pairs(weights)
        return _signs(won - won.mT).sum(2)

    return rule


def _signs(margins: Tensor) -> Tensor:
    # Sums of weights in another order may differ in their last bits: that is a tie.
    return torch.where(margins.abs() < 1e-9, 0.0, margins.sign())


def _minimax(table: Tensor) -> Callable[[Tensor], Tensor]:
    pairs = _pairwise(table)

    def rule(weights: Tensor) -> Tensor:
        won = pairs(weights)
        # The heaviest defeat; a system's meeting with itself is none.
        lost = (won.mT - won).diagonal_scatter(won.new_full(won.shape[:2], -torch.inf), dim1=1, dim2=2)
        return -lost.amax(2)

    return rule


def _threshold(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Fewest last places, then fewest last but one, and so on: one order of many numbers."""
    count = len(table)
    first, sharing = shared_places(table)
    place = first + sharing - 1  # of shared places the worst counts
    at = torch.stack([(place == p).double() for p in range(count, 1, -1)])  # [places, s, t]

    def rule(weights: Tensor) -> Tensor:
        bad = torch.einsum("pst,bt->bps", at, weights)
        points = bad.new_zeros(len(weights), count)
        for b, columns in enumerate((bad * 1e9).round()):
            keys = [tuple(one) for one in columns.T.tolist()]
            ordered = sorted(set(keys), reverse=True)
            points[b] = points.new_tensor([float(ordered.index(key)) for key in keys])
        return points

    return rule


def _baldwin(table: Tensor) -> Callable[[Tensor], Tensor]:
    pairs = _pairwise(table)

    def rule(weights: Tensor) -> Tensor:
        won = pairs(weights)
        left = torch.ones(won.shape[:2], dtype=torch.bool)
        points = won.new_zeros(won.shape[:2])
        for _ in range(won.shape[1]):
            rated = torch.einsum("bij,bj->bi", won, left.double()).masked_fill(~left, torch.inf)
            out = left & (rated <= rated.amin(1, keepdim=True) + 1e-9)  # equals leave together
            left &= ~out
            points += left.double()
        return points

    return rule


def _rule(table: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    if name == "mean":
        return lambda weights: (weights @ table.T) / weights.sum(1, keepdim=True)
    additive = {"plurality": _plurality, "borda": _borda, "dowdall": _dowdall}
    if name in additive:
        return _additive(additive[name](table))
    return {"copeland": _copeland, "minimax": _minimax, "threshold": _threshold, "baldwin": _baldwin}[name](table)


@card(
    paper="Rofin et al. 2023, 'Vote'n'Rank: Revision of Benchmarking with Social Choice Theory'",
    covers=("votenrank",),
    unit="model",
    claim="rankings by order do not change when a task's scores are rescaled",
    departs="equals share the points of their places, where the authors' code gives all of them the worst; Copeland "
    "counts wins minus losses and minimax margins, which are options there; missing scores are left out",
)
def vote(
    scores: Any,
    rule: str = "copeland",
    *,
    names: Sequence[str] | None = None,
    weights: Any = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Report:
    r"""Rank systems by a rule of social choice, tasks being the voters.

    ``plurality``: tasks won. ``borda``: systems beaten. ``dowdall``: the sum of 1 / place. ``copeland``: systems beaten
    on most tasks minus those lost to. ``minimax``: minus the heaviest defeat by any system, in tasks lost minus won.
    ``threshold``: fewest last places, then fewest last but one. ``baldwin``: who is left when the lowest by Borda
    leaves, again and again. ``mean``: of the scores themselves.

    Args:
        scores: ``[s, t]`` or ``{name: [t]}``; NaN is missing, which ``mean`` and ``threshold`` refuse. Rules by pairs
            (copeland, minimax, baldwin) count the tasks where both were there.
        rule: one of `RULES`.
        names, weights, higher_is_better, confidence, samples, seed: as in `borda`.

    Returns:
        Report: a row per system, the best first, with ``points``; ``Condorcet winner`` is who beats each other one on
        most tasks.

    Raises:
        Error: an unknown rule, or scores missing where the rule needs all.

    >>> table = [[3, 3, 1], [2, 2, 3], [1, 1, 2]]
    >>> [[round(x, 3) for x in vote(table, rule, samples=0)["points"]] for rule in ("plurality", "dowdall")]
    [[2.0, 1.0, 0.0], [2.333, 2.0, 1.167]]
    """
    if rule not in RULES:
        raise Error(f"vote knows {', '.join(RULES)}, not {rule!r}{did_you_mean(rule, RULES)}")
    called, table = score_table(
        scores, names, f"vote ({rule})", higher_is_better=higher_is_better, complete=rule in COMPLETE
    )
    weight = task_weights(weights, table.shape[1], "vote")
    by = _rule(table, rule)
    drawn = resampled(by, weight, samples, seed, len(table))
    winner = condorcet_winner(table, names=called, weights=weight)
    figures = {"rule": rule, "Condorcet winner": winner, "systems": len(called), "tasks": table.shape[1]}
    notes = [f"{int(table.isnan().sum())} scores are missing."] if bool(table.isnan().any()) else []
    return ranking_report(
        f"Ranking by {rule}", called, by(weight[None])[0], drawn, confidence=confidence, figures=figures, notes=notes
    )


@card(
    paper="Condorcet 1785; Rofin et al. 2023, 'Vote'n'Rank: Revision of Benchmarking with Social Choice Theory'",
    covers=("votenrank",),
    unit="model",
)
def condorcet_winner(
    scores: Any, *, names: Sequence[str] | None = None, weights: Any = None, higher_is_better: bool = True
) -> str | None:
    """The system that beats each other one on more tasks than not, or None.

    Args:
        scores, names, weights, higher_is_better: as in `vote`.

    Raises:
        Error: fewer than two systems, or a task or system without scores.

    >>> condorcet_winner({"a": [3, 3, 1], "b": [2, 2, 3]})
    'a'
    """
    called, table = score_table(scores, names, "condorcet_winner", higher_is_better=higher_is_better)
    weight = task_weights(weights, table.shape[1], "condorcet_winner")
    wins = _copeland(table)(weight[None])[0]
    best = int(wins.argmax())
    return called[best] if float(wins[best]) == len(called) - 1 else None


@card(
    paper="Rofin et al. 2023, 'Vote'n'Rank: Revision of Benchmarking with Social Choice Theory'",
    covers=("votenrank",),
    unit="model",
    claim="finds weights of the tasks that put a system first wherever there are any",
)
def winning_weights(
    scores: Any,
    system: str | int,
    rule: str = "borda",
    *,
    names: Sequence[str] | None = None,
    higher_is_better: bool = True,
) -> Report:
    r"""Weights of the tasks under which a system wins, as far ahead as can be.

    .. math:: \max_{w \ge 0, \sum w = 1} \min_{j \ne i} \sum_t w_t (p_{it} - p_{jt})

    Args:
        scores: ``[s, t]`` or ``{name: [t]}``.
        system: its name or index.
        rule: ``mean``, ``plurality``, ``borda``, ``dowdall``, or ``condorcet``: to beat each other one by weight.
        names, higher_is_better: as in `vote`.

    Returns:
        Report: ``wins``; ``margin``, above 0 where it can win; ``change``, the least share of weight that must move
        away from equal weights for it to win or tie (None if it cannot); a row per task with its weight for the
        widest margin, and ``nearest``, that of the least change.

    Raises:
        Error: a rule that does not add up over tasks, or no such system.
        MissingPackage: scipy is not installed.

    >>> found = winning_weights({"a": [3, 1], "b": [1, 3], "c": [2, 2]}, "c", "plurality")
    >>> found["wins"], winning_weights({"a": [3, 1], "b": [1, 3], "c": [2, 2]}, "a", "plurality")["wins"]
    (False, True)
    """
    if rule not in LINEAR:
        raise Error(f"winning_weights knows {', '.join(LINEAR)}, not {rule!r}{did_you_mean(rule, LINEAR)}")
    called, table = score_table(
        scores, names, "winning_weights", higher_is_better=higher_is_better, complete=rule == "mean"
    )
    if isinstance(system, str) and system not in called:
        raise Error(
            f"winning_weights: no system {system!r}{did_you_mean(system, called)}; there are {', '.join(called)}"
        )
    if not isinstance(system, str) and not 0 <= system < len(called):
        raise Error(f"winning_weights: no system {system}; there are {len(called)}, from 0")
    chosen = called.index(system) if isinstance(system, str) else system
    if rule == "condorcet":
        ahead = (beats(table)[chosen] - 0.5).nan_to_num(0.0)
    else:
        points = {"mean": lambda x: x, "plurality": _plurality, "borda": _borda, "dowdall": _dowdall}[rule](table)
        ahead = points[chosen] - points
    lead = numpy.delete(ahead.numpy(), chosen, axis=0)  # [others, t]
    scale = float(numpy.abs(lead).max()) or 1.0  # linear programs are solved to a fixed precision
    lead = lead / scale
    others, count = lead.shape
    # The widest margin: over (w, m), most m with lead w >= m.
    at_most = (numpy.hstack([-lead, numpy.ones((others, 1))]), numpy.zeros(others))
    total = (numpy.array([[1.0] * count + [0.0]]), numpy.ones(1))
    bounds: list[tuple[float | None, float | None]] = [*((0.0, None) for _ in range(count)), (None, None)]
    point, cost = linear_program([0.0] * count + [-1.0], at_most=at_most, equal=total, bounds=bounds,
                                 purpose="winning_weights")  # fmt: skip
    margin = -cost
    nearest: list[float | None] = [None] * count
    change = None
    if margin >= -1e-9:
        nearest, change = _nearest(lead)
    table_rows = [{"task": t, "weight": float(point[t]), "nearest": nearest[t]} for t in range(count)]
    figures = {"system": called[chosen], "rule": rule, "wins": margin > 1e-9, "margin": margin * scale,
               "change": change}  # fmt: skip
    return Report(f"weights under which {called[chosen]} wins", figures, table_rows)


def _nearest(lead: numpy.ndarray) -> tuple[list[float | None], float]:
    """Weights with no system ahead that move the least from equal ones; over (w, u), least u = |w - 1/t|."""
    others, count = lead.shape
    unit = numpy.eye(count)
    matrix = numpy.vstack(
        [numpy.hstack([-lead, numpy.zeros((others, count))]), numpy.hstack([unit, -unit]), numpy.hstack([-unit, -unit])]
    )
    limit = numpy.concatenate([numpy.full(others, 1e-9), numpy.full(count, 1 / count), numpy.full(count, -1 / count)])
    total = (numpy.array([[1.0] * count + [0.0] * count]), numpy.ones(1))
    point, cost = linear_program([0.0] * count + [1.0] * count, at_most=(matrix, limit), equal=total,
                                 purpose="winning_weights")  # fmt: skip
    return [float(one) for one in point[:count]], cost / 2
