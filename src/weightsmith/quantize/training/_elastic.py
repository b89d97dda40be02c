"""One network for many widths of codes: the same weights, with steps of their own for every grid.

Which widths a device can compute with is often known only later, and then there is no time to train again. Trained at
its largest, its smallest and a few widths in between at once, each taught by a larger one, one set of weights serves
them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.quantize._coded import Coded
from weightsmith.quantize._layout import Layout
from weightsmith.quantize.training._distillation import divergence, of_logits
from weightsmith.quantize.training._fake import Fake, layouts_of, put_on, standing
from weightsmith.solve import generator_for
from weightsmith.stats import Batch, Forward, Loss
from weightsmith.stats.room import default_forward, default_loss
from weightsmith.weights import Pattern, PerTensor, resolve


class Elastic(nn.Module):
    """The parametrization ``W -> g_i(W)``, with one grid of several at a time, each with learned steps.

    Args:
        weight: ``[out, ...]``, what it will stand on.
        layouts: one a grid.
    """

    def __init__(self, weight: Tensor, layouts: Sequence[Layout]):
        super().__init__()
        self.choices = nn.ModuleList(Fake(weight, layout, "learned") for layout in layouts)
        self.chosen = self.largest

    @property
    def widths(self) -> list[int]:
        """Bits of each grid."""
        return [one.layout.grid.bits for one in self.fakes]

    @property
    def fakes(self) -> list[Fake]:
        """The grids with their steps."""
        return list(self.choices)  # type: ignore[arg-type]

    @property
    def largest(self) -> int:
        """The first grid of the most bits."""
        return self.widths.index(max(self.widths))

    @property
    def smallest(self) -> int:
        """The last grid of the fewest bits."""
        return max(index for index, width in enumerate(self.widths) if width == min(self.widths))

    @property
    def layout(self) -> Layout:
        """Of the grid that is chosen."""
        return self.fakes[self.chosen].layout

    def rows(self, weight: Tensor) -> Tensor:
        """The weight that is rounded, ``[out, in]``."""
        return self.fakes[self.chosen].rows(weight)

    def coded(self, weight: Tensor) -> Coded:
        """The codes on the grid that is chosen."""
        return self.fakes[self.chosen].coded(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return self.fakes[self.chosen](weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.chosen)

    def set_extra_state(self, state: Any) -> None:
        self.chosen = int(state)


@card(
    paper="Xu, Han, Tian, Yang, Zhang 2023, 'EQ-Net: Elastic Quantization Neural Networks' (elastic quantization "
    "space)",
    covers=("eq-net",),
    unit="model",
    claim="at each width it is about as good as a network trained for that width alone",
    departs="weights alone (`fake_inputs` quantizes inputs, at one width); groups of inputs stand for granularity",
)
def elastic(
    module: nn.Module,
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    group: Sequence[int | None] = (None,),
    symmetric: Sequence[bool] = (True,),
    pattern: Pattern | None = None,
) -> dict[str, Elastic]:
    """Let a module compute on one of several grids at a time, each with learned steps over the same weights.

    Args:
        module: changed in place. The grid with the most bits is chosen at first; `configure` chooses another.
        bits: widths of codes.
        group: numbers of inputs that share a step; None for whole rows.
        symmetric: whether zero lies in the middle. Every combination of the three is a grid.
        pattern: of the names of weights; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name of a weight -> its parametrization. `coded` and ``weightsmith.adapt.fold`` take the grids chosen.

    Raises:
        Error: no weight fits, no grid, or groups that do not fill a row.

    >>> model = nn.Linear(4, 3)
    >>> made = elastic(model, bits=(8, 2), pattern="*")
    >>> configure(model, bits=2)
    {'weight': 2}
    """
    grids = list(itertools.product(bits, group, symmetric))
    if not grids:
        raise Error("elastic: give at least one width, one size of groups and one symmetry")
    every = [layouts_of(module, pattern, bits=b, group=g, symmetric=s) for b, g, s in grids]
    return put_on(module, pattern, lambda name, weight: Elastic(weight, [layouts[name] for layouts in every]))


def elastics(module: nn.Module) -> dict[str, Elastic]:
    """The elastic parametrizations of a module by name.

    Raises:
        Error: there is none.

    >>> model = nn.Linear(4, 3)
    >>> _ = elastic(model, bits=(8, 2), pattern="*")
    >>> elastics(model)["weight"].widths
    [8, 2]
    """
    found = {name: top for name, top, _ in standing(module) if isinstance(top, Elastic)}
    if not found:
        raise Error("no weight of this module has several grids; put them there with elastic(module)")
    return found


def configure(
    module: nn.Module,
    bits: PerTensor[int] | None = None,
    *,
    group: PerTensor[Any] = "any",
    symmetric: PerTensor[bool] | None = None,
) -> dict[str, int]:
    """Choose the grid of every elastic weight, in place.

    Args:
        module: as `elastic` left it.
        bits, group, symmetric: of the grid; a number, or ``{pattern: number}``. What is not said stays as it was where
            there is such a grid.

    Returns:
        name -> bits chosen.

    Raises:
        Error: a weight has no such grid. Nothing is changed then.

    >>> model = nn.Linear(4, 3)
    >>> made = elastic(model, bits=(8, 2), group=(None, 2), pattern="*")
    >>> configure(model, 2), configure(model, group=2)
    ({'weight': 2}, {'weight': 2})
    """
    found = elastics(module)
    said = {"bits": bits, "group": group, "symmetric": symmetric}
    columns = {word: resolve(value, found, word) for word, value in said.items()}
    chosen = {}
    for name, one in found.items():
        wanted = {word: column[name] for word, column in columns.items()}
        wanted = {w: v for w, v in wanted.items() if (v != "any" if w == "group" else v is not None)}
        grids: list[Any] = [fake.layout.grid for fake in one.fakes]
        fitting = [i for i, grid in enumerate(grids) if all(getattr(grid, w) == v for w, v in wanted.items())]
        if not fitting:
            raise Error(f"{name} has no grid with {wanted}; it has {listed(map(str, grids))}")
        now: Any = grids[one.chosen]
        # Of those that fit, the first that differs least from the one chosen now.
        chosen[name] = min(fitting, key=lambda i: sum(getattr(grids[i], w) != getattr(now, w) for w in said))
    for name, index in chosen.items():
        found[name].chosen = index
    return {name: one.widths[one.chosen] for name, one in found.items()}


@card(
    paper="Xu, Han, Tian, Yang, Zhang 2023, 'EQ-Net: Elastic Quantization Neural Networks' (group progressive "
    "guidance)",
    covers=("eq-net",),
    needs=("data",),
    unit="model",
    claim="small widths learn more from the width above them than from labels alone",
)
def sandwich(
    module: nn.Module,
    batch: Batch,
    *,
    middle: int = 1,
    truth: float = 0.5,
    forward: Forward | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:
    r"""Gradients of an elastic module at its largest grids, at some drawn at random, and at its smallest.

    .. math:: \text{loss}(f_{\max}) + \sum_i \big[ \alpha\, \text{loss}(f_i)
        + (1 - \alpha) \operatorname{KL}(p_{i-1} \Vert p_i) \big]

    where every configuration is taught by the one before it. Gradients are added to those that are there; the
    optimizer's step is yours.

    Args:
        module: as `elastic` left it; in the end the grids that were chosen before are chosen again.
        batch: ``(inputs, labels)`` or a mapping with labels.
        middle: configurations drawn at random, a grid for every weight.
        truth: :math:`\alpha`, from 0 to 1.
        forward, loss: as in `weightsmith.stats.collect`; ``loss`` is called with a model that gives the logits.
        generator: draws the configurations; on the CPU. Default: the global one.

    Returns:
        the losses, from the largest to the smallest configuration.

    Raises:
        Error: no weight has several grids, ``truth`` outside [0, 1], or fewer than 0 configurations in the middle.

    >>> model = nn.Linear(2, 3)
    >>> made = elastic(model, bits=(8, 2), pattern="*")
    >>> losses = sandwich(model, (torch.ones(4, 2), torch.zeros(4, dtype=torch.long)))
    >>> len(losses), model.parametrizations.weight.original.grad is not None
    (3, True)
    """
    if not 0 <= truth <= 1 or middle < 0:
        raise Error(f"sandwich: truth lies in [0, 1] and middle is 0 or more, got {truth} and {middle}")
    found = elastics(module)
    before = {name: one.chosen for name, one in found.items()}
    call, loss = forward or default_forward, loss or default_loss
    taught: Tensor | None = None
    losses = []
    try:
        for choice in _configurations(found, middle, generator):
            for name, one in found.items():
                one.chosen = choice[name]
            logits = call(module, batch)
            total = of_logits(loss, logits, batch)
            if taught is not None:
                total = truth * total + (1 - truth) * divergence(taught, logits, batch)
            total.backward()
            taught = logits.detach()
            losses.append(float(total.detach()))
    finally:
        for name, index in before.items():
            found[name].chosen = index
    return losses


def _configurations(
    found: Mapping[str, Elastic], middle: int, generator: torch.Generator | None
) -> Iterator[dict[str, int]]:
    yield {name: one.largest for name, one in found.items()}
    for _ in range(middle):
        yield {
            name: int(torch.randint(len(one.choices), (), generator=generator, device="cpu"))
            for name, one in found.items()
        }
    yield {name: one.smallest for name, one in found.items()}


# Which width for which weight


@card(
    paper="Xu, Han, Tian, Yang, Zhang 2023, 'EQ-Net: Elastic Quantization Neural Networks' (genetic search)",
    covers=("eq-net",),
    needs=("evaluate",),
    unit="model",
    claim="at the same size mixed widths are better than one width for all",
    departs="every configuration is evaluated, or scored by what is given; `linear_predictor` takes the place of the "
    "paper's network; children that are too large are made smaller, where the authors draw again until one fits",
)
def evolve(
    levels: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    budget: float,
    evaluate: Callable[[dict[str, int]], float],
    *,
    population: int = 32,
    rounds: int = 10,
    parents: float = 0.25,
    mutants: float = 0.5,
    change: float = 0.1,
    seed: int = 0,
) -> tuple[dict[str, int], float]:
    """The widths that score best within a budget, by a genetic search.

    The best quarter of a population are the parents of the next: half of the children are a parent with a tenth of its
    widths drawn anew, half are mixed of two. Children that are too large are made smaller at random places. One width
    for all, the largest that fits, is among the first.

    Args:
        levels: name -> widths to choose from.
        sizes: name -> weights that have this width.
        budget: of bits together, at most: ``sum(size * width)``.
        evaluate: ``{name: bits} -> score``, higher is better, NaN the worst; asked once for each configuration.
        population, rounds, parents, mutants, change: how many live at a time, how often they are replaced, the share
            of parents, of children by change alone, and of widths changed in those.
        seed: of all draws.

    Returns:
        the widths and their score. Where every width has a loss of its own that adds up,
        ``weightsmith.solve.knapsack`` finds the best at once.

    Raises:
        Error: even the smallest widths do not fit, a weight without widths or without a size, or an empty population.

    >>> levels = {"a": [2, 4, 8], "b": [2, 4, 8]}
    >>> evolve(levels, {"a": 10, "b": 1}, 60, lambda bits: bits["a"] + 2 * bits["b"], rounds=5)[0]
    {'a': 4, 'b': 8}
    """
    names = list(levels)
    generator = generator_for(seed, "evolve")
    poor = [name for name in names if not levels[name] or name not in sizes]
    if poor or population < 1:
        raise Error(
            f"evolve: {listed(poor)} has no widths or no size" if poor else "evolve: the population must be 1 or more"
        )
    bits = {name: sorted(set(levels[name])) for name in names}
    if sum(sizes[name] * bits[name][0] for name in names) > budget:
        raise Error(f"evolve: even the smallest widths are more than {budget} bits together")

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    def fitted(genes: list[int]) -> tuple[int, ...]:
        while sum(sizes[n] * bits[n][g] for n, g in zip(names, genes, strict=True)) > budget:
            large = [i for i, gene in enumerate(genes) if gene]
            genes[large[draw(len(large))]] -= 1
        return tuple(genes)

    def anew() -> list[int]:
        return [draw(len(bits[name])) for name in names]

    scores: dict[tuple[int, ...], float] = {}

    def score(genes: tuple[int, ...]) -> float:
        if genes not in scores:
            found = float(evaluate({n: bits[n][g] for n, g in zip(names, genes, strict=True)}))
            scores[genes] = -math.inf if math.isnan(found) else found
        return scores[genes]

    living = _uniform(names, bits, sizes, budget)
    living += [fitted(anew()) for _ in range(population - len(living))]
    for _ in range(rounds):
        chosen = sorted(set(living), key=score, reverse=True)[: max(round(parents * population), 2)]
        children = []
        for index in range(population):
            first, second = chosen[draw(len(chosen))], chosen[draw(len(chosen))]
            if index < mutants * population:
                genes = [new if chance() < change else old for old, new in zip(first, anew(), strict=True)]
            else:
                genes = [a if chance() < 0.5 else b for a, b in zip(first, second, strict=True)]
            children.append(fitted(genes))
        living = [*chosen, *children]
    best = max(living, key=score)
    return {name: bits[name][gene] for name, gene in zip(names, best, strict=True)}, score(best)


def _uniform(
    names: Sequence[str], bits: Mapping[str, list[int]], sizes: Mapping[str, int], budget: float
) -> list[tuple[int, ...]]:
    """The largest width for all that fits, if there is one."""
    common = set.intersection(*(set(bits[name]) for name in names)) if names else set()
    fitting = [width for width in common if width * sum(sizes[name] for name in names) <= budget]
    return [tuple(bits[name].index(max(fitting)) for name in names)] if fitting else []


def linear_predictor(
    configurations: Sequence[Mapping[str, int]], scores: Sequence[float], ridge: float = 1e-2
) -> Callable[[Mapping[str, int]], float]:
    """A prediction of scores from some that were measured: each width of each weight adds a number of its own.

    Args:
        configurations: ``{name: bits}``, measured ones.
        scores: of each.
        ridge: how strongly numbers are drawn to zero, above 0.

    Returns:
        ``{name: bits} -> score``, for `evolve`; a width that was never measured adds nothing.

    Raises:
        Error: no configurations, another number of scores, or a ridge of 0 or less.

    >>> measured = [{"a": a, "b": b} for a in (2, 4) for b in (2, 4)]
    >>> guess = linear_predictor(measured, [one["a"] + 10 * one["b"] for one in measured], ridge=1e-9)
    >>> round(guess({"a": 4, "b": 2}), 3)
    24.0
    """
    if not configurations or len(configurations) != len(scores):
        raise Error(f"linear_predictor: {len(configurations)} configurations and {len(scores)} scores do not fit")
    if not ridge > 0:
        raise Error(
            f"linear_predictor: the ridge must be above 0, got {ridge}: the numbers of one weight add up to one"
        )
    features = sorted({item for one in configurations for item in one.items()})
    place = {item: index for index, item in enumerate(features)}

    def encoded(one: Mapping[str, int]) -> Tensor:
        row = torch.zeros(len(place), dtype=torch.float64)
        row[[place[item] for item in one.items() if item in place]] = 1
        return row

    rows = torch.stack([encoded(one) for one in configurations])
    wanted = torch.tensor(list(scores), dtype=torch.float64)
    mean = wanted.mean()
    system = rows.T @ rows + ridge * torch.eye(len(features), dtype=torch.float64)
    found = torch.linalg.solve(system, rows.T @ (wanted - mean))
    return lambda one: float(encoded(one) @ found + mean)
