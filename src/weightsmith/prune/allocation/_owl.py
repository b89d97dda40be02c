"""Leave more in layers with outliers: weights that do far more than their layer's average.

In large language models some inputs are far larger than others, and the weights on them carry what the layer does.
Layers with many such weights are hurt most by pruning, so they lose less; all stay within a narrow range of each
other, for a layer that is pruned much harder than the others ruins the network.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import wanda
from weightsmith.prune.allocation._parts import layer_of, met, share_of, sized
from weightsmith.prune.room import Source, of_targets
from weightsmith.weights import Pattern, materialize


@card(
    paper="Yin et al. 2024, 'Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High "
    "Sparsity'",
    needs=("stats.gram",),
    unit="model",
    claim="at high sparsity a language model pruned by Wanda loses less with these shares than with uniform ones",
    departs="layers count by their elements, so that the budget is met exactly where they differ in size",
)
def owl(
    weights: Source,
    sparsity: float = 0.5,
    *,
    stats: Source,
    outlier: float = 5.0,
    reach: float = 0.08,
    layer: Callable[[str], Hashable] = layer_of,
    pattern: Pattern | None = None,
) -> dict[str, float]:
    r"""Shares that fall with the share of outliers of a layer.

    .. math:: D_l = \frac{\#\{ A_{ij} > M \bar A \}}{n_l}, \quad A_{ij} = |w_{ij}| \, \lVert X_j \rVert_2, \qquad
        p_l = t - 2 \lambda \frac{D_l - \min D}{\max D - \min D}

    with :math:`t` such that ``sparsity`` of all elements is removed. All tensors of a layer are counted together and
    lose the same share.

    Args:
        weights: anything that `weightsmith.open` opens; the tensors are read twice, one at a time.
        sparsity: share removed of all the tensors' elements together.
        stats: Gram matrices of their inputs (`weightsmith.stats.gram`) or their diagonals.
        outlier: :math:`M`, how many times the mean of its layer an outlier is.
        reach: :math:`\lambda`, half the difference between the layer that loses most and the one that loses least.
        layer: name of a tensor -> what tells its layer from others; by default the name up to its first number
            (``model.layers.7``), or all of it.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity outside [0, 1], a reach below 0, or statistics that do not fit.

    >>> weights = {"a": torch.ones(1, 10), "b": torch.ones(1, 10)}
    >>> stats = {"a": torch.ones(10), "b": torch.tensor([1e4] + [1.0] * 9)}
    >>> owl(weights, 0.5, stats=stats, reach=0.0625)
    {'a': 0.5625, 'b': 0.4375}
    """
    share = share_of(sparsity, "owl")
    if not 0 <= reach <= 1 or not outlier > 0:
        raise Error(f"owl needs a reach between 0 and 1 and outliers above 0 times the mean, got {reach} and {outlier}")
    opened, sizes = sized(weights, pattern)
    known = of_targets(stats, "stats.gram", opened, list(sizes), "owl")
    layers: dict[Hashable, list[str]] = {}
    for name in sizes:
        layers.setdefault(layer(name), []).append(name)
    found: dict[str, float] = {}
    for names in layers.values():

        def scores(name: str) -> Tensor:
            return wanda.kernel(opened[name].detach(), materialize(known[name].node))

        count = max(sum(sizes[name] for name in names), 1)
        bar = outlier * sum(float(scores(name).double().sum()) for name in names) / count
        if not bar < float("inf"):
            raise Error(f"owl: the weights of {names[0]} or another of its layer are not finite")
        above = sum(int((scores(name).double() > bar).sum()) for name in names) / count
        found |= dict.fromkeys(names, above)
    low, high = min(found.values()), max(found.values())
    width = 2 * reach / (high - low) if high > low else 0.0
    return met({name: -width * (value - low) for name, value in found.items()}, sizes, share, who="owl")
