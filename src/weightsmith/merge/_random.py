"""Most of what fine-tuning changed can be dropped at random, if the rest makes up for it.

Task vectors are redundant: with the rest scaled up, a random part of one does nearly what the whole does.
Sparse task vectors overlap less, so they disturb each other less when they are added. It helps a little
more to drop small elements more often than large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from weightsmith.card import card
from weightsmith.merge._drop import election, keep_by_rank, keep_random
from weightsmith.merge._parts import at_least
from weightsmith.merge._trim import Trim, elected, linear, moved, trim_of, trimmed


@card(
    paper="Yu et al. 2024, 'Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free "
    "Lunch'",
    needs=("base",),
    unit="element",
    solve=keep_random,
    laws=("scale",),
    claim="half of the changes of every fine-tune, drawn at random and scaled up, merge as well as all of them",
    departs="as in mergekit the rest is scaled to the sum of magnitudes that the task vector had; "
    'dialect="paper" divides by the density',
)
def dare_linear(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    amount: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    dialect: Literal["mergekit", "paper"] = "mergekit",
    seed: int = 0,
    key: str = "",
    solved: Trim | None = None,
    start: int = 0,
) -> Tensor:
    r"""Drop elements of the task vectors at random, scale the rest up, and add it to the base.

    .. math:: w = w_0 + \lambda \sum_i a_i \, c_i \, m_i \odot (w_i - w_0), \qquad m_i \sim \mathrm{Bernoulli}(\rho)

    with :math:`a_i` the ``weight`` of model :math:`i`, :math:`\rho` the ``density``, :math:`\lambda` the ``amount``
    and the scale :math:`c_i = \|w_i - w_0\|_1 / \|m_i \odot (w_i - w_0)\|_1` (``dialect="paper"``:
    :math:`1 / \rho`, so that the mean over seeds is the sum of the whole task vectors).

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: probability that an element is kept, in [0, 1]; one number a model, or one for all.
        amount: how far to go along the sum.
        normalize: divide the sum by the sum of the weights.
        rescale: scale the rest up; else :math:`c_i = 1`.
        dialect: how it is scaled up, ``"mergekit"`` or ``"paper"``.
        seed: another one drops other elements.
        key: the tensor's name, so that no two tensors drop the same places.
        solved: the scale, where it was found from all chunks of the tensor.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights or densities, ones out of range, or an unknown dialect.

    >>> base, models = torch.zeros(5), torch.ones(1, 5)
    >>> dare_linear(models, base, density=0.5, dialect="paper")
    tensor([2., 0., 2., 0., 2.])
    """
    at_least(1, models, "dare_linear")
    trim = trim_of(models, base, solved, keep_random(density, rescale, dialect, seed, key))
    deltas = trimmed(models, base, trim, start)
    return moved(models, base, linear(deltas, weight, normalize), amount)


@card(
    paper="Yu et al. 2024, 'Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free "
    "Lunch', with the election of Yadav et al. 2023, 'TIES-Merging: Resolving Interference When Merging Models'",
    needs=("base",),
    unit="element",
    solve=keep_random,
    laws=("scale",),
    claim="half of the changes of every fine-tune, drawn at random and scaled up, merge as well as all of them",
    departs="as in mergekit the rest is scaled to the sum of magnitudes that the task vector had "
    '(dialect="paper" divides by the density) and what agrees is added, not averaged',
)
def dare_ties(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    amount: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    dialect: Literal["mergekit", "paper", "peft", "count"] = "mergekit",
    seed: int = 0,
    key: str = "",
    solved: Trim | None = None,
    start: int = 0,
) -> Tensor:
    r"""Drop elements of the task vectors at random, scale the rest up, and add what has the elected sign.

    .. math:: d_i = c_i \, m_i \odot (w_i - w_0), \qquad s = \mathrm{sign} \sum_i a_i d_i, \qquad
       w = w_0 + \lambda \sum_{i \in A} a_i d_i, \quad A = \{i : \mathrm{sign}(a_i d_i) = s\}

    with the masks :math:`m_i` and scales :math:`c_i` of `dare_linear`.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: probability that an element is kept, in [0, 1]; one number a model, or one for all.
        amount: how far to go along the sum, :math:`\lambda`.
        normalize: divide by the weights of those that agree.
        rescale: scale the rest up; else :math:`c_i = 1`.
        dialect: how it is scaled up and elected. ``"mergekit"``: by the sums of magnitudes, votes and divisor by
            weight; ``"paper"``: so, but scaled up by probabilities; ``"peft"``: by probabilities too, votes without
            weights, and the divisor of a mean is the number of those that agree; ``"count"``: as ``"mergekit"``, but
            every model has one vote.
        seed: another one drops other elements.
        key: the tensor's name, so that no two tensors drop the same places.
        solved: the scale, where it was found from all chunks of the tensor.
        start: index of the first element in its tensor.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights or densities, ones out of range, or an unknown dialect.

    >>> base, models = torch.zeros(3), torch.tensor([[1.0, 2.0, 3.0], [-4.0, 1.0, 1.0]])
    >>> dare_ties(models, base, density=1.0)                        # nothing dropped: the election alone
    tensor([-4.,  3.,  4.])
    """
    at_least(1, models, "dare_ties")
    trim = trim_of(models, base, solved, keep_random(density, rescale, dialect, seed, key))
    deltas = trimmed(models, base, trim, start)
    return moved(models, base, elected(deltas, weight, normalize, election(dialect)), amount)


@card(
    paper="Deep, Bhardwaj, Poria 2024, 'DELLA-Merging: Reducing Interference in Model Merging through "
    "Magnitude-Based Sampling'",
    needs=("base",),
    unit="tensor",
    laws=("scale",),
    claim="dropping small changes more often than large ones loses less than dropping all alike",
    departs="as in mergekit the rest is scaled to the sum of magnitudes that the task vector had; "
    'dialect="paper" divides each element by its probability',
)
def della(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    amount: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    dialect: Literal["mergekit", "paper", "peft", "count"] = "mergekit",
    seed: int = 0,
    key: str = "",
) -> Tensor:
    r"""Drop elements at random, small ones more often, scale the rest up, and average what has the elected sign.

    .. math:: p_{ij} = \rho - \varepsilon + 2 \varepsilon \frac{r_{ij}}{n - 1}, \qquad
       d_i = c_i \, m_i \odot (w_i - w_0), \quad m_{ij} \sim \mathrm{Bernoulli}(p_{ij}), \qquad
       w = w_0 + \lambda \frac{\sum_{i \in A} a_i d_i}{\sum_{i \in A} a_i}

    with :math:`r_{ij}` the rank of element :math:`j` by magnitude (from 0) among the :math:`n` of its row (all inputs
    of one output; a vector is one row), :math:`\rho` the ``density``, :math:`\varepsilon` the ``epsilon``,
    :math:`a_i` the ``weight``, :math:`\lambda` the ``amount``, the election :math:`A` of `ties` and the scale
    :math:`c_i` of `dare_linear` (``dialect="paper"``: :math:`1 / p_{ij}`).

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: mean probability that an element is kept, in [0, 1]; one number a model, or one for all.
        epsilon: how far the probability goes above and below; smaller than density and 1 - density, unless density
            is 0 or 1. One number a model, or one for all.
        amount: how far to go along the mean.
        normalize: divide by the weights of those that agree; else they are added.
        rescale: scale the rest up.
        dialect: how it is scaled up and elected. ``"mergekit"``: by the sums of magnitudes, votes and divisor by
            weight; ``"paper"``: so, but scaled up by probabilities; ``"peft"``: by probabilities too, votes without
            weights, and the divisor of a mean is the number of those that agree; ``"count"``: as ``"mergekit"``, but
            every model has one vote.
        seed: another one drops other elements.
        key: the tensor's name, so that no two tensors drop the same places.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights, densities or epsilons, ones out of range, or an unknown
            dialect.

    >>> base, models = torch.zeros(3), torch.tensor([[1.0, 2.0, 3.0], [-4.0, 1.0, 1.0]])
    >>> della(models, base, density=1.0)                            # nothing dropped: the election alone
    tensor([-4.0000,  1.5000,  2.0000])
    """
    at_least(1, models, "della")
    trim = trim_of(models, base, None, keep_by_rank(base.shape, density, epsilon, rescale, dialect, seed, key))
    return moved(models, base, elected(trimmed(models, base, trim, 0), weight, normalize, election(dialect)), amount)


@card(
    paper="Deep, Bhardwaj, Poria 2024, 'DELLA-Merging: Reducing Interference in Model Merging through "
    "Magnitude-Based Sampling' (without the election)",
    needs=("base",),
    unit="tensor",
    laws=("scale",),
    claim="dropping small changes more often than large ones loses less than dropping all alike",
    departs="as in mergekit the rest is scaled to the sum of magnitudes that the task vector had "
    '(dialect="paper" divides each element by its probability), and all of it is added',
)
def della_linear(
    models: Tensor,
    base: Tensor,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    amount: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    dialect: Literal["mergekit", "paper"] = "mergekit",
    seed: int = 0,
    key: str = "",
) -> Tensor:
    r"""Drop elements of the task vectors at random, small ones more often, scale the rest up, and add it to the base.

    .. math:: w = w_0 + \lambda \sum_i a_i \, c_i \, m_i \odot (w_i - w_0),
       \qquad m_{ij} \sim \mathrm{Bernoulli}(p_{ij})

    with the probabilities :math:`p_{ij}` and the scale :math:`c_i` of `della`.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were all started from.
        weight: one number a model, or one for all.
        density: mean probability that an element is kept, in [0, 1]; one number a model, or one for all.
        epsilon: how far the probability goes above and below; smaller than density and 1 - density, unless density
            is 0 or 1. One number a model, or one for all.
        amount: how far to go along the sum, :math:`\lambda`.
        normalize: divide the sum by the sum of the weights.
        rescale: scale the rest up.
        dialect: how it is scaled up, ``"mergekit"`` or ``"paper"``.
        seed: another one drops other elements.
        key: the tensor's name, so that no two tensors drop the same places.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model; a wrong number of weights, densities or epsilons, ones out of range, or an unknown
            dialect.

    >>> base, models = torch.zeros(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> della_linear(models, base, rescale=False, seed=1)
    tensor([0., 2., 0., 0.])
    """
    at_least(1, models, "della_linear")
    trim = trim_of(models, base, None, keep_by_rank(base.shape, density, epsilon, rescale, dialect, seed, key))
    return moved(models, base, linear(trimmed(models, base, trim, 0), weight, normalize), amount)
