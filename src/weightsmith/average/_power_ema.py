"""An average whose memory grows with the run, so that it forgets the start whatever the run's length.

An exponential average remembers a fixed number of steps: too many early in a run, too few late. Here
the weight of a moment is a power of its time, so the average always spans the same share of the run.
"""

from __future__ import annotations

import functools
import math

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error

LONGEST = 12**-0.5
"""The relative length of the plain mean of a whole run, and so of any average that forgets its start."""


def power_of(sigma_rel: float) -> float:
    r"""The power :math:`\gamma \ge 0` whose average has this relative length.

    .. math:: \sigma_{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    Args:
        sigma_rel: standard deviation of the weights' times, as a share of the run; above 0, at most 0.2887.

    Raises:
        ValueError: there is no such average.

    >>> round(power_of(0.10), 3), round(power_of(0.05), 3)
    (6.937, 16.972)
    """
    return _power_of(float(sigma_rel))


@functools.lru_cache(maxsize=1024)
def _power_of(sigma_rel: float) -> float:
    if not 0 < sigma_rel <= LONGEST * (1 + 1e-9):
        raise Error(
            f"sigma_rel is the length of an average as a share of the run, above 0 and at most {LONGEST:.4f} "
            f"(the mean of the whole run); got {sigma_rel:g}"
        )
    # The length falls steadily as the power rises from 0, and is below 1 / power: halve what lies between.
    low, high = 0.0, 1 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        if relative_length(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return low


def relative_length(power: float) -> float:
    """``sigma_rel`` of the average with a power: the way back from `power_of`.

    >>> round(relative_length(6.937), 3)
    0.1
    """
    return math.sqrt((power + 1) / (power + 3)) / (power + 2)


@card(
    paper="Karras, Aittala, Lehtinen, Hellsten, Aila, Laine 2024, 'Analyzing and Improving the Training Dynamics of "
    "Diffusion Models' (power function EMA)",
    covers=("analyzing-improving-training-dynamics",),
    unit="element",
    laws=("constant", "linear"),
    claim="its memory is the same share of a run at every step",
)
def power_ema(mean: Tensor, weight: Tensor, count: int, *, sigma_rel: float = 0.1) -> Tensor:
    r"""The mean of all moments so far, each weighted by a power of its time.

    .. math:: \bar w_t = \beta_t \bar w_{t-1} + (1 - \beta_t) w_t, \qquad
        \beta_t = \left(1 - \frac{1}{t}\right)^{\gamma + 1}

    so that the moment :math:`i` has the weight :math:`(i^{\gamma+1} - (i-1)^{\gamma+1}) / t^{\gamma+1}`. Save
    ``average.weights("float32")`` every now and then: `post_hoc_ema` makes averages of any length of such snapshots.

    Args:
        mean: ``[*shape]``, :math:`\bar w_{t-1}`, float32 or wider.
        weight: ``[*shape]``, the next moment.
        count: :math:`t - 1`, the moments that ``mean`` holds.
        sigma_rel: the length of the average: standard deviation of the weights' times, as a share of
            the run; above 0, at most 0.2887 (the plain mean). It gives :math:`\gamma`.

    Returns:
        ``[*shape]``, in the dtype of ``mean``.

    Raises:
        ValueError: no average has that ``sigma_rel``.

    >>> power_ema(torch.tensor([0.0]), torch.tensor([8.0]), count=1, sigma_rel=12**-0.5)   # the plain mean
    tensor([4.])
    >>> power_ema(torch.tensor([0.0]), torch.tensor([8.0]), count=1, sigma_rel=0.1)        # the new one, nearly
    tensor([7.9674])
    """
    power = power_of(sigma_rel)
    fresh = -math.expm1((power + 1) * math.log1p(-1 / (count + 1)))
    return mean.lerp(weight.to(mean.dtype), fresh)
