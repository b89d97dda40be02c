"""A pool of forecasts: who was nearest, were they as sure as they should be, and does a consensus beat them?

Forecasters err together and apart. What each adds of his own cancels in a mean; what one gets grossly
wrong does not, but does in a median. A forecast that says how sure it is can be judged on that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation._parts import alike, named_rows, numbers, share
from weightsmith.solve import resampled_means

CONSENSUS = ("mean", "median", "trimmed", "inverse error")


@card(
    paper="Marinescu et al. 2020, 'The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: "
    "Results after 1 Year Follow-up'",
    covers=("alzheimers-disease-prediction-longitudinal",),
    unit="model",
    claim="the median stays near the best forecasters where some are badly wrong, which ruins the mean",
)
def consensus(forecasts: Any, how: str = "median", *, errors: Any = None, trim: float = 0.2) -> Tensor:
    r"""One forecast of many.

    .. math:: \frac{\sum_m f_m / e_m^2}{\sum_m 1 / e_m^2} \text{ (inverse error)}

    Args:
        forecasts: ``[m, n]``, m forecasters.
        how: ``mean``; ``median``; ``trimmed``, the mean without the outer ``trim`` of both ends together;
            ``inverse error``.
        errors: ``[m]``, typical errors on other data, above 0, for ``inverse error``.
        trim: share left out, half of it (rounded down to whole forecasters) at either end.

    Returns:
        ``[n]`` in float64.

    Raises:
        Error: values that are not finite, an unknown word, errors missing.

    >>> consensus([[1.0], [2.0], [90.0]], "median").tolist()
    [2.0]
    """
    found = numbers(forecasts, "consensus", dimensions=2)
    if how not in CONSENSUS:
        raise Error(f"consensus knows {', '.join(CONSENSUS)}, not {how!r}{did_you_mean(how, CONSENSUS)}")
    if how == "mean":
        return found.mean(0)
    if how == "inverse error":
        if errors is None:
            raise Error("consensus: inverse error needs errors=, one per forecaster, from other data")
        size = numbers(errors, "consensus: errors")
        if size.shape != found.shape[:1] or not bool((size > 0).all()):
            raise Error(f"consensus: errors above 0 for {len(found)} forecasters, got {size.tolist()}")
        weights = size.to(found).pow(-2)
        return weights @ found / weights.sum()
    ordered, count = found.sort(0).values, len(found)
    if how == "trimmed" and not 0 <= trim < 1:
        raise Error(f"consensus: trim is at least 0 and below 1, got {trim:g}")
    middle = (count - 1) // 2
    outer = middle if how == "median" else min(int(trim * count / 2 + 1e-9), middle)
    return ordered[outer : count - outer].mean(0)


@card(
    paper="Marinescu et al. 2020, 'The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: "
    "Results after 1 Year Follow-up'",
    covers=("alzheimers-disease-prediction-longitudinal",),
    unit="model",
)
def weighted_error(forecasts: Any, targets: Any, low: Any, high: Any) -> float:
    r"""The mean error, where a forecast that claims to be sure counts for more.

    .. math:: \frac{\sum_i C_i |f_i - y_i|}{\sum_i C_i}, \qquad C_i = \frac{1}{h_i - l_i}

    Args:
        forecasts, targets: ``[n]``.
        low, high: ``[n]``, ends of the forecasts' intervals, low < high.

    Raises:
        Error: numbers that do not pair up, or an empty interval.

    >>> weighted_error([1.0, 1.0], [1.0, 5.0], [0.0, 0.0], [1.0, 4.0])
    0.8
    """
    said, came = numbers(forecasts, "weighted_error: forecasts"), numbers(targets, "weighted_error: targets")
    width = numbers(high, "weighted_error: high") - numbers(low, "weighted_error: low")
    alike(said, came, "weighted_error: forecasts and targets")
    alike(said, width, "weighted_error: forecasts and intervals")
    if not bool((width > 0).all()):
        raise Error(f"weighted_error: {int((width <= 0).sum())} intervals are empty; low lies below high")
    sure = 1 / width
    return float((sure * (said - came).abs()).sum() / sure.sum())


@card(
    paper="Marinescu et al. 2020, 'The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: "
    "Results after 1 Year Follow-up'",
    covers=("alzheimers-disease-prediction-longitudinal",),
    unit="model",
)
def coverage_accuracy(low: Any, high: Any, targets: Any, *, stated: float = 0.5) -> float:
    r"""How far the share of targets inside of their intervals is from the share stated; 0 is best.

    .. math:: \Big| \frac1n \sum_i 1[l_i \le y_i \le h_i] - s \Big|

    Args:
        low, high, targets: ``[n]``.
        stated: s, the confidence that the intervals claim; 0.5 in the paper.

    Raises:
        Error: numbers that do not pair up.

    >>> coverage_accuracy([0.0, 0.0], [1.0, 1.0], [0.5, 0.7])
    0.5
    """
    below, above = numbers(low, "coverage_accuracy: low"), numbers(high, "coverage_accuracy: high")
    came = numbers(targets, "coverage_accuracy: targets")
    alike(below, came, "coverage_accuracy: low and targets")
    alike(above, came, "coverage_accuracy: high and targets")
    inside = (below <= came) & (came <= above)
    return abs(float(inside.double().mean()) - share(stated, "stated"))


def absolute_error(forecasts: Tensor, targets: Tensor) -> Tensor:
    """The default error of a forecast."""
    return (forecasts - targets).abs()


@card(
    paper="Marinescu et al. 2020, 'The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: "
    "Results after 1 Year Follow-up'",
    covers=("alzheimers-disease-prediction-longitudinal",),
    unit="model",
    claim="the ranks that it calls sure are those of the next sample too",
)
def forecast_pool(
    forecasts: Mapping[str, Any] | Sequence[Any] | Tensor,
    targets: Any,
    *,
    names: Sequence[str] | None = None,
    baseline: str | None = None,
    combine: Sequence[str] = ("mean", "median", "trimmed"),
    error: Callable[[Tensor, Tensor], Tensor] = absolute_error,
    groups: Any = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Report:
    """Forecasters and their consensus by error, each with the ranks that it may well have, and against a baseline.

    Args:
        forecasts: ``{name: [n]}`` or ``[m, n]``.
        targets: ``[n]``.
        names: of the rows, where forecasts is no mapping.
        baseline: a forecaster, such as the last known value; it is left out of the consensus.
        combine: words of `consensus` other than ``inverse error``.
        error: ``(forecasts [m, n], targets [n]) -> [m, n]``, less is better.
        groups, confidence, samples, seed: as in `bootstrap`; all share the same resamples.

    Returns:
        Report: a row per forecaster and consensus, the best first: ``error``, its ``low`` and ``high``, ``rank`` with
        ``rank low`` and ``rank high``, ``best`` (share of resamples that it wins), ``p``: of no lower error than the
        baseline's (None without one).

    Raises:
        Error: rows or targets that do not pair up, an unknown baseline or word, errors that are not finite.

    >>> said = {"near": [1.0, 2.0, 3.0], "far": [5.0, 5.0, 5.0], "last": [0.0, 1.0, 2.0]}
    >>> forecast_pool(said, [1.0, 2.0, 3.5], baseline="last", combine=(), samples=50)["forecaster"]
    ['near', 'last', 'far']
    """
    called, said = named_rows(forecasts, names, "forecast_pool")
    came = numbers(targets, "forecast_pool: targets").to(said)
    alike(said[0], came, "forecast_pool: forecasts and targets")
    share(confidence, "confidence")
    if samples < 2:
        raise Error(f"forecast_pool needs 2 samples or more, got {samples}")
    if baseline is not None and baseline not in called:
        raise Error(f"forecast_pool: no forecaster {baseline!r}{did_you_mean(baseline, called)}")
    members = [index for index, name in enumerate(called) if name != baseline]
    if combine and not members:
        raise Error("forecast_pool: nobody to combine beside the baseline")
    added = [consensus(said[members], how) for how in combine]
    everybody = [*called, *(f"consensus: {how}" for how in combine)]
    losses = error(torch.cat([said, torch.stack(added)]) if added else said, came)
    if losses.shape != (len(everybody), len(came)) or not bool(losses.isfinite().all()):
        raise Error(
            f"forecast_pool: error gives finite numbers {[len(everybody), len(came)]}, not {list(losses.shape)}"
        )
    errors = losses.mean(1)
    drawn = resampled_means(losses, samples, seed, groups)
    tails = drawn.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = torch.quantile(drawn, tails, dim=0).tolist()
    # A rank is one more than how many have less error; equals share the better one.
    ranks = 1 + torch.searchsorted(drawn.sort(1).values, drawn.contiguous())
    rank_low, rank_high = torch.quantile(ranks.double(), tails, dim=0, interpolation="nearest").tolist()
    wins = (ranks == 1).double().mean(0).tolist()
    if baseline is None:
        p_values: list[float | None] = [None] * len(everybody)
    else:
        behind = (drawn >= drawn[:, [called.index(baseline)]]).double().sum(0)
        p_values = ((1 + behind) / (1 + samples)).tolist()
    rank = (1 + (errors[None] < errors[:, None]).sum(1)).tolist()
    table = [
        {"forecaster": everybody[i], "error": float(errors[i]), "low": low[i], "high": high[i], "rank": rank[i],
         "rank low": int(rank_low[i]), "rank high": int(rank_high[i]), "best": wins[i], "p": p_values[i]}
        for i in sorted(range(len(everybody)), key=lambda i: (rank[i], i))
    ]  # fmt: skip
    figures = {name: float(errors[len(called) + i]) for i, name in enumerate(everybody[len(called) :])}
    figures["best forecaster"] = min(float(one) for one in errors[: len(called)])
    column = {name: [row[name] for row in table] for name in table[0]}
    plot = Plot("Error", "", "mean error", [Line("error", column["forecaster"], column["error"], column["low"],
                                                 column["high"], "bars")])  # fmt: skip
    notes = [] if baseline is None else [f"p: share of resamples with no less error than {baseline}, one-sided."]
    return Report(f"{len(called)} forecasters", figures, table, [plot], notes)
