"""The report of a fitted law: constants, errors, and four pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weightsmith.inspect._report import Line, Plot, Report

if TYPE_CHECKING:
    from weightsmith.inspect.scaling._law import Law

_CURVES = 4  # budgets that are drawn
_FINE = 41  # points a curve


def report(law: Law, level: float = 0.9, budgets: Sequence[float] | None = None) -> Report:
    """What `Law.report` returns."""
    fitted, sure = len(law.observed) > 0, len(law.draws) > 0
    figures: dict[str, object] = {"formula": law.form.about or law.form.name, "runs": len(law.observed)}
    notes = []
    if fitted:
        left_out = law.errors().abs()
        figures |= {
            "objective (sum of Huber losses)": law.loss,
            "median error of the fit": float(_relative(law, law.residuals).abs().median()),
            "mean error, each run left out": float(left_out.mean()),
            "largest error, each run left out": float(left_out.max()),
            "starts that reached the least objective": f"{law.agreeing} of {law.starts}",
        }
        if law.agreeing < 2 and law.starts > 1:
            notes.append("Only one start reached this minimum: give other starts, and see whether it stays the least.")
    spending = _spending(law, budgets)
    if spending:
        figures |= _advice(law, spending)
    plots = [*(_fit_and_residuals(law) if fitted else ()), *(_budget_plots(law, spending, level) if spending else ())]
    if fitted and not sure:
        notes.append("No bootstrap was asked for, so there are no intervals.")
    if fitted and int(law.groups.max()) + 1 < len(law.observed):
        notes.append("Runs of one group are left out and resampled together; sandwich errors take them as independent.")
    if sure:
        notes.append(
            f"Intervals are {level:.0%} percentile intervals of {len(law.draws)} bootstraps over runs; they know "
            "nothing of errors that all runs share, nor of a law that is wrong."
        )
        wide = [name for name, (low, high) in law.intervals(level).items() if low > 0 and high / low > 10]
        if wide:
            notes.append(f"The runs hardly tell {', '.join(wide)}: the interval spans more than a factor of 10.")
    return Report(f"Law {law.form.name}", figures, _rows(law, level), plots, notes)


def _rows(law: Law, level: float) -> list[dict[str, object]]:
    fitted, sure = len(law.observed) > 0, len(law.draws) > 0
    errors = law.standard_errors() if fitted else {}
    rows = []
    for name, value in law.parameters.items():
        low, high = law.interval(name, level) if sure else (None, None)
        spread = None
        if sure and name not in law.fixed:
            spread = float(law.form.natural(law.draws, name).std())
        rows.append(
            {
                "constant": name,
                "value": value,
                "low": low,
                "high": high,
                "bootstrap error": spread,
                "sandwich error": errors.get(name),
            }
        )
    return rows


def _relative(law: Law, residuals: torch.Tensor) -> torch.Tensor:
    return residuals.expm1() if law.form.scale == "log" else residuals


def _fit_and_residuals(law: Law) -> list[Plot]:
    told = law.told(law.columns)
    error = (-_relative(law, law.residuals)).tolist()
    ends = [float(min(told.min(), law.observed.min())), float(max(told.max(), law.observed.max()))]
    goal = law.form.target
    name = "relative error" if law.form.scale == "log" else "error"
    return [
        Plot(
            "Fit",
            f"predicted {goal}",
            f"observed {goal}",
            [Line("as predicted", ends, ends), Line("runs", told.tolist(), law.observed.tolist(), style="points")],
        ),
        Plot(
            "Residuals",
            f"predicted {goal}",
            f"{name}, observed over predicted",
            [Line("none", ends, [0.0, 0.0]), Line("runs", told.tolist(), error, style="points")],
        ),
    ]


def _spending(law: Law, budgets: Sequence[float] | None) -> list[float]:
    kind = law.form.budget
    if kind is None:
        return []
    if budgets is not None:
        return [float(one) for one in budgets]
    if not len(law.observed):
        return []
    first, second = (law.columns[name] for name in law.form.columns[:2])
    spent = kind.spent(first, second)
    low, high = math.log(float(spent.min())), math.log(float(spent.max()))
    high = max(high, low + math.log(10.0)) + math.log(10.0)  # one decade beyond the runs
    return [math.exp(low + (high - low) * step / (_CURVES - 1)) for step in range(_CURVES)]


def _advice(law: Law, spending: Sequence[float]) -> dict[str, float]:
    kind, first = law.form.budget, law.form.columns[0]
    assert kind is not None
    top = max(spending)
    here, above = law.shared(top), law.shared(10 * top)
    exponent = math.log10(above.columns[first] / here.columns[first])
    found = {f"best {name} at {kind.name} {top:.3g}": value for name, value in here.columns.items()}
    found[f"predicted {law.form.target} there"] = here.value
    return found | {f"best {first} grows as {kind.name} to the": exponent}


def _budget_plots(law: Law, spending: Sequence[float], level: float) -> list[Plot]:
    kind = law.form.budget
    assert kind is not None
    first, second = law.form.columns[:2]
    curves, bests = [], []
    for spent in spending:
        best = law.shared(spent)
        bests.append(best)
        reach = math.log(30.0)
        centre = math.log(best.columns[first])
        top = math.log(spent) - 1e-3 if kind.name == "size" else math.inf
        places = [math.exp(min(centre + reach * (2 * i / (_FINE - 1) - 1), top)) for i in range(_FINE)]
        at = torch.tensor(places, dtype=torch.float64)
        told = law.told({first: at, second: kind.rest(at, spent)})
        curves.append(Line(f"{kind.name} {spent:.2g}", places, told.tolist()))
    points = [best.columns[first] for best in bests]
    curves.append(Line("best", points, [best.value for best in bests], style="points"))
    plots = [Plot(f"Curves of equal {kind.name}", first, law.form.target, curves, log="x")]
    lines = []
    sure = [law.shared(spent, interval=True, level=level) for spent in spending] if len(law.draws) else []
    for name in (first, second):
        values = [best.columns[name] for best in bests]
        low = [one.low[name] for one in sure] or None
        high = [one.high[name] for one in sure] or None
        lines.append(Line(f"best {name}", list(spending), values, low, high))
    return [*plots, Plot("Best allocation", kind.name, f"{first} and {second}", lines, log="xy")]
