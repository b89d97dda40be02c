"""Allocations that ask for shapes only: the same share everywhere, or more left where a tensor is small.

A layer with few weights for its inputs and outputs would be cut off by a share that a wide one hardly notices. So the
density of a layer is put in proportion to its lengths over their product. With such densities even a mask that is
drawn at random trains well.
"""

from __future__ import annotations

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.allocation._parts import met, share_of, sized
from weightsmith.prune.room import Source
from weightsmith.prune.structured import erk_densities
from weightsmith.weights import Pattern, PerTensor, resolve


@card(
    paper="Gale, Elsen, Hooker 2019, 'The State of Sparsity in Deep Neural Networks' (the first layer dense, the last "
    "one pruned less)",
    unit="model",
    claim="removes the same share of every tensor that may lose it",
)
def uniform(
    weights: Source,
    sparsity: float = 0.5,
    *,
    ends: bool = False,
    most: PerTensor[float] = 1.0,
    pattern: Pattern | None = None,
) -> dict[str, float]:
    r"""The same share of every tensor, except of those that may not lose so much.

    .. math:: p_l = \min(t, m_l), \qquad \sum_l n_l p_l = S \sum_l n_l

    Args:
        weights: anything that `weightsmith.open` opens; only shapes are read.
        sparsity: share removed of all the tensors' elements together.
        ends: the first and the last of the tensors stay whole; the others make up for it.
        most: share that a tensor loses at most, possibly by tensor: ``{"head.weight": 0.8, "*": 1.0}``.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity or a share outside [0, 1], or a sparsity that cannot be had.

    >>> weights = {"a": torch.ones(2, 2), "b": torch.ones(4, 4), "c": torch.ones(2, 2)}
    >>> uniform(weights, 0.5, ends=True)
    {'a': 0.0, 'b': 0.75, 'c': 0.0}
    """
    share = share_of(sparsity, "uniform")
    _, sizes = sized(weights, pattern)
    highest = resolve(most, sizes, "most")
    for name, value in highest.items():
        if not 0 <= value <= 1:
            raise Error(f"uniform: most of {name} is a share between 0 and 1, got {value}")
    if ends:
        names = list(sizes)
        highest |= {names[0]: 0.0, names[-1]: 0.0}
    return met(dict.fromkeys(sizes, 0.0), sizes, share, highest, "uniform")


@card(
    paper="Mocanu et al. 2018, 'Scalable training of artificial neural networks with adaptive sparse connectivity "
    "inspired by network science'; Evci et al. 2020, 'Rigging the Lottery: Making All Tickets Winners' (with kernels); "
    "Liu et al. 2022, 'The Unreasonable Effectiveness of Random Pruning'",
    covers=("random-pruning",),
    unit="model",
    claim="in wide networks, random masks with these densities train better than with uniform ones",
)
def erk(weights: Source, sparsity: float = 0.5, *, pattern: Pattern | None = None) -> dict[str, float]:
    r"""Densities in proportion to the sum of a tensor's lengths over their product (Erdős–Rényi, with kernels).

    .. math:: p_l = 1 - \min \Bigl( 1,\ \epsilon \frac{\sum_d n_{l,d}}{\prod_d n_{l,d}} \Bigr)

    with :math:`\epsilon` such that ``sparsity`` of all elements is removed; tensors that would be more than dense are
    dense, and the others make up for it.

    Args:
        weights: anything that `weightsmith.open` opens; only shapes are read.
        sparsity: share removed of all the tensors' elements together.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity outside [0, 1].

    >>> erk({"a": torch.ones(10, 10), "b": torch.ones(10, 90)}, 0.3)
    {'a': 0.0, 'b': 0.33333333333333337}
    """
    share = share_of(sparsity, "erk")
    opened, sizes = sized(weights, pattern)
    shapes = {name: opened.spec(name).shape for name, size in sizes.items() if size}
    if share == 1 or not shapes:
        return dict.fromkeys(sizes, share if share == 1 else 0.0)
    densities = erk_densities(shapes, 1 - share)
    return {name: min(max(1 - densities.get(name, 1.0), 0.0), 1.0) for name in sizes}
