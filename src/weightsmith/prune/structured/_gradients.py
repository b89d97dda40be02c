"""How much the loss would notice: gradients with respect to a mask on each unit.

Put a mask of ones on the units where they are read. The derivative of the loss with respect to the mask of one unit
is the sum of gradient times weight over the columns that read it: what the loss would lose, to first order, without
the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.prune._autograd import free_parameters, gradients
from weightsmith.prune.structured._parts import Normalise, as_scores, cuttable, masked_by, per_unit
from weightsmith.stats.room import Batch, Loss, mapped, size
from weightsmith.weights import Weights


@card(
    paper="Molchanov et al. 2017, 'Pruning Convolutional Neural Networks for Resource Efficient Inference'; Molchanov "
    "et al. 2019, 'Importance Estimation for Neural Network Pruning'",
    needs=("graph", "data"),
    unit="model",
    claim="at a given budget, a lower loss than cutting by the size of the weights, before any fine-tuning",
)
def taylor(
    model: nn.Module,
    graph: UnitGraph,
    batches: Iterable[Batch],
    *,
    squared: bool = False,
    loss: Loss | None = None,
    normalise: Normalise | None = None,
    spaces: Collection[str] | None = None,
) -> Weights:
    r"""What the loss would change by without each unit, to first order.

    .. math:: s_u = \frac1B \sum_b \Bigl| \frac{\partial L_b}{\partial m_u} \Bigr|, \qquad
        \frac{\partial L_b}{\partial m_u} = \sum_{w \text{ reads } u} \frac{\partial L_b}{\partial w}\, w

    Args:
        model: asked in evaluation mode and left as it was.
        graph: which weights read which unit. Where no tensor reads a space (queries and keys, which only meet each
            other), its gains, else those that write it; if two do, as there, the mask acts on both and counts twice.
        batches: ``(inputs, labels)`` or mappings for Hugging Face models.
        squared: the square instead of the absolute value.
        loss: ``(model, batch) -> number``, summed over the examples of a batch; by default the cross-entropy.
        normalise: what the scores of a space are divided by; by default nothing, since losses can be compared.
        spaces: those that are scored; by default all that are cut without being named.

    Returns:
        Weights: space -> ``[units]`` float32, of the mean loss over a batch.

    Raises:
        Error: no batch, no such space, or gradients that are not finite.

    >>> from weightsmith.graph import declare
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> for layer, value in zip(model, ([[1.0], [2.0]], [[3.0, -1.0]])):
    ...     layer.weight.data = torch.tensor(value)
    >>> graph = declare(model, {"0.weight": "> hidden, 1", "1.weight": "1, < hidden"})
    >>> taylor(model, graph, [torch.ones(1, 1)], loss=lambda model, x: model(x).sum())["hidden"]
    tensor([3., 2.])
    """

    def felt(slope: Tensor, examples: int) -> Tensor:
        return (slope / examples).square() if squared else (slope / examples).abs()

    return as_scores(_mean_over_batches(model, graph, spaces, batches, loss, felt), normalise)


@card(
    paper="Theis et al. 2018, 'Faster gaze prediction with dense networks and Fisher pruning'; Liu et al. 2021, 'Group "
    "Fisher Pruning for Practical Network Compression'",
    needs=("graph", "data"),
    unit="model",
    departs="of the labels of the data, and one gradient an example, not one a batch",
)
def fisher(
    model: nn.Module,
    graph: UnitGraph,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    normalise: Normalise | None = None,
    spaces: Collection[str] | None = None,
) -> Weights:
    r"""What the loss would change by without each unit, to second order at a minimum.

    .. math:: s_u = \frac1{2n} \sum_{i=1}^n \Bigl( \frac{\partial \ell_i}{\partial m_u} \Bigr)^2

    Args:
        model: asked in evaluation mode, with one example at a time, and left as it was.
        graph: which weights read which unit; see `taylor`.
        batches: ``(inputs, labels)`` or mappings for Hugging Face models; a few hundred examples do.
        loss: ``(model, batch of one) -> number``; by default the cross-entropy.
        normalise: what the scores of a space are divided by.
        spaces: those that are scored; by default all that are cut without being named.

    Returns:
        Weights: space -> ``[units]`` float32.

    Raises:
        Error: no batch, no such space, or gradients that are not finite.

    >>> from weightsmith.graph import declare
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> for layer, value in zip(model, ([[1.0], [2.0]], [[3.0, -1.0]])):
    ...     layer.weight.data = torch.tensor(value)
    >>> graph = declare(model, {"0.weight": "> hidden, 1", "1.weight": "1, < hidden"})
    >>> fisher(model, graph, [torch.ones(2, 1)], loss=lambda model, x: model(x).sum())["hidden"]
    tensor([4.5000, 2.0000])
    """
    # One by one: gradients of many examples at once would hold as many copies of every weight that reads a unit.
    ones = _ones(batches)
    found = _mean_over_batches(model, graph, spaces, ones, loss, lambda slope, examples: slope.square() / 2)
    return as_scores(found, normalise)


def _mean_over_batches(
    model: nn.Module,
    graph: UnitGraph,
    spaces: Collection[str] | None,
    batches: Iterable[Batch],
    loss: Loss | None,
    felt: Callable[[Tensor, int], Tensor],
) -> dict[str, Tensor]:
    """Space -> ``[units]`` float64, the mean of ``felt(derivative by the mask, examples of the batch)``."""
    chosen = cuttable(graph, spaces)
    totals = {space: torch.zeros(graph.space(space).size, dtype=torch.float64) for space in chosen}
    seen = 0
    for found, examples in mask_gradients(model, graph, chosen, batches, loss):
        for space, slope in found.items():
            totals[space] += felt(slope, examples)
        seen += 1
    return {space: total / seen for space, total in totals.items()}


def _ones(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for i in range(size(batch)):
            yield mapped(lambda value, i=i: value[i : i + 1], batch)


def mask_gradients(
    model: nn.Module, graph: UnitGraph, spaces: Collection[str], batches: Iterable[Batch], loss: Loss | None
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """For each batch the derivative of its loss by a mask on each unit, ``[units]`` float64, and its examples."""
    places = {space: masked_by(graph, space) for space in spaces}
    names = dict.fromkeys(member.tensor for found in places.values() for member in found)
    with free_parameters(model, names) as parameters, progress.task("gradients of units", 0) as advance:
        seen = 0
        for batch in batches:
            found = gradients(model, parameters, batch, loss)
            slopes = per_unit(lambda name, found=found: found[name] * parameters[name].detach(), graph, places)
            yield slopes, size(batch)
            seen += 1
            advance(1)
        if not seen:
            raise Error("gradients of units need at least one batch of data, got none")
