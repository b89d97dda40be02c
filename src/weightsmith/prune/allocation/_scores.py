"""Allocations that one threshold over all tensors gives: those lose most that have most to lose.

What a global method removes of each tensor can be asked for by itself, and be given to another method that compares
weights within a tensor only.
"""

from __future__ import annotations

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import by_score
from weightsmith.prune import lamp as lamp_pruned
from weightsmith.prune import magnitude as magnitude_pruned
from weightsmith.prune.allocation._parts import share_of
from weightsmith.prune.room import Source
from weightsmith.weights import Pattern, Weights, open


@card(
    paper="Han, Pool, Tran, Dally 2015, 'Learning both Weights and Connections for Efficient Neural Networks' (one "
    "threshold for all layers)",
    unit="model",
    claim="the shares that pruning by these scores with scope='global' removes",
)
def from_scores(scores: Source, sparsity: float = 0.5, *, pattern: Pattern | None = None) -> dict[str, float]:
    """The share of each tensor that lies below one threshold over the scores of all.

    Args:
        scores: ``[*shape]`` under the weights' names, higher is more worth keeping.
        sparsity: share removed of all elements together.
        pattern: which tensors share the budget; by default all that have a score.

    Returns:
        tensor -> share removed: exactly what is removed with ``scope="global"``.

    Raises:
        Error: a sparsity outside [0, 1], or no scores.

    >>> from_scores({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
    {'a': 1.0, 'b': 0.0}
    """
    share = share_of(sparsity, "from_scores")
    opened = open(scores)
    if not len(opened):
        raise Error("from_scores needs the score of at least 1 tensor, got none")
    chosen = opened if pattern is None else opened.select(pattern)
    return _removed(by_score(chosen, chosen, share, scope="global", action="mask"))


@card(
    paper="Han, Pool, Tran, Dally 2015, 'Learning both Weights and Connections for Efficient Neural Networks' (one "
    "threshold for all layers)",
    unit="model",
    claim="the shares that magnitude pruning with scope='global' removes",
)
def global_magnitude(weights: Source, sparsity: float = 0.5, *, pattern: Pattern | None = None) -> dict[str, float]:
    """The share of each tensor that lies below one magnitude.

    Args:
        weights: anything that `weightsmith.open` opens.
        sparsity: share removed of all the tensors' elements together.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        tensor -> share removed.

    Raises:
        Error: a sparsity outside [0, 1].

    >>> global_magnitude({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}, 0.25)
    {'a': 0.5, 'b': 0.0}
    """
    share = share_of(sparsity, "global_magnitude")
    return _removed(magnitude_pruned(weights, share, scope="global", pattern=pattern, action="mask"))


@card(
    paper="Lee, Park, Mo, Ahn, Shin 2021, 'Layer-adaptive Sparsity for the Magnitude-based Pruning'",
    unit="model",
    claim="no tensor is emptied while another has more than one weight left, whatever their scales",
)
def lamp(weights: Source, sparsity: float = 0.5, *, pattern: Pattern | None = None) -> dict[str, float]:
    """The share of each tensor that lies below one `weightsmith.prune.lamp` score.

    Args:
        weights: anything that `weightsmith.open` opens.
        sparsity: share removed of all the tensors' elements together.
        pattern: which tensors; by default `weightsmith.prune.prunable`.

    Returns:
        tensor -> share removed; the same for tensors that were scaled.

    Raises:
        Error: a sparsity outside [0, 1].

    >>> lamp({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[30.0, 40.0]])}, 0.25)
    {'a': 0.5, 'b': 0.0}
    """
    share = share_of(sparsity, "lamp")
    return _removed(lamp_pruned(weights, share, scope="global", pattern=pattern, action="mask"))


def _removed(masks: Weights) -> dict[str, float]:
    """The share of each mask that is false, read one mask at a time."""
    counts = {name: spec.numel for name, spec in masks.specs.items()}
    return {name: 1 - int(masks[name].sum()) / count if count else 0.0 for name, count in counts.items()}
