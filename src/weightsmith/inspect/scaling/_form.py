"""The form of a law, as data: a formula, what its parameters may be, and where a search for them starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.errors import Error, listed

TOKENS = 6.0
"""Floating-point operations per parameter and token of training: 2 forward, 4 backward."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """What is spent, and how two columns share it: ``second = rest(first, spent)``."""

    name: str
    spent: Callable[[Tensor, Tensor], Tensor]
    rest: Callable[[Tensor, float], Tensor]


COMPUTE = Budget("compute", lambda size, data: TOKENS * size * data, lambda size, spent: spent / (TOKENS * size))
"""``C = 6 N D`` floating-point operations."""

TOTAL = Budget("size", lambda first, second: first + second, lambda first, spent: spent - first)
"""Two parts of one size."""


@dataclass(frozen=True)
class Form:
    """A law without its constants.

    Attributes:
        name: what `fit` knows it by.
        formula: ``(*columns, *parameters) -> predicted``, by keyword, elementwise on float64 tensors.
        columns: what a run must say, in the formula's words; all above 0 unless in ``signed``.
        starts: parameter -> values to start from; the search begins at all their combinations.
        target: the column that is predicted.
        free: parameters that may be 0 or negative; the others are above 0 and fitted as logarithms.
        scale: whether residuals are differences of logarithms (``log``) or of values (``linear``).
        defaults: columns that may be missing, and the value they then have.
        signed: columns that may be 0 or negative.
        budget: what is spent, where the first two columns share one.
        optimum: ``(parameters, spent) -> the best first column``, where there is a closed form; for numbers and for
            tensors of them.
        about: the formula, for people.
    """

    name: str
    formula: Callable[..., Tensor]
    columns: tuple[str, ...]
    starts: Mapping[str, Sequence[float]]
    target: str = "loss"
    free: tuple[str, ...] = ()
    scale: Literal["log", "linear"] = "log"
    defaults: Mapping[str, float] = field(default_factory=dict)
    signed: tuple[str, ...] = ()
    budget: Budget | None = None
    optimum: Callable[[Mapping[str, Any], float], Any] | None = None
    about: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order."""
        return tuple(self.starts)

    def raw(self, parameters: Values) -> list[float]:
        """Parameters as they are searched: logarithms, and free ones as they are.

        Raises:
            Error: one is missing or unknown, not finite, or not above 0 where it must be.
        """
        wrong = set(parameters) ^ set(self.names)
        if wrong:
            raise Error(f"law {self.name} has the parameters {', '.join(self.names)}; see {listed(sorted(wrong))}")
        for name in self.names:
            if not math.isfinite(parameters[name]) or (name not in self.free and not parameters[name] > 0):
                least = "finite" if name in self.free else "above 0 and finite"
                raise Error(f"law {self.name}: {name} must be {least}, got {parameters[name]}")
        return [parameters[name] if name in self.free else math.log(parameters[name]) for name in self.names]

    def natural(self, theta: Tensor, name: str) -> Tensor:
        """The values of one parameter, from rows ``[..., p]`` of what is searched."""
        column = theta[..., self.names.index(name)]
        return column if name in self.free else column.exp()

    def predict(self, theta: Tensor, columns: Mapping[str, Tensor], fixed: Values | None = None) -> Tensor:
        """``[b, p]`` rows of parameters, ``[n]`` columns (or ``[b, n]``, other ones for each row) -> ``[b, n]``."""
        held = fixed or {}
        parameters = {
            name: torch.full_like(theta[:, :1], held[name]) if name in held else self.natural(theta, name)[:, None]
            for name in self.names
        }
        made = self.formula(**columns, **parameters)
        return made.expand(len(theta), next(iter(columns.values())).shape[-1])

    def difference(self, predicted: Tensor, observed: Tensor) -> Tensor:
        """Residuals on the form's scale."""
        return predicted.log() - observed.log() if self.scale == "log" else predicted - observed

    def grid(self, fixed: Values, starts: Mapping[str, Sequence[float]] | None = None) -> Tensor:
        """All combinations of starting values, ``[s, p]``, as they are searched."""
        chosen = dict(self.starts) | dict(starts or {})
        values = [[fixed[name]] if name in fixed else list(chosen[name]) for name in self.names]
        raw = [
            [v if name in self.free or name in fixed else math.log(v) for v in options]
            for name, options in zip(self.names, values, strict=True)
        ]
        return torch.tensor(list(itertools.product(*raw)), dtype=torch.float64)
