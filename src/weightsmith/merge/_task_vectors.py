"""What several fine-tunes have learned is added to their common start.

A task vector, fine-tune minus start, holds what was learned. Task vectors can be added, but where they
disagree they cancel. Most of their elements hardly matter, so these are dropped first; and of the rest
only those count that have the sign on which the weighted majority agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from weightsmith.card import card
from weightsmith.merge._parts import at_least
from weightsmith.merge._trim import (
    Trim,
    elected,
    keep_band,
    keep_top,
    known,
    linear,
    moved,
    task_vectors,
    trim_of,
    trimmed,
)


@card(
    paper="Ilharco et al. 2023, 'Editing Models with Task Arithmetic'",
    needs=("base",),
    unit="element",
    laws=("model_order", "translation", "scale", "rotation"),
    claim="one model gains on several tasks at once when their task vectors are added",
)
def task_arithmetic(
    models: Tensor, base: Tensor, *, weight: float | Sequence[float] = 1.0, amount: float = 1.0, normalize: bool = False
) -> Tensor:
    r"""The sum of task vectors, added to the base.

    .. math:: w = w_0 + \lambda \sum_i a_i (w_i - w_0)

    with :math:`a_i` the ``weight`` of model :math:`i` and :math:`\lambda` the ``amount``. A negative weight makes
    the base forget what a model has learned.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        amount: how far to go along the sum.
        normalize: divide the sum by the sum of the weights.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights, or ones that are not finite or cannot be normalized.

    >>> base = torch.tensor([1.0, 1.0])
    >>> task_arithmetic(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), base, weight=[1, 0.5])
    tensor([2., 2.])
    """
    at_least(1, models, "task_arithmetic")
    return moved(models, base, linear(task_vectors(models, base), weight, normalize), amount)


def of_whole_model(*, dialect: str = "mergekit") -> bool:
    """Whether `ties` trims all tensors together."""
    return dialect == "paper"


@card(
    paper="Yadav et al. 2023, 'TIES-Merging: Resolving Interference When Merging Models'",
    needs=("base",),
    unit="element",
    solve=keep_top,
    joint=of_whole_model,
    laws=("scale",),
    claim="merges of many fine-tunes lose less than by plain addition, because opposed changes do not cancel",
    departs="as in mergekit, the share is kept in every tensor and not in the whole model, votes and mean are "
    "weighted, and a vote that is tied is plus; dialect='paper' is the paper's way, except that exactly the share is "
    "kept, the first among equal ones (its code keeps all that equal the smallest)",
)
def ties(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.2,
    amount: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    dialect: Literal["mergekit", "paper", "peft", "count"] = "mergekit",
    combine: Literal["mean", "sum", "max"] | None = None,
    solved: Trim | None = None,
    start: int = 0,
) -> Tensor:
    r"""Trim the task vectors, elect a sign for each element, and average those that have it.

    .. math:: d_i = \mathrm{top}_\rho(w_i - w_0), \qquad s = \mathrm{sign} \sum_i a_i d_i, \qquad
       w = w_0 + \lambda \frac{\sum_{i \in A} a_i d_i}{\sum_{i \in A} a_i},
       \quad A = \{i : \mathrm{sign}(a_i d_i) = s\}

    with :math:`a_i` the ``weight`` of model :math:`i`, :math:`\rho` the ``density`` and :math:`\lambda` the
    ``amount``. Of a tensor of :math:`n` elements exactly :math:`\max(1, \lfloor \rho n \rfloor)` are kept, the
    first among equal ones.

    Tools differ in what they call TIES, hence ``dialect``:

    - ``"mergekit"``: the formula above.
    - ``"count"``: the same, but :math:`s = \mathrm{sign} \sum_i \mathrm{sign}(a_i d_i)`: every model has one vote.
    - ``"peft"``: :math:`s = \mathrm{sign} \sum_i d_i`, and the mean is over the number of those that agree,
      :math:`\sum_{i \in A} a_i d_i / |A|`. No element is kept where :math:`\rho n < 1`.
    - ``"paper"``: as ``"peft"``, but the share is that of the whole model (all tensors that are merged together have
      one threshold a model), and where :math:`\sum_i d_i` is zero the sign is that of the majority of all elements.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: share of a task vector that is kept, in [0, 1]; one number a model, or one for all.
        amount: how far to go along the mean.
        normalize: divide by the weights of those that agree; else they are added.
        rescale: give a trimmed task vector the sum of magnitudes back that it had.
        dialect: ``"mergekit"``, ``"paper"``, ``"peft"`` or ``"count"``.
        combine: what is made of those that agree: their ``"mean"``, their ``"sum"``, or ``"max"``, the largest of
            them; by default the mean with ``normalize`` and else the sum.
        solved: what is kept, where it was found from all chunks of the tensor.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights or densities, or ones out of range.

    >>> models = torch.tensor([[3.0, 0.1, -2.0, 0.0], [1.0, 0.2, 4.0, 0.0]])
    >>> ties(models, torch.zeros(4), density=0.5)
    tensor([2., 0., 4., 0.])
    """
    at_least(1, models, "ties")
    known(dialect, "mergekit", "paper", "peft", "count")
    trim = trim_of(models, base, solved, keep_top(density, rescale, dialect))
    deltas = trimmed(models, base, trim, start)
    return moved(models, base, elected(deltas, weight, normalize, dialect, combine, trim.tie), amount)


@card(
    paper="Davari, Belilovsky 2024, 'Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks'",
    needs=("base",),
    unit="element",
    solve=keep_band,
    laws=("scale",),
    claim="without its smallest and its largest elements a task vector disturbs other tasks less",
    departs="as in mergekit, what is kept is a count in every tensor (density), and the largest are only dropped "
    "as far as enough others are left; the paper names the two shares that are cut off, layer by layer",
)
def breadcrumbs(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    gamma: float | Sequence[float] = 0.01,
    amount: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    solved: Trim | None = None,
    start: int = 0,
) -> Tensor:
    r"""The sum of task vectors without their largest and their smallest elements, added to the base.

    .. math:: w = w_0 + \lambda \sum_i a_i \, m_i \odot (w_i - w_0)

    where the mask :math:`m_i` leaves out the :math:`\lfloor \gamma n \rfloor` largest of :math:`n` elements and
    keeps the :math:`\lfloor \rho n \rfloor` largest of the others; the first among equal ones count as larger.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: share of a task vector that is kept, :math:`\rho`, in [0, 1]; one number a model, or one for all.
        gamma: share of the largest that is dropped, in [0, 1]; no more than ``1 - density`` is.
        amount: how far to go along the sum, :math:`\lambda`.
        normalize: divide the sum by the sum of the weights.
        rescale: give a trimmed task vector the sum of magnitudes back that it had.
        solved: what is kept, where it was found from all chunks of the tensor.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights or shares, or ones out of range.

    >>> models = torch.tensor([[9.0, 0.1, -2.0, 1.0]])
    >>> breadcrumbs(models, torch.zeros(4), density=0.5, gamma=0.25)
    tensor([ 0.,  0., -2.,  1.])
    """
    at_least(1, models, "breadcrumbs")
    trim = trim_of(models, base, solved, keep_band(density, gamma, rescale))
    deltas = trimmed(models, base, trim, start)
    return moved(models, base, linear(deltas, weight, normalize), amount)


@card(
    paper="Davari, Belilovsky 2024, 'Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks', with "
    "the election of Yadav et al. 2023, 'TIES-Merging: Resolving Interference When Merging Models'",
    needs=("base",),
    unit="element",
    solve=keep_band,
    laws=("scale",),
    claim="what is left of the task vectors does not cancel where their signs are opposed",
    departs="a combination that mergekit made common; see breadcrumbs and ties",
)
def breadcrumbs_ties(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    gamma: float | Sequence[float] = 0.01,
    amount: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    solved: Trim | None = None,
    start: int = 0,
) -> Tensor:
    r"""Task vectors without their largest and smallest elements; those with the elected sign are added.

    .. math:: d_i = m_i \odot (w_i - w_0), \qquad s = \mathrm{sign} \sum_i a_i d_i, \qquad
       w = w_0 + \lambda \sum_{i \in A} a_i d_i, \quad A = \{i : \mathrm{sign}(a_i d_i) = s\}

    with the masks :math:`m_i` of `breadcrumbs`.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: share of a task vector that is kept, in [0, 1]; one number a model, or one for all.
        gamma: share of the largest that is dropped, in [0, 1]; no more than ``1 - density`` is.
        amount: how far to go along the sum, :math:`\lambda`.
        normalize: divide by the weights of those that agree.
        rescale: give a trimmed task vector the sum of magnitudes back that it had.
        solved: what is kept, where it was found from all chunks of the tensor.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights or shares, or ones out of range.

    >>> models = torch.tensor([[9.0, 0.1, -2.0, 1.0], [9.0, 1.0, 3.0, 0.0]])
    >>> breadcrumbs_ties(models, torch.zeros(4), density=0.5, gamma=0.25)
    tensor([0., 1., 3., 1.])
    """
    at_least(1, models, "breadcrumbs_ties")
    trim = trim_of(models, base, solved, keep_band(density, gamma, rescale))
    deltas = trimmed(models, base, trim, start)
    return moved(models, base, elected(deltas, weight, normalize), amount)
