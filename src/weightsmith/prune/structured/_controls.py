"""Is it the weights that were kept, or only the shape? What every pruner should be compared with.

A pruned and fine-tuned network may owe what it can do to its weights, to its structure, or to the training it got
afterwards. So the same structure is trained from fresh weights, for as many epochs (Scratch-E) and for as much
computing as the whole network would have taken (Scratch-B); and so is a structure of the same cost that was drawn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.graph import UnitGraph
from weightsmith.prune._controls import Train, row
from weightsmith.prune.structured._allocate import allocate
from weightsmith.prune.structured._costs import Cost, parameters
from weightsmith.prune.structured._modules import Initialise, cut_module, reinitialised
from weightsmith.solve import generator_for
from weightsmith.weights import Weights

if TYPE_CHECKING:
    from weightsmith.inspect import Report


@card(
    paper="Liu et al. 2019, 'Rethinking the Value of Network Pruning'",
    covers=("rethinking-pruning-value",),
    needs=("graph", "data", "evaluate"),
    unit="model",
    claim="trained from fresh weights with equal computing, the structure does as well as with its inherited weights",
)
def controls(
    model: nn.Module,
    graph: UnitGraph,
    kept: Mapping[str, Tensor],
    train: Train,
    evaluate: Callable[[nn.Module], float],
    *,
    epochs: int,
    tune_epochs: int | None = None,
    longest: float = 2.0,
    cost: Cost | None = None,
    seeds: Sequence[int] = (0,),
    initialise: Initialise | None = None,
) -> Report:
    """A cut network beside its controls: the same structure from fresh weights, and a structure that was drawn.

    Args:
        model: trained; left as it is.
        graph: its units.
        kept: space -> ``[kept]``, what a pruner leaves; of `allocate`.
        train: ``(model, epochs, seed)``, trains a module in place. Runs that are compared get the same seed.
        evaluate: ``module -> quality`` on held-out data, higher is better.
        epochs: that the whole network was trained for: those of Scratch-E.
        tune_epochs: of fine-tuning; by default ``epochs``.
        longest: Scratch-B trains at most so many times as long as Scratch-E.
        cost: says how much less a step of the cut network takes, and what the drawn structure may cost; by default
            its parameters. Operations (`flops`) are nearer to computing.
        seeds: one run each of all that is trained.
        initialise: ``(module) -> None``, gives fresh weights; see `reinitialised`.

    Returns:
        Report: a row for the whole network, the cut one as it is, fine-tuned, Scratch-E, Scratch-B and a random
        structure (epochs of Scratch-E): quality, its standard deviation over the seeds, the share of the cost, and
        the epochs.

    Raises:
        Error: no seed, no epoch, nothing that was cut, or parameters that no part knows how to draw.
    """
    from weightsmith.inspect import Report

    if not seeds or epochs < 1:
        raise Error(f"controls needs at least 1 seed and 1 epoch, got {len(seeds)} and {epochs}")
    if not any(len(index) < graph.space(name).size for name, index in kept.items()):
        raise Error("controls needs a cut: the structure is that of the whole network")
    cost = cost or parameters(graph, model)
    share = _share(cost, graph, kept)
    made = cut_module(model, graph, kept)
    reinitialised(made, 0, initialise)  # whether it can be had is found before training
    tuned = epochs if tune_epochs is None else tune_epochs
    longer = round(epochs * min(1 / share, longest))
    runs: dict[str, list[float]] = {name: [] for name in ("fine-tuned", "scratch-E", "scratch-B", "random structure")}
    shares: list[float] = []
    with progress.task("controls", len(seeds) * len(runs)) as advance:

        def measured(name: str, start: nn.Module, length: int, seed: int) -> None:
            train(start, length, seed)
            runs[name].append(float(evaluate(start)))
            advance(1)

        for seed in seeds:
            measured("fine-tuned", copy.deepcopy(made), tuned, seed)
            measured("scratch-E", reinitialised(made, seed, initialise), epochs, seed)
            measured("scratch-B", reinitialised(made, seed, initialise), longer, seed)
            drawn = random_structure(graph, kept, cost, seed)
            shares.append(_share(cost, graph, drawn))
            measured("random structure", reinitialised(cut_module(model, graph, drawn), seed, initialise), epochs, seed)
    lengths = {"fine-tuned": tuned, "scratch-E": epochs, "scratch-B": longer, "random structure": epochs}
    rows = [
        row("whole", [float(evaluate(copy.deepcopy(model)))], 1.0, 0),
        row("cut", [float(evaluate(made))], share, 0),
    ]
    for name, found in runs.items():
        part = statistics.fmean(shares) if name == "random structure" else share
        rows.append(row(name, found, part, lengths[name]))
    gain = statistics.fmean(runs["fine-tuned"]) - statistics.fmean(runs["scratch-B"])
    return Report(
        "A cut network and its controls",
        {"fine-tuned minus scratch-B": gain, "seeds": len(seeds)},
        rows,
        notes=[
            "Scratch-E trains the same structure from fresh weights for as many epochs; Scratch-B until it has cost as "
            f"much as the whole network, or {longest:g} times as long."
        ],
    )


def _share(cost: Cost, graph: UnitGraph, kept: Mapping[str, Tensor]) -> float:
    return cost({name: len(index) for name, index in kept.items()}) / cost({})


def random_structure(graph: UnitGraph, kept: Mapping[str, Tensor], cost: Cost, seed: int) -> Weights:
    """Units of the same spaces, drawn, that cost at most as much: every space is cut to a share of its own.

    >>> from weightsmith.graph import declare
    >>> weights = {"a": torch.ones(8, 1), "b": torch.ones(8, 8)}
    >>> graph = declare(weights, {"a": "> one, 1", "b": "> two, < one"})
    >>> drawn = random_structure(graph, {"one": torch.arange(4), "two": torch.arange(8)}, parameters(graph), seed=0)
    >>> bool(parameters(graph)({name: len(index) for name, index in drawn.items()}) <= 36)
    True
    """
    generator = generator_for(seed, "random structure")
    # Uniform scores times a factor of the space: the smaller the factor, the more of its units are low in the order.
    together = {name: group for group in graph.equal() for name in group}
    factors: dict[tuple[str, ...], float] = {}
    scores = {}
    for name in kept:
        group = together.get(name, (name,))
        factors.setdefault(group, 0.5 + float(torch.rand((), generator=generator)))
        scores[name] = torch.rand(graph.space(name).size, generator=generator) * factors[group]
    least = min([len(index) / graph.space(name).size for name, index in kept.items()], default=1.0)
    return allocate(scores, graph, _share(cost, graph, kept), cost=cost, least=min(least, 0.1))
