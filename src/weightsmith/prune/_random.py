"""Remove weights that were drawn by lot: the baseline that any score must beat.

Which weights go hardly matters in a network that is wide and trained afterwards; how many each layer loses does. So a
random mask with good shares by layer is less naive than it looks.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card
from weightsmith.solve import uniform


@card(
    paper="Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy 2022, 'The Unreasonable Effectiveness of Random Pruning: "
    "Return of the Most Naive Baseline for Sparse Training'",
    unit="element",
    laws=("nested", "scale", "sign"),
    claim="what any other score must beat",
)
def random(weight: Tensor, *, seed: int = 0, key: str = "", start: int = 0) -> Tensor:
    r"""Score every weight by a random number.

    .. math:: s_{ij} \sim U[0, 1)

    The number depends on the seed, the tensor's name and the place, and on nothing else, so a higher sparsity removes
    more of the same lot.

    Args:
        weight: ``[*shape]``; only its shape and device matter.
        seed: another one removes others.
        key: the tensor's name, so that no two tensors lose the same places.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, float32, multiples of 2^-24.

    >>> random(torch.ones(4)), random(torch.ones(2), start=2)
    (tensor([0.5913, 0.5440, 0.3134, 0.8199]), tensor([0.3134, 0.8199]))
    """
    return uniform(weight.numel(), start=start, seed=seed, key=key).reshape(weight.shape).to(weight.device)
