"""Penalties that make weights easy to quantize: an even distribution, near the points, within a short range.

A grid of evenly spaced points loses least on weights that are spread evenly: no tails that widen the step, no side that
leaves points unused. Added to a loss with a small factor, these move the weights there while they still can learn.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.quantize._coded import coded, runs_of
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.grids import Grid, Integer
from weightsmith.quantize.grids._grid import check_group
from weightsmith.quantize.training._fake import beneath, layouts_of, standing
from weightsmith.weights import Pattern, PerTensor, Spec

EVEN = 1.8
"""Kurtosis of the uniform distribution."""


@card(
    paper="Xu, Han, Tian, Yang, Zhang 2023, 'EQ-Net: Elastic Quantization Neural Networks' (weight distribution "
    "regularization); the kurtosis of Shkolnik et al. 2020, 'Robust Quantization: One Model to Rule Them All'",
    covers=("eq-net",),
    unit="model",
    claim="rounding afterwards to 2 or 3 bits loses less",
    departs="variances without Bessel's correction; the first layer counts too; equal weights cost nothing",
)
def moments(
    module: nn.Module,
    *,
    kurtosis: float = EVEN,
    skewness: float = 0.0,
    share: float = 1 / 0.015,
    pattern: Pattern | None = None,
) -> Tensor:
    r"""How far weights are from an even distribution, averaged over tensors.

    .. math:: \big(\operatorname{kurt}(w) - 1.8\big)^2 + \lambda \operatorname{skew}(w)^2

    Args:
        module: only looked at; the weights beneath a quantization count.
        kurtosis, skewness: what they are drawn to; 1.8 and 0 for evenly spread weights.
        share: :math:`\lambda`; the authors' code takes the first term 0.015 times and the second once.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        a number; multiply it with 0.015 for the authors' settings.

    Raises:
        Error: no weight fits.

    >>> even = nn.Linear(1001, 1, bias=False)
    >>> even.weight = nn.Parameter(torch.linspace(-1, 1, 1001).view(1, -1))
    >>> moments(even, pattern="*").item() < 1e-4
    True
    """
    return _mean(_moments(value, kurtosis, skewness, share) for value in beneath(module, pattern).values())


def _moments(value: Tensor, kurtosis: float, skewness: float, share: float) -> Tensor:
    value = value.flatten().to(torch.promote_types(value.dtype, torch.float32))
    centred = value - value.mean()
    variance = centred.square().mean()
    if not variance > 0:
        return centred.sum() * 0
    even = centred / variance.sqrt()  # first, since powers of small weights are soon zero
    third, fourth = even.pow(3).mean(), even.pow(4).mean()
    return (fourth - kurtosis) ** 2 + share * (third - skewness) ** 2


@card(
    paper="the distance to the nearest point, as in Polino, Pascanu, Alistarh 2018, 'Model compression via "
    "distillation and quantization' (projection) and Naumov et al. 2018, 'On Periodic Functions as Regularizers for "
    "Quantization of Neural Networks'",
    unit="model",
    claim="rounding afterwards changes less",
)
def to_points(
    module: nn.Module,
    *,
    bits: PerTensor[int] | None = None,
    group: PerTensor[int | None] | None = None,
    grid: PerTensor[str | Grid] = "int",
    symmetric: PerTensor[bool] | None = None,
    pattern: Pattern | None = None,
) -> Tensor:
    r"""How far weights are from the points they would be rounded to, averaged over tensors.

    .. math:: \frac{\sum (w - g(w))^2}{\sum w^2}

    with the points and the sum of squares taken as given: the gradient pulls every weight to its nearest point.

    Args:
        module: only looked at; of weights with a grid of their own, that counts, and the options are for the rest.
        bits, group, grid, symmetric, pattern: as in `fake`.

    Returns:
        a number, the relative squared error of rounding.

    Raises:
        Error: no weight fits, settings that the grid does not have, or groups that do not fill a row.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> model.weight = nn.Parameter(torch.tensor([[3.5, -3.0, 1.0, 0.5]]))
    >>> loss = to_points(model, bits=3, pattern="*")   # points at -4 ... 3
    >>> loss.backward()
    >>> model.weight.grad > 0
    tensor([[ True, False, False,  True]])
    """
    weights, tops = beneath(module, pattern), {name: top for name, top, _ in standing(module)}
    found = {
        name: (tops[name].rows(weight), tops[name].coded(weight).values())
        for name, weight in weights.items()
        if hasattr(tops.get(name), "rows")
    }
    plain = {name: weight for name, weight in weights.items() if name not in tops}
    if plain:
        layouts = layouts_of(module, pattern, bits=bits, group=group, grid=grid, symmetric=symmetric)
        for name, weight in plain.items():
            rows = layouts[name].matrix(weight)
            found[name] = rows, coded(rows.detach(), layouts[name].grid).values()
    tiny = torch.finfo(torch.float32).tiny
    return _mean(
        (rows - points).square().sum() / rows.detach().square().sum().clamp(min=tiny) for rows, points in found.values()
    )


@card(
    paper="Shkolnik et al. 2020, 'Robust Quantization: One Model to Rule Them All' (why long tails hurt); the range "
    "itself as a penalty, as in Kundu et al. 2023, 'R2 Loss: Range Restriction Loss for Model Compression and "
    "Quantization'",
    unit="model",
    claim="steps become shorter at the same number of bits",
)
def span(module: nn.Module, *, group: int | None = None, pattern: Pattern | None = None) -> Tensor:
    r"""The largest magnitude over the root mean square, averaged over groups and tensors.

    .. math:: \frac{\max |w|}{\sqrt{\overline{w^2}}}

    1 where all magnitudes are equal, :math:`\sqrt 3` for evenly spread weights.

    Args:
        module: only looked at; the weights beneath a quantization count.
        group: inputs that share a range, the last ones of a row perhaps fewer; None for whole rows.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        a number; groups of zeros do not count.

    Raises:
        Error: no weight fits, or a group below 1.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight = nn.Parameter(torch.tensor([[3.0, -3.0]]))
    >>> span(model, pattern="*").item()
    1.0
    """
    check_group(group)

    def one(name: str, value: Tensor) -> Tensor:
        rows = Layout.of(name, Spec(tuple(value.shape), value.dtype), Integer()).matrix(value)
        parts = []
        for runs in runs_of(rows, group):
            size = runs.square().mean(-1)
            alive = size > 0
            parts.append(runs.abs().amax(-1)[alive] / size[alive].sqrt())
        ratios = torch.cat(parts)
        return ratios.mean() if ratios.numel() else rows.sum() * 0

    return _mean(one(name, value) for name, value in beneath(module, pattern).items())


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
