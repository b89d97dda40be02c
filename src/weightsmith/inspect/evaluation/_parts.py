"""Steps that the functions of this room share: checked numbers per example, tails of distributions, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.errors import Error, missing
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Line, Plot, Report


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends of an interval that holds the true one with the stated confidence."""

    estimate: float
    low: float
    high: float
    confidence: float
    method: str
    error: float
    """The standard error."""
    count: int
    """How many examples, or groups of them, it rests on."""
    dropped: int = 0
    """Resamples on which the figure was not a number."""

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return not self.low <= value <= self.high

    def map(self, rising: Callable[[float], float]) -> Interval:
        """The same for a rising function of the figure, such as ``math.exp``; the error by its slope."""
        step = 1e-6 * max(abs(self.estimate), 1e-6)
        slope = (rising(self.estimate + step) - rising(self.estimate - step)) / (2 * step)
        estimate, low, high = (rising(value) for value in (self.estimate, self.low, self.high))
        return Interval(
            estimate, low, high, self.confidence, self.method, abs(slope) * self.error, self.count, self.dropped
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return plain(self)

    def report(self, title: str = "an interval") -> Report:
        """As a report."""
        notes = [f"{self.method} interval, confidence {self.confidence:g}, from {self.count} examples or groups."]
        if self.dropped:
            notes.append(f"{self.dropped} resamples gave no number and were left out.")
        figures = {"estimate": self.estimate, "low": self.low, "high": self.high, "standard error": self.error}
        return Report(title, figures, notes=notes)


@dataclass(frozen=True)
class Test:
    """What a test of no difference found."""

    name: str
    statistic: float
    p_value: float
    freedom: tuple[float, ...] = ()
    """Degrees of freedom, where the statistic has some."""
    count: int = 0
    """How many examples, pairs or rounds spoke."""

    __test__ = False  # no test of pytest's

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return plain(self)

    def report(self) -> Report:
        """As a report."""
        figures = {"statistic": self.statistic, "p": self.p_value, "counted": self.count}
        freedom = [f"Degrees of freedom: {', '.join(f'{one:g}' for one in self.freedom)}."] if self.freedom else []
        return Report(self.name, figures, notes=freedom)


def tensor_of(values: Any) -> Tensor:
    """Tensors as they are; lists and arrays without rounding: Python's numbers are of 64 bits."""
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(numpy.asarray(values))


def numbers(values: Any, what: str, *, dimensions: int = 1, least: int = 1) -> Tensor:
    """Finite float64 numbers of so many axes, at least so many along the last.

    Raises:
        Error: another shape, too few, or a value that is not finite.
    """
    found = tensor_of(values).double()
    if found.ndim != dimensions or found.shape[-1] < least or not found.numel():
        shape = {1: "[n]", 2: "[k, n]"}.get(dimensions, f"of {dimensions} axes")
        raise Error(f"{what}: needs {shape} with at least {least} examples, got {list(found.shape)}")
    if not bool(found.isfinite().all()):
        raise Error(f"{what}: {int((~found.isfinite()).sum())} of {found.numel()} values are not finite")
    return found


def alike(first: Tensor, second: Tensor, what: str) -> None:
    """Refuse two tensors of different shapes."""
    if first.shape != second.shape:
        raise Error(f"{what}: {list(first.shape)} and {list(second.shape)} do not pair up")


def named_rows(scores: Mapping[str, Any] | Sequence[Any] | Tensor, names: Sequence[str] | None, what: str) -> (
    tuple[list[str], Tensor]
):  # fmt: skip
    """Rows ``[k, n]`` and their names, from a mapping of rows or a stack of them."""
    if isinstance(scores, Mapping):
        names, scores = [str(name) for name in scores], list(scores.values())
    if not isinstance(scores, Tensor | numpy.ndarray):
        labels = names if names is not None and len(names) == len(scores) else range(len(scores))
        rows = [numbers(row, f"{what}: {label}") for label, row in zip(labels, scores, strict=True)]
        if len({len(row) for row in rows}) > 1:
            raise Error(f"{what}: rows of different lengths: {[len(row) for row in rows]}")
        if not rows:
            raise Error(f"{what}: nothing to compare")
        scores = torch.stack(rows)
    found = numbers(scores, what, dimensions=2)
    called = [str(index) for index in range(len(found))] if names is None else list(names)
    if len(called) != len(found) or len(set(called)) != len(called):
        raise Error(f"{what}: {len(found)} rows need as many different names, got {called}")
    return called, found


def share(value: float, what: str) -> float:
    """A number between 0 and 1, exclusive."""
    if not 0 < value < 1:
        raise Error(f"{what} is between 0 and 1, got {value:g}")
    return value


def normal_quantile(probability: float) -> float:
    """Of the standard normal distribution.

    >>> round(normal_quantile(0.975), 4)
    1.96
    """
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def normal_tail(value: float) -> float:
    """The probability of a standard normal variable above ``value``."""
    return 0.5 * math.erfc(value / math.sqrt(2))


def chi_square_tail(value: float, freedom: float) -> float:
    """The probability of a chi-square variable above ``value``.

    >>> round(chi_square_tail(3.841, 1), 3)
    0.05
    """
    half = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def student_tail(value: float, freedom: float, purpose: str) -> float:
    """The probability of a Student variable beyond plus or minus ``value``."""
    return float(2 * _special(purpose).stdtr(freedom, -abs(value)))


def f_tail(value: float, above: float, below: float, purpose: str) -> float:
    """The probability of an F variable above ``value``."""
    return float(_special(purpose).fdtrc(above, below, value))


def _special(purpose: str) -> Any:
    try:
        from scipy import special
    except ImportError:
        raise missing("scipy", "inspect", purpose) from None
    return special


def mean_interval(values: Tensor, confidence: float) -> Interval:
    """The normal interval of a mean of independent values ``[n]``."""
    count = len(values)
    mean = float(values.mean())
    error = float(values.std() / math.sqrt(count)) if count > 1 else math.inf
    half = normal_quantile(0.5 + confidence / 2) * error
    return Interval(mean, mean - half, mean + half, confidence, "normal", error, count)


def bars(title: str, axis: str, names: Sequence[str], found: Sequence[Interval]) -> Plot:
    """Figures with their intervals, as points."""
    line = Line(
        axis,
        list(names),
        [one.estimate for one in found],
        [one.low for one in found],
        [one.high for one in found],
        style="bars",
    )
    return Plot(title, "", axis, [line])
