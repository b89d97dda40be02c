"""What the rankings of this room share: a checked table of scores, places by task, and the report of a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.solve import draws

Rule = Callable[[Tensor], Tensor]
"""``weights of tasks [b, t] -> points of systems [b, s]``, more is better."""


def score_table(
    scores: Any, names: Sequence[str] | None, what: str, *, higher_is_better: bool = True, complete: bool = False
) -> tuple[list[str], Tensor]:
    """Names and scores ``[s, t]`` in float64, more being better; NaN is missing.

    Raises:
        Error: another shape, an infinite score, a system or a task without any, names that do not fit.
    """
    if isinstance(scores, Mapping):
        names = [str(name) for name in scores] if names is None else names
        scores = list(scores.values())
    if isinstance(scores, Tensor):
        found = scores.detach().cpu().double()
    else:
        rows = [numpy.asarray(row.detach().cpu() if isinstance(row, Tensor) else row, dtype=float) for row in scores]
        if len({row.shape for row in rows}) > 1:
            raise Error(f"{what}: rows of different lengths; write nan where a score is missing")
        found = torch.tensor(numpy.stack(rows) if rows else numpy.zeros(0))
    if found.ndim != 2 or len(found) < 2 or not found.shape[1]:
        raise Error(f"{what}: needs scores [systems, tasks] of 2 systems or more, got {list(found.shape)}")
    if bool(found.isinf().any()):
        raise Error(f"{what}: a score is infinite; nan is a missing one")
    there = ~found.isnan()
    if complete and not bool(there.all()):
        raise Error(f"{what}: {int((~there).sum())} scores are missing, which this rule cannot do without")
    called = [str(index) for index in range(len(found))] if names is None else [str(name) for name in names]
    if len(called) != len(found) or len(set(called)) != len(called):
        raise Error(f"{what}: {len(found)} systems need as many different names, got {called}")
    bare = [called[i] for i in range(len(found)) if not bool(there[i].any())]
    if bare or not bool(there.any(0).all()):
        raise Error(f"{what}: without any score: {', '.join(bare) or 'a task'}")
    return called, found if higher_is_better else -found


def task_weights(weights: Any, count: int, what: str) -> Tensor:
    """``[t]`` weights of 0 or more, one each by default."""
    if weights is None:
        return torch.ones(count, dtype=torch.float64)
    found = torch.tensor(numpy.asarray(weights, dtype=float))
    if found.shape != (count,) or not bool((found >= 0).all()) or not 0 < float(found.sum()) < math.inf:
        raise Error(f"{what}: {count} tasks need finite weights of 0 or more, not all 0, got {list(found.shape)}")
    return found


def beats(scores: Tensor) -> Tensor:
    """``[s, s, t]``: 1 where the first is better on the task, a half where equal, NaN where one is missing."""
    first, second = scores[:, None], scores[None]
    found = (first > second).double() + 0.5 * (first == second).double()
    return torch.where(first.isnan() | second.isnan(), torch.nan, found)


def places(scores: Tensor) -> Tensor:
    """``[s, t]`` from 1, the best; equals share the mean of theirs; NaN where missing."""
    first, sharing = shared_places(scores)
    return torch.where(scores.isnan(), torch.nan, first + (sharing - 1) / 2)


def shared_places(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``[s, t]`` twice: the best of the places that a system shares with its equals, and how many they are.

    What stands where a score is missing means nothing.

    >>> [found.tolist() for found in shared_places(torch.tensor([[2.0], [1.0], [1.0]]))]
    [[[1], [2], [2]], [[1], [2], [2]]]
    """
    filled = scores.masked_fill(scores.isnan(), -torch.inf).mT.contiguous()
    ordered = filled.sort(1).values
    up_to = torch.searchsorted(ordered, filled, right=True)
    return (len(scores) + 1 - up_to).mT, (up_to - torch.searchsorted(ordered, filled)).mT


def competition_ranks(points: Tensor) -> Tensor:
    """Ranks ``[..., s]`` from 1: one more than how many have more points."""
    ordered = points.sort(-1).values
    return 1 + points.shape[-1] - torch.searchsorted(ordered, points.contiguous() + 1e-12, right=True)


def drawn_weights(weights: Tensor, samples: int, seed: int, width: int = 1) -> Iterator[Tensor]:
    """Weights of tasks drawn with replacement, in chunks ``[b, t]``; ``width`` as in `weightsmith.solve.draws`."""
    for chunk in draws(len(weights), samples, seed, width):
        counts = weights.new_zeros(chunk.shape).scatter_add_(1, chunk, torch.ones_like(chunk, dtype=weights.dtype))
        yield counts * weights


def resampled(rule: Rule, weights: Tensor, samples: int, seed: int, systems: int) -> Tensor:
    """Points ``[b, s]`` by the rule over tasks drawn with replacement; memory for some resamples at a time."""
    width = 1 + systems**2 // len(weights)  # of a rule by pairs of systems
    chunks = drawn_weights(weights, samples, seed, width)
    return torch.cat([weights.new_zeros(0, systems), *(rule(chunk) for chunk in chunks)])


def ranking_report(
    title: str,
    names: Sequence[str],
    points: Tensor,
    drawn: Tensor,
    *,
    word: str = "points",
    confidence: float = 0.95,
    figures: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Report:
    """A row per system, the best first: its points, its rank, and how both vary over resamples.

    Args:
        points: ``[s]``, more is better.
        drawn: ``[b, s]`` over resamples; rows with NaN are left out; b may be 0.
        columns: further values by system.
    """
    if not 0 < confidence < 1:
        raise Error(f"{title}: confidence is between 0 and 1, got {confidence:g}")
    rank = competition_ranks(points)
    table: list[dict[str, Any]] = []
    usable = drawn[drawn.isfinite().all(1)]
    if len(usable):
        tails = usable.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = torch.quantile(usable, tails, dim=0)
        over = competition_ranks(usable).double()
        best_rank, worst_rank = torch.quantile(over, tails, dim=0, interpolation="nearest")
        firsts = (over == 1).double().mean(0)
    for i in sorted(range(len(names)), key=lambda i: (int(rank[i]), i)):
        row: dict[str, Any] = {"system": names[i], "rank": int(rank[i]), word: float(points[i])}
        if len(usable):
            row |= {"low": float(low[i]), "high": float(high[i]), "rank low": int(best_rank[i]),
                    "rank high": int(worst_rank[i]), "first": float(firsts[i])}  # fmt: skip
        table.append(row | {name: values[i] for name, values in (columns or {}).items()})
    shown = [row["system"] for row in table]
    ends = ([row["low"] for row in table], [row["high"] for row in table]) if len(usable) else (None, None)
    plot = Plot(title, "", word, [Line(word, shown, [row[word] for row in table], *ends, style="bars")])
    said = list(notes)
    if len(drawn) > len(usable):
        said.append(f"{len(drawn) - len(usable)} of {len(drawn)} resamples gave no ranking and were left out.")
    return Report(title, dict(figures or {}), table, [plot], said)
