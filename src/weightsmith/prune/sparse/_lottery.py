"""Prune a little, train again, and again: lottery tickets, alone or many averaged.

What is left after a network was trained and its smallest weights removed, set back to where it began, often trains as
well as the whole network (a winning ticket), and rounds of this find sparser ones than it does at once. Copies that are
trained with one mask from one place often lie in one valley of the loss, so that their average can be pruned and go on
in place of a single one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import apply_mask, by_score
from weightsmith.prune._holding import holding
from weightsmith.prune.room import chosen_targets
from weightsmith.solve import seed_for
from weightsmith.stats import Batch, batch_norm
from weightsmith.weights import Pattern, Weights, open

if TYPE_CHECKING:
    from weightsmith.inspect import Report

Train = Callable[[nn.Module, int], Any]
"""``(module, seed)``: trains in place, with any optimizer; the mask is kept for it."""

Soup = Callable[[Sequence[Weights]], Weights]

Scope = Literal["global", "tensor"]


@dataclass(frozen=True)
class Round:
    """One training."""

    sparsity: float
    """Share of the prunable weights that the mask leaves out."""
    quality: float | None
    """After it; None without ``evaluate``."""


@dataclass(frozen=True)
class Ticket:
    """What the rounds ended with."""

    module: nn.Module
    """Trained with the last mask; plain, with exact zeros."""
    start: Weights
    """What the last training began from, under the mask: the ticket."""
    mask: Weights
    """True where a weight is kept."""
    rounds: tuple[Round, ...]

    def report(self) -> Report:
        """A row for each round."""
        from weightsmith.inspect import Line, Plot, Report

        rows = [{"round": place, "sparsity": r.sparsity, "quality": r.quality} for place, r in enumerate(self.rounds)]
        seen = [r for r in self.rounds if r.quality is not None]
        line = Line("rounds", [r.sparsity for r in seen], [float(r.quality or 0) for r in seen])
        plots = [Plot("Quality by round", "sparsity", "quality", [line])] if seen else []
        return Report("Rounds of pruning", {"sparsity": self.rounds[-1].sparsity}, rows, plots)


@card(
    paper="Frankle, Carbin 2019, 'The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks'; Frankle, "
    "Dziugaite, Roy, Carbin 2020, 'Linear Mode Connectivity and the Lottery Ticket Hypothesis' (rewinding to an "
    "early moment); Renda, Frankle, Carbin 2020, 'Comparing Rewinding and Fine-tuning in Neural Network Pruning'",
    needs=("data",),
    unit="model",
    claim="tickets found in rounds train better than masks of that sparsity that were drawn",
)
def iterative_magnitude(
    module: nn.Module,
    train: Train,
    sparsity: float = 0.9,
    rounds: int = 5,
    *,
    warm_up: Train | None = None,
    rewind: bool = True,
    scope: Scope = "global",
    evaluate: Callable[[nn.Module], float] | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
) -> Ticket:
    r"""Train, remove the smallest of what is left, rewind, and so on.

    .. math:: s_r = 1 - (1 - S)^{r / R}

    Args:
        module: as it is before training; left as it is.
        train: ``(module, seed)``, trains in place; called ``rounds + 1`` times, first for the whole network and last
            for the ticket.
        sparsity: :math:`S`, of the last mask.
        rounds: :math:`R`; each removes the same share of what is left.
        warm_up: ``(module, seed)``, trains to the early moment that is rewound to; by default none, and that is the
            start.
        rewind: set the weights that are left back before each training; False trains on from where they are.
        scope: among what the smallest are looked for.
        evaluate: ``module -> quality``, called after each training.
        pattern: which tensors; by default `weightsmith.prune.prunable`.
        seed: each training gets another one, made from it.

    Returns:
        Ticket: masks are nested, and hold while training.

    Raises:
        Error: a sparsity outside (0, 1) or one that leaves nothing, no round, no tensor to prune, or training
            that ends with weights that are not finite.

    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> def train(layer, seed): layer.weight.data += torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> layer.weight.data.zero_()
    tensor([[0., 0., 0., 0.]])
    >>> ticket = iterative_magnitude(layer, train, 0.75, rounds=2)
    >>> ticket.module.weight.detach(), [round.sparsity for round in ticket.rounds]
    (tensor([[4., 0., 0., 0.]]), [0.0, 0.5, 0.75])
    """
    loop = _Loop(module, train, scope, evaluate, pattern, seed, None, None, 1)
    return loop.from_start(_checked(sparsity), _counted("rounds", rounds), warm_up, rewind)


@card(
    paper="Choi et al. 2024, 'Sparse Weight Averaging with Multiple Particles for Iterative Magnitude Pruning'",
    covers=("swamp",),
    needs=("data",),
    unit="model",
    claim="at high sparsity at least as accurate as iterative magnitude pruning with as many rounds",
    departs="averaging along each particle's own run is left to train",
)
def swamp(
    module: nn.Module,
    train: Train,
    sparsity: float = 0.9,
    rounds: int = 5,
    *,
    particles: int = 4,
    warm_up: Train | None = None,
    batches: Iterable[Batch] | None = None,
    scope: Scope = "global",
    evaluate: Callable[[nn.Module], float] | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
) -> Ticket:
    r"""Iterative magnitude pruning of the average of several runs from the same ticket.

    .. math:: \bar w_r = \frac{1}{N} \sum_{i=1}^N \operatorname{train}_i(m_r \odot w_0), \qquad
        m_{r+1} = \text{the largest of } |\bar w_r|

    Args:
        module: as it is before training; left as it is.
        train: ``(module, seed)``, trains in place; its order of the data should come from ``seed``, which differs by
            particle. It may put an average along its own run into the module (`weightsmith.average.swa`), as the paper
            does. Called ``particles * (rounds + 1)`` times.
        sparsity: of the last mask.
        rounds: each removes the same share of what is left.
        particles: :math:`N`, as many are in memory.
        warm_up: ``(module, seed)``, trains to the moment that is rewound to. The particles share what they begin with,
            and runs from very early moments end too far apart to be averaged.
        batches: inputs to estimate batch norm's statistics from after averaging, read every round; None leaves their
            means.
        scope: among what the smallest are looked for.
        evaluate: ``module -> quality``, called after each round with the average.
        pattern: which tensors; by default `weightsmith.prune.prunable`.
        seed: each training gets another one, made from it.

    Returns:
        Ticket: the last average, and the rewound ticket that it came from.

    Raises:
        Error: a sparsity outside (0, 1) or one that leaves nothing, no round or particle, no tensor to prune, or
            training that ends with weights that are not finite.
    """
    loop = _Loop(module, train, scope, evaluate, pattern, seed, batches, None, _counted("particles", particles))
    return loop.from_start(_checked(sparsity), _counted("rounds", rounds), warm_up, True)


@card(
    paper="Zimmer, Spiegel, Pokutta 2024, 'Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging'",
    covers=("sparse-model-soups",),
    needs=("data",),
    unit="model",
    claim="at one sparsity, at least as accurate as going on from the best single retrained model",
)
def sparse_soups(
    module: nn.Module,
    train: Train,
    sparsity: float = 0.9,
    rounds: int = 3,
    *,
    copies: int = 3,
    soup: Soup | None = None,
    batches: Iterable[Batch] | None = None,
    scope: Scope = "global",
    evaluate: Callable[[nn.Module], float] | None = None,
    pattern: Pattern | None = None,
    seed: int = 0,
) -> Ticket:
    """Prune a trained network, retrain copies with the mask, average them, and go on from their average.

    Args:
        module: trained; left as it is.
        train: ``(module, seed)``, retrains in place; what differs between copies (order, rate, decay) should come from
            ``seed``. Called ``copies * rounds`` times.
        sparsity: of the last mask.
        rounds: each removes the same share of what is left.
        copies: as many are in memory.
        soup: ``models -> weights``; by default their mean (`weightsmith.merge.sparse_soup`), else such as
            ``lambda models: merge.greedy_soup(models, quality)``.
        batches: inputs to estimate batch norm's statistics from after averaging, read every round; None leaves their
            means.
        scope: among what the smallest are looked for.
        evaluate: ``module -> quality``, called after each round with the soup.
        pattern: which tensors; by default `weightsmith.prune.prunable`.
        seed: each training gets another one, made from it.

    Returns:
        Ticket: the last soup; its zeros are those of the mask.

    Raises:
        Error: a sparsity outside (0, 1) or one that leaves nothing, no round or copy, no tensor to prune, or training
            that ends with weights that are not finite.
    """
    loop = _Loop(module, train, scope, evaluate, pattern, seed, batches, soup, _counted("copies", copies))
    shares = _shares(_checked(sparsity), _counted("rounds", rounds))[1:]
    return loop.run(shares, _snapshot(copy.deepcopy(module)), None)


def _checked(sparsity: float) -> float:
    if not 0 < sparsity < 1:
        raise Error(f"rounds of pruning end at a sparsity between 0 and 1, got {sparsity}")
    return sparsity


def _counted(what: str, count: int) -> int:
    if count < 1:
        raise Error(f"{what} must be at least 1, got {count}")
    return count


def _shares(sparsity: float, rounds: int) -> list[float]:
    """From 0 to the last sparsity; every round removes the same share of what is left."""
    return [1 - (1 - sparsity) ** (turn / rounds) for turn in range(rounds)] + [sparsity]


def _snapshot(module: nn.Module) -> Weights:
    """A module's tensors, those of a copy that nobody else has."""
    return Weights.of({name: value.detach() for name, value in module.state_dict().items()})


@dataclass(frozen=True)
class _Loop:
    """Prune, train ``particles`` copies with the mask, combine them; once for each sparsity."""

    module: nn.Module
    train: Train
    scope: Scope
    evaluate: Callable[[nn.Module], float] | None
    pattern: Pattern | None
    seed: int
    batches: Iterable[Batch] | None
    soup: Soup | None
    particles: int

    def __post_init__(self) -> None:
        """What cannot be had is found before any training."""
        if self.scope not in ("global", "tensor"):
            raise Error(f"scope must be global or tensor, got {self.scope!r}")
        if self.batches is not None and iter(self.batches) is self.batches:
            raise Error("batches are read every round; give a list or another iterable that can be read again")
        self.names()

    def names(self) -> list[str]:
        """Of the tensors that are pruned."""
        return chosen_targets(open(self.module), self.pattern)

    def from_start(self, sparsity: float, rounds: int, warm_up: Train | None, rewind: bool) -> Ticket:
        """Rounds for a network that is not trained yet."""
        made = copy.deepcopy(self.module)
        if warm_up is not None:
            warm_up(made, seed_for(self.seed, "warm-up"))
        start = _snapshot(made)
        return self.run(_shares(sparsity, rounds), start, start if rewind else None)

    def run(self, shares: Sequence[float], after: Weights, rewound: Weights | None) -> Ticket:
        """
        Args:
            shares: removed before each training.
            after: what the first is removed from.
            rewound: what every training begins from; None is what was pruned.
        """
        mask = Weights.of({name: torch.ones_like(after[name], dtype=torch.bool) for name in self.names()})
        if round((1 - shares[-1]) * mask.numel) < 1:
            raise Error(f"at a sparsity of {shares[-1]:g} none of {mask.numel} weights would be left; ask for less")
        begin, rounds = after, []
        with progress.task("rounds of pruning", len(shares) * self.particles) as advance:
            for turn, share in enumerate(shares):
                mask = self._pruned(after, mask, share)
                begin = Weights.of(apply_mask(after if rewound is None else rewound, mask).to_dict())
                trained = []
                for particle in range(self.particles):
                    trained.append(self._trained(begin, mask, seed_for(self.seed, turn, particle)))
                    advance(1)
                after = self._combined(trained, mask)
                rounds.append(Round(_left_out(mask), self._quality(after)))
        return Ticket(self._loaded(after), begin, mask, tuple(rounds))

    def _pruned(self, weights: Weights, mask: Weights, share: float) -> Weights:
        """The mask of what is left; what was out stays out, also beside weights that became zero."""
        scores = {name: weights[name].float().abs().masked_fill_(~mask[name], -1.0) for name in mask}
        chosen = weights.select(frozenset(mask).__contains__)
        return Weights.of(by_score(chosen, scores, share, scope=self.scope, action="mask").to_dict())

    def _trained(self, begin: Weights, mask: Mapping[str, Tensor], seed: int) -> Weights:
        made = self._loaded(begin)
        with holding(made, dict(mask)):
            self.train(made, seed)
        for name in mask:
            if not made.get_parameter(name).isfinite().all():
                raise Error(f"training left weights of {name} that are not finite; train with a lower learning rate")
        return _snapshot(made)

    def _combined(self, trained: Sequence[Weights], mask: Weights) -> Weights:
        if len(trained) == 1 and self.soup is None:
            after = trained[0]
        elif self.soup is None:
            from weightsmith.merge import sparse_soup

            after = sparse_soup(trained, mask=mask)
        else:
            after = apply_mask(self.soup(trained), mask)
        after = Weights.of(after.to_dict())
        if self.batches is None:
            return after
        return Weights.of((after | batch_norm(self._loaded(after), self.batches)).to_dict())

    def _loaded(self, weights: Weights) -> nn.Module:
        made = copy.deepcopy(self.module)
        weights.load_into(made)
        return made

    def _quality(self, weights: Weights) -> float | None:
        return None if self.evaluate is None else float(self.evaluate(self._loaded(weights)))


def _left_out(mask: Weights) -> float:
    return 1 - sum(int(mask[name].sum()) for name in mask) / max(mask.numel, 1)
