"""How good a checkpoint is and what it costs, found by reading it from its folder.

Shares come with a Wilson interval: it is right for shares near one, where the usual one is not.
Two models are compared on the same pictures, which tells smaller differences apart than two
intervals side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from weightsmith.demo._task import unpacked
from weightsmith.weights import Weights

NORMAL = 1.959964  # the 97.5 % point of the normal distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Share:
    """``right`` of ``of`` examples, with the 95 % Wilson interval of the share."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """The share itself."""
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of all such examples would lie, with 95 % confidence.

        >>> low, high = Share(95, 100).interval
        >>> round(low, 3), round(high, 3)
        (0.888, 0.978)
        """
        n, z2 = self.of, NORMAL**2
        centre = (self.right + z2 / 2) / (n + z2)
        half = NORMAL / (n + z2) * math.sqrt(self.right * (n - self.right) / n + z2 / 4)
        return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Difference:
    """How much larger a share is than another on the same examples, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``no difference shown`` if the interval holds zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def share(right: Tensor) -> Share:
    """The share of ``[n]`` booleans that are true."""
    return Share(int(right.sum()), len(right))


def difference(right: Tensor, reference: Tensor, seed: int = 0) -> Difference:
    """``right`` against ``reference``, both ``[n]`` bool over the same examples in the same order.

    An example counts 1 if only the first is right, -1 if only the second is, else 0. Drawing
    examples anew is drawing the numbers of each kind from a multinomial distribution.
    """
    n = len(right)
    wins, losses = int((right & ~reference).sum()), int((reference & ~right).sum())
    drawn = np.random.default_rng(seed).multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return Difference((wins - losses) / n, float(low), float(high))


def bytes_on_disk(folder: Path) -> int:
    """The size of a folder's weight files."""
    return sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors")))


def zeros_by_tensor(weights: Weights) -> dict[str, tuple[int, int]]:
    """Tensor -> (values that are exactly zero, all values); packed tensors as they are computed with."""
    plain = unpacked(weights)
    counts = {}
    for name in plain.names(floating=True):
        tensor = plain[name]
        counts[name] = (int((tensor == 0).sum()), tensor.numel())
    return counts
