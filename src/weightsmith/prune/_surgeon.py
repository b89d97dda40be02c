"""Remove the weights that the others can make up for best.

Two inputs that always come together carry the same news twice: without one of them, the weight of the other can take
over. So what a weight is worth is not what goes when it goes, but what is then still missing when all others have been
fitted again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune._parts import full_gram
from weightsmith.solve import inverse_factor, steadied


@card(
    paper="Hassibi, Stork 1992, 'Second order derivatives for network pruning: Optimal Brain Surgeon'; of one layer's "
    "outputs: Frantar, Alistarh 2022, 'Optimal Brain Compression'",
    needs=("stats.gram",),
    unit="tensor",
    laws=("nested", "scale", "sign"),
    claim="where what is left is fitted again, less is lost than by the norms of inputs alone",
    departs="all scores are of the full matrix: the first to go is exact, those after it are not updated",
)
def obs(weight: Tensor, stats: Tensor, *, damp: float = 0.01) -> Tensor:
    r"""Score every weight by the squared output error that is left when the others of its row have made up for it.

    .. math:: s_{ij} = \frac{w_{ij}^2}{[G^{-1}]_{jj}} =
        \min_{v : v_j = 0} \lVert X (w_i - v) \rVert^2

    With a diagonal matrix that is the square of `wanda`. It means something only where the rest is fitted again, see
    ``prune.repair``.

    Args:
        weight: ``[out, ...]``.
        stats: of the inputs of its flattened rows (`weightsmith.stats.gram`): ``[in, in]`` or its blocks
            ``[in / b, b, b]``, inverted one by one.
        damp: added to the diagonal of G, as a share of its mean; inputs that were always zero score 0 all the same.

    Returns:
        ``[out, ...]``, float32. The inverse takes the time of ``in^3``, in float64; once with ``scope="row"`` and
        with patterns, up to three times else, since scores are read as often.

    Raises:
        Error: a diagonal alone, NaN in the matrix, or ``damp`` below zero.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> obs(torch.tensor([[1.0, 2.0]]), gram, damp=0.0)
    tensor([[1.5000, 6.0000]])
    """
    inputs = weight.shape[1:].numel()
    blocks = [full_gram(stats, inputs, "obs")] if stats.dim() != 3 else list(stats)
    spread = torch.cat([_left_over(block.to(weight.device), damp) for block in blocks])
    if len(spread) != inputs:
        raise Error(f"obs: the Gram matrix is of {len(spread)} inputs, the weight {list(weight.shape)} has {inputs}")
    # Roots first, so that there is no float64 copy of the weight.
    return (weight.float() * spread.sqrt().float().reshape(weight.shape[1:])).square_()


def _left_over(gram: Tensor, damp: float) -> Tensor:
    """``1 / diag(G^-1)``: the energy of each input that the others do not explain; 0 for an input that was always 0."""
    upper = inverse_factor(steadied(gram, damp=damp))
    return torch.where(gram.diagonal() > 0, 1 / upper.square().sum(dim=0), 0.0)
