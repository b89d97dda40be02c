"""Cut off the few weights that lie far outside: a range that no longer holds them leaves the others finer steps.

Which ones those are is found in two turns. Quartiles say which magnitudes are unusual; among these, the widest gap,
less the spread of what stays, says where the outliers begin.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.room import Source, targets_of
from weightsmith.weights import Lazy, Pattern, PerTensor, Weights, apply, open, resolve


@card(
    paper="Ding et al. 2023, 'CBQ: Cross-Block Quantization for Large Language Models' (coarse-to-fine preprocessing)",
    covers=("cbq",),
    unit="model",
    departs="weights alone, not activations; the largest usual magnitude is the first that may be kept; where no cut "
    "is better than none, nothing is cut off",
)
def without_outliers(
    weights: Source, *, reach: PerTensor[float] = 1.5, spread: PerTensor[float] = 1.0, pattern: Pattern | None = None
) -> Weights:
    r"""Weights with their outliers drawn in to the largest magnitude that is none.

    .. math:: T = Q_3 + c\,(Q_3 - Q_1), \qquad
        i^* = \operatorname{arg\,max}_i \; (a_{i+1} - a_i)^2 - \lambda \operatorname{Var}(a_0, \dots, a_i)

    for each tensor with its magnitudes :math:`a_1 \le a_2 \le \dots` above :math:`T`, and :math:`a_0` the largest that
    is not; those after :math:`i^*` are outliers.

    Args:
        weights: what is quantized next. Memory: a tensor of them in float64, twice.
        reach: :math:`c`, how many times the distance of the quartiles is still usual.
        spread: :math:`\lambda`, how much the variance of what stays counts.
        pattern: which tensors; by default matrices and convolutions without embeddings and the head.

    Returns:
        Weights: lazy, in the same dtypes; tensors without outliers are as they were.

    Raises:
        Error: options below zero, values that are not finite, or a pattern that fits nothing.

    >>> without_outliers({"l.weight": torch.tensor([[0.1, -0.2, 0.3, 0.4, -9.0, 0.2, 0.9]])})["l.weight"]
    tensor([[ 0.1000, -0.2000,  0.3000,  0.4000, -0.9000,  0.2000,  0.9000]])
    """
    opened = open(weights)
    targets = targets_of(opened, pattern)
    reaches, spreads = resolve(reach, targets, "reach"), resolve(spread, targets, "spread")
    for name in targets:
        if not reaches[name] >= 0 or not spreads[name] >= 0:
            raise Error(f"{name}: reach and spread are 0 or more, got {reaches[name]} and {spreads[name]}")

    def build(name: str, node: Lazy) -> Lazy:
        if name not in reaches:
            return node
        one = partial(drawn_in, reach=reaches[name], spread=spreads[name], name=name)
        return apply(one, node, unit="tensor", spec=node.spec)

    return opened.zip_nodes(build, (), "quantize.without_outliers", {"reach": reach, "spread": spread})


def drawn_in(weight: Tensor, *, reach: float = 1.5, spread: float = 1.0, name: str = "a tensor") -> Tensor:
    """One tensor without its outliers."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    if not wide.isfinite().all():
        raise Error(f"without_outliers: {name} has values that are not finite; leave it out with pattern=")
    limit = outlier_limit(wide.abs().flatten(), reach=reach, spread=spread)
    return weight if limit is None else wide.clamp(-limit, limit).to(weight.dtype)


def outlier_limit(magnitudes: Tensor, *, reach: float = 1.5, spread: float = 1.0) -> float | None:
    """The largest of ``magnitudes [n]`` that is no outlier; None where there are none."""
    if len(magnitudes) < 2:
        return None
    ordered = magnitudes.to(torch.float64).sort().values
    first, third = (_quantile(ordered, at) for at in (0.25, 0.75))
    usual = int(torch.searchsorted(ordered, third + reach * (third - first), right=True))
    unusual = ordered[usual - 1 :]  # and the largest of the others
    if len(unusual) < 2:
        return None
    count = torch.arange(1, len(unusual), device=unusual.device, dtype=unusual.dtype)
    stay = unusual[:-1] - unusual[0]  # variances do not change, and lose less to rounding
    variance = (stay.square().cumsum(0) / count - (stay.cumsum(0) / count).square()).clamp(min=0)
    gain = unusual.diff().square() - spread * variance
    best = int(gain.argmax())
    return float(unusual[best]) if gain[best] > 0 else None


def _quantile(ordered: Tensor, at: float) -> Tensor:
    """Of sorted values; `torch.quantile` takes at most 2^24."""
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
