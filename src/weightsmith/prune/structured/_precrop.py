"""A narrower network before training: as many channels as an unstructured pruner would leave weights.

Where weights are pruned before training, which of a layer's weights go hardly matters, only how many. So a layer with
a density of a quarter may as well be a dense one with half of its inputs and half of its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.prune._flow import flow_scores
from weightsmith.prune.structured._costs import Cost, parameters
from weightsmith.prune.structured._modules import Initialise, cut_module, reinitialised
from weightsmith.prune.structured._parts import cuttable


@card(
    paper="Cai et al. 2022, 'Structured Pruning is All You Need for Pruning CNNs at Initialization'",
    covers=("structured-pruning-need-pruning",),
    needs=("graph",),
    unit="model",
    claim="trained from the start, at least as good as the same network with all widths scaled alike",
    departs="widths are those nearest to all densities at once, by weighted least squares of their logarithms",
)
def precrop(
    model: nn.Module,
    graph: UnitGraph,
    keep: float,
    *,
    density: Literal["synflow", "erk"] | Mapping[str, float] = "synflow",
    example: Tensor | None = None,
    cost: Cost | None = None,
    multiple: int = 1,
    spaces: Collection[str] | None = None,
    seed: int = 0,
    initialise: Initialise | None = None,
) -> nn.Module:
    r"""A narrower network with fresh weights.

    .. math:: \min_a \sum_l n_l \Bigl( \log \rho_l - \sum_{s \in l} a_s \Bigr)^2, \qquad
        c_s = C_s\, e^{\min(a_s + t, 0)}

    over the tensors :math:`l` of :math:`n_l` elements and densities :math:`\rho_l`; :math:`t` meets the budget.
    Spaces that run along several tensors (residual streams, if named) have one width for all of them.

    Args:
        model: as it is before training; left as it is.
        graph: its units.
        keep: share of the cost that is left at most, and of the weights that the densities are asked for.
        density: tensor -> share of its weights; or ``"synflow"``, or ``"erk"``, which knows shapes only.
        example: inputs ``[n, ...]`` for ``"synflow"``; only the shape of one of them matters.
        cost: see `allocate`; by default the parameters.
        multiple: new sizes are multiples of this and of the graph's own.
        spaces: those that get narrower; by default all that are cut without being named.
        seed: of the fresh weights.
        initialise: ``(module) -> None``, see `reinitialised`.

    Returns:
        A plain module. The narrower a layer, the larger its fresh weights, as for any network of that width.

    Raises:
        Error: a budget that cannot be met, densities outside (0, 1], or an example that is missing.
    """
    chosen = cuttable(graph, spaces)
    if density == "synflow" and example is None:
        raise Error('precrop with density="synflow" needs example=, inputs of the right shape; or take "erk"')
    found: Mapping[str, float]
    if isinstance(density, str):
        found = synflow_densities(model, example, keep) if density == "synflow" else erk_densities(_shapes(model), keep)  # type: ignore[arg-type]
    else:
        found = density
    sizes = widths(graph, found, keep, cost=cost or parameters(graph, model), multiple=multiple, spaces=chosen)
    index = {name: torch.arange(size) for name, size in sizes.items() if size != graph.space(name).size}
    return reinitialised(cut_module(model, graph, index), seed, initialise)


def widths(
    graph: UnitGraph,
    densities: Mapping[str, float],
    keep: float,
    *,
    cost: Cost,
    multiple: int = 1,
    spaces: Collection[str],
) -> dict[str, int]:
    """Sizes of spaces whose tensors are as dense as wished, within a budget; see `precrop`.

    >>> from weightsmith.graph import declare
    >>> weights = {"a": torch.ones(8, 2), "b": torch.ones(2, 8)}
    >>> graph = declare(weights, {"a": "> hidden, 2", "b": "2, < hidden"})
    >>> widths(graph, {"a": 0.25, "b": 1.0}, 0.5, cost=parameters(graph), spaces=["hidden"])
    {'hidden': 4}
    """
    if not 0 < keep <= 1:
        raise Error(f"precrop needs a share to keep above 0 and at most 1, got {keep:g}")
    wrong = [name for name, share in densities.items() if not 0 < share <= 1]
    if wrong:
        raise Error(f"the density of {wrong[0]} is {densities[wrong[0]]:g}; it must be above 0 and at most 1")
    sets = _sets(graph, spaces)
    logs = _log_shares(graph, densities, sets)
    budget = keep * cost({})

    def sizes(shift: float) -> dict[str, int]:
        return {
            name: _size(graph, group, math.exp(min(log + shift, 0.0)), multiple)
            for group, log in zip(sets, logs, strict=True)
            for name in group
        }

    low, high = -20.0, 20.0 - min(logs, default=0.0)
    if cost(sizes(low)) > budget * (1 + 1e-9):
        raise Error(f"keeping {keep:g} of the cost is not possible: the fixed parts cost more; narrow more spaces")
    if cost(sizes(high)) <= budget * (1 + 1e-9):
        return sizes(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(sizes(middle)) <= budget * (1 + 1e-9) else (low, middle)
    return sizes(low)


def _sets(graph: UnitGraph, spaces: Collection[str]) -> list[tuple[str, ...]]:
    """Spaces that have one size together, each once."""
    together = {name: group for group in graph.equal() for name in group}
    return list(dict.fromkeys(together.get(name, (name,)) for name in spaces))


def _size(graph: UnitGraph, group: tuple[str, ...], share: float, multiple: int) -> int:
    spaces = [graph.space(name) for name in group]
    now, unit = spaces[0].size, math.lcm(multiple, *(space.multiple for space in spaces))
    lowest = -(-max(unit, *(space.minimum for space in spaces)) // unit) * unit
    return now if share >= 1 else min(now, max(lowest, round(share * now / unit) * unit))


def _log_shares(graph: UnitGraph, densities: Mapping[str, float], sets: list[tuple[str, ...]]) -> list[float]:
    """The weighted least squares solution: the logarithm of what each set of spaces keeps."""
    at = {name: column for column, group in enumerate(sets) for name in group}
    rows, targets = [], []
    for tensor, density in densities.items():
        if tensor not in graph.tensors:
            continue
        shape, row = graph.shape(tensor), torch.zeros(len(sets), dtype=torch.float64)
        for name, column in at.items():
            for member in graph.members(name):
                if member.tensor == tensor:  # how much of the dimension shrinks with the space
                    row[column] += float((graph.units(member, name) >= 0).double().mean())
        weight = math.sqrt(math.prod(shape))
        if row.any():
            rows.append(row * weight)
            targets.append(math.log(density) * weight)
    if not rows:
        raise Error("no tensor with a density runs along a space that gets narrower")
    matrix, target = torch.stack(rows), torch.tensor(targets, dtype=torch.float64)[:, None]
    return (torch.linalg.pinv(matrix) @ target).flatten().tolist()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    r"""Densities in proportion to the sum of a tensor's lengths over their product (Erdős–Rényi, with kernels).

    .. math:: \rho_l = \min \Bigl( 1,\ \epsilon \frac{\sum_d n_{l,d}}{\prod_d n_{l,d}} \Bigr)

    with :math:`\epsilon` such that the share of all weights is ``density`` (Mocanu et al. 2018; Evci et al. 2020).

    >>> erk_densities({"a": (10, 10), "b": (10, 90)}, 0.7)
    {'a': 1.0, 'b': 0.6666666666666666}
    """
    if not 0 < density <= 1:
        raise Error(f"a density is above 0 and at most 1, got {density:g}")
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / counts[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(counts.values()) - sum(counts[name] for name in dense)
        ratio = left / max(sum(raw[name] * counts[name] for name in raw if name not in dense), 1e-300)
        full = {name for name in raw if name not in dense and ratio * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else ratio * raw[name] for name in raw}
        dense |= full


def synflow_densities(model: nn.Module, example: Tensor, density: float, rounds: int = 100) -> dict[str, float]:
    r"""The densities that pruning by synaptic flow gives the matrices of a network, without any data.

    .. math:: R = \mathbf 1^\top \Bigl( \prod_l |W_l| \Bigr) \mathbf 1, \qquad s = |w| \frac{\partial R}{\partial |w|}

    Weights go in ``rounds`` rounds, each leaving the same share, and scores are found again after each (Tanaka et al.
    2020, 'Pruning neural networks without any data by iteratively conserving synaptic flow').

    Args:
        model: asked in evaluation mode and left as it was.
        example: inputs ``[n, ...]`` of floats; ones of the shape of the first are what it is asked with.
        density: share of the weights of all tensors with two or more axes that is left.
        rounds: of pruning.

    Returns:
        parameter -> density; never 0, at least one weight is counted.

    Raises:
        Error: inputs are not floats, a density outside (0, 1], or a flow that is not finite.
    """
    if not 0 < density <= 1:
        raise Error(f"a density is above 0 and at most 1, got {density:g}")
    matrices = [name for name, p in model.named_parameters() if p.dim() > 1]
    scores = flow_scores(model, example, 1 - density, matrices, rounds)
    return {name: max(float((score >= 0).double().mean()), 1 / score.numel()) for name, score in scores.items()}
