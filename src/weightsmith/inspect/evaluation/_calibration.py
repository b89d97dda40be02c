"""Does a probability mean what it says: of all that was said with 80 %, do 80 % come true?

Forecasts are sorted into bins, and in each the mean forecast is held against the share that came true.
The fixed remedies are here too: one number that scales all logits, or a logistic curve over the scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation._parts import numbers, tensor_of

TINY = 1e-12


def _forecasts(probabilities: Any, labels: Any, what: str) -> tuple[Tensor, Tensor]:
    """Probabilities ``[n]`` or ``[n, c]`` and whole labels ``[n]``, checked."""
    found = tensor_of(probabilities).double()
    true = tensor_of(labels).to(found.device)
    if found.ndim not in (1, 2) or not len(found) or true.shape != found.shape[:1]:
        raise Error(
            f"{what}: needs probabilities [n] or [n, c] and labels [n], got {list(found.shape)}, {list(true.shape)}"
        )
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise Error(f"{what}: probabilities lie between 0 and 1")
    top = found.shape[1] if found.ndim == 2 else 2
    if not bool(((true >= 0) & (true < top) & (true == true.long())).all()):
        raise Error(f"{what}: labels are whole numbers from 0 to {top - 1}")
    return found, true.long()


def _said_and_came(probabilities: Any, labels: Any, what: str) -> tuple[Tensor, Tensor]:
    """A probability and whether it came true, ``[n]`` each: of the event, or of the likeliest class."""
    found, true = _forecasts(probabilities, labels, what)
    if found.ndim == 1:
        return found, true.double()
    sure, likeliest = found.max(1)
    return sure, (likeliest == true).double()


def _bins(said: Tensor, bins: int, adaptive: bool, what: str) -> Tensor:
    """The bin of every forecast: of equal width, or of equal numbers."""
    if bins < 1:
        raise Error(f"{what}: bins is 1 or more, got {bins}")
    if adaptive:
        # Equal forecasts belong together: a bin is that of the middle of their places.
        _, place, sizes = torch.unique(said, return_inverse=True, return_counts=True)
        middle = sizes.cumsum(0).double() - (sizes.double() + 1) / 2
        return (middle[place] * bins / len(said)).long().clamp(max=bins - 1)
    # Edges divided out, not forecasts multiplied: 0.07 times 100 is a bit more than 7.
    return torch.bucketize(said, torch.arange(1, bins, device=said.device).double() / bins)


def _table(said: Tensor, came: Tensor, bins: int, adaptive: bool, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forecasts, mean forecast and share come true, by bin that has any."""
    place = _bins(said, bins, adaptive, what)
    size, first, second = (
        said.new_zeros(bins).index_add_(0, place, values) for values in (torch.ones_like(said), said, came)
    )
    some = size > 0
    return size[some], first[some] / size[some], second[some] / size[some]


@card(
    paper="Naeini, Cooper, Hauskrecht 2015, 'Obtaining Well Calibrated Probabilities Using Bayesian Binning'; "
    "Gupta, Ramdas 2023, 'Online Platt Scaling with Calibeating'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
)
def calibration_error(probabilities: Any, labels: Any, *, bins: int = 15, adaptive: bool = False) -> float:
    r"""The mean gap between what was said and what came true, over bins of forecasts.

    .. math:: \sum_b \frac{n_b}{n} \big| \bar p_b - \bar y_b \big|

    Args:
        probabilities: ``[n]`` of an event, or ``[n, c]`` of classes, whose likeliest is judged.
        labels: ``[n]``.
        bins: how many, each open below, as ``(0.1, 0.2]``.
        adaptive: bins of equal numbers in place of equal width; equal forecasts stay together.

    Raises:
        Error: shapes that do not fit, probabilities outside of [0, 1], labels that are no classes.

    >>> calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0])
    0.0
    """
    said, came = _said_and_came(probabilities, labels, "calibration_error")
    size, first, second = _table(said, came, bins, adaptive, "calibration_error")
    return float((size * (first - second).abs()).sum() / size.sum())


@card(
    paper="Brier 1950, 'Verification of forecasts expressed in terms of probability'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
)
def brier(probabilities: Any, labels: Any) -> float:
    r"""The mean squared error of forecasts: :math:`(p - y)^2`, or :math:`\sum_c (p_c - 1[y = c])^2` over classes.

    Args:
        probabilities: ``[n]`` of an event, or ``[n, c]`` of classes.
        labels: ``[n]``.

    Raises:
        Error: as `calibration_error`.

    >>> brier([0.5, 1.0], [1, 1])
    0.125
    """
    found, true = _forecasts(probabilities, labels, "brier")
    if found.ndim == 1:
        return float((found - true).square().mean())
    return float((found - torch.nn.functional.one_hot(true, found.shape[1])).square().sum(1).mean())


@card(
    paper="Good 1952, 'Rational Decisions'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
)
def log_loss(probabilities: Any, labels: Any) -> float:
    r"""Minus the mean log-probability of what came true, in nats; probabilities are held above 1e-12.

    Args:
        probabilities: ``[n]`` of an event, or ``[n, c]`` of classes.
        labels: ``[n]``.

    Raises:
        Error: as `calibration_error`.

    >>> round(log_loss([0.5, 0.5], [1, 0]), 4)
    0.6931
    """
    found, true = _forecasts(probabilities, labels, "log_loss")
    chance = torch.where(true == 1, found, 1 - found) if found.ndim == 1 else found.gather(1, true[:, None])[:, 0]
    return float(-chance.clamp(min=TINY).log().mean())


@card(
    paper="Niculescu-Mizil, Caruana 2005, 'Predicting Good Probabilities with Supervised Learning'; "
    "Gupta, Ramdas 2023, 'Online Platt Scaling with Calibeating'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
)
def reliability(probabilities: Any, labels: Any, *, bins: int = 15, adaptive: bool = False) -> Report:
    """What was said against what came true, bin by bin, with the usual figures.

    Args:
        probabilities: ``[n]`` of an event, or ``[n, c]`` of classes.
        labels: ``[n]``.
        bins, adaptive: as in `calibration_error`.

    Returns:
        Report: ``calibration error`` (both kinds), ``sharpness`` (variance of the share come true over bins),
        ``log loss``, ``Brier``; a row per bin.

    Raises:
        Error: as `calibration_error`.

    >>> reliability([0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1], bins=2)["calibration error"]
    0.25
    """
    said, came = _said_and_came(probabilities, labels, "reliability")
    size, first, second = _table(said, came, bins, adaptive, "reliability")
    # The interval of a share after Wilson, which stays between 0 and 1.
    centre = (second + 1.92 / size) / (1 + 3.84 / size)
    half = 1.96 / (1 + 3.84 / size) * (second * (1 - second) / size + 0.96 / size**2).sqrt()
    figures = {
        "calibration error": calibration_error(probabilities, labels, bins=bins),
        "adaptive calibration error": calibration_error(probabilities, labels, bins=bins, adaptive=True),
        "sharpness": float((size * (second - came.mean()).square()).sum() / size.sum()),
        "log loss": log_loss(probabilities, labels),
        "Brier": brier(probabilities, labels),
        "mean said": float(said.mean()),
        "share come true": float(came.mean()),
    }
    columns = {
        "forecasts": size.long(),
        "said": first,
        "came true": second,
        "low": centre - half,
        "high": centre + half,
    }
    table = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    drawn = [
        Line(
            "forecasts", first.tolist(), second.tolist(), (centre - half).tolist(), (centre + half).tolist(), "points"
        ),
        Line("as said", [0.0, 1.0], [0.0, 1.0]),
    ]
    return Report(
        f"reliability of {len(said)} forecasts", figures, table, [Plot("Reliability", "said", "came true", drawn)]
    )


# Fixed remedies


def logistic_fit(features: Tensor, targets: Tensor, steps: int = 100) -> Tensor:
    """The weights ``[d]`` of a logistic curve that fit targets in [0, 1] best, by Newton's method with halved steps.

    >>> x = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    >>> logistic_fit(x, torch.tensor([1.0, 1.0, 1.0, 0.0])).item().__round__(4)         # log 3
    1.0986
    """
    weights = features.new_zeros(features.shape[1])

    def cost(at: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(features @ at, targets, reduction="sum")

    now = cost(weights)
    for _ in range(steps):
        chance = torch.sigmoid(features @ weights)
        gradient = features.T @ (chance - targets)
        curvature = (features.T * (chance * (1 - chance))) @ features
        # A curve that separates the outcomes grows for ever: the little ridge only keeps the system solvable.
        ridge = 1e-12 * curvature.diagonal().mean().clamp(min=1e-12)
        step = torch.linalg.solve(curvature + ridge * torch.eye(len(weights)).to(curvature), gradient)
        length = 1.0
        while cost(weights - length * step) > now and length > 1e-8:
            length /= 2
        weights = weights - length * step
        before, now = now, cost(weights)
        if float(before - now) <= 1e-14 * float(before.abs()):
            break
    return weights


@card(
    paper="Guo, Pleiss, Sun, Weinberger 2017, 'On Calibration of Modern Neural Networks'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
    claim="the log loss of the scaled logits on the data it is fitted to is never above that of the logits",
)
def temperature(logits: Any, labels: Any) -> float:
    r"""The number that logits are best divided by.

    .. math:: T = \arg\min_T -\sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    Convex in 1/T; found by Newton's method within a bracket.

    Args:
        logits: ``[n, c]`` of held-out examples.
        labels: ``[n]``.

    Returns:
        T. It is 1e-4 or 1e4 where the loss has no least value: all right, or no better than chance.

    Raises:
        Error: shapes that do not fit, or logits that are not finite.

    >>> logits = torch.tensor([[4.0, 0.0]] * 4)                       # says 98 %, is right in three of four
    >>> round(temperature(logits, torch.tensor([0, 0, 0, 1])), 3), round(4 / math.log(3), 3)
    (3.641, 3.641)
    """
    found = numbers(logits, "temperature", dimensions=2)
    true = tensor_of(labels).to(found.device).long()
    if true.shape != found.shape[:1] or bool(((true < 0) | (true >= found.shape[1])).any()):
        raise Error(f"temperature: labels {list(true.shape)} do not fit logits {list(found.shape)}")
    target = found.gather(1, true[:, None])[:, 0].mean()
    low, high, inverse = 1e-4, 1e4, 1.0

    def slope_and_bend(at: float) -> tuple[float, float]:
        chance = torch.softmax(found * at, 1)
        mean = (chance * found).sum(1)
        return float(mean.mean() - target), float((chance * (found - mean[:, None]).square()).sum(1).mean())

    if slope_and_bend(high)[0] <= 0:
        return 1 / high
    if slope_and_bend(low)[0] >= 0:
        return 1 / low
    for _ in range(200):
        slope, bend = slope_and_bend(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / bend if bend > 0 else math.inf
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-13 * inverse:
            break
        inverse = following
    return 1 / inverse


@card(
    paper="Platt 1999, 'Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood "
    "Methods'; Gupta, Ramdas 2023, 'Online Platt Scaling with Calibeating', Equation 2",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
)
def platt(scores: Any, outcomes: Any, *, smooth: bool = True) -> tuple[float, float]:
    r"""The logistic curve that turns scores into probabilities best.

    .. math:: p = \sigma(a s + b)

    Args:
        scores: ``[n]``, such as the log-odds of a classifier.
        outcomes: ``[n]``, 0 or 1.
        smooth: whether outcomes are drawn in by Platt's prior, :math:`(n_+ + 1) / (n_+ + 2)` and
            :math:`1 / (n_- + 2)`, which keeps the curve finite where scores separate the outcomes.

    Returns:
        ``(a, b)``.

    Raises:
        Error: outcomes other than 0 and 1, different lengths, or scores that are not finite.

    >>> a, b = platt([-1.0, 1.0, -1.0, 1.0], [0, 1, 0, 1])
    >>> round(a, 4), abs(b) < 1e-9                                    # log 3
    (1.0986, True)
    """
    found, true = numbers(scores, "platt: scores"), numbers(outcomes, "platt: outcomes")
    if found.shape != true.shape or not bool(((true == 0) | (true == 1)).all()):
        raise Error(f"platt: outcomes are 0 or 1, one per score; got {list(found.shape)} and {list(true.shape)}")
    positive, negative = float(true.sum()), float((1 - true).sum())
    if smooth:
        true = torch.where(true > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    a, b = logistic_fit(torch.stack([found, torch.ones_like(found)], 1), true).tolist()
    return a, b
