"""Several models on the same examples: who is better, by how much, and how sure that is.

Differences are taken example by example, so what is hard for all cancels; p values are raised for the
number of comparisons made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation._bootstrap import bootstrap
from weightsmith.inspect.evaluation._parts import Interval, Test, bars, named_rows, numbers
from weightsmith.inspect.evaluation._tests import adjusted, mcnemar, paired_t, permutation, wilcoxon

_TESTS = ("permutation", "t", "wilcoxon", "mcnemar")


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'; "
    "Demšar 2006, 'Statistical Comparisons of Classifiers over Multiple Data Sets'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="finds differences that intervals of the single models hide, and seldom one that is not there",
)
def compare(
    scores: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    names: Sequence[str] | None = None,
    baseline: str | None = None,
    test: str = "permutation",
    adjust: str = "holm",
    higher_is_better: bool = True,
    groups: Any = None,
    weight: Any = None,
    method: str = "percentile",
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Report:
    """Means, paired differences with intervals, and p values corrected for their number.

    Args:
        scores: ``{name: [n]}`` or ``[k, n]``: a number per example for each of k >= 2 models.
        names: of the rows, where scores is no mapping.
        baseline: the model that all others are compared with; None compares all pairs.
        test: ``permutation``, ``t``, ``wilcoxon``, or ``mcnemar`` for right and wrong answers.
        adjust: as in `adjusted`.
        higher_is_better: of scores.
        groups, weight, method, confidence, samples, seed: as in `bootstrap`. A test takes a weighted number as one of
            that weight.

    Returns:
        Report: a row per pair: ``first``, ``second``, ``difference`` (first minus second), its ``low`` and ``high``,
        ``p``, ``adjusted p`` and ``better``, a name or None; ``mean of <name>`` are its figures.

    Raises:
        Error: one model only, rows of different lengths, a baseline that is not there.

    >>> easy = torch.linspace(0, 1, 40)
    >>> found = compare({"a": easy + 0.01, "b": easy}, samples=100)
    >>> found["better"], round(found["difference"][0], 3)
    (['a'], 0.01)
    """
    if test not in _TESTS:
        raise Error(f"compare knows the tests {', '.join(_TESTS)}, not {test!r}{did_you_mean(test, _TESTS)}")
    called, rows = named_rows(scores, names, "compare")
    if len(rows) < 2:
        raise Error("compare needs 2 models or more, got 1")
    if test == "mcnemar" and (groups is not None or weight is not None):
        raise Error("compare: McNemar's test takes examples as independent and equal; use test='permutation' instead")
    adjusted([], adjust)  # refuses an unknown word before the long work
    if baseline is not None and baseline not in called:
        raise Error(f"compare: no model {baseline!r}{did_you_mean(baseline, called)}; there are {', '.join(called)}")
    options = {
        "groups": groups, "weight": weight, "method": method, "confidence": confidence, "samples": samples, "seed": seed
    }  # fmt: skip
    means = [bootstrap(row, **options) for row in rows]
    pairs = _pairs(called, baseline)
    differences = [bootstrap(rows[i] - rows[j], **options) for i, j in pairs]
    scale = 1 if weight is None else numbers(weight, "compare: weight").to(rows)
    tested = [_tested(test, rows[i], rows[j], scale, groups, seed) for i, j in pairs]
    raised = adjusted([one.p_value for one in tested], adjust)
    table = [
        _row(called[i], called[j], difference, one.p_value, p, confidence, higher_is_better)
        for (i, j), difference, one, p in zip(pairs, differences, tested, raised, strict=True)
    ]
    figures = {f"mean of {name}": mean.estimate for name, mean in zip(called, means, strict=True)}
    labels = [f"{called[i]} - {called[j]}" for i, j in pairs]
    gaps = Line(
        "difference", labels, [d.estimate for d in differences], [d.low for d in differences],
        [d.high for d in differences], style="bars",
    )  # fmt: skip
    plots = [bars("Means", "mean", called, means), Plot("Paired differences", "", "first minus second", [gaps])]
    count = means[0].count
    notes = [
        f"Paired over {count} {'examples' if groups is None else 'groups'}; {method} intervals of the single "
        f"differences at {confidence:g}, p values by {tested[0].name}, {adjust} for {len(pairs)} comparisons."
    ]
    return Report(f"{len(called)} models on the same examples", figures, table, plots, notes)


def _pairs(names: Sequence[str], baseline: str | None) -> list[tuple[int, int]]:
    if baseline is None:
        return list(itertools.combinations(range(len(names)), 2))
    base = list(names).index(baseline)
    return [(index, base) for index in range(len(names)) if index != base]


def _tested(test: str, first: Tensor, second: Tensor, scale: Any, groups: Any, seed: int) -> Test:
    if test == "mcnemar":
        return mcnemar(first, second)
    options: dict[str, Any] = {"groups": groups} | ({"seed": seed} if test == "permutation" else {})
    found: Callable[..., Test] = {"permutation": permutation, "t": paired_t, "wilcoxon": wilcoxon}[test]
    return found(first * scale, second * scale, **options)


def _row(
    first: str, second: str, difference: Interval, p: float, raised: float, confidence: float, higher: bool
) -> dict[str, Any]:
    ahead = first if (difference.estimate > 0) == higher else second
    return {
        "first": first,
        "second": second,
        "difference": difference.estimate,
        "low": difference.low,
        "high": difference.high,
        "p": p,
        "adjusted p": raised,
        "better": ahead if raised < 1 - confidence and difference.estimate else None,
    }
