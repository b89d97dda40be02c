"""How much is removed, and how much is exchanged, at each step of a run."""

from __future__ import annotations

import math


def cubic(step: int, first: float, last: float, start: int, stop: int) -> float:
    r"""From one share to another, fast at first and slowly in the end.

    .. math:: s_t = s_f + (s_i - s_f) \Bigl( 1 - \frac{t - t_0}{t_1 - t_0} \Bigr)^3

    and :math:`s_i` before :math:`t_0`, :math:`s_f` after :math:`t_1` (Zhu and Gupta 2018, 'To prune, or not to prune').

    Args:
        step: :math:`t`.
        first: :math:`s_i`.
        last: :math:`s_f`.
        start: :math:`t_0`.
        stop: :math:`t_1`, above ``start``.

    >>> [cubic(step, 0.0, 0.8, 10, 20) for step in (0, 10, 15, 20, 99)]
    [0.0, 0.0, 0.7000000000000001, 0.8, 0.8]
    """
    done = min(max((step - start) / (stop - start), 0.0), 1.0)
    return last + (first - last) * (1 - done) ** 3


def cosine(step: int, amount: float, start: int, stop: int) -> float:
    r"""From a share to nothing along half a cosine.

    .. math:: f_t = \frac{\alpha}{2} \Bigl( 1 + \cos \pi \frac{t - t_0}{t_1 - t_0} \Bigr)

    (Evci et al. 2020, 'Rigging the lottery').

    Args:
        step: :math:`t`.
        amount: :math:`\alpha`.
        start: :math:`t_0`.
        stop: :math:`t_1`, above ``start``.

    >>> [round(cosine(step, 0.3, 0, 100), 4) for step in (0, 50, 100)]
    [0.3, 0.15, 0.0]
    """
    done = min(max((step - start) / (stop - start), 0.0), 1.0)
    return amount / 2 * (1 + math.cos(math.pi * done))
