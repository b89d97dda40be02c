"""Remove whole blocks of weights, by what the loss would do without each, and as many of each layer as costs least.

Processors skip a block of zeros where they cannot skip single ones. What a block is worth is not the sum of what its
weights are worth alone: their effects add up, or cancel, example by example. With the curvature taken from the
gradients of single examples, the effect of any set of blocks on the loss needs one number a block and example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import _select
from weightsmith.prune._autograd import scored_names, slopes_of_examples
from weightsmith.prune.room import Action, by_score
from weightsmith.solve import lagrangian
from weightsmith.stats.room import Batch, Loss
from weightsmith.weights import Pattern, PerTensor, Weights, resolve, working

LEVELS = 400
"""Sparsities of each tensor that are offered, at most."""


@card(
    paper="Xu, Wang, Chen, Geng, Lin, Yang, Wu, Li, Lin 2024, 'LPViT: Low-Power Semi-structured Pruning for Vision "
    "Transformers'",
    needs=("data",),
    unit="model",
    claim="blocks are removed at a lower loss than by their magnitude",
    departs="gradients are of the loss and of single examples (the authors' code has those of a batch's mean square "
    "output), and blocks are ordered by their second-order cost (there by the sum of first-order sizes)",
)
def block_taylor(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    structure: PerTensor[str] = "16x16",
    slope: bool = False,
    pattern: Pattern | None = None,
    at_once: int = 16,
    loss: Loss | None = None,
) -> Weights:
    r"""Scores of blocks: what the loss would rise by without each, to second order.

    .. math:: \delta_b = [\, -g_b^\top w_b \,] + \tfrac12 w_b^\top H_b w_b
        = \frac1n \sum_{i=1}^n \Bigl( [\, -a_{ib} \,] + \tfrac12 a_{ib}^2 \Bigr), \qquad a_{ib} = g_{ib}^\top w_b

    with :math:`g_{ib}` the gradient of example :math:`i` and :math:`H_b \approx \frac1n \sum_i g_{ib} g_{ib}^\top` the
    empirical Fisher information, which is never formed. The term in brackets counts with ``slope`` only: at the end of
    training it speaks of small changes and a removed block is a large one, and it is no longer certain of its sign.
    The claim on `lpvit` measures what it does.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings.
        structure: blocks of rows x columns such as ``"8x8"``, ``"row"`` or ``"column"``; the same as is then cut.
        slope: whether the first-order term counts.
        pattern: which parameters; by default `prunable` ones.
        at_once: examples whose gradients are held together, as many copies of all scored tensors.
        loss: ``(model, batch) -> number``, summed over examples; the default is cross-entropy.

    Returns:
        Weights: ``[*shape]`` float32; the elements of a block share its score, evenly. With ``slope`` below zero
        where the loss would fall. Held meanwhile is a number for every block and example.

    Raises:
        Error: no batch, a tensor that cannot be cut into such blocks, or gradients that are not finite.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 2.0]])
    >>> data = [torch.tensor([[1.0, 0.0], [3.0, 1.0]])]
    >>> block_taylor(layer, data, structure="1x1", loss=lambda model, x: model(x).sum())["weight"]
    tensor([[2.5000, 1.0000]])
    """
    grids = grids_of(model, structure, pattern)
    effects = block_effects(model, batches, grids, at_once, loss)
    return _scores(effects, grids, model, slope)


@card(
    paper="Xu, Wang, Chen, Geng, Lin, Yang, Wu, Li, Lin 2024, 'LPViT: Low-Power Semi-structured Pruning for Vision "
    "Transformers'",
    covers=("lpvit",),
    needs=("data",),
    unit="model",
    claim="at half of the blocks, at least as accurate as removing the same share of every layer by magnitude",
    departs="the curve of a layer is exact in the second-order model, not smoothed; the power's weight is in "
    "proportion to all distortion and all power, not to their steepest slopes",
)
def lpvit(
    model: nn.Module,
    batches: Iterable[Batch],
    sparsity: float = 0.5,
    *,
    structure: PerTensor[str] = "16x16",
    slope: bool = False,
    power: float = 0.0,
    block_power: Mapping[str, float] | None = None,
    floor: float = 0.05,
    pattern: Pattern | None = None,
    action: Action = "zero",
    at_once: int = 16,
    loss: Loss | None = None,
) -> Weights:
    r"""Prune blocks, of each layer as many as costs least in loss and in power together.

    .. math:: \min_{k} \sum_l \bigl( D_l(k_l) + \lambda P_l(k_l) \bigr) \quad \text{with} \quad
        \sum_l k_l m_l \ge \text{sparsity} \cdot \sum_l n_l

    with :math:`k_l` blocks of :math:`m_l` weights removed from the :math:`n_l` of layer :math:`l`, those of the lowest
    `block_taylor` score first. :math:`D_l(k) = \frac1n \sum_i ([\, -c_i \,] + \frac12 c_i^2)` is what the loss rises
    by, where :math:`c_i` is the sum of :math:`a_{ib}` over the blocks removed; :math:`P_l` is in proportion to the
    blocks left.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings; a few hundred examples.
        sparsity: share of the weights of all these tensors together that goes; less than a step of a tensor's own
            sparsities more may go.
        structure: blocks of rows x columns such as ``"8x8"``, ``"row"`` or ``"column"``.
        slope: whether the first-order term counts, see `block_taylor`.
        power: how much power counts: with 1, the power of all blocks as much as the loss of removing each layer whole.
        block_power: tensor -> what one of its blocks draws, in any unit; by default the layer's inputs.
        floor: share of its blocks that every tensor keeps.
        pattern: which parameters; by default `prunable` ones.
        action: ``"zero"``, or ``"mask"`` for the boolean mask of what is kept.
        at_once: examples whose gradients are held together.
        loss: ``(model, batch) -> number``, summed over examples; the default is cross-entropy.

    Returns:
        Weights: the pruned ones, or the masks.

    Raises:
        Error: no batch, options out of range, a tensor that cannot be cut into such blocks, gradients that are not
            finite, or a sparsity that the floor forbids.

    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> data = [torch.tensor([[1.0, 0.1], [3.0, 0.2]])]                  # the second input is nearly nothing
    >>> lpvit(layer, data, 0.5, structure="column", loss=lambda model, x: model(x).sum())["weight"]
    tensor([[1., 0.],
            [3., 0.]])
    """
    if not 0 <= sparsity <= 1 or not 0 <= floor <= 1:
        raise Error(f"sparsity and floor lie between 0 and 1, got {sparsity} and {floor}")
    if not 0 <= power < math.inf:
        raise Error(f"power is 0 or more, got {power}")
    grids = grids_of(model, structure, pattern)
    effects = block_effects(model, batches, grids, at_once, loss)
    curves = {name: curve(effect, slope) for name, effect in effects.items()}
    shares = _shares(curves, grids, sparsity, power, block_power or {}, floor)
    return by_score(model, _scores(effects, grids, model, slope), shares, structure=structure, action=action)


Grid = tuple[int, int, int, int]
"""Rows and columns of a flattened tensor, and of a block."""


def grids_of(model: nn.Module, structure: PerTensor[str], pattern: Pattern | None) -> dict[str, Grid]:
    """How each tensor is cut into blocks, by name; an error where it cannot be."""
    names = scored_names(model, pattern)
    own = dict(model.named_parameters(remove_duplicate=False))
    structures = resolve(structure, names, "structure")
    return {
        name: _select._grid(tuple(own[name].shape), _select.whole_of(structures[name], name), name) for name in names
    }


def block_effects(
    model: nn.Module, batches: Iterable[Batch], grids: Mapping[str, Grid], at_once: int, loss: Loss | None
) -> dict[str, Tensor]:
    r"""What each block adds to the slope of each example's loss, :math:`a_{ib}`: ``[n, blocks]`` float32 by name."""
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Tensor]] = {name: [] for name in grids}
    order = [name for name, _ in model.named_parameters() if name in grids]
    sizes = [own[name].numel() for name in order]
    with progress.task("blocks", len(batches) if isinstance(batches, Sequence) else 0) as advance:
        for batch in batches:
            for slopes in slopes_of_examples(model, [batch], grids, at_once, loss):
                for name, slope in zip(order, slopes.split(sizes, dim=1), strict=True):
                    found[name].append(_summed(slope * working(own[name].detach()).flatten(), grids[name]))
            advance(1)
    if not all(found.values()):
        raise Error("block scores need at least one batch of data, got none")
    effects = {name: torch.cat(parts) for name, parts in found.items()}
    for name, effect in effects.items():
        if not effect.isfinite().all():
            raise Error(f"the gradients of {name} are not finite; are the weights and the data?")
    return effects


def _summed(values: Tensor, grid: Grid) -> Tensor:
    """``[n, elements]`` to the sum over each block, ``[n, blocks]``."""
    rows, columns, height, width = grid
    return values.reshape(-1, rows // height, height, columns // width, width).sum(dim=(2, 4)).flatten(1)


def second_order(effects: Tensor, slope: bool) -> Tensor:
    """The sum over examples of what the loss rises by when these effects on its slope are taken away."""
    squares = effects.square().sum(dim=0) / 2
    return squares - effects.sum(dim=0) if slope else squares


def curve(effects: Tensor, slope: bool = False) -> Tensor:
    """The rise of the loss without the k blocks of the lowest score, ``[blocks + 1]`` float64 for k from 0.

    Of equal scores the last go first.
    """
    order = second_order(effects.double(), slope).argsort(descending=True, stable=True).flip(0)  # as `by_score` cuts
    rise = torch.zeros(len(order) + 1, dtype=torch.float64, device=effects.device)
    for part in effects.split(64):
        rise[1:] += second_order(part[:, order].double().cumsum(dim=1), slope)
    return rise / len(effects)


def _scores(effects: Mapping[str, Tensor], grids: Mapping[str, Grid], model: nn.Module, slope: bool) -> Weights:
    own = dict(model.named_parameters(remove_duplicate=False))
    scores: dict[str, Tensor] = {}
    for name, (rows, columns, height, width) in grids.items():
        each = second_order(effects[name].double(), slope) / (len(effects[name]) * height * width)
        blocks = each.float().view(rows // height, columns // width)
        scores[name] = _select.of_blocks(blocks, height=height, width=width, shape=tuple(own[name].shape))
    return Weights.of(scores)


def _shares(
    curves: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    sparsity: float,
    power: float,
    block_power: Mapping[str, float],
    floor: float,
) -> dict[str, float]:
    """Tensor -> the share of its blocks that goes."""
    unknown = [name for name in block_power if name not in grids]
    if unknown:
        raise Error(f"block_power names {unknown[0]!r}, which is not among the tensors to prune")
    draws = {name: float(block_power.get(name, grid[1])) for name, grid in grids.items()}
    counts = {name: len(rise) - 1 for name, rise in curves.items()}
    lost = sum(max(float(rise[-1]), 0.0) for rise in curves.values())
    drawn = sum(draws[name] * counts[name] for name in grids)
    weight = power * lost / max(drawn, 1e-300)
    levels: dict[str, list[int]] = {}
    for name, count in counts.items():
        most = math.floor(count * (1 - floor) + 1e-9)
        steps = min(most, LEVELS)
        levels[name] = sorted({round(most * step / max(steps, 1)) for step in range(steps + 1)})
    sizes = [torch.tensor(k, dtype=torch.float64) * math.prod(grids[name][2:]) for name, k in levels.items()]
    costs: list[Tensor] = []
    for name, k in levels.items():
        costs.append(curves[name].cpu()[k] + weight * draws[name] * (counts[name] - torch.tensor(k)))
    # The same price on every weight removed, so high that nothing goes beyond what is asked: it changes no order.
    gains = [(-cost.diff() / gone.diff()).amax() for cost, gone in zip(costs, sizes, strict=True) if len(cost) > 1]
    price = 2 * max(0.0, *(float(gain) for gain in gains)) if gains else 0.0
    costs = [cost + price * gone for cost, gone in zip(costs, sizes, strict=True)]
    total = sum(math.prod(grid[:2]) for grid in grids.values())
    try:
        chosen = lagrangian(costs, sizes, sparsity * total, at_least=True).levels
    except Error as error:
        raise Error(f"lpvit cannot remove {sparsity:g} with a floor of {floor:g}: {error}") from None
    return {name: k[level] / max(counts[name], 1) for (name, k), level in zip(levels.items(), chosen, strict=True)}
