"""Allocations from measured curves: the shares that do least harm together.

If the harms of pruning single layers add up, the best allocation is a knapsack: one level for each layer, so much
removed in all. It is solved exactly for the levels that were measured, whatever the curves look like; or with one
multiplier for all layers, which is exact for convex curves that are straight between levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from weightsmith import solve
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.allocation._curves import Curves
from weightsmith.prune.allocation._parts import share_of
from weightsmith.weights import PerTensor, resolve


@card(
    paper="Xu et al. 2023, 'Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks'",
    covers=("efficient-joint-optimization-layer-adaptive",),
    unit="model",
    claim="no combination of the measured levels does less harm by the curves; more accurate than uniform shares",
    departs="what the levels remove beyond the budget is given back between two levels, where it does most good",
)
def distortion(
    curves: Curves, sparsity: float = 0.5, *, cost: PerTensor[float] = 1.0, cells: int = 100_000
) -> dict[str, float]:
    r"""The levels with the least sum of harms, by dynamic programming.

    .. math:: f_l(K) = \min_k \; f_{l-1}(K - k\, n_l) + \delta_l(k)

    Args:
        curves: of `measured` or `gram_curves`.
        sparsity: share removed of all the tensors' elements together.
        cost: what an element of a tensor costs (operations, say), possibly by tensor; the share is then that of the
            cost.
        cells: of the grid that counts are rounded to, at most; see `weightsmith.solve.knapsack`.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity outside [0, 1] or beyond the last level, or curves that are not finite.

    >>> curves = Curves((0.0, 0.5), {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 3.0])}, {"a": 4, "b": 4})
    >>> distortion(curves, 0.25)
    {'a': 0.5, 'b': 0.0}
    """

    def solved(harms: list, sizes: list, budget: float) -> solve.Choice:
        return solve.knapsack(harms, sizes, budget, at_least=True, cells=cells)

    return _allocated(curves, sparsity, cost, solved, "distortion")


@card(
    paper="Shoham, Gersho 1988, 'Efficient bit allocation for an arbitrary set of quantizers' (one multiplier for all)",
    unit="model",
    claim="for convex curves, straight between levels, no allocation at all does less harm by them",
)
def lagrangian(curves: Curves, sparsity: float = 0.5, *, cost: PerTensor[float] = 1.0) -> dict[str, float]:
    r"""The levels that one price for what is kept picks on every curve.

    .. math:: k_l = \arg\min_k \; \delta_l(k) - \lambda\, c_l n_l k

    with :math:`\lambda` such that the budget is met; one tensor ends between two levels.

    Args:
        curves: of `measured` or `gram_curves`.
        sparsity: share removed of all the tensors' elements together.
        cost: :math:`c_l`, what an element of a tensor costs (operations, say), possibly by tensor; the share is then
            that of the cost.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity outside [0, 1] or beyond the last level, or curves that are not finite.

    >>> curves = Curves((0.0, 0.5), {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 3.0])}, {"a": 4, "b": 4})
    >>> lagrangian(curves, 0.25, cost={"a": 1.0, "b": 9.0})
    {'a': 0.0, 'b': 0.2777777777777778}
    """

    def solved(harms: list, sizes: list, budget: float) -> solve.Choice:
        return solve.lagrangian(harms, sizes, budget, at_least=True, fill=False)

    return _allocated(curves, sparsity, cost, solved, "lagrangian")


def _allocated(
    curves: Curves,
    sparsity: float,
    cost: PerTensor[float],
    solved: Callable[[list, list, float], solve.Choice],
    who: str,
) -> dict[str, float]:
    share = share_of(sparsity, who)
    names = list(curves.harms)
    for name, harm in curves.harms.items():
        if tuple(harm.shape) != (len(curves.levels),):
            raise Error(f"{who}: the harms of {name} are {list(harm.shape)}; there are {len(curves.levels)} levels")
        if not harm.isfinite().all():
            raise Error(f"{who}: the harms of {name} are not all finite; leave out its levels or the tensor")
    prices = resolve(cost, names, "cost")
    for name, price in prices.items():
        if not 0 < price < math.inf:
            raise Error(f"{who}: the cost of an element of {name} is a number above 0, got {price}")
    worth = {name: curves.sizes[name] * prices[name] for name in names}
    budget = share * math.fsum(worth.values())
    if share > curves.levels[-1]:
        raise Error(f"{who}: a sparsity of {share:g} is beyond the last level of the curves, {curves.levels[-1]:g}")
    sizes = [[level * worth[name] for level in curves.levels] for name in names]
    levels = solved([curves.harms[name] for name in names], sizes, budget).levels
    return _given_back(curves, dict(zip(names, levels, strict=True)), worth, budget)


def _given_back(curves: Curves, chosen: dict[str, int], worth: dict[str, float], budget: float) -> dict[str, float]:
    """Shares at or below the chosen levels that meet the budget exactly: first back where it spares most harm."""
    levels = curves.levels
    shares = {name: levels[level] for name, level in chosen.items()}
    surplus = math.fsum(worth[name] * share for name, share in shares.items()) - budget

    def spared(name: str) -> float:
        """Harm for each unit of cost on the way down from the level that the share is at or below."""
        top, harm = chosen[name], curves.harms[name]
        return float(harm[top] - harm[top - 1]) / ((levels[top] - levels[top - 1]) * worth[name])

    while surplus > 1e-12 * math.fsum(worth.values()):
        able = [name for name, level in chosen.items() if level > 0 and worth[name] > 0]
        name = max(able, key=spared)
        step = min(surplus, (shares[name] - levels[chosen[name] - 1]) * worth[name])
        surplus -= step
        chosen[name] -= 1  # either all of the step is given back, or there is nothing left to give
        shares[name] = max(shares[name] - step / worth[name], 0.0)
    return shares
