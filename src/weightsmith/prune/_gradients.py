"""Remove the weights whose loss would be felt least, as the derivatives of the loss foretell it.

Put one weight to zero: the loss moves by its slope there times the way, and, where the slope is nothing because the
network has been trained, by half of its curvature times the way squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card


@card(
    paper="Lee, Ajanthan, Torr 2019, 'SNIP: Single-shot Network Pruning based on Connection Sensitivity'",
    needs=("stats.gradients",),
    unit="element",
    laws=("nested", "scale", "sign"),
    claim="before any training, and on one batch, better than by magnitude",
    departs="not divided by the sum of all scores, which changes no order",
)
def snip(weight: Tensor, stats: Tensor) -> Tensor:
    r"""Score every weight by how strongly the loss feels it, whether for good or ill.

    .. math:: s_{ij} = \Bigl| w_{ij} \frac{\partial L}{\partial w_{ij}} \Bigr|

    The derivative of the loss by a factor on the weight. The paper cuts all tensors by one threshold:
    ``scope="global"``.

    Args:
        weight: ``[*shape]``.
        stats: the mean gradient (`weightsmith.stats.gradients`), ``[*shape]``.

    Returns:
        ``[*shape]``, float32.

    >>> snip(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    tensor([1., 3.])
    """
    return (weight.float() * stats.to(weight.device, torch.float32)).abs()


@card(
    paper="Mozer, Smolensky 1988, 'Skeletonization: A Technique for Trimming the Fat from a Network via Relevance "
    "Assessment'; squared: Molchanov et al. 2019, 'Importance Estimation for Neural Network Pruning'",
    needs=("stats.gradients",),
    unit="element",
    laws=("nested", "scale"),
    claim="in pieces with several weights, effects that cancel are known to cancel",
    departs="of single weights; the mean over a block, a row or a column is that of the signed scores of its weights",
)
def taylor(weight: Tensor, stats: Tensor, *, squared: bool = False) -> Tensor:
    r"""Score every weight by what the loss would rise by without it, to first order.

    .. math:: s_{ij} = -w_{ij} \frac{\partial L}{\partial w_{ij}}, \qquad \text{squared: } s_{ij}^2

    Weights whose absence would lower the loss score below zero and go first. Over the weights of a block the signed
    scores add up to what the loss would do without all of them; squared ones, like those of `snip`, whose order they
    share, do not know of each other's sign.

    Args:
        weight: ``[*shape]``.
        stats: the mean gradient (`weightsmith.stats.gradients`), ``[*shape]``.
        squared: the square, of whichever sign.

    Returns:
        ``[*shape]``, float32.

    >>> taylor(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    tensor([-1.,  3.])
    """
    change = -(weight.float() * stats.to(weight.device, torch.float32))
    return change.square() if squared else change


@card(
    paper="LeCun, Denker, Solla 1989, 'Optimal Brain Damage'; with Fisher information: Theis et al. 2018, 'Faster gaze "
    "prediction with dense networks and Fisher pruning'",
    needs=("stats.fisher",),
    unit="element",
    laws=("nested", "scale", "sign"),
    claim="on a trained network a lower loss than by magnitude",
)
def obd(weight: Tensor, stats: Tensor) -> Tensor:
    r"""Score every weight by what the loss would rise by without it at a minimum, to second order.

    .. math:: s_{ij} = \tfrac12 \, h_{ij} \, w_{ij}^2

    The slope is taken to be zero and weights to be independent. With Fisher information as the curvature the score is
    never below zero. The true diagonal (`weightsmith.stats.curvature`) may be: such a weight sits on a ridge of the
    loss, which would fall either way, and goes first.

    Args:
        weight: ``[*shape]``.
        stats: the diagonal of the curvature, ``[*shape]``: `weightsmith.stats.fisher` or another estimate.

    Returns:
        ``[*shape]``, float32, in the unit of the loss.

    >>> obd(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    tensor([1.0000, 1.5000])
    """
    return 0.5 * stats.to(weight.device, torch.float32) * weight.float().square()
