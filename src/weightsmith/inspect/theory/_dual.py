"""The dual of an activation: how alike two inputs still are after one more infinitely wide layer.

All that an infinitely wide layer does to two inputs is to replace their correlation by another. Iterated, this one
function of one number says what depth does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect.theory._parts import (
    Activation,
    correlated,
    function_of,
    gaussian_nodes,
    name_of,
    with_slope,
)

_DEGREE = 80  # of the polynomials in the angle; enough for 1e-12 with ReLU, tanh, GELU and Hermite polynomials to 10
_SMALL, _TERMS = 0.25, 32  # correlations up to which the power series is taken, and its terms
_CELLS = 4096  # of the table over angles; a cubic in each is as exact as the polynomials
_AT_ONCE = 1 << 16  # correlations that are worked on together: what is in between then stays in the cache


@dataclass(frozen=True)
class Dual:
    """The dual of an activation that is scaled to keep the length of its input, ``value(1) = 1``."""

    activation: str
    scale: float
    """What the activation was multiplied by."""
    at_zero: float
    r"""``value(0)``: :math:`E[\phi]^2`."""
    slope_at_zero: float
    r""":math:`E[\phi']^2`: how much of a small correlation is left."""
    slope_at_one: float
    r""":math:`E[\phi'^2]`: by how much a small squared distance grows."""
    series: tuple[tuple[float, ...], tuple[float, ...]]
    """Chebyshev coefficients, in the angle over pi, of the value and of the slope."""
    powers: tuple[float, ...]
    """Coefficients of the power series of the value: squares of the activation's Hermite coefficients."""

    def value(self, correlations: Tensor) -> Tensor:
        """The correlations after a layer, in float64."""
        return self.both(correlations)[0]

    def slope(self, correlations: Tensor) -> Tensor:
        """The derivative of `value`, in float64: the dual of the activation's derivative."""
        return self.both(correlations)[1]

    def both(self, correlations: Tensor) -> tuple[Tensor, Tensor]:
        """`value` and `slope` together, which costs little more than one."""
        given = correlations.detach().double().clamp(-1, 1).flatten()
        table, powers = self._table.to(given.device), self._powers.to(given.device)
        found = torch.empty(2, len(given), dtype=torch.float64, device=given.device)
        for part, out in zip(given.split(_AT_ONCE), found.split(_AT_ONCE, dim=1), strict=True):
            place = torch.arccos(part) * (_CELLS / math.pi)
            cell = place.long().clamp(0, _CELLS - 1)  # what is not a number stays so through `rest`
            rest = place - cell
            out.zero_()
            for row in table:
                out.mul_(rest).add_(row.index_select(1, cell))
            # With depth correlations may vanish, and then their ratios are what counts: a power series keeps those.
            small = (part.abs() < _SMALL).nonzero()[:, 0]
            if len(small):
                near = part[small]
                sums = torch.zeros(2, len(small), dtype=torch.float64, device=given.device)
                for pair in powers:
                    sums.mul_(near).add_(pair[:, None])
                out[:, small] = sums
        return found[0].view(correlations.shape), found[1].view(correlations.shape)

    @functools.cached_property
    def _table(self) -> Tensor:
        """Cubics over the cells of the angle, highest power first: ``[4, 2, _CELLS]``, of the value and of the slope.

        They have the series' values and derivatives at the ends of each cell.
        """
        ends = 2 * numpy.arange(_CELLS + 1) / _CELLS - 1
        cubics = []
        for series in self.series:
            height = numpy.polynomial.chebyshev.chebval(ends, series)
            tilt = numpy.polynomial.chebyshev.chebval(ends, numpy.polynomial.chebyshev.chebder(series)) * (2 / _CELLS)
            rise, start, end = numpy.diff(height), tilt[:-1], tilt[1:]
            cubics.append(numpy.stack([start + end - 2 * rise, 3 * rise - 2 * start - end, start, height[:-1]]))
        return torch.as_tensor(numpy.stack(cubics, axis=1))

    @functools.cached_property
    def _powers(self) -> Tensor:
        """The power series of the value and of the slope, highest power first, without leading zeros: ``[p, 2]``."""
        slope = [*numpy.polynomial.polynomial.polyder(self.powers), 0.0]
        pairs = numpy.array([self.powers, slope]).T
        last = max(numpy.flatnonzero(pairs.any(axis=1)), default=0)
        return torch.as_tensor(pairs[last::-1].copy())


@card(
    paper="Daniely, Frostig, Singer 2016, 'Toward Deeper Understanding of Neural Networks'",
    unit="model",
    claim="the dual of ReLU is the arc-cosine kernel, to ten digits",
)
def dual(activation: Activation) -> Dual:
    r"""The dual of an activation, scaled so that lengths are kept.

    .. math:: \check\phi(\xi) = \frac{E[\phi(u)\,\phi(v)]}{E[\phi(u)^2]}, \qquad E[uv] = \xi

    Args:
        activation: a name (``"relu"``, ``"tanh"``, ``"gelu"``, ...) or an elementwise function. Kinks are integrated
            exactly at 0; elsewhere they cost digits.

    Returns:
        Dual: ``value`` and ``slope`` at any correlation.

    Raises:
        Error: an unknown name, or an activation that is 0 everywhere or not finite.

    >>> relu = dual("relu")
    >>> round(float(relu.value(torch.tensor(0.0))) * torch.pi, 9), round(relu.slope_at_one, 9)
    (1.0, 1.0)
    """
    return _named(activation) if isinstance(activation, str) else _made(activation)


@functools.cache
def _named(activation: str) -> Dual:
    return _made(activation)


def _made(activation: Activation) -> Dual:
    function = function_of(activation)
    scale, mean, mean_slope, square_slope = _moments(function, name_of(activation))
    nodes = numpy.polynomial.chebyshev.chebpts1(_DEGREE + 1)
    value, slope = correlated(lambda x: scale * function(x), torch.cos(torch.as_tensor((nodes + 1) / 2) * torch.pi))
    fitted = [numpy.polynomial.chebyshev.chebfit(nodes, y.numpy(), _DEGREE) for y in (value, slope)]
    series = tuple(tuple(numpy.polynomial.chebyshev.chebtrim(one, 1e-16).tolist()) for one in fitted)
    return Dual(name_of(activation), scale, mean**2, mean_slope**2, square_slope, (series[0], series[1]),
                _powers(function, scale))  # fmt: skip


def _powers(function: Callable[[Tensor], Tensor], scale: float) -> tuple[float, ...]:
    places, weights = gaussian_nodes()
    value = weights * scale * function(places)
    before, here, found = torch.zeros_like(places), torch.ones_like(places), []
    for index in range(_TERMS):
        coefficient = float(value @ here)
        found.append(coefficient**2 if abs(coefficient) > 1e-12 else 0.0)
        before, here = here, (places * here - index**0.5 * before) / (index + 1) ** 0.5
    return tuple(found)


def _moments(function: Callable[[Tensor], Tensor], name: str) -> tuple[float, float, float, float]:
    """The scale that keeps lengths; after it the mean, the mean slope and the mean squared slope."""
    places, weights = gaussian_nodes()
    value, slope = with_slope(function, places)
    length = float(weights @ value.square())
    if not 0 < length < float("inf"):
        raise Error(
            f"the activation {name} has a mean square of {length:g} over a standard Gaussian; it must be above 0"
        )
    scale = length**-0.5
    mean, mean_slope = float(weights @ value) * scale, float(weights @ slope) * scale
    return scale, mean, mean_slope, float(weights @ slope.square()) * scale**2


@card(
    paper="Jacot, Gabriel, Hongler 2018, 'Neural Tangent Kernel'",
    unit="model",
    claim="with one hidden layer of ReLU it is the arc-cosine formula",
)
def deep_kernels(activation: Activation | Dual, correlations: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    r"""The two kernels of an infinitely wide network: that of its start and that of its training.

    .. math:: \Sigma_l = \check\phi(\Sigma_{l-1}), \qquad
        \Theta_l = \Sigma_l + \Theta_{l-1}\, \check{\phi'}(\Sigma_{l-1}), \qquad \Sigma_0 = \Theta_0 = \xi

    Args:
        activation: a name, a function, or its `Dual`.
        correlations: cosines of pairs of inputs, any shape; gradients do not pass.
        depth: hidden layers.

    Returns:
        ``(start, training)``: the Gaussian-process kernel and the tangent kernel, float64, of the correlations' shape.

    Raises:
        Error: a negative depth.

    >>> start, training = deep_kernels("relu", torch.tensor([1.0]), 3)
    >>> [round(float(one), 6) for one in (start, training)]
    [1.0, 4.0]
    """
    if depth < 0:
        raise Error(f"a depth is 0 or more, got {depth}")
    known = activation if isinstance(activation, Dual) else dual(activation)
    start = training = correlations.double().clamp(-1, 1)
    for _ in range(depth):
        start, slope = known.both(start)
        start = start.clamp(-1, 1)
        training = start + training * slope
    return start, training
