"""Forecasts that stay calibrated while the world drifts, corrected after every outcome.

A logistic curve over the forecaster's log-odds is moved by a Newton step after each outcome (online Platt
scaling). Where no curve of that shape fits, its forecasts are sorted into bins, and what is said is what
came true in the bin so far (calibeating); said at random between two neighbours, it is calibrated on any
sequence of outcomes, even one chosen against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect.evaluation._parts import alike, numbers

Array = NDArray[numpy.float64]

RATE = 0.1  # gamma of the Newton step; that of the authors' code for Platt scaling, as are the next two
FIRM = 100.0  # the curvature that it starts with
FARTHEST = 100.0  # length of the weights at most
_CLIP = 1e-6  # forecasts are held this far from 0 and 1, whose log-odds are not finite

SCALINGS = ("platt", "beta", "none")
CALIBEATINGS = ("none", "tracking", "hedging")


@dataclass(frozen=True)
class Curve:
    """State of the online logistic curve."""

    weights: Array
    """``[d]``."""
    inverse: Array
    """``[d, d]``, of the summed squares of the gradients."""


@dataclass(frozen=True)
class Counts:
    """State of calibeating: what came of each bin of forecasts, by what was then said."""

    said: Array
    """``[bins, places]`` how often."""
    came: Array
    """``[bins, places]`` how often it came true."""


def features(probability: float, scaling: str) -> Array:
    """What the curve is over: the log-odds and 1 (platt), or the log of either probability and 1 (beta).

    >>> features(0.5, "platt").tolist()
    [0.0, 1.0]
    """
    p = min(max(probability, _CLIP), 1 - _CLIP)
    if scaling == "beta":
        return numpy.array([math.log(p), -math.log1p(-p), 1.0])
    return numpy.array([math.log(p) - math.log1p(-p), 1.0])


def start_curve(scaling: str) -> Curve:
    """The curve that changes nothing."""
    weights = numpy.array([1.0, 1.0, 0.0] if scaling == "beta" else [1.0, 0.0])
    return Curve(weights, numpy.eye(len(weights)) / FIRM)


def newton_step(curve: Curve, seen: Array, outcome: float) -> Curve:
    r"""The curve after one more outcome.

    .. math:: A \leftarrow A + g g^\top, \qquad \theta \leftarrow \Pi_A\big(\theta - A^{-1} g / \gamma\big), \qquad
        g = (p - y)\, x

    with :math:`\Pi_A` the nearest point, by the metric A, of length 100 at most.
    """
    gradient = (_sigmoid(float(curve.weights @ seen)) - outcome) * seen
    moved = curve.inverse @ gradient
    inverse = curve.inverse - numpy.outer(moved, moved) / (1 + float(gradient @ moved))
    weights = curve.weights - inverse @ gradient / RATE
    if float(weights @ weights) > FARTHEST**2:
        weights = _projected(weights, inverse)
    return Curve(weights, inverse)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _projected(weights: Array, inverse: Array) -> Array:
    # (A + x I)^-1 A w in the axes of A's inverse: w / (1 + x / a), with x such that the length is the greatest.
    sizes, axes = numpy.linalg.eigh(inverse)
    inner = axes.T @ weights
    low, high = 0.0, 1.0
    while numpy.linalg.norm(inner / (1 + high * sizes)) > FARTHEST:
        high *= 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if numpy.linalg.norm(inner / (1 + middle * sizes)) > FARTHEST else (low, middle)
    return axes @ (inner / (1 + high * sizes))


def hedged(counts: Array, came: Array, start: int, uniform: float) -> int:
    """Which of evenly spaced places to say next, at random between two neighbours (Foster 1999).

    Args:
        counts, came: ``[places]`` how often each was said, and how often it then came true.
        start: the place that is said as long as it holds, as at first.
        uniform: a random number in [0, 1).

    >>> hedged(numpy.array([0.0, 0.0]), numpy.array([0.0, 0.0]), 1, 0.3)
    1
    """
    places = len(counts)
    edges = numpy.arange(places + 1) / places
    # How many outcomes each place lacks to reach its lower edge, and has above its upper one.
    deficit, excess = counts * edges[:-1] - came, came - counts * edges[1:]
    right = (deficit <= 0) & (excess <= 0)
    if right.any():
        return start if right[start] else int(right.argmax())
    # The lowest place cannot be below nothing nor the highest above one, so some neighbours err towards each other.
    index = int(numpy.nonzero((excess[:-1] > 0) & (deficit[1:] > 0))[0][0])
    chance = deficit[index + 1] / (deficit[index + 1] + excess[index])
    return index if uniform < chance else index + 1


class OnlineCalibrator:
    """A forecaster's probability in, a calibrated one out; told each outcome, it learns.

    Args:
        scaling, calibeat, bins, seed: as in `online_calibration`.

    >>> calibrator = OnlineCalibrator()
    >>> for _ in range(200):
    ...     said = calibrator.predict_one(0.9)
    ...     calibrator.update_one(0.9, outcome=0)
    >>> said < 0.05
    True
    """

    def __init__(self, scaling: str = "platt", calibeat: str = "none", *, bins: int = 10, seed: int = 0):
        for word, known in ((scaling, SCALINGS), (calibeat, CALIBEATINGS)):
            if word not in known:
                raise Error(f"online calibration knows {', '.join(known)}, not {word!r}{did_you_mean(word, known)}")
        if bins < 1:
            raise Error(f"online calibration: bins is 1 or more, got {bins}")
        self.scaling, self.calibeat, self.bins = scaling, calibeat, bins
        self.curve = start_curve(scaling)
        places = bins if calibeat == "hedging" else 1
        self.counts = Counts(numpy.zeros((bins, places)), numpy.zeros((bins, places)))
        self._random = numpy.random.default_rng(seed)
        self._said: tuple[float, int, int] | None = None

    def predict_one(self, probability: float) -> float:
        """The calibrated probability of the next event; repeated calls for one event say the same.

        Raises:
            Error: a probability outside of [0, 1].
        """
        if not 0 <= probability <= 1:
            raise Error(f"online calibration: a probability lies between 0 and 1, got {probability:g}")
        if self._said is None or self._said[0] != probability:
            bin_, place = self._place(self._scaled(probability))
            self._said = probability, bin_, place
        _, bin_, place = self._said
        if self.calibeat == "none":
            return self._scaled(probability)
        if self.calibeat == "hedging":
            return (place + 0.5) / self.bins
        said = self.counts.said[bin_, 0]
        return float(self.counts.came[bin_, 0] / said) if said else (bin_ + 0.5) / self.bins

    def update_one(self, probability: float, outcome: float) -> None:
        """What came of it: 0 or 1.

        Raises:
            Error: another outcome, or a probability outside of [0, 1].
        """
        if outcome not in (0, 1):
            raise Error(f"online calibration: an outcome is 0 or 1, got {outcome:g}")
        self.predict_one(probability)
        assert self._said is not None
        _, bin_, place = self._said
        if self.calibeat != "none":
            self.counts.said[bin_, place] += 1
            self.counts.came[bin_, place] += outcome
        if self.scaling != "none":
            self.curve = newton_step(self.curve, features(probability, self.scaling), outcome)
        self._said = None

    def _scaled(self, probability: float) -> float:
        if self.scaling == "none":
            return probability
        return _sigmoid(float(self.curve.weights @ features(probability, self.scaling)))

    def _place(self, probability: float) -> tuple[int, int]:
        bin_ = min(int(probability * self.bins), self.bins - 1)
        if self.calibeat != "hedging":
            return bin_, 0
        return bin_, hedged(self.counts.said[bin_], self.counts.came[bin_], bin_, float(self._random.random()))


@card(
    paper="Gupta, Ramdas 2023, 'Online Platt Scaling with Calibeating'; Foster, Hart 2023, "
    "'\"Calibeating\": Beating Forecasters at Their Own Game'; Foster 1999, 'A Proof of Calibration Via Blackwell's "
    "Approachability Theorem'",
    covers=("online-platt-scaling-calibeating",),
    unit="model",
    claim="under drift, it has less log loss than a curve fitted once",
    departs="the curve starts as the identity and beta scaling as firmly as Platt's (the authors' code: from nothing, "
    "and at a quarter); a bin's middle is said until an outcome is known, and then no longer counts; hedging weighs "
    "how far a place errs by how often it was said",
)
def online_calibration(
    probabilities: Any, outcomes: Any, scaling: str = "platt", calibeat: str = "none", *, bins: int = 10, seed: int = 0
) -> Tensor:
    r"""The calibrated forecasts of a stream, each made before its outcome was known.

    .. math:: p_t = \sigma(a_t \operatorname{logit} f_t + b_t), \qquad
        p_t = \sigma(a_t \log f_t - b_t \log(1 - f_t) + c_t)

    for ``platt`` and ``beta``; ``tracking`` then says the share come true so far among forecasts of the same bin,
    ``hedging`` one of the bins' middles, drawn so that it is calibrated against any outcomes.

    Args:
        probabilities: ``[t]``, the forecaster's, in order.
        outcomes: ``[t]``, 0 or 1.
        scaling: ``platt``, ``beta`` or ``none``.
        calibeat: ``none``, ``tracking`` or ``hedging``.
        bins: of calibeating.
        seed: of hedging.

    Returns:
        ``[t]`` in float64. Judge it with `calibration_error`, `log_loss`, `reliability`.

    Raises:
        Error: probabilities outside of [0, 1], outcomes other than 0 and 1, an unknown word.

    >>> online_calibration([0.7, 0.7], [1, 0]).tolist()[0].__round__(6)                # nothing known yet
    0.7
    """
    said = numbers(probabilities, "online_calibration: probabilities")
    came = numbers(outcomes, "online_calibration: outcomes")
    alike(said, came, "online_calibration: probabilities and outcomes")
    if not bool(((said >= 0) & (said <= 1)).all()) or not bool(((came == 0) | (came == 1)).all()):
        raise Error("online_calibration: probabilities lie between 0 and 1, outcomes are 0 or 1")
    calibrator = OnlineCalibrator(scaling, calibeat, bins=bins, seed=seed)
    found = []
    for probability, outcome in zip(said.tolist(), came.tolist(), strict=True):
        found.append(calibrator.predict_one(probability))
        calibrator.update_one(probability, outcome)
    return torch.tensor(found, dtype=torch.float64)
