"""Remove the smallest weights.

A weight near zero changes its output little, so zero in its place changes it little too. Needs no
data; the baseline that every other score is measured against.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card


@card(
    paper="Han, Pool, Tran, Dally 2015, 'Learning both Weights and Connections for Efficient Neural Networks'",
    covers=("essential-sparsity",),
    unit="element",
    laws=("nested", "scale", "sign", "element_order"),
    claim="up to a knee in sparsity the smallest weights can be removed at once with little loss",
)
def magnitude(weight: Tensor) -> Tensor:
    r"""Score every weight by its absolute value: the smallest go first.

    .. math:: s_{ij} = |w_{ij}|

    Args:
        weight: ``[*shape]``.

    Returns:
        ``[*shape]``, float32: the score; the lowest are pruned.

    >>> magnitude(torch.tensor([[-3.0, 1.0]]))
    tensor([[3., 1.]])
    """
    return weight.float().abs()
