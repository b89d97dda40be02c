"""The best values that a layer's remaining weights can have, given what its inputs are.

Which weights stay is settled; how large they should be is then a least squares problem for each output, with one
answer. On the data that the Gram matrix is of, it is the floor under every repair that keeps to the same mask. On
other data it is not: the fit has as many unknowns as weights. So what inputs have in common is trusted only in part.
"""

from __future__ import annotations

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.repair._parts import posed
from weightsmith.solve import masked_conjugate_gradients, masked_least_squares


@card(
    paper="Meng, Behdin, Wang, Mazumder 2024, 'ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for "
    "Large Language Models'",
    needs=("stats.gram",),
    unit="tensor",
    claim="with the same mask no weights change the outputs less on the data of the Gram matrix",
    departs="the refit of the paper's method alone, for a mask from anywhere; Gram matrices are shrunk",
)
def least_squares(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
    *,
    damp: float = 0.01,
    shrink: float = 0.3,
    exact: bool = False,
    steps: int = 100,
) -> Tensor:
    r"""The nearest outputs that a mask allows, row by row.

    .. math:: \min_X \operatorname{tr}\left((X - W) H (X - W)^\top\right) \text{ with } X_{\lnot S} = 0:
        \qquad x_S = (w H)_S \, H_{SS}^{-1}

    Args:
        weight: ``W [out, in]``, before pruning.
        gram: ``[in, in]`` or blocks ``[in / b, b, b]`` (`weightsmith.stats.gram`).
        mask: ``[out, in]``, true for what is kept.
        damp: what is added to the diagonal of the Gram matrix, as a share of its mean.
        shrink: how far the Gram matrix is drawn to its diagonal, from 0 to 1: the less data and the less like what
            the model will meet, the further. With 0 the fit on the data is best.
        exact: factor the matrix of every row, in float64. Otherwise conjugate gradients on all rows at once, which
            come within a thousandth of it many times sooner.
        steps: of conjugate gradients, at most.

    Returns:
        ``[out, in]`` in the dtype of ``weight``, exact zeros where the mask is false. Memory: the Gram matrix
        in float64 and as it is, then the weight five times.

    Raises:
        Error: no mask; shapes that do not fit; NaN.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> least_squares(torch.tensor([[1.0, 1.0]]), gram, torch.tensor([[False, True]]), damp=0, shrink=0)
    tensor([[0.0000, 1.5000]])
    """
    if steps < 1:
        raise Error(f"least_squares needs at least 1 step, got {steps}")
    problem = posed("least_squares", weight, gram, mask, damp=damp, shrink=shrink)
    before, keep = problem.weight, problem.kept()
    if exact:
        return masked_least_squares(before, problem.matrix, keep).to(weight.dtype)
    matrix = problem.matrix.to(before.dtype)
    del problem  # and its matrix
    return masked_conjugate_gradients(before, matrix, keep, steps=steps).to(weight.dtype)
