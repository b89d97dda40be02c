"""A better model than any average often lies just outside of a run's checkpoints.

An average only mixes checkpoints. With coefficients that may be negative one can also step back from
where an earlier one was wrong. Such a handful of numbers is found by trying: good ones are crossed
and mutated, and what is better on held-out data stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightsmith import progress
from weightsmith.average._parts import combination, opened_run
from weightsmith.average.room import Source
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.evaluators import Evaluate
from weightsmith.weights import Weights

Coefficients = tuple[float, ...]
"""One for each checkpoint, from the first to the last; they sum to one."""

DECAYS = (0.25, 0.5, 0.75, 0.9)
"""Of the exponential averages that a search starts with: what is kept of the average at each checkpoint."""


@dataclass(frozen=True)
class Population:
    """What the next step needs."""

    members: tuple[tuple[Coefficients, float], ...]
    """Coefficients and their scores, the best first."""
    evaluations: int


@dataclass(frozen=True)
class Trial:
    """What a person wants to see of a step."""

    evaluation: int
    coefficients: Coefficients
    score: float
    best: float
    """The best score so far, this one included."""


def starts(count: int) -> list[Coefficients]:
    """What needs no search: every single checkpoint, the last first, their mean, and exponential averages.

    >>> starts(2)[:4]
    [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.25, 0.75)]
    """
    singles = [tuple(float(index == chosen) for index in range(count)) for chosen in reversed(range(count))]
    averages = [tuple((1 - decay if index else 1.0) * decay ** (count - 1 - index) for index in range(count))
                for decay in DECAYS]  # fmt: skip
    return list(dict.fromkeys([*singles, (1 / count,) * count, *averages]))


def init(count: int, score: Callable[[Coefficients], float]) -> Population:
    """The population that is there before the search, all of it evaluated."""
    members = [(coefficients, score(coefficients)) for coefficients in starts(count)]
    return Population(_ranked(members), len(members))


def step(
    population: Population, score: Callable[[Coefficients], float], size: int, spread: float, seed: int
) -> tuple[Population, Trial]:
    """Try one child, and keep the best ``size``. The population that went in is not changed."""
    # Every step has its own numbers, so that a search can be cut and continued anywhere.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + population.evaluations) % 2**63)
    coefficients = child([member for member, _ in population.members[:size]], spread, generator)
    found, evaluations = score(coefficients), population.evaluations + 1
    members = _ranked([*population.members, (coefficients, found)])[:size]
    return Population(members, evaluations), Trial(evaluations, coefficients, found, members[0][1])


def child(parents: Sequence[Coefficients], spread: float, generator: torch.Generator) -> Coefficients:
    """A point between two parents, mutated: all but the last coefficient are free, and the last makes the sum one."""
    # The smaller of two draws: the better parents, which stand first, are taken more often.
    first, second = torch.randint(len(parents), (2, 2), generator=generator).amin(dim=1).tolist()
    one, other = (torch.tensor(parents[index][:-1], dtype=torch.float64) for index in (first, second))
    crossed = one.lerp(other, torch.rand((), generator=generator, dtype=torch.float64))
    free = (crossed + spread * torch.randn(crossed.shape, generator=generator, dtype=torch.float64)).tolist()
    return (*free, 1.0 - math.fsum(free))


def _ranked(members: Sequence[tuple[Coefficients, float]]) -> tuple[tuple[Coefficients, float], ...]:
    """The best first, and the older of equals; a score of NaN, which no order knows, last."""
    return tuple(sorted(members, key=lambda member: (math.isnan(member[1]), -member[1])))


@card(
    paper="Liu et al. 2024, 'Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better'",
    covers=("lcsc",),
    needs=("evaluate",),
    unit="model",
    claim="on the data it is chosen by, never worse than the last checkpoint, the best one, and averages of them",
)
def lcsc(
    checkpoints: Sequence[Source],
    evaluate: Evaluate,
    *,
    budget: int = 100,
    population: int = 10,
    spread: float = 0.1,
    seed: int = 0,
    on_step: Callable[[Trial], None] | None = None,
) -> Weights:
    r"""The linear combination of a run's checkpoints that is best on held-out data, found by evolution.

    .. math:: w = w_n + \sum_{i < n} \beta_i (w_i - w_n)

    The coefficients sum to one; each may be negative or above one. The search starts with every single checkpoint,
    their mean and exponential averages of them. Each further trial is a random point between two good members,
    with Gaussian noise on every :math:`\beta_i`.

    Args:
        checkpoints: of one run; anything that `weightsmith.open` opens, in an order as for `lawa`.
        evaluate: ``weights -> quality`` on held-out data, higher is better. Judge the result on other data, and by
            the same figure: what is searched for a lower loss may be no more accurate.
        budget: how often it is called; n checkpoints take n + 5 calls before the search proper.
        population: how many coefficients are kept to make others of.
        spread: standard deviation of the noise.
        seed: of the search; the same seed tries the same coefficients as long as the scores are the same.
        on_step: told of every trial after the start.

    Returns:
        Weights: lazy. ``lineage`` names the coefficients, from the first checkpoint to the last, and the score.

    Raises:
        ValueError: no checkpoint, checkpoints of different architectures, a budget below what the start takes,
            or not one score that is a number.

    >>> run = [{"w": torch.tensor([x])} for x in (4.0, 2.0, 1.0)]              # on its way to 0
    >>> best = lcsc(run, lambda w: -abs(float(w["w"])))
    >>> bool(best["w"].abs() < 0.1), min(best.lineage.options["coefficients"]) < 0
    (True, True)
    """
    opened = opened_run(checkpoints, "lcsc")
    needed = len(starts(len(opened)))
    for name, value, least in (("budget", budget, needed), ("population", population, 2)):
        if value < least:
            raise Error(f"lcsc needs {name}= of at least {least} for {len(opened)} checkpoints, got {value}")
    if not (math.isfinite(spread) and spread > 0):
        raise Error(f"lcsc needs a spread above 0, got {spread:g}")
    budget = budget if len(opened) > 1 else 1  # nothing is free

    with progress.task("lcsc", budget) as advance:

        def score(coefficients: Coefficients) -> float:
            tried = {"coefficients": list(coefficients)}
            found = float(evaluate(combination(opened, coefficients, "average.lcsc", tried, nonfinite="allow")))
            advance(1)
            return found

        state = init(len(opened), score)
        while state.evaluations < budget:
            state, trial = step(state, score, population, spread, seed)
            if on_step is not None:
                on_step(trial)
    coefficients, best = state.members[0]
    if not math.isfinite(best):
        raise Error(f"lcsc: the best of {state.evaluations} combinations scored {best}; is evaluate right?")
    chosen = {"coefficients": list(coefficients), "score": best, "evaluations": state.evaluations, "seed": seed}
    return combination(opened, coefficients, "average.lcsc", chosen)
