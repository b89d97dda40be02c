"""Strengths from games: whoever wins more, against stronger ones, is stronger.

The most likely strengths are where everybody's wins are what his strength makes expected. Zermelo's
century-old iteration gets there slowly; the same equations solved for the strength in another way
(Newman) need many times fewer sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._report import Report
from weightsmith.inspect.ranking._parts import ranking_report

UPDATES = ("newman", "zermelo")


class Strengths(NamedTuple):
    """Of one set of games, or of b sets at once."""

    values: Tensor
    """``[..., s]``."""
    tie: Tensor
    """``[...]`` how likely ties are."""
    sweeps: int
    converged: Tensor
    """``[...]``."""


@card(
    paper="Newman 2023, 'Efficient computation of rankings from pairwise comparisons'",
    covers=("fast-bradley-terry",),
    unit="model",
)
def strengths(
    wins: Tensor,
    ties: Tensor | None = None,
    *,
    prior: bool = False,
    update: str = "newman",
    tolerance: float = 1e-10,
    limit: int = 10000,
) -> Strengths:
    r"""Strengths of greatest likelihood (or of greatest posterior), by sweeps over the systems.

    .. math:: \pi_i \leftarrow \frac{\sum_j w_{ij} \pi_j / (\pi_i + \pi_j) \; [+ 1/(\pi_i + 1)]}
        {\sum_j w_{ji} / (\pi_i + \pi_j) \; [+ 1/(\pi_i + 1)]}

    with the brackets under a logistic prior. Ties (Davidson) add :math:`2 \nu \sqrt{\pi_i \pi_j}` to every
    :math:`\pi_i + \pi_j`, and count half a win for both.

    Args:
        wins: ``[..., s, s]``: games that the row's system won against the column's.
        ties: ``[..., s, s]`` symmetric: games that ended even. Both have a diagonal of 0.
        prior: whether the logistic prior pulls strengths towards 1, which keeps them finite.
        update: ``newman``, or ``zermelo`` for the classical one, without ties: the same strengths, later.
        tolerance: on the change of the logarithms in a sweep, and of the tie parameter.
        limit: sweeps at most.

    Returns:
        Strengths: in float64, of geometric mean 1 without prior; NaN or infinite where games connect nobody.

    Raises:
        Error: an unknown update, or zermelo with ties.

    >>> found = strengths(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
    >>> round(float(found.values[0] / found.values[1]), 6), found.sweeps < 5
    (3.0, True)
    """
    if update not in UPDATES or (update == "zermelo" and ties is not None and bool(ties.any())):
        raise Error(f"strengths: {update!r} is none of {', '.join(UPDATES)}, or has no rule for ties")
    wins = wins.double()
    count = wins.shape[-1]
    tied = torch.zeros_like(wins) if ties is None else ties.to(wins)
    won = wins + tied / 2  # ties count half
    games = won + won.mT
    values = torch.ones_like(won[..., 0])
    tie = (tied.sum((-1, -2)) > 0).to(won) * 0.5
    both = 1.0 if prior else 0.0
    done = torch.zeros_like(tie, dtype=torch.bool)
    sweeps = 0
    while sweeps < limit:
        sweeps += 1
        before, tie_before = values.clone(), tie.clone()
        for i in range(count):
            mine, theirs = values[..., i, None], values
            root = tie[..., None] * (mine * theirs).sqrt()
            total = mine + theirs + 2 * root
            pull = both / (mine[..., 0] + 1)
            if update == "newman":
                above = (won[..., i, :] * (theirs + root) / total).sum(-1) + pull
                below = (won[..., :, i] * (1 + root / mine) / total).sum(-1) + pull
            else:
                above = won[..., i, :].sum(-1) + both
                below = (games[..., i, :] / total).sum(-1) + 2 * pull
            values[..., i] = above / below
        if not prior:  # only ratios matter: the geometric mean is 1
            values = values / values.log().mean(-1, keepdim=True).exp()
        root = (values[..., :, None] * values[..., None, :]).sqrt()
        total = values[..., :, None] + values[..., None, :] + 2 * tie[..., None, None] * root
        tie = tied.sum((-1, -2)) / (games * 2 * root / total).sum((-1, -2)).clamp(min=1e-300)
        moved = (values.log() - before.log()).abs().amax(-1) + (tie - tie_before).abs()
        done = moved < tolerance
        # What is not a number (a set of games that connects nobody) never will be.
        if bool((done | ~moved.isfinite()).all()):
            break
    return Strengths(values, tie, sweeps, done)


@card(
    paper="Ford 1957, 'Solution of a ranking problem from binary comparisons'",
    covers=("fast-bradley-terry",),
    unit="model",
)
def components(wins: Tensor) -> list[list[int]]:
    """The groups within which everybody has, through a chain of wins, beaten everybody; the strongest first.

    Args:
        wins: ``[s, s]``; add ties, which count as wins of both.

    >>> components(torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]))
    [[0, 1], [2]]
    """
    reach = (wins > 0) | torch.eye(len(wins), dtype=torch.bool, device=wins.device)
    while True:
        further = (reach.double() @ reach.double()) > 0
        if torch.equal(further, reach):
            break
        reach = further
    mutual = reach & reach.T
    groups = {tuple(row.nonzero()[:, 0].tolist()) for row in mutual}
    return [list(group) for group in sorted(groups, key=lambda group: (-int(reach[group[0]].sum()), group))]


def _matrix(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        found = values.detach().cpu().double()
    else:
        found = torch.tensor(numpy.asarray(values, dtype=float))
    if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) < 2:
        raise Error(f"bradley_terry: {what} are [systems, systems] of 2 systems or more, got {list(found.shape)}")
    if not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise Error(f"bradley_terry: {what} are counts of 0 or more")
    if bool(found.diagonal().any()):
        raise Error(f"bradley_terry: {what}: nobody plays against himself; the diagonal is 0")
    return found


@card(
    paper="Newman 2023, 'Efficient computation of rankings from pairwise comparisons'; ties: Davidson 1970, 'On "
    "Extending the Bradley-Terry Model to Accommodate Ties in Paired Comparison Experiments'",
    covers=("fast-bradley-terry",),
    unit="model",
    claim="the strengths of greatest likelihood in many times fewer sweeps than Zermelo's iteration",
)
def bradley_terry(
    wins: Any,
    ties: Any = None,
    *,
    names: Sequence[str] | None = None,
    prior: bool = False,
    update: str = "newman",
    confidence: float = 0.95,
    samples: int = 200,
    seed: int = 0,
    tolerance: float = 1e-10,
    limit: int = 10000,
) -> Report:
    r"""Strengths of systems from how often they beat each other, such that i beats j with :math:`\pi_i/(\pi_i+\pi_j)`.

    Args:
        wins: ``[s, s]``: how often the row's system beat the column's.
        ties: ``[s, s]`` symmetric: how often they ended even.
        names: of the systems.
        prior: a logistic prior on log-strengths, one win and one loss against a system of strength 1: strengths are
            finite for any games.
        update: ``newman``, or ``zermelo`` for comparison.
        confidence, samples, seed: games are drawn with replacement; 0 samples for none. Resamples whose games do not
            connect all systems are left out.
        tolerance, limit: when sweeps end.

    Returns:
        Report: a row per system: ``log strength`` (of mean 0 without prior) with interval, ranks over resamples,
        ``strength`` and games ``played``; ``sweeps``, ``log likelihood`` and ``tie``, how likely ties are, as figures.

    Raises:
        Error: without prior, games that do not let everybody reach everybody through wins: the groups are named; no
            convergence within the limit.

    >>> found = bradley_terry([[0, 3, 4], [1, 0, 3], [0, 1, 0]], names=["a", "b", "c"], samples=0)
    >>> found["system"], found["rank"]
    (['a', 'b', 'c'], [1, 2, 3])
    """
    won = _matrix(wins, "wins")
    tied = torch.zeros_like(won) if ties is None else _matrix(ties, "ties")
    if tied.shape != won.shape or not torch.equal(tied, tied.T):
        raise Error("bradley_terry: ties are symmetric, of the shape of the wins")
    if not bool((won + tied).any()):
        raise Error("bradley_terry: nobody has played; a game is needed")
    called = [str(i) for i in range(len(won))] if names is None else [str(name) for name in names]
    if len(called) != len(won) or len(set(called)) != len(called):
        raise Error(f"bradley_terry: {len(won)} systems need as many different names, got {called}")
    groups = components(won + tied)
    if not prior and len(groups) > 1:
        said = "; ".join(listed([called[i] for i in group]) for group in groups[:6])
        raise Error(
            f"bradley_terry: {len(groups)} groups of systems that wins do not connect both ways ({said}): their "
            "strengths have no finite ratio. Rate them one by one, add games, or use prior=True"
        )
    options: dict[str, Any] = {"prior": prior, "update": update, "tolerance": tolerance, "limit": limit}
    found = strengths(won, tied, **options)
    if not bool(found.converged):
        raise Error(f"bradley_terry: no convergence in {limit} sweeps; raise limit=, or use update='newman'")
    values = found.values.log()
    drawn = _resampled(won, tied, samples, seed, options)
    games = (won + won.T + tied).sum(1)
    figures = {
        "sweeps": found.sweeps,
        "log likelihood": _likelihood(won, tied, found),
        "games": float(won.sum() + tied.sum() / 2),
        "tie": float(found.tie),
    }
    columns = {"strength": found.values.tolist(), "played": games.tolist()}
    return ranking_report("Bradley-Terry strengths", called, values, drawn, word="log strength",
                          confidence=confidence, figures=figures, columns=columns)  # fmt: skip


def _likelihood(won: Tensor, tied: Tensor, found: Strengths) -> float:
    mine, theirs = found.values[:, None], found.values[None]
    root = (mine * theirs).sqrt()
    total = (mine + theirs + 2 * found.tie * root).log()
    of_wins = (won * (mine.log() - total)).sum()
    if not bool(tied.any()):
        return float(of_wins)
    return float(of_wins + (tied * (math.log(2) + found.tie.log() + root.log() - total)).sum() / 2)


def _resampled(won: Tensor, tied: Tensor, samples: int, seed: int, options: dict[str, Any]) -> Tensor:
    """Log-strengths over games drawn again; NaN for a resample that has none."""
    count = len(won)
    if not samples:
        return won.new_zeros(0, count)
    outcomes = torch.cat([won.flatten(), tied.triu().flatten()])
    total = round(float(outcomes.sum()))
    generator = numpy.random.default_rng(seed)
    counts = generator.multinomial(total, (outcomes / outcomes.sum()).numpy(), size=samples)
    again = torch.from_numpy(counts).double()
    wins = again[:, : count**2].unflatten(1, (count, count))
    half = again[:, count**2 :].unflatten(1, (count, count))
    ties = half + half.mT
    usable = torch.tensor([options["prior"] or len(components(w + t)) == 1 for w, t in zip(wins, ties, strict=True)])
    found = won.new_full((samples, count), torch.nan)
    if bool(usable.any()):
        made = strengths(wins[usable], ties[usable], **{**options, "tolerance": 1e-6})
        found[usable] = torch.where(made.converged[:, None], made.values.log(), torch.nan)
    return found
