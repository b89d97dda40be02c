"""What an infinitely wide network turns into when it is infinitely deep as well: one of three old classifiers.

Depth repeats the dual of the activation. Correlations then either all become one number (majority vote), or vanish
so fast that only the nearest example is left (one nearest neighbour), or vanish in proportion to a power of the
distance: a kernel that is infinite at the examples. Of the last, one power is optimal for every distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.theory._dual import Dual, deep_kernels, dual
from weightsmith.inspect.theory._parts import Activation

NEAREST, MAJORITY, SINGULAR, LINEAR = "nearest neighbour", "majority vote", "singular kernel", "linear kernel"
_NOTHING = 1e-10  # a dual's value or slope at 0 below which it counts as none
_PAIRS = 1 << 20  # kernel values that are held together: 8 MiB, and a few times that while they are made


@dataclass(frozen=True)
class DepthLimit:
    """What infinitely deep networks of an activation are as classifiers."""

    activation: str
    kind: str
    """``nearest neighbour``, ``majority vote``, ``singular kernel``, or ``linear kernel`` where depth does nothing."""
    at_zero: float
    slope_at_zero: float
    slope_at_one: float
    exponent: float | None
    """Of a singular kernel: it is the distance to the power of minus this."""
    curves: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Depths, and the tangent kernel there at `places`, over its value at the first of them."""
    places: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return plain(self)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a depth and place."""
        return [
            {"depth": depth, "distance": place, "kernel": value}
            for depth, curve in self.curves
            for place, value in zip(self.places, curve, strict=True)
        ]

    def report(self) -> Report:
        """For people."""
        figures = {
            "activation": self.activation,
            "limit": self.kind,
            "dual at 0": self.at_zero,
            "slope at 0": self.slope_at_zero,
            "slope at 1": self.slope_at_one,
        }
        notes = ["For inputs of one length; the activation is scaled so that every layer keeps it."]
        if self.exponent is not None:
            figures["exponent"] = self.exponent
            notes.append(f"On a sphere of dimension {self.exponent:.3g} this classifier is optimal in the limit.")
        if self.kind == MAJORITY and self.slope_at_one <= 1 + 1e-9:
            notes.append("Correlations grow to 1 at any distance, so the vote is reached only slowly with depth.")
        lines = [Line(f"depth {depth}", self.places, curve) for depth, curve in self.curves]
        if self.exponent is not None and self.places:
            power = [(place / self.places[0]) ** -self.exponent for place in self.places]
            lines.append(Line(f"distance to the -{self.exponent:.3g}", self.places, power))
        plots = (Plot("Tangent kernel", "distance", "kernel, relative", lines, log="xy"),) if lines else ()
        return Report(f"Infinite depth of {self.activation}", figures, self.rows(), plots, notes)


@card(
    paper="Radhakrishnan, Belkin, Uhler 2023, 'Wide and Deep Neural Networks Achieve Optimality for Classification'",
    covers=("wide-deep-neural-networks",),
    unit="model",
    claim="names the classifier that kernels of 50 and more layers act like",
)
def depth_limit(activation: Activation, depths: tuple[int, ...] = (2, 8, 32)) -> DepthLimit:
    r"""The classifier that infinitely wide networks of an activation become with depth.

    .. math:: \check\phi(0) > 0: \text{majority}; \quad
        \check\phi(0) = \check\phi'(0) = 0: \text{nearest}; \quad
        \text{else } K \propto \|x - x'\|^{-a},\; a = -2 \frac{\log \check\phi'(0)}{\log \check\phi'(1)}

    The power follows from :math:`\psi(\check\phi(\xi)) = \check\phi'(0)\,\psi(\xi)`, which the rescaled kernel obeys:
    near 1 the dual multiplies the squared distance by its slope there. The tangent kernel comes to it by a share of
    1 / depth, and more slowly the nearer the inputs.

    Args:
        activation: a name or an elementwise function; its scale does not matter.
        depths: hidden layers at which kernels are drawn beside the limit.

    Returns:
        DepthLimit: with ``report()``.

    >>> depth_limit("relu").kind, depth_limit("tanh").kind, depth_limit(lambda x: x**2 - 1).kind
    ('majority vote', 'singular kernel', 'nearest neighbour')
    """
    known = dual(activation)
    exponent = None
    if known.at_zero > _NOTHING:
        kind = MAJORITY
    elif known.slope_at_zero < _NOTHING:
        kind = NEAREST
    elif known.slope_at_one < 1 + 1e-9:
        kind = LINEAR
    else:
        kind = SINGULAR
        exponent = -2 * math.log(known.slope_at_zero) / math.log(known.slope_at_one)
    places = torch.logspace(-2, math.log10(1.2), 25, dtype=torch.float64)
    curves = []
    for depth in depths:
        _, kernel = deep_kernels(known, 1 - places.square() / 2, depth)
        curves.append((depth, tuple((kernel / kernel[0]).tolist())))
    return DepthLimit(known.activation, kind, known.at_zero, known.slope_at_zero, known.slope_at_one, exponent,
                      tuple(curves), tuple(places.tolist()))  # fmt: skip


@card(
    paper="Radhakrishnan, Belkin, Uhler 2023, 'Wide and Deep Neural Networks Achieve Optimality for Classification'",
    covers=("wide-deep-neural-networks",),
    unit="model",
    claim="its infinitely deep kernel has the distance to the power of minus the dimension",
    departs="one free degree instead of the paper's fixed ones; the coefficients are solved for",
)
def optimal_activation(dimension: float, degree: int = 7) -> tuple[float, ...]:
    r"""Hermite coefficients of an activation whose infinitely deep network is an optimal classifier.

    .. math:: \phi = \sqrt{a}\,h_1 + \sqrt{1 - a}\,h_p, \qquad
        \check\phi'(0) = a, \quad \check\phi'(1) = a + p (1 - a), \qquad
        -2 \frac{\log a}{\log(a + p(1 - a))} = d

    with :math:`h_i` the Hermite polynomials of unit mean square. Use `hermite` to call it.

    Args:
        dimension: d, of the sphere that the inputs lie on.
        degree: p >= 2, of the other polynomial.

    Returns:
        ``degree + 1`` coefficients.

    Raises:
        Error: a dimension of 0 or less, or a degree below 2.

    >>> coefficients = optimal_activation(2)
    >>> round(depth_limit(lambda x: hermite(coefficients, x)).exponent, 6)
    2.0
    """
    if not dimension > 0 or degree < 2:
        raise Error(f"needs a dimension above 0 and a degree of at least 2, got {dimension} and {degree}")

    def exponent(share: float) -> float:
        return -2 * math.log(share) / math.log(share + degree * (1 - share))

    # The exponent falls from infinity at share 0 to 2 / (degree - 1) at share 1.
    if dimension <= 2 / (degree - 1):
        raise Error(f"degree {degree} reaches dimensions above {2 / (degree - 1):.3g}; got {dimension}: raise degree=")
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) > dimension else (low, middle)
    share = (low + high) / 2
    return (0.0, math.sqrt(share), *[0.0] * (degree - 2), math.sqrt(1 - share))


def hermite(coefficients: tuple[float, ...], places: Tensor) -> Tensor:
    """A sum of Hermite polynomials of unit mean square over a standard Gaussian.

    >>> hermite((0.0, 0.0, 2**0.5), torch.tensor([1.0, 3.0])).round().tolist()         # x^2 - 1
    [0.0, 8.0]
    """
    before, here = torch.zeros_like(places), torch.ones_like(places)
    total = coefficients[0] * here
    for index, coefficient in enumerate(coefficients[1:]):
        before, here = here, (places * here - math.sqrt(index) * before) / math.sqrt(index + 1)
        if coefficient:
            total = total + coefficient * here
    return total


@card(
    paper="Radhakrishnan, Belkin, Uhler 2023, 'Wide and Deep Neural Networks Achieve Optimality for Classification'; "
    "Devroye, Györfi, Krzyżak 1998, 'The Hilbert Kernel Regression Estimate'",
    covers=("wide-deep-neural-networks",),
    needs=("data",),
    unit="model",
    claim="with the exponent of the sphere's dimension its error falls to the best possible, one neighbour's does not",
)
def kernel_classes(
    examples: Tensor,
    labels: Tensor,
    inputs: Tensor,
    *,
    exponent: float | None = None,
    activation: Activation | Dual | None = None,
    depth: int = 1,
    kind: Literal["vote", "interpolate"] = "vote",
) -> Tensor:
    r"""Classes of inputs, by a vote of the examples or by interpolating their labels.

    .. math:: \arg\max_c \sum_{i: y_i = c} K(x, x_i) \quad\text{or}\quad
        \arg\max_c \; K(x, X)\, K(X, X)^{-1}\, [y = c]

    with :math:`K = \|x - x_i\|^{-a}` where ``exponent`` is given, or the tangent kernel of a deep network.

    Args:
        examples: ``[n, features]``.
        labels: ``[n]`` whole numbers from 0.
        inputs: ``[m, features]``.
        exponent: a, for the singular kernel.
        activation: name, function or `Dual`; inputs and examples are then scaled to length 1.
        depth: hidden layers of the network.
        kind: ``vote``, or ``interpolate``: the network trained to the end from outputs of 0.

    Returns:
        ``[m]`` classes. A tie goes to the smaller class; an input that is an example has that example's class.

    Raises:
        Error: both or neither kernel named, shapes that do not fit, no example, values that are not finite, so many
            layers that nothing is left of the kernel.

    Memory is bounded for votes; to interpolate takes the kernel of all pairs of examples.

    >>> examples = torch.tensor([[0.0], [1.0], [1.2]])
    >>> kernel_classes(examples, torch.tensor([0, 1, 1]), torch.tensor([[0.4], [0.1]]), exponent=1.0).tolist()
    [1, 0]
    """
    if (exponent is None) == (activation is None):
        raise Error("kernel_classes needs exponent= of a singular kernel or activation= of a network, and not both")
    if exponent is not None and not exponent > 0:
        raise Error(f"exponent= of a singular kernel is above 0, got {exponent}")
    if kind not in ("vote", "interpolate"):
        raise Error(f"kind= is 'vote' or 'interpolate', got {kind!r}")
    if kind == "interpolate" and exponent is not None:
        raise Error("a singular kernel is infinite at its examples: it votes, it does not interpolate")
    if examples.dim() != 2 or inputs.dim() != 2 or examples.shape[1:] != inputs.shape[1:]:
        raise Error(f"examples {list(examples.shape)} and inputs {list(inputs.shape)} do not fit")
    if labels.shape != examples.shape[:1] or not len(labels):
        raise Error(f"labels {list(labels.shape)} do not fit examples {list(examples.shape)}")
    if int(labels.min()) < 0:
        raise Error(f"labels are whole numbers from 0, got {int(labels.min())}")
    given, asked = examples.detach().double(), inputs.detach().double()
    if not bool(torch.isfinite(given).all() and torch.isfinite(asked).all()):
        raise Error("examples and inputs are not all finite numbers")
    targets = torch.nn.functional.one_hot(labels.long()).to(given)
    known = dual(activation) if activation is not None and not isinstance(activation, Dual) else activation
    if known is not None:
        given, asked = (torch.nn.functional.normalize(one, dim=1) for one in (given, asked))

    def kernel(rows: Tensor) -> Tensor:
        if exponent is not None:
            distance = torch.cdist(rows, given, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distance.amin(dim=1, keepdim=True)
            # Relative to the nearest, so that nothing overflows; at distance 0 that one alone counts.
            ratio = torch.where(nearest > 0, nearest / distance, (distance == 0).double())
            return ratio.pow(exponent)
        assert known is not None
        found = deep_kernels(known, rows @ given.T, depth)[1]
        if not bool(found.any(dim=1).all()):
            raise Error(f"after {depth} layers the kernel is too small for float64 at every example; take fewer layers")
        return found

    if kind == "interpolate":  # on the processor, whose solver takes examples that are there twice
        targets = torch.linalg.lstsq(kernel(given).cpu(), targets.cpu()).solution.to(given)
    rows = asked.split(max(_PAIRS // len(given), 1))
    return torch.cat([(kernel(part) @ targets).argmax(dim=1) for part in rows])
