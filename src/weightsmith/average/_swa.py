"""Average the last moments of a run that keeps moving.

With a learning rate that stays high, training circles around the middle of a wide valley without
ever reaching it. The mean of its positions is that middle.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card


@card(
    paper="Izmailov, Podoprikhin, Garipov, Vetrov, Wilson 2018, 'Averaging Weights Leads to Wider Optima and Better "
    "Generalization' (Algorithm 1)",
    covers=("swa",),
    unit="element",
    laws=("constant", "linear", "plain_mean"),
    claim="the mean of the positions of a run at a constant learning rate is better than the last of them",
)
def swa(mean: Tensor, weight: Tensor, count: int) -> Tensor:
    r"""The mean of all moments so far.

    .. math:: \bar w_{n+1} = \bar w_n + \frac{w_{n+1} - \bar w_n}{n + 1}

    Args:
        mean: ``[*shape]``, :math:`\bar w_n`, float32 or wider.
        weight: ``[*shape]``, the next moment.
        count: :math:`n`, the moments that ``mean`` holds.

    Returns:
        ``[*shape]``, in the dtype of ``mean``.

    >>> swa(torch.tensor([2.0]), torch.tensor([5.0]), count=2)
    tensor([3.])
    """
    return mean.lerp(weight.to(mean.dtype), 1 / (count + 1))
