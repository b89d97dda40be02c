"""Fairness against accuracy at equal terms: what thresholds by group can reach with the scores of any model.

A model's scores, cut at a threshold of their own in each group and mixed at random between two of them,
reach every pair of error rates under the group's ROC curve. The best choice under a bound on the gap
between groups is a linear program. With no bound it undoes what a fair training did (unprocessing), so
models can be compared at the same gap instead of each at its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation._parts import alike, numbers
from weightsmith.solve import linear_program

Array = NDArray[numpy.float64]

CONSTRAINTS = ("equalized odds", "equal opportunity", "predictive equality", "demographic parity")
_CLASSES = {"equalized odds": (0, 1), "equal opportunity": (1,), "predictive equality": (0,)}  # whose rates may differ


def _known(constraint: str, what: str) -> None:
    if constraint not in CONSTRAINTS:
        raise Error(f"{what} knows {', '.join(CONSTRAINTS)}, not {constraint!r}{did_you_mean(constraint, CONSTRAINTS)}")


@card(
    paper="Provost, Fawcett 2001, 'Robust Classification for Imprecise Environments'",
    covers=("unprocessing-seven-years-algorithmic",),
    unit="model",
)
def roc_hull(scores: Any, labels: Any) -> tuple[list[float], list[float], list[float]]:
    """The corners of what thresholds on scores can reach, from nobody accepted to everybody.

    Args:
        scores: ``[n]``; who scores at least the threshold is accepted.
        labels: ``[n]`` 0 or 1, both there.

    Returns:
        Thresholds (from infinity down), false and true positive rates, of the corners of the upper hull.

    Raises:
        Error: one class only, or values that are not finite.

    >>> roc_hull([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    ([inf, 0.9, 0.7, 0.1], [0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    found, true = numbers(scores, "roc_hull: scores"), numbers(labels, "roc_hull: labels")
    alike(found, true, "roc_hull: scores and labels")
    if not bool(((true == 0) | (true == 1)).all()):
        raise Error("roc_hull: labels are 0 or 1")
    positive, negative = int((true == 1).sum()), int((true == 0).sum())
    if not positive or not negative:
        raise Error(f"roc_hull: needs examples of both classes, got {positive} of 1 and {negative} of 0")
    order = found.argsort(descending=True)
    cuts, labels_there = found[order], true[order]
    last = torch.cat([cuts[1:] != cuts[:-1], torch.tensor([True], device=cuts.device)])  # equal scores go together
    rates = torch.stack([(1 - labels_there).cumsum(0), labels_there.cumsum(0)], 1)[last].long().tolist()
    corners: list[tuple[float, int, int]] = [(math.inf, 0, 0)]
    for cut, (false, right) in zip(cuts[last].tolist(), rates, strict=True):
        while len(corners) > 1 and not _turns_right(corners[-2][1:], corners[-1][1:], (false, right)):
            corners.pop()
        corners.append((cut, false, right))
    return [c[0] for c in corners], [c[1] / negative for c in corners], [c[2] / positive for c in corners]


def _turns_right(first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]) -> bool:
    rise = (middle[0] - first[0]) * (last[1] - first[1]) - (middle[1] - first[1]) * (last[0] - first[0])
    return rise < 0


@dataclass(frozen=True)
class GroupThresholds:
    """A threshold for every group, drawn at random from a few."""

    thresholds: dict[Any, tuple[tuple[float, float], ...]]
    """By group: pairs of a threshold and the probability that it is used."""
    rates: dict[Any, tuple[float, float]]
    """By group: false and true positive rate on the examples that it was fitted to."""
    accuracy: float
    """Expected there; 1 minus the mean cost where costs were given."""
    gap: float
    """The largest difference between groups that the constraint speaks of."""
    constraint: str

    def predict(self, scores: Any, groups: Any, *, seed: int = 0) -> Tensor:
        """Who is accepted: ``[n]`` booleans on the CPU, one random threshold per example.

        Raises:
            Error: a group that it was not fitted to.
        """
        found = numbers(scores, "predict")
        chance = torch.rand(len(found), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        accepted = torch.zeros(len(found), dtype=torch.bool)
        number, names = _groups(groups, len(found))
        for index, name in enumerate(names):
            if name not in self.thresholds:
                raise Error(f"predict: group {name!r} was not there in fitting; there were {list(self.thresholds)}")
            cuts, weights = zip(*self.thresholds[name], strict=True)
            ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
            inside = number == index
            which = torch.searchsorted(ends, chance[inside], right=True).clamp(max=len(cuts) - 1)
            accepted[inside] = found[inside].cpu() >= torch.tensor(cuts, dtype=torch.float64)[which]
        return accepted

    def report(self) -> Report:
        """As a report: a row per group and threshold."""
        table = [
            {"group": str(name), "threshold": cut, "used": weight, "false positives": self.rates[name][0],
             "true positives": self.rates[name][1]}
            for name, cuts in self.thresholds.items() for cut, weight in cuts
        ]  # fmt: skip
        figures = {"accuracy": self.accuracy, "gap": self.gap, "constraint": self.constraint}
        return Report("thresholds by group", figures, table, notes=["Rates are those of the examples fitted to."])


def _groups(groups: Any, count: int) -> tuple[Tensor, list[Any]]:
    listed = groups.tolist() if isinstance(groups, Tensor | numpy.ndarray) else list(groups)
    if len(listed) != count:
        raise Error(f"fairness: {len(listed)} groups for {count} examples")
    names = sorted(set(listed), key=lambda name: (str(type(name)), name))
    places = {name: index for index, name in enumerate(names)}
    return torch.tensor([places[name] for name in listed]), names


@card(
    paper="Cruz, Hardt 2024, 'Unprocessing Seven Years of Algorithmic Fairness'; Hardt, Price, Srebro 2016, "
    "'Equality of Opportunity in Supervised Learning'",
    covers=("unprocessing-seven-years-algorithmic",),
    unit="model",
    claim="no other thresholds on the same scores are more accurate at the same gap, on the examples fitted to",
)
def fair_thresholds(
    scores: Any,
    labels: Any,
    groups: Any,
    *,
    tolerance: float = 0.0,
    constraint: str = "equalized odds",
    false_positive_cost: float = 1.0,
    false_negative_cost: float = 1.0,
) -> GroupThresholds:
    r"""The most accurate thresholds by group whose rates differ by no more than a tolerance.

    .. math:: \min_\lambda \sum_g \pi_g \big( c_+ P_g(0) f_g + c_- P_g(1) (1 - t_g) \big), \qquad
        |f_g - f_h| \le r, \; |t_g - t_h| \le r

    with :math:`(f_g, t_g)` a mixture, by :math:`\lambda`, of the corners of the group's ROC curve.

    Args:
        scores: ``[n]``, of any model.
        labels: ``[n]`` 0 or 1.
        groups: ``[n]`` of anything that can be told apart.
        tolerance: r, from 0 (no gap) to infinity (no constraint).
        constraint: what may differ by r at most: both rates (``equalized odds``), the true positive rate (``equal
            opportunity``), the false positive rate (``predictive equality``), the share accepted (``demographic
            parity``).
        false_positive_cost, false_negative_cost: 1 and 1 count errors.

    Returns:
        GroupThresholds: with ``predict``, ``rates``, ``accuracy`` and ``gap``.

    Raises:
        Error: a group with one class only, or shapes that do not fit.
        MissingPackage: scipy is not installed.

    >>> found = fair_thresholds([0.1, 0.9, 0.2, 0.6], [0, 1, 1, 0], ["a", "a", "b", "b"])
    >>> found.accuracy, found.gap
    (0.5, 0.0)
    """
    _known(constraint, "fair_thresholds")
    if not tolerance >= 0:
        raise Error(f"fair_thresholds: tolerance is 0 or more, got {tolerance:g}")
    found, true = numbers(scores, "fair_thresholds: scores"), numbers(labels, "fair_thresholds: labels")
    alike(found, true, "fair_thresholds: scores and labels")
    number, names = _groups(groups, len(found))
    hulls, shares = [], []
    for index, name in enumerate(names):
        inside = number == index
        try:
            hulls.append(roc_hull(found[inside], true[inside]))
        except Error as error:
            raise Error(f"fair_thresholds: group {name!r}: {error}") from None
        shares.append([float((true[inside] == c).sum()) / len(true) for c in (0, 1)])
    return _solved(names, hulls, shares, tolerance, constraint, false_positive_cost, false_negative_cost)


def _solved(
    names: list[Any],
    hulls: list[Any],
    shares: list[list[float]],
    tolerance: float,
    constraint: str,
    up: float,
    down: float,
) -> GroupThresholds:
    sizes = [len(cuts) for cuts, _, _ in hulls]
    starts = numpy.cumsum([0, *sizes])
    costs = numpy.concatenate(
        [
            up * negative * numpy.array(false) + down * positive * (1 - numpy.array(right))
            for (_, false, right), (negative, positive) in zip(hulls, shares, strict=True)
        ]
    )
    total = int(starts[-1])
    measured = _measured(hulls, shares, constraint)  # by constrained rate: the corners' values, group by group
    equal = numpy.zeros((len(names), total + len(measured)))
    bounds_matrix, limits = [], []
    for g in range(len(names)):
        part = slice(starts[g], starts[g + 1])
        equal[g, part] = 1
        for which, values in enumerate(measured):
            # Every group's rate lies between a free level and that level plus the tolerance.
            for sign, limit in ((1, tolerance), (-1, 0.0)):
                if math.isfinite(tolerance):
                    row = numpy.zeros(total + len(measured))
                    row[part], row[total + which] = sign * values[g], -sign
                    bounds_matrix.append(row)
                    limits.append(limit)
    at_most = (numpy.array(bounds_matrix), numpy.array(limits)) if limits else None
    costs = numpy.concatenate([costs, numpy.zeros(len(measured))])
    point, cost = linear_program(
        costs, at_most=at_most, equal=(equal, numpy.ones(len(names))), purpose="fair_thresholds"
    )
    thresholds, rates, mixed = {}, {}, []
    for g, name in enumerate(names):
        weights = point[starts[g] : starts[g + 1]]
        cuts, false, right = hulls[g]
        thresholds[name] = tuple((cut, float(w)) for cut, w in zip(cuts, weights, strict=True) if w > 1e-12)
        rates[name] = (float(weights @ numpy.array(false)), float(weights @ numpy.array(right)))
        mixed.append([float(weights @ values[g]) for values in measured])
    gap = max(max(column) - min(column) for column in zip(*mixed, strict=True))
    return GroupThresholds(thresholds, rates, 1 - cost, gap, constraint)


def _measured(hulls: list[Any], shares: list[list[float]], constraint: str) -> list[list[Array]]:
    false = [numpy.array(f) for _, f, _ in hulls]
    right = [numpy.array(t) for _, _, t in hulls]
    accepted = [(n * f + p * t) / (n + p) for (n, p), f, t in zip(shares, false, right, strict=True)]
    return {
        "equalized odds": [false, right],
        "equal opportunity": [right],
        "predictive equality": [false],
        "demographic parity": [accepted],
    }[constraint]


@card(
    paper="Cruz, Hardt 2024, 'Unprocessing Seven Years of Algorithmic Fairness'",
    covers=("unprocessing-seven-years-algorithmic",),
    unit="model",
)
def unprocess(scores: Any, labels: Any, groups: Any, **options: Any) -> GroupThresholds:
    """The most accurate thresholds by group with no constraint: what a model could do before it was made fair.

    Args:
        scores, labels, groups, options: as in `fair_thresholds`.

    Returns:
        GroupThresholds.

    Raises:
        Error: as `fair_thresholds`.

    >>> unprocess([0.1, 0.9, 0.6, 0.2], [0, 1, 1, 0], ["a", "a", "b", "b"]).accuracy
    1.0
    """
    return fair_thresholds(scores, labels, groups, tolerance=math.inf, **options)


@card(
    paper="Hardt, Price, Srebro 2016, 'Equality of Opportunity in Supervised Learning'",
    covers=("unprocessing-seven-years-algorithmic",),
    unit="model",
)
def group_gap(decisions: Any, labels: Any, groups: Any, constraint: str = "equalized odds") -> float:
    """The largest difference between groups of the rates that a constraint speaks of, of decisions as they are.

    Args:
        decisions: ``[n]`` 0 or 1.
        labels, groups: ``[n]``.
        constraint: as in `fair_thresholds`.

    Returns:
        From 0 to 1.

    Raises:
        Error: an unknown constraint, or a group without examples of a class that it speaks of.

    >>> group_gap([1, 0, 1, 1], [1, 0, 1, 0], ["a", "a", "b", "b"])
    1.0
    """
    said, true = numbers(decisions, "group_gap: decisions"), numbers(labels, "group_gap: labels")
    alike(said, true, "group_gap")
    _known(constraint, "group_gap")
    number, names = _groups(groups, len(said))
    rates = []
    for index, name in enumerate(names):
        inside = (number == index).to(said.device)
        parts = [inside] if constraint == "demographic parity" else [inside & (true == c) for c in _CLASSES[constraint]]
        if not all(bool(part.any()) for part in parts):
            raise Error(f"group_gap: group {name!r} has examples of one class only, which leaves {constraint} unknown")
        rates.append([float(said[part].mean()) for part in parts])
    return max(max(column) - min(column) for column in zip(*rates, strict=True))


@card(
    paper="Cruz, Hardt 2024, 'Unprocessing Seven Years of Algorithmic Fairness'",
    covers=("unprocessing-seven-years-algorithmic",),
    unit="model",
    claim="the most accurate model, cut by group, is at the gap of a model trained to be fair no less accurate",
)
def fairness_frontier(
    scores: Mapping[str, Any],
    labels: Any,
    groups: Any,
    *,
    fitting: Mapping[str, Any] | None = None,
    fitting_labels: Any = None,
    fitting_groups: Any = None,
    threshold: float = 0.5,
    tolerances: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3),
    constraint: str = "equalized odds",
    seed: int = 0,
) -> Report:
    """Models at their own gap, unprocessed, and the most accurate of them at everybody's gap.

    Args:
        scores: ``{name: [n]}`` by model, on the examples judged.
        labels, groups: ``[n]``.
        fitting, fitting_labels, fitting_groups: scores, labels and groups of other examples, to fit thresholds to;
            without them they are fitted to the examples judged, which flatters them.
        threshold: where the models' own decisions are cut.
        tolerances: of the curve that is drawn for the most accurate model.
        constraint: as in `fair_thresholds`.
        seed: of the random thresholds.

    Returns:
        Report: a row per model: ``accuracy`` and ``gap`` of its own decisions; ``unprocessed``, its accuracy with free
        thresholds; ``base at this gap``, the accuracy and ``its gap`` of the best unprocessed model cut to that gap.

    Raises:
        Error: as `fair_thresholds`, or fitting scores without labels and groups.

    >>> labels, groups = [0, 1, 1, 0] * 2, ["a", "a", "b", "b"] * 2
    >>> fairness_frontier({"m": [0.1, 0.9, 0.6, 0.2] * 2}, labels, groups)["unprocessed"]
    [1.0]
    """
    if not scores:
        raise Error("fairness_frontier: no model")
    held = fitting is not None
    if held and (fitting_labels is None or fitting_groups is None or set(fitting or ()) != set(scores)):
        raise Error("fairness_frontier: fitting needs scores of the same models, fitting_labels and fitting_groups")
    fit_scores, fit_labels, fit_groups = (fitting, fitting_labels, fitting_groups) if held else (scores, labels, groups)
    true = numbers(labels, "fairness_frontier: labels")

    def at(name: str, tolerance: float) -> tuple[float, float, float]:
        """Accuracy and gap on the examples judged, and accuracy on those fitted to."""
        found = fair_thresholds(fit_scores[name], fit_labels, fit_groups, tolerance=tolerance, constraint=constraint)
        if not held:
            return found.accuracy, found.gap, found.accuracy
        said = found.predict(scores[name], groups, seed=seed)
        return float((said == true.bool()).double().mean()), group_gap(said, labels, groups, constraint), found.accuracy

    free = {name: at(name, math.inf) for name in scores}
    base = max(free, key=lambda name: free[name][2])
    table = []
    for name, values in scores.items():
        said = numbers(values, f"fairness_frontier: {name}") >= threshold
        gap = group_gap(said, labels, groups, constraint)
        accuracy, reached, _ = at(base, gap)
        own = float((said == true.bool()).double().mean())
        table.append({"model": name, "accuracy": own, "gap": gap, "unprocessed": free[name][0],
                      "base at this gap": accuracy, "its gap": reached})  # fmt: skip
    curve = [at(base, tolerance) for tolerance in tolerances]
    lines = [
        Line(f"{base}, cut by group", [c[1] for c in curve], [c[0] for c in curve]),
        Line("models as they are", [row["gap"] for row in table], [row["accuracy"] for row in table], style="points"),
    ]
    where = "other examples" if held else "the same examples"
    notes = [f"The base is {base}, the most accurate without constraint. Thresholds were fitted to {where}."]
    plot = Plot("Accuracy and gap", f"gap ({constraint})", "accuracy", lines)
    return Report("fairness at equal terms", {"base": base, "constraint": constraint}, table, [plot], notes)
