"""Two laws that the eigenvalues of a weight matrix are held against: a power law, and pure noise.

The eigenvalues of a matrix of independent noise end at a sharp edge (Marchenko and Pastur 1967). Those of a
trained one go beyond it, and the density of the largest often falls like a power (Martin and Mahoney 2021,
'Implicit Self-Regularization in Deep Neural Networks').
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error

_BLOCK = 2**20  # numbers of the table of all candidates against all values that are held at once


@dataclass(frozen=True)
class PowerLaw:
    """The density ``x ** -exponent`` from ``least`` on."""

    exponent: float
    least: float
    """Where the tail begins."""
    count: int
    """Values in the tail."""
    distance: float
    """Largest distance between the tail's distribution and the law's: the statistic of Kolmogorov and Smirnov."""


def power_law(values: Tensor) -> PowerLaw | None:
    r"""The power law that fits the upper tail of positive values, and where that tail begins.

    .. math:: \alpha = 1 + n \Big/ \sum_{x_i \ge x_{\min}} \ln \frac{x_i}{x_{\min}}

    with that of the values as :math:`x_{\min}` whose law lies nearest to its tail, by the largest distance of the
    distribution functions (Clauset, Shalizi and Newman 2009, 'Power-Law Distributions in Empirical Data').

    Args:
        values: ``[n]``; those that are not above 0 are left out. All against all are compared: n² steps.

    Returns:
        PowerLaw: None for fewer than two different values.

    >>> found = power_law((1 - (torch.arange(1000.0, dtype=torch.float64) + 0.5) / 1000) ** -0.5)  # density x ** -3
    >>> abs(found.exponent - 3) < 0.05
    True
    """
    found = values[values > 0].double().sort().values
    if len(found) < 2 or found[0] == found[-1]:
        return None
    logs = found.log()
    count = len(found)
    # The first of equal values stands for all: its tail holds the others.
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=found.device), found[1:] > found[:-1]])
    first &= found < found[-1]
    starts = first.nonzero().flatten()
    tails = count - starts
    sums = logs.flip(0).cumsum(0).flip(0)[starts] - tails * logs[starts]
    exponents = 1 + tails / sums
    distances = torch.empty_like(exponents)
    places = torch.arange(count, device=found.device)
    for part in torch.arange(len(starts), device=found.device).split(max(_BLOCK // count, 1)):
        begin, own = starts[part, None], exponents[part, None]
        law = 1 - torch.exp((1 - own) * (logs - logs[begin]))
        empirical = (places - begin) / tails[part, None]
        apart = torch.where(places >= begin, (law - empirical).abs(), 0.0)
        distances[part] = apart.amax(dim=1)
    best = int(distances.argmin())
    return PowerLaw(float(exponents[best]), float(found[starts[best]]), int(tails[best]), float(distances[best]))


@dataclass(frozen=True)
class NoiseEdge:
    """What the singular values would be if the matrix were noise."""

    noise: float
    """Standard deviation of the entries of that noise."""
    edge: float
    """The largest singular value that it would have."""
    spikes: int
    """Singular values beyond the edge."""


def noise_edge(values: Tensor, rows: int, columns: int) -> NoiseEdge:
    r"""Where the singular values of noise would end, with its level read off their median.

    .. math:: \sigma = \frac{\mathrm{median}(s)}{\sqrt{n\,\mu_\beta}}, \qquad
              s_{\max} = \sigma\,(\sqrt{m} + \sqrt{n}), \qquad \beta = m / n \le 1

    with :math:`\mu_\beta` the median of the law of Marchenko and Pastur. The median does not see a few large values,
    so that structure does not raise the noise that it is held against (Gavish and Donoho 2014, 'The Optimal Hard
    Threshold for Singular Values is 4/sqrt(3)').

    Args:
        values: ``[min(rows, columns)]`` singular values, in any order.
        rows, columns: of the matrix.

    >>> noise_edge(torch.ones(4), 4, 4).spikes
    0
    """
    short, long = sorted((rows, columns))
    if short < 1 or len(values) != short:
        raise Error(f"a matrix of {rows} x {columns} has {short} singular values, got {len(values)}")
    ordered = values.double().sort().values
    middle = float(ordered[(short - 1) // 2] + ordered[short // 2]) / 2
    noise = middle / math.sqrt(long * marchenko_pastur_median(short / long))
    edge = noise * (math.sqrt(short) + math.sqrt(long))
    return NoiseEdge(noise, edge, int((ordered > edge).sum()))


@functools.lru_cache(maxsize=1024)
def marchenko_pastur_median(ratio: float) -> float:
    """The median of the law of Marchenko and Pastur for noise of variance 1, with ``ratio`` = short / long side.

    >>> round(marchenko_pastur_median(1.0), 4), round(marchenko_pastur_median(1e-6), 4)
    (0.6528, 1.0)
    """
    # With x = 1 + ratio + 2 sqrt(ratio) cos(a) the density becomes smooth, also where it is infinite at 0.
    angles = (torch.arange(40_000, dtype=torch.float64) + 0.5) * (math.pi / 40_000)
    places = 1 + ratio + 2 * math.sqrt(ratio) * angles.cos()
    mass = (angles.sin().square() / places).cumsum(0)
    return float(places[int(torch.searchsorted(mass, float(mass[-1]) / 2))])
