"""Proper losses of a model that can only be sampled: no probability is ever asked for.

What a loss asks of probabilities can be asked of draws, if it is a polynomial: two draws agree with
probability :math:`\\sum_a q_a^2`. The log loss is no polynomial, but the number of draws until the target
comes up knows it without bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect.evaluation._parts import Interval, mean_interval, share, tensor_of

Draw = Callable[[Tensor], Tensor]
"""``examples [m] -> [m]`` outcomes: one draw from the model for each of these examples, by index."""


def _whole(values: Any, what: str, dimensions: int) -> Tensor:
    found = tensor_of(values)
    if found.is_floating_point() or found.ndim != dimensions or not found.numel():
        shape = "[n]" if dimensions == 1 else "[n, m]"
        raise Error(f"{what}: outcomes are whole numbers {shape}, got {found.dtype} {list(found.shape)}; "
                    "torch.unique(return_inverse=True) numbers other things")  # fmt: skip
    return found.long()


@card(
    paper="Kimpara, Frongillo, Waggoner 2023, 'Proper losses for discrete generative models'",
    covers=("proper-losses-discrete-generative",),
    unit="model",
    claim="its mean is the exact loss, however few draws there are; the true distribution has the least",
    departs="all draws are used, by averaging over their subsets",
)
def power_loss(draws: Any, targets: Any, *, degree: int = 2, confidence: float = 0.95) -> Interval:
    r"""A proper loss of any whole degree k, from k draws or more for each target.

    .. math:: (k - 1) \sum_a q_a^k - k\, q_y^{k-1}

    estimated by the shares of sets of k draws that all agree, and of k - 1 draws that all agree with the target.

    Args:
        draws: ``[n, m]`` outcomes as whole numbers: m >= k independent draws from the model for each example.
        targets: ``[n]`` the outcomes that came.
        degree: k >= 2; 2 is the quadratic loss, higher ones look at likely outcomes more.
        confidence: of the interval.

    Returns:
        Interval: its mean over targets drawn from p is, for k = 2, :math:`\|p - q\|^2 - \|p\|^2`.

    Raises:
        Error: fewer draws than the degree, or outcomes that are no whole numbers.

    >>> draws = torch.tensor([[0, 0], [0, 1], [1, 1]])
    >>> power_loss(draws, torch.tensor([0, 0, 0])).estimate              # [1 - 2, 0 - 1, 1 - 0] on average
    -0.3333333333333333
    """
    found, true = _whole(draws, "power_loss: draws", 2), _whole(targets, "power_loss: targets", 1)
    share(confidence, "confidence")
    true = true.to(found.device)
    if degree < 2 or found.shape[1] < degree or len(true) != len(found):
        raise Error(
            f"power_loss of degree {degree} needs at least {max(degree, 2)} draws for each of {len(true)} targets, "
            f"got {list(found.shape)}"
        )
    # How many draws of its row agree with each draw: runs of equal values in sorted rows.
    ordered = found.sort(1).values
    first = torch.searchsorted(ordered, ordered, right=False)
    last = torch.searchsorted(ordered, ordered, right=True)
    agree = (last - first).double()
    # Sets of k among c equal draws, c times over: once from each of the c draws.
    same = (_subsets(agree, degree) / agree).sum(1) / _choices(found.shape[1], degree)
    hit = _subsets((found == true[:, None]).double().sum(1), degree - 1) / _choices(found.shape[1], degree - 1)
    return mean_interval((degree - 1) * same - degree * hit, confidence)


def _subsets(count: Tensor, size: int) -> Tensor:
    """How many sets of ``size`` there are among ``count``."""
    found = torch.ones_like(count)
    for step in range(size):
        found = found * (count - step).clamp(min=0) / (step + 1)
    return found


def _choices(count: int, size: int) -> float:
    return float(_subsets(torch.tensor(float(count), dtype=torch.float64), size))


@card(
    paper="Kimpara, Frongillo, Waggoner 2023, 'Proper losses for discrete generative models'",
    covers=("proper-losses-discrete-generative",),
    unit="model",
)
def quadratic_loss(draws: Any, targets: Any, *, confidence: float = 0.95) -> Interval:
    r"""The quadratic (Brier) loss, from two draws or more for each target.

    .. math:: \sum_a q_a^2 - 2 q_y \approx 1[a = a'] - 1[a = y] - 1[a' = y]

    Args:
        draws: ``[n, m]``, m >= 2.
        targets: ``[n]``.
        confidence: of the interval.

    Returns:
        Interval: as `power_loss` of degree 2.

    Raises:
        Error: as `power_loss`.

    >>> quadratic_loss(torch.tensor([[3, 3]]), torch.tensor([3])).estimate
    -1.0
    """
    return power_loss(draws, targets, degree=2, confidence=confidence)


@card(
    paper="Kimpara, Frongillo, Waggoner 2023, 'Proper losses for discrete generative models'; "
    "van Opheusden, Acerbi, Ma 2020, 'Unbiased and efficient log-likelihood estimation with inverse binomial sampling'",
    covers=("proper-losses-discrete-generative",),
    unit="model",
    claim="its mean is the exact log loss",
    departs="draws until the first match, which needs no bound on probabilities; the paper draws a Poisson number",
)
def harmonic_log_loss(
    draw: Draw,
    targets: Any,
    *,
    repeats: int = 1,
    limit: int = 10000,
    truncate: bool = False,
    confidence: float = 0.95,
) -> Interval:
    r"""The log loss, from how often a model is drawn from until it gives the target.

    .. math:: \sum_{j=1}^{N} \frac1j, \qquad E = -\log q_y

    with N the failures before the first match. It takes 1 / q draws on average.

    Args:
        draw: indices of examples ``[m]`` to one draw each, ``[m]`` whole numbers; asked only for those still open.
        targets: ``[n]``.
        repeats: estimates averaged for each target.
        limit: draws per target and repeat at most.
        truncate: stop there and count what was seen, which makes the figure too small; else it is an error.
        confidence: of the interval.

    Returns:
        Interval: in nats. The interval is of the mean over targets.

    Raises:
        Error: a target that did not come up within the limit.

    >>> harmonic_log_loss(lambda examples: torch.zeros_like(examples), torch.tensor([0, 0])).estimate    # sure
    0.0
    """
    true = _whole(targets, "harmonic_log_loss: targets", 1)
    share(confidence, "confidence")
    if repeats < 1 or limit < 1:
        raise Error(f"harmonic_log_loss: repeats and limit are 1 or more, got {repeats} and {limit}")
    total = torch.zeros(len(true), dtype=torch.float64, device=true.device)
    still = torch.arange(len(true), device=true.device).repeat(repeats)
    for failures in range(1, limit + 1):
        found = _whole(draw(still), "harmonic_log_loss: draw", 1).to(true.device)
        if found.shape != still.shape:
            raise Error(f"harmonic_log_loss: asked for {len(still)} draws, got {list(found.shape)}")
        still = still[found != true[still]]
        if not len(still):
            break
        total.index_add_(0, still, torch.full_like(still, 1, dtype=torch.float64) / failures)
    if len(still) and not truncate:
        raise Error(
            f"harmonic_log_loss: {len(still)} of {repeats * len(true)} targets did not come up in {limit} draws; "
            "raise limit=, or accept a figure that is too small with truncate=True"
        )
    return mean_interval(total / repeats, confidence)
