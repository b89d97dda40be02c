"""Remove the weights that carry the least: small ones, and those whose inputs are small.

What a weight adds to its output is its value times its input, so a small weight on a large input matters more than a
larger one on an input that is almost always zero. Compared within each output, since outputs differ in size.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card
from weightsmith.prune._parts import input_energy


@card(
    paper="Sun, Liu, Bair, Kolter 2024, 'A Simple and Effective Pruning Approach for Large Language Models'",
    needs=("stats.gram",),
    unit="row",
    laws=("nested", "scale", "sign"),
    claim="without any change of what is left, a pruned language model is far better than by magnitude",
)
def wanda(weight: Tensor, stats: Tensor) -> Tensor:
    r"""Score every weight by its absolute value times the norm of its input.

    .. math:: s_{ij} = |w_{ij}| \, \lVert X_j \rVert_2

    Args:
        weight: ``[out, ...]``.
        stats: of the inputs of its flattened rows (`weightsmith.stats.gram`): the Gram matrix ``[in, in]``, its blocks
            ``[in / b, b, b]``, or its diagonal ``[in]``, which is enough.

    Returns:
        ``[out, ...]``, float32.

    >>> wanda(torch.tensor([[-3.0, 1.0]]), torch.tensor([1.0, 16.0]))
    tensor([[3., 4.]])
    """
    energy = input_energy(stats).sqrt().to(weight.device)
    return weight.float().abs() * energy.reshape(weight.shape[1:])
