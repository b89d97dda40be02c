"""What data says of each model decides how much of it is taken.

A plain mean gives every model the same say in every weight. Where one of them was made sure of a
weight by its data and the others were not, it should have more. Fisher information says how sure,
weight by weight; the Gram matrix of a layer's inputs says in which directions. Both are small,
can be gathered where the data are, and need no training. ``stats=None`` stands for a tensor of which
nothing is known: there the result is the weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.merge._parts import at_least, combined, shares
from weightsmith.weights import working


@card(
    paper="Matena, Raffel 2022, 'Merging Models with Fisher-Weighted Averaging' (Equation 4)",
    covers=("fisher-merging",),
    needs=("stats.fisher",),
    unit="element",
    laws=("model_order", "agreement", "translation", "scale"),
    claim="on the tasks of both, the Fisher-weighted mean of two siblings is at least as accurate as their plain mean",
)
def fisher(
    models: Tensor,
    stats: Tensor | None = None,
    *,
    weight: float | Sequence[float] | None = None,
    floor: float = 1e-6,
) -> Tensor:
    r"""The mean of models, each weight weighted by how sure each model is of it.

    .. math:: w = \frac{\sum_i a_i \max(F_i, \epsilon)\, w_i}{\sum_i a_i \max(F_i, \epsilon)}

    Args:
        models: ``[k, *shape]``, k >= 1 models of one start.
        stats: :math:`F_i`, ``[k, *shape]``, the diagonal Fisher information of each (`weightsmith.stats.fisher`);
            None where there is none: the mean weighted by ``weight``.
        weight: :math:`a_i`, one number >= 0 for each model; all equal by default.
        floor: :math:`\epsilon > 0`; information below it counts as this much, so that a weight that matters
            to no model becomes the weighted mean.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, negative weights, a floor that is not positive, or statistics of another shape.

    >>> models = torch.tensor([[0.0, 2.0], [4.0, 4.0]])
    >>> fisher(models, torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    tensor([1., 3.])
    """
    at_least(1, models, "fisher")
    given = _positive(shares(weight, len(models), normalize=True), "fisher")
    if not 0 < floor < math.inf:
        raise Error(f"floor is a positive number, got {floor}")
    values = working(models)
    if stats is None:
        return combined(values, given).to(models.dtype)
    sure = _aligned(stats, models, len(models), "fisher").to(values.dtype).clamp(min=floor)
    # Divided by the largest first: a sum of float32 products of large and of tiny numbers would be lost.
    sure = sure / sure.amax(dim=0)
    first = values[0]
    offsets = combined(sure * (values - first), given)
    return (first + offsets / combined(sure, given)).to(models.dtype)


@card(
    paper="Daheim, Möllenhoff, Ponti, Gurevych, Khan 2024, 'Model Merging by Uncertainty-Based Gradient Matching' "
    "(Equation 12)",
    covers=("uncertainty-gradient-matching",),
    needs=("base", "stats.fisher"),
    unit="element",
    laws=("model_order", "translation", "scale"),
    claim="on the tasks of all, at least as accurate as the Fisher-weighted mean",
    departs="where negative weights leave no curvature (the denominator is not positive) the base stays",
)
def gradient_matching(
    models: Tensor,
    base: Tensor,
    stats: Tensor | None = None,
    *,
    weight: float | Sequence[float] = 1.0,
    prior: float = 1e-6,
) -> Tensor:
    r"""Task vectors added so that the gradients of all tasks balance, as far as curvatures tell.

    .. math:: w = w_0 + \sum_i a_i \frac{H_0 + H_i}{H_0 + \sum_j a_j H_j} (w_i - w_0)

    For quadratic losses this is the minimum of the sum of all of them, if each model was trained from the
    base with the base's own loss as a regulariser. Without curvatures of the tasks it is task arithmetic.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, :math:`w_0`.
        stats: ``[k + 1, *shape]``, diagonal Fisher information (`weightsmith.stats.fisher`) of each model
            :math:`H_i`, and then that of the base on data of its own, :math:`H_0`; None where there is
            none: task arithmetic.
        weight: :math:`a_i`, one number for each model or one for all; a negative one removes a task.
        prior: > 0, added to :math:`H_0`: how firmly the base stands where nothing was measured.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, a wrong number of weights, a prior that is not positive, or statistics of another shape.

    >>> models, base = torch.tensor([[1.0], [4.0]]), torch.zeros(1)
    >>> gradient_matching(models, base, torch.tensor([[3.0], [0.0], [1.0]]), weight=[1, 1])   # (4 * 1 + 1 * 4) / 4
    tensor([2.0000])
    """
    at_least(1, models, "gradient_matching")
    given = shares(weight, len(models), normalize=False)
    if not 0 < prior < math.inf:
        raise Error(f"prior is a positive number, got {prior}")
    start = working(base)
    deltas = working(models) - start
    if stats is None:
        return (start + combined(deltas, given)).to(models.dtype)
    curvatures = _aligned(stats, models, len(models) + 1, "gradient_matching").to(deltas.dtype)
    tasks, own = curvatures[:-1], curvatures[-1] + prior
    joint = own + combined(tasks, given)
    step = combined((own + tasks) * deltas, given)
    return (start + torch.where(joint > 0, step / joint, torch.zeros_like(step))).to(models.dtype)


@card(
    paper="Jin, Ren, Preotiuc-Pietro, Cheng 2023, 'Dataless Knowledge Fusion by Merging Weights of Language Models' "
    "(Equation 2, RegMean)",
    covers=("regmean",),
    needs=("stats.gram",),
    unit="tensor",
    laws=("model_order", "agreement", "translation", "scale"),
    claim="on the tasks of both, the regression mean of two siblings is at least as accurate as their plain mean",
    departs="directions that no model's inputs have keep the plain mean, where the paper's inverse does not exist",
)
def regmean(
    models: Tensor,
    stats: Tensor | None = None,
    *,
    weight: float | Sequence[float] | None = None,
    alpha: float = 0.9,
) -> Tensor:
    r"""The layer whose outputs differ least from those of all models, each on its own inputs.

    .. math:: W = \Bigl(\sum_i a_i W_i \tilde G_i\Bigr) \Bigl(\sum_i a_i \tilde G_i\Bigr)^{-1}, \qquad
        \tilde G_i = \alpha\, G_i + (1 - \alpha) \operatorname{diag} G_i

    With :math:`\alpha = 1` it minimises :math:`\sum_i a_i \lVert X_i W^\top - X_i W_i^\top \rVert^2`.

    Args:
        models: ``[k, out, *in]``, k >= 1 weights of one layer, flattened to ``[k, out, in]``.
        stats: :math:`G_i = X_i^\top X_i`, ``[k, in, in]`` (`weightsmith.stats.gram`); None where there is
            none (biases, norms, embeddings): the mean weighted by ``weight``.
        weight: :math:`a_i`, one number >= 0 for each model; all equal by default.
        alpha: what is left of the inner products of different features, in [0, 1].

    Returns:
        ``[out, *in]``, in the dtype of ``models``; solved in float64.

    Raises:
        ValueError: no model, negative weights, an alpha outside of [0, 1], or statistics of another shape.

    >>> models = torch.tensor([[[0.0, 2.0]], [[4.0, 4.0]]])
    >>> grams = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)])
    >>> regmean(models, grams)
    tensor([[1., 3.]])
    """
    at_least(1, models, "regmean")
    given = _positive(shares(weight, len(models), normalize=True), "regmean")
    if not 0 <= alpha <= 1:
        raise Error(f"alpha lies between 0 and 1, got {alpha}")
    values = working(models)
    if stats is None:
        return combined(values, given).to(models.dtype)
    layers = models.double().flatten(2)
    features = layers.shape[-1]
    if stats.shape != (len(models), features, features):
        raise Error(f"regmean needs Gram matrices {[len(models), features, features]}, got {list(stats.shape)}")
    if not stats.isfinite().all():
        raise Error("the Gram matrices are not finite: some input of the layer was not")
    grams = alpha * stats.double() + (1 - alpha) * torch.diag_embed(stats.double().diagonal(dim1=1, dim2=2))
    mean = combined(layers, given)
    # As a change of the mean, so that what no input shows stays the mean.
    pull = combined((layers - mean) @ grams, given)
    found = mean + _solved(combined(grams, given), pull)
    return found.reshape(models.shape[1:]).to(values.dtype).to(models.dtype)


def _solved(gram: Tensor, pull: Tensor) -> Tensor:
    """``pull @ inverse(gram)`` for a symmetric matrix that need not have one."""
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    # In units of the features' own sizes, so that small features are not taken for absent ones.
    scaled = gram * torch.outer(inverse, inverse)
    scaled.diagonal().add_((size == 0).to(scaled.dtype))
    triangle, failed = torch.linalg.cholesky_ex(scaled)
    noise = len(gram) * torch.finfo(torch.float32).eps  # what rounding left in the matrix
    if not failed and bool((triangle.diagonal().square() > noise).all()):
        return torch.cholesky_solve((pull * inverse).T, triangle).T * inverse
    return (pull * inverse) @ torch.linalg.pinv(scaled, rtol=noise, hermitian=True) * inverse


def _positive(given: list[float], method: str) -> list[float]:
    if min(given) < 0:
        raise Error(f"{method} needs weights that are not negative, got {given}")
    return given


def _aligned(stats: Tensor, models: Tensor, count: int, method: str) -> Tensor:
    """Statistics ``[count, *shape]`` for models ``[k, *shape]``."""
    if stats.shape != (count, *models.shape[1:]):
        raise Error(f"{method} needs statistics {[count, *models.shape[1:]]}, got {list(stats.shape)}")
    return stats
