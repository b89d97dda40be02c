"""What scores and repairs share: forms of Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights import working


def input_energy(gram: Tensor) -> Tensor:
    """The sum of squares of each input, ``[in]`` float32, from a Gram matrix, its blocks or its diagonal.

    >>> input_energy(torch.tensor([[4.0, 1.0], [1.0, 9.0]]))
    tensor([4., 9.])
    """
    if gram.dim() == 1:
        energy = gram
    elif gram.dim() == 2:
        energy = gram.diagonal()
    else:
        energy = gram.diagonal(dim1=1, dim2=2).reshape(-1)
    if not energy.isfinite().all() or (energy < 0).any():
        where = int((~(energy >= 0) | energy.isinf()).nonzero()[0])
        raise Error(f"input {where} has the sum of squares {float(energy[where])}; were there NaN among the inputs?")
    return energy.float()


def full_gram(gram: Tensor, inputs: int, method: str) -> Tensor:
    """A Gram matrix ``[in, in]``, float32 or wider, from itself or its blocks; an error for a diagonal alone.

    >>> full_gram(torch.ones(2, 1, 1), 2, "obc")
    tensor([[1., 0.],
            [0., 1.]])
    """
    if gram.dim() == 3:
        return torch.block_diag(*working(gram))
    if gram.shape != (inputs, inputs):
        raise Error(
            f"{method} needs how inputs go together, Gram matrices {[inputs, inputs]}; got {list(gram.shape)}: gather "
            "them with weightsmith.stats.gram(...), not their diagonal"
        )
    return working(gram)
