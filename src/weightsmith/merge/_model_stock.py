"""Two fine-tunes and their common start tell where the centre of many fine-tunes would be.

Fine-tunes of one start lie on a thin shell around a centre that is better than any of them. The
angle between two task vectors tells how far out the shell is, and so how far to go from the start
towards their mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.merge._parts import at_least, delta_gram, mean_pairwise_cosine, wide


def shell_ratio(gram: Tensor) -> Tensor:
    """How far to go from the base to the mean, from the inner products ``[k, k]`` of the task vectors."""
    count, cosine = len(gram), mean_pairwise_cosine(gram).clamp(min=0)
    return count * cosine / (1 + (count - 1) * cosine)


def what_turns(shape: tuple[int, ...], *, filter_wise: bool = False) -> Literal["element", "row"]:
    """What `model_stock` must see at once, beside the inner products."""
    return "row" if filter_wise and len(shape) > 1 else "element"


@card(
    paper="Jang, Yun, Han 2024, 'Model Stock: All we need is just a few fine-tuned models' (Equation 7)",
    covers=("model-stock",),
    needs=("base",),
    unit="element",
    reduce=delta_gram,
    solve=shell_ratio,
    unit_for=what_turns,
    laws=("model_order", "agreement", "translation", "scale", "rotation"),
    claim="the stock of two fine-tunes is at least as good under shift as their uniform soup",
    departs="the ratio is held in [0, 1]: opposed task vectors give the base, not an overshoot beyond it; "
    "filter_wise is by output for convolutions too, where mergekit's is by row of a kernel",
)
def model_stock(models: Tensor, base: Tensor, *, filter_wise: bool = False, solved: Tensor | None = None) -> Tensor:
    r"""Weights on the line from ``base`` to the mean of ``models``.

    .. math:: t = \frac{k\,c}{1 + (k-1)\,c}, \qquad w = t\,\bar w + (1 - t)\,w_0

    with :math:`c` the mean cosine between the task vectors :math:`w_i - w_0` of one tensor.

    Args:
        models: ``[k, *shape]``, k >= 2 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        filter_wise: one :math:`t` for each output (index of the first axis), not one for the tensor.
        solved: :math:`t`, where it was found from all chunks of the tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: fewer than two models, so that no angle can be measured.

    >>> base = torch.zeros(2)
    >>> model_stock(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), base)   # right angle: base
    tensor([0., 0.])
    >>> model_stock(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), base)   # one direction: the mean
    tensor([3., 0.])
    """
    at_least(2, models, "model_stock")
    wider, start = wide(models, base)
    if filter_wise and base.dim() > 1:
        deltas = (wider - start).flatten(2).movedim(0, 1)
        ratios = torch.stack([shell_ratio(gram) for gram in (deltas @ deltas.mT).double()]) if len(base) else start
        ratios = ratios.to(start.dtype).reshape(-1, *[1] * (base.dim() - 1))
        return start.lerp(wider.mean(dim=0), ratios).to(models.dtype)
    ratio = shell_ratio(delta_gram(models, base)) if solved is None else solved
    return start.lerp(wider.mean(dim=0), float(ratio)).to(models.dtype)
