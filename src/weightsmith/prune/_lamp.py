"""Remove the weights that are small beside those of their own layer that would be left.

A weight's share of what is left when all smaller ones are gone says how much its removal changes the layer. That
share is comparable between layers of any scale, so one threshold over all layers finds how much each can lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card


@card(
    paper="Lee, Park, Mo, Ahn, Shin 2021, 'Layer-adaptive Sparsity for the Magnitude-based Pruning'",
    unit="tensor",
    laws=("nested", "scale", "sign"),
    claim="with one threshold over all layers, better than global magnitude where layers differ in scale",
)
def lamp(weight: Tensor) -> Tensor:
    r"""Score every weight by its share of the energy of those of its tensor that are no smaller.

    .. math:: s(u) = \frac{w_{(u)}^2}{\sum_{v \ge u} w_{(v)}^2}, \qquad |w_{(1)}| \le |w_{(2)}| \le \dots

    Within a tensor the order is that of magnitudes, so it is meant for ``scope="global"``; the largest weight of each
    tensor scores 1 and none is ever emptied while another has more than one weight left.

    Args:
        weight: ``[*shape]``. Of equal weights the first is counted as the larger.

    Returns:
        ``[*shape]``, float32. Zeros score 0; what is not finite counts for nothing in the sums and keeps its magnitude.

    >>> lamp(torch.tensor([3.0, -4.0]))
    tensor([0.3600, 1.0000])
    """
    size = weight.double().abs().flatten()
    finite = size.isfinite()
    # Relative to the largest, so that no square is too small or too large for float64.
    largest = torch.where(finite, size, 0).amax() if size.numel() else size.new_zeros(())
    energy = torch.where(finite, size / largest.clamp(min=1e-300), 0).square()
    order = energy.argsort(descending=True, stable=True)
    left = energy[order].cumsum(0)
    share = torch.empty_like(energy)
    share[order] = energy[order] / left.clamp(min=1e-300)
    return torch.where(finite, share, size).float().reshape(weight.shape)
