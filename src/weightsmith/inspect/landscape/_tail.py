"""The scaled non-central chi-square law: fitted to a sample, and its far lower tail.

It is the law of a squared error: the sum of squares of Gaussians of one spread with any means, times a scale.
Its distribution function is a mixture of central ones, and is summed here in logarithms, so that chances of
``exp(-10000)`` are found as well as those of a half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.errors import Error

STEPS = 12  # of the recurrence that lifts a Bessel function's order to where its expansion is exact
TERMS = 4096  # of the mixture, around its largest; with a wider mixture, every so many
ALIKE = 1e-3  # of the mean: with less spread than this the chances are not exact any more
STARTS = (0.02, 0.3, 0.8)


@dataclass(frozen=True)
class Law:
    """``scale`` times a non-central chi-square variable; each of ``[...]``, float64."""

    freedom: Tensor
    offset: Tensor
    """The non-centrality: the sum of the squares of the means."""
    scale: Tensor


def bessel_log(order: Tensor, x: Tensor) -> Tensor:
    r"""``log I_order(x)`` for order > -1 and x > 0, to about 1e-7, where the value itself has no number.

    Upwards of an order of 12 the uniform expansion holds; from there the recurrence
    :math:`I_{\nu-1} = I_{\nu+1} + (2\nu/x) I_\nu` goes down, a sum of positive terms.

    >>> round(float(bessel_log(torch.tensor(0.0), torch.tensor(1.0))), 6)        # log 1.266066
    0.235914
    """
    order, x = torch.broadcast_tensors(order.double(), x.double())
    upper, lower = _expansion(order + STEPS + 1, x), _expansion(order + STEPS, x)
    ratio = (upper - lower).exp()  # of one order over that below
    total = lower
    for step in range(STEPS, 0, -1):
        lifted = ratio + 2 * (order + step) / x
        total = total + lifted.log()
        ratio = 1 / lifted
    return total


def _expansion(order: Tensor, x: Tensor) -> Tensor:
    """The uniform expansion in 1 / order, of four terms (Abramowitz, Stegun, 'Handbook of Mathematical Functions')."""
    z = x / order
    root = (1 + z * z).sqrt()
    t = 1 / root
    t2 = t * t
    one = t * (3 - 5 * t2) / 24
    two = t2 * (81 - 462 * t2 + 385 * t2**2) / 1152
    three = t * t2 * (30375 - 369603 * t2 + 765765 * t2**2 - 425425 * t2**3) / 414720
    four = t2**2 * (4465125 - 94121676 * t2 + 349922430 * t2**2 - 446185740 * t2**3 + 185910725 * t2**4) / 39813120
    series = 1 + (one + (two + (three + four / order) / order) / order) / order
    exponent = order * (root + (z / (1 + root)).log())
    return exponent - 0.5 * (2 * math.pi * order * root).log() + series.log()


def log_density(law: Law, x: Tensor) -> Tensor:
    """The logarithm of the density at ``x`` > 0."""
    k, offset = law.freedom, law.offset
    y = x / law.scale
    bent = bessel_log(k / 2 - 1, (offset * y).sqrt())
    return -math.log(2) - (y + offset) / 2 + (k / 4 - 0.5) * (y / offset).log() + bent - law.scale.log()


def log_chance(law: Law, x: float) -> Tensor:
    r"""The logarithm of the chance of a value of at most ``x``, ``[...]``.

    .. math:: P(X \le x) = \sum_j \mathrm{Poisson}(j; \lambda/2)\; P\bigl(k/2 + j,\; x / 2s\bigr)

    >>> law = Law(*(torch.tensor(value, dtype=torch.float64) for value in (2.0, 1e-9, 1.0)))
    >>> round(float(log_chance(law, 2.0).exp()), 6)                             # 1 - exp(-1)
    0.632121
    """
    if x <= 0:
        return torch.full_like(law.scale, -math.inf)
    half, y = law.offset / 2, x / law.scale / 2
    # The largest term: below the bulk where the ratio of neighbours, (half / j) (y / (k / 2 + j)), is one.
    k = law.freedom / 4
    below = torch.minimum((k.square() + half * y).sqrt() - k, half)
    peak = torch.where(y < law.freedom / 2 + half, below, half)
    stride = (20 * (peak + 1).sqrt() / TERMS).ceil()  # ten deviations to each side; a term in 200 a deviation is enough
    first = (peak - stride * TERMS / 2).clamp(min=0).floor()
    j = first[..., None] + stride[..., None] * torch.arange(TERMS, dtype=torch.float64)
    poisson = j * half[..., None].log() - half[..., None] - torch.lgamma(j + 1)
    gamma = _log_gamma_chance(law.freedom[..., None] / 2 + j, y[..., None].expand_as(j))
    return (torch.logsumexp(poisson + gamma, dim=-1) + stride.log()).clamp(max=0)


def _log_gamma_chance(a: Tensor, y: Tensor) -> Tensor:
    """The logarithm of the regularised lower incomplete gamma function, also where it underflows."""
    plain = torch.special.gammainc(a, y)
    far = plain < 1e-280
    found = plain.clamp(min=1e-300).log()
    if bool(far.any()):
        # y ** a exp(-y) / Gamma(a + 1) times a series, whose terms fall by y / (a + step)
        a, y = a[far], y[far]
        total, term = torch.ones_like(a), torch.ones_like(a)
        for step in range(1, 3000):
            term = term * y / (a + step)
            total = total + term
            if float((term / total).max()) < 1e-14:
                break
        found[far] = a * y.log() - y - torch.lgamma(a + 1) + total.log()
    return found


def fit(sample: Tensor, weights: Tensor | None = None, start: Law | None = None, rounds: int = 60) -> Law:
    r"""The law under which samples are likeliest.

    The search is over the logarithm of the mean, that of the squared coefficient of variation, and the share
    :math:`r = \lambda / (k + \lambda)` of the non-centrality, which hardly depend on each other. Newton steps are
    damped until the likelihood rises.

    Args:
        sample: ``[n]`` above 0.
        weights: ``[b, n]``: how often each counts, for b fits at once (bootstrap); by default once.
        start: of the search, ``[b]``; by default several are tried.
        rounds: of the search at most.

    Returns:
        Law: of ``[b]``, or of numbers where no weights are given.

    Raises:
        Error: fewer than 8 samples, ones that are not finite and above 0, or that hardly differ.
    """
    x = sample.double()
    if x.dim() != 1 or len(x) < 8 or not bool((x.isfinite() & (x > 0)).all()):
        raise Error(
            f"a law is fitted to at least 8 finite losses above 0, got {x.numel()} of them"
            + (f", least {float(x.min())}" if x.numel() else "")
        )
    if float(x.std()) < ALIKE * float(x.mean()):
        raise Error(f"the {len(x)} losses hardly differ ({float(x.min()):g} to {float(x.max()):g}): they have no tail")
    w = torch.ones(1, len(x), dtype=torch.float64) if weights is None else weights.double()
    w = w / w.sum(dim=1, keepdim=True)
    mean = w @ x
    variance = (w @ x.square() - mean.square()).clamp(min=1e-12 * mean.square())
    rough = torch.stack([mean.log(), (variance / mean.square()).log()], dim=1)
    if start is None:
        starts = [torch.cat([rough, torch.full_like(rough[:, :1], math.log(r / (1 - r)))], dim=1) for r in STARTS]
    else:
        starts = [_free(start).expand(len(w), 3).clone()]
    found = [_climb(x, w, one, rounds) for one in starts]
    best = torch.stack([value for _, value in found]).argmax(dim=0)
    chosen = torch.stack([place for place, _ in found])[best, torch.arange(len(w))]
    law = _law(chosen)
    return law if weights is not None else Law(law.freedom[0], law.offset[0], law.scale[0])


def _law(free: Tensor) -> Law:
    mean, variation, share = free[..., 0].exp(), free[..., 1].exp(), free[..., 2].sigmoid()
    total = 2 * (1 + share) / variation  # freedom plus offset
    return Law((1 - share) * total, share * total, mean / total)


def _free(law: Law) -> Tensor:
    total, share = law.freedom + law.offset, law.offset / (law.freedom + law.offset)
    return torch.stack([(law.scale * total).log(), (2 * (1 + share) / total).log(), torch.logit(share)], dim=-1)


def _likelihood(x: Tensor, w: Tensor, free: Tensor) -> Tensor:
    law = _law(free)
    wide = Law(law.freedom[:, None], law.offset[:, None], law.scale[:, None])
    found = (w * log_density(wide, x)).sum(dim=1)
    return found - 1e-4 * (free[:, 2] / 6).pow(4)  # the share's ends lie infinitely far; nothing is gained out there


def _climb(x: Tensor, w: Tensor, free: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Damped Newton steps for each row of ``free`` ``[b, 3]``."""
    damping = torch.full((len(free),), 1e-3, dtype=torch.float64)
    with torch.enable_grad():
        for _ in range(rounds):
            at = free.detach().requires_grad_()
            value = _likelihood(x, w, at)
            (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
            rows = [torch.autograd.grad(slope[:, i].sum(), at, retain_graph=True)[0] for i in range(3)]
            bend, slope, value = -torch.stack(rows, dim=1), slope.detach(), value.detach()
            values, vectors = torch.linalg.eigh((bend + bend.mT) / 2)
            values = values.abs() + damping[:, None] * (1 + values.abs().amax(dim=1, keepdim=True))
            step = (vectors @ ((vectors.mT @ slope[:, :, None]) / values[:, :, None]))[:, :, 0].clamp(-2, 2)
            with torch.no_grad():
                tried = (at + step).clamp(-40, 40)
                gain = _likelihood(x, w, tried) - value
                better = gain > 0  # False for NaN
                free = torch.where(better[:, None], tried, at.detach())
                damping = torch.where(better, damping / 5, damping * 8).clamp(1e-9, 1e9)
                if bool(((gain.abs() < 1e-8) | (damping > 1e8)).all()):
                    break
    with torch.no_grad():
        return free, _likelihood(x, w, free).nan_to_num(-math.inf)
