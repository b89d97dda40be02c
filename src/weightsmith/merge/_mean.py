"""The average of several fine-tunes is often better than any of them.

Fine-tunes of one start tend to lie in one wide valley of the loss. Their average lies nearer to its
middle, where the loss is flat, and costs no more at inference than a single model. Which fine-tunes
go in is another question: independent ones (Ramé et al. 2022, 'Diverse Weight Averaging for
Out-of-Distribution Generalization'), ones that took a detour over other tasks (Ramé et al. 2023, 'Model
Ratatouille'), or ones of other tasks without their heads, as a start for a new one (Choshen et al. 2022, 'Fusing
finetuned models for better pretraining').
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weightsmith.card import card
from weightsmith.merge._parts import at_least, combined, shares
from weightsmith.weights import working


@card(
    paper="Wortsman et al. 2022, 'Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time' (uniform soup)",
    covers=("model-soups", "diwa", "model-ratatouille", "fusing"),
    unit="element",
    laws=("model_order", "agreement", "translation", "scale", "rotation"),
    claim="the uniform soup of fine-tunes is at least as good on held-out data as the best of them",
)
def mean(models: Tensor, *, weight: float | Sequence[float] | None = None, normalize: bool = True) -> Tensor:
    r"""The weighted mean of models.

    .. math:: w = \frac{\sum_i a_i w_i}{\sum_i a_i}

    with :math:`a_i` the ``weight`` of model :math:`i`, and without the denominator when
    ``normalize`` is off.

    Args:
        models: ``[k, *shape]``, k >= 1 models of one architecture.
        weight: one number for each model; all equal by default. Negative ones are allowed.
        normalize: divide by the sum of the weights.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, a wrong number of weights, or weights that are not finite or sum to zero.

    >>> mean(torch.tensor([[0.0, 2.0], [4.0, 4.0]]))
    tensor([2., 3.])
    >>> mean(torch.tensor([[0.0, 2.0], [4.0, 4.0]]), weight=[3, 1])
    tensor([1.0000, 2.5000])
    """
    at_least(1, models, "mean")
    coefficients = shares(weight, len(models), normalize)
    return combined(working(models), coefficients).to(models.dtype)
