"""Which settings a score depends on, from a table of runs that were made anyway.

A straight line through the runs, in units of each setting's own spread, is a summary that many trials share; a line
through those near one setting says what matters there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.solve import draws

_RIDGE = 1e-8  # keeps resamples in which a setting never varies solvable; of the number of runs


@card(
    paper="Nguyen, Awal, Wang 2023, 'What augmentations are sensitive to hyper-parameters and why?'; "
    "Ribeiro, Singh, Guestrin 2016, '\"Why Should I Trust You?\"'",
    covers=("what-augmentations-sensitive-hyper-parameters",),
    needs=("data",),
    unit="model",
    claim="a setting that the score was made to depend on is ranked first",
    departs="standardised least squares with bootstrap intervals; the paper reads off single local weights",
)
def sensitivity(
    runs: Sequence[Mapping[str, Any]],
    score: str = "score",
    *,
    settings: Sequence[str] | None = None,
    log: Sequence[str] = (),
    near: Mapping[str, Any] | None = None,
    width: float = 1.0,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    r"""How much a score changes when a setting changes by one standard deviation, the others held.

    .. math:: \min_\beta \sum_i \pi_i \Bigl(y_i - \beta_0 - \sum_j \beta_j \frac{x_{ij} - \bar x_j}{s_j}\Bigr)^2,
        \qquad \pi_i = e^{-\|x_i - x\|^2 / (p\, w^2)}

    with :math:`\pi = 1` without ``near``, and distances in standard deviations over the p settings. Words and truth
    values become one indicator for each but the first of their values, not divided by their spread: a coefficient is
    then the change from "off" to "on".

    Args:
        runs: one record a run, all with the same settings: numbers, truth values or words.
        score: the record's key of the score.
        settings: which to look at; by default all others.
        log: numbers whose logarithm counts, such as learning rates.
        near: settings of the run around which the line is local; by default all runs count the same.
        width: of what counts as near, w.
        samples: resamples of the runs for the intervals.
        confidence: of the intervals.
        seed: of the resamples.

    Returns:
        Report: a row for every setting, the most sensitive first: ``coefficient``, its interval ``low`` to ``high``,
        ``certain`` (the interval is on one side of 0); ``R2`` of the line.

    Raises:
        Error: fewer runs than settings and two more, runs with other settings, a score that is not finite, the
            logarithm of what is not above 0, settings that never vary.

    >>> runs = [{"rate": r / 7, "flip": r % 2 == 0, "score": 2.0 * r + (r % 2 == 0)} for r in range(8)]
    >>> found = sensitivity(runs)
    >>> found["setting"], [round(value, 6) for value in found["coefficient"]]
    (['rate', 'flip = True'], [4.898979, 1.0])
    """
    table = _checked(runs, score, settings, log)
    if not 0 < confidence < 1 or samples < 2 or not width > 0:
        raise Error("needs a confidence between 0 and 1, at least 2 samples and a width above 0")
    scores = torch.tensor([float(run[score]) for run in runs], dtype=torch.float64)
    names, columns, centre = _columns(table, log, near)
    if len(runs) < len(names) + 2:
        raise Error(f"{len(names)} coefficients need at least {len(names) + 2} runs, got {len(runs)}")
    weight = torch.ones_like(scores)
    if centre is not None:
        weight = torch.exp(-(columns - centre).square().sum(dim=1) / (len(names) * width**2))
        if float(weight.sum().square() / weight.square().sum()) < len(names) + 2:
            raise Error(f"fewer than {len(names) + 2} runs are near: take a larger width= than {width:g}")
    design = torch.cat([torch.ones(len(runs), 1, dtype=torch.float64), columns], dim=1)
    coefficients = _fit(design, scores, weight[None])[0]
    resampled = []
    for chunk in draws(len(runs), samples, seed, width=len(names) ** 2):
        counts = torch.zeros(chunk.shape, dtype=torch.float64).scatter_add_(1, chunk, torch.ones(chunk.shape).double())
        resampled.append(_fit(design, scores, counts * weight))
    tail = (1 - confidence) / 2
    low, high = torch.cat(resampled).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    left = scores - design @ coefficients
    middle = (weight @ scores) / weight.sum()
    total = weight @ (scores - middle).square()
    rows = [
        {"setting": name, "coefficient": float(coefficients[i]), "low": float(low[i]), "high": float(high[i]),
         "certain": bool(low[i] > 0 or high[i] < 0)}
        for i, name in enumerate(names, start=1)
    ]  # fmt: skip
    rows.sort(key=lambda row: -abs(row["coefficient"]))
    figures = {
        "runs": len(runs),
        "R2": float(1 - weight @ left.square() / total) if total > 0 else math.nan,
        "most sensitive": rows[0]["setting"],
    }
    places = [row["setting"] for row in rows]
    bars = Line("coefficient", places, [row["coefficient"] for row in rows],
                [row["low"] for row in rows], [row["high"] for row in rows], style="bars")  # fmt: skip
    plots = (Plot("Sensitivity", "setting", f"change of {score} a standard deviation", [bars]),)
    notes = ["A line sees no optimum inside the range: a setting whose best value is in the middle looks harmless."]
    if int(torch.linalg.matrix_rank(design)) < design.shape[1]:
        notes.append("Some settings always change together: what they do is shared out between them arbitrarily.")
    return Report(f"Sensitivity of {score}", figures, rows, plots, notes)


def _checked(
    runs: Sequence[Mapping[str, Any]], score: str, settings: Sequence[str] | None, log: Sequence[str]
) -> dict[str, list[Any]]:
    """The settings by name."""
    if not runs:
        raise Error("sensitivity needs a table of runs, got none")
    known = list(runs[0])
    wanted = [name for name in known if name != score] if settings is None else list(settings)
    for name in [score, *wanted]:
        if name not in known:
            raise Error(f"the runs have no {name!r}{did_you_mean(name, known)}; they have {listed(known)}")
    for name in log:
        if name not in wanted:
            raise Error(f"log= names no setting {name!r}{did_you_mean(name, wanted)}; they are {listed(wanted)}")
    lacking = [i for i, run in enumerate(runs) if any(name not in run for name in [score, *wanted])]
    if lacking:
        raise Error(f"runs {listed(map(str, lacking))} lack a setting or the score that the first one has")
    broken = [i for i, run in enumerate(runs) if run[score] is None or not math.isfinite(float(run[score]))]
    if broken:
        raise Error(f"the {score} of runs {listed(map(str, broken))} is not a finite number; leave them out")
    if not wanted:
        raise Error("the runs have no settings beside the score")
    return {name: [run[name] for run in runs] for name in wanted}


def _columns(
    table: Mapping[str, list[Any]], log: Sequence[str], near: Mapping[str, Any] | None
) -> tuple[list[str], Tensor, Tensor | None]:
    """Names, standardised columns ``[n, p]``, and where ``near`` is among them."""
    names: list[str] = []
    columns: list[list[float]] = []
    centre: list[float] = []
    if near is not None and (absent := [name for name in table if name not in near]):
        raise Error(f"near= names every setting; it lacks {listed(absent)}")
    for name, values in table.items():
        here = None if near is None else near[name]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            given = [float(value) for value in values] + ([] if here is None else [float(here)])
            if name in log and min(given) <= 0:
                raise Error(f"the logarithm of {name!r} needs values above 0, got {min(given):g}")
            if not all(map(math.isfinite, given)):
                raise Error(f"the setting {name!r} has values that are not finite numbers")
            given = [math.log(value) for value in given] if name in log else given
            own = torch.tensor(given[: len(values)], dtype=torch.float64)
            spread = float(own.std())
            if not spread > 0:
                raise Error(f"the setting {name!r} never varies: leave it out of settings=")
            names.append(name)
            columns.append(((own - own.mean()) / spread).tolist())
            if here is not None:
                centre.append((given[-1] - float(own.mean())) / spread)
            continue
        if name in log:
            raise Error(f"the setting {name!r} has values that are not numbers: it has no logarithm")
        levels = sorted(set(values), key=str)
        if near is not None and here not in levels:
            raise Error(f"near= has {here!r} for {name!r}; the runs have {listed(map(str, levels))}")
        if len(levels) < 2:
            raise Error(f"the setting {name!r} never varies: leave it out of settings=")
        for level in levels[1:]:
            names.append(f"{name} = {level}")
            columns.append([float(value == level) for value in values])
            if near is not None:
                centre.append(float(here == level))
    return (
        names,
        torch.tensor(columns, dtype=torch.float64).T,
        (torch.tensor(centre, dtype=torch.float64) if near is not None else None),
    )


def _fit(design: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted least squares for many sets of weights ``[b, n]``: ``[b, p]``."""
    gram = torch.einsum("bn,np,nq->bpq", weights, design, design)
    right = torch.einsum("bn,np,n->bp", weights, design, scores)
    ridge = _RIDGE * weights.sum(dim=1)[:, None, None] * torch.eye(design.shape[1], dtype=design.dtype)
    return torch.linalg.solve(gram + ridge, right[..., None])[..., 0]
