"""Trade weights that are kept for weights that are gone, a few at a time, where the loss would fall.

A score judges each weight alone, and before any other is gone. With a mask there, its marginal members can be judged
again together: which of a block of them to keep is a small problem with one term for every pair, solved, checked
against the real loss, and followed by the next block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune._autograd import called_loss, free_parameters, slopes_of_examples
from weightsmith.solve import binary_quadratic
from weightsmith.stats.room import Batch, Loss, size
from weightsmith.weights import Weights, open, working


@card(
    paper="Rosenberg, Brubaker, Schuetz, Zhu, Kadıoğlu, Borujeni, Katzgraber 2024, 'Scalable iterative pruning of "
    "large language and vision models using block coordinate descent'",
    covers=("scalable-iterative-pruning-large",),
    needs=("data",),
    unit="model",
    claim="at the same density, without any training, better than the mask it starts from",
    departs="a block is taken only if the loss on all batches does not rise, and the next one is smaller where it "
    "does; tensors take turns and are not drawn; swaps with a memory in place of simulated annealing",
)
def refine(
    model: nn.Module,
    masks: Any,
    batches: Iterable[Batch],
    *,
    block: int = 256,
    rounds: int = 20,
    scope: Literal["tensor", "global"] = "tensor",
    tabu: float = 0.5,
    ridge: float = 0.0,
    at_once: int = 64,
    seed: int = 0,
    loss: Loss | None = None,
) -> Weights:
    r"""Better masks of the same density, by block coordinate descent.

    .. math:: \Delta L(z) = g^\top d + \tfrac12 d^\top F d + \rho \lVert d \rVert^2, \qquad
        d = w \odot (z - m), \qquad F = \tfrac1n \sum_i g_i g_i^\top, \qquad \sum z = \sum m

    over the masks :math:`z` of one block, with the gradients of examples :math:`g_i` and their mean :math:`g` where the
    network is now, pruned by :math:`m`. A block is half of it kept weights with the smallest :math:`|w g|`, half of it
    pruned ones with the largest.

    Args:
        model: dense; asked in evaluation mode and left as it was.
        masks: boolean `Weights` under names of parameters, true where a weight is kept, of any method's
            ``action="mask"``. Patterns such as 2:4 are not kept, only how many of each tensor there are.
        batches: ``(inputs, labels)`` or mappings; all are held, and gone through three times in each round.
        block: candidates in a round. F of a block takes the square of it, its gradients ``n * block`` numbers.
        rounds: blocks that are tried.
        scope: ``"tensor"``, one tensor after another, each with a density that stays; or ``"global"``: candidates of
            all tensors together, of which the density stays.
        tabu: share of the weights of a scope that may wait until others have been candidates.
        ridge: :math:`\rho`, which keeps steps small where the model of the loss should not be trusted far.
        at_once: examples whose gradients are held together, as many copies of the scope's tensors.
        seed: of the search in a block.
        loss: ``(model, batch) -> number``, minus the log-likelihood summed over examples (or what F is a curvature
            of); the default is cross-entropy.

    Returns:
        Weights: boolean masks with as many true in each tensor (or in all). The loss on the batches is never higher.

    Raises:
        Error: no batch, masks that fit no parameter or are not boolean, options out of range, or a loss that is not
            finite.

    >>> layer = torch.nn.Linear(3, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 1.0, 0.5]])
    >>> masks = {"weight": torch.tensor([[True, False, False]])}          # the largest, but its input is nothing
    >>> data = [torch.tensor([[0.0, 1.0, 0.5], [0.0, 2.0, 1.0]])]
    >>> square = lambda model, x: (model(x) - x[:, 1:2]).square().sum() / 50
    >>> refine(layer, masks, data, block=2, rounds=1, loss=square)["weight"]
    tensor([[False,  True, False]])
    """
    if block < 2 or rounds < 0 or at_once < 1:
        raise Error(f"refine needs block >= 2, rounds >= 0 and at_once >= 1, got {block}, {rounds} and {at_once}")
    if not 0 <= tabu <= 1 or not ridge >= 0:
        raise Error(f"refine needs tabu in [0, 1] and ridge >= 0, got {tabu} and {ridge}")
    if scope not in ("tensor", "global"):
        raise Error(f'scope is "tensor" or "global", got {scope!r}')
    asked = _Asked(model, list(batches), loss, at_once)
    kept = _checked(model, masks)
    groups = [list(kept)] if scope == "global" else [[name] for name in kept]
    lists = {names[0]: _Waiting(sum(kept[name].numel() for name in names), tabu, block) for names in groups}
    with progress.task("refining masks", rounds) as advance:
        now = asked.loss(kept) if rounds else 0.0
        for turn in range(rounds):
            names = groups[turn % len(groups)]
            waiting = lists[names[0]]
            offered = _round(asked, kept, names, waiting, ridge, seed + turn)
            if offered is not None:
                then = asked.loss(kept | offered)
                waiting.learn(then <= now)
                if then <= now:
                    kept, now = kept | offered, then
            advance(1)
    return Weights.of(kept)


def _checked(model: nn.Module, masks: Any) -> dict[str, Tensor]:
    """The masks by the first name of each parameter, in the model's order, beside their parameters."""
    given = open(masks)
    own = dict(model.named_parameters(remove_duplicate=False))
    first = {id(value): name for name, value in reversed(list(own.items()))}
    wrong = [name for name in given if name not in own or given.spec(name).shape != tuple(own[name].shape)]
    if wrong or not list(given):
        raise Error(f"refine needs masks of parameters of the model, in their shapes; got {listed(wrong) or 'none'}")
    kinds = [name for name in given if given.spec(name).dtype != torch.bool]
    if kinds:
        raise Error(f"the mask of {kinds[0]} is {given.spec(kinds[0])}; a mask is boolean, such as action='mask' makes")
    found = {first[id(own[name])]: given[name].to(own[name].device) for name in given}
    return {name: found[name] for name in own if name in found}


def _round(
    asked: _Asked, kept: Mapping[str, Tensor], names: Sequence[str], waiting: _Waiting, ridge: float, seed: int
) -> dict[str, Tensor] | None:
    """What one block would make of the masks of these tensors; None where nothing would change."""
    weight = torch.cat([working(asked.own[name].detach()).flatten() for name in names])
    mask = torch.cat([kept[name].flatten() for name in names])
    slope = asked.slope(kept, names)
    chosen = waiting.candidates((weight * slope).abs(), mask)
    if not len(chosen):
        return None
    each = asked.slopes(kept, names, chosen)
    better = settled(each, weight[chosen], mask[chosen], ridge, seed)
    if torch.equal(better, mask[chosen]):
        return None
    mask[chosen] = better
    parts = mask.split([kept[name].numel() for name in names])
    return {name: part.view_as(kept[name]) for name, part in zip(names, parts, strict=True)}


def settled(each: Tensor, weight: Tensor, mask: Tensor, ridge: float = 0.0, seed: int = 0) -> Tensor:
    """Which of the candidates to keep, as many as now.

    Args:
        each: ``[n, b]``, the gradients of examples by the candidates.
        weight: ``[b]``, their dense values.
        mask: ``[b]`` boolean, which are kept now.
        ridge: what a squared change of the weights costs.
        seed: of the search.
    """
    effect = each.double() * weight.double()
    # With y = z - m: f(y) = e'y + y'Ay; z'Az - 2 z'Am is the same but for a constant, since m stands still.
    bend = effect.T @ effect / (2 * len(effect))
    now = mask.double()
    linear = effect.mean(dim=0) - 2 * (bend @ now) + ridge * weight.double().square() * (1 - 2 * now)
    small = bend.cpu(), linear.cpu()  # one step after another, each of little work
    return binary_quadratic(*small, int(mask.sum()), start=mask.cpu(), restarts=0, seed=seed)[0].to(mask.device)


@dataclass
class _Waiting:
    """Which elements were candidates lately, and how large a block may be."""

    size: int
    share: float
    most: int
    block: int = field(init=False)
    queue: deque[Tensor] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.block = self.most

    def candidates(self, score: Tensor, mask: Tensor) -> Tensor:
        """Indices of pruned elements with high scores and of kept ones with low scores, none of them waiting."""
        half = min(self.block // 2, int(mask.sum()), int((~mask).sum()))
        while True:
            free = torch.ones_like(mask)
            for held in self.queue:
                free[held] = False
            gone, there = (~mask & free), (mask & free)
            if not self.queue or min(int(gone.sum()), int(there.sum())) >= half:
                break
            self.queue.popleft()
        top = torch.where(gone, score, -1.0).topk(half).indices
        low = torch.where(there, -score, -torch.inf).topk(half).indices
        chosen = torch.cat([top, low])
        self.queue.append(chosen)
        while sum(map(len, self.queue)) > self.share * self.size:
            self.queue.popleft()
        return chosen

    def learn(self, fell: bool) -> None:
        """A block that made the loss rise is followed by one of half the size, one that did not by one of twice."""
        self.block = min(self.block * 2, self.most) if fell else max(self.block // 2, 2)


class _Asked:
    """The dense model, and what its pruned forms say of the data."""

    def __init__(self, model: nn.Module, batches: list[Batch], loss: Loss | None, at_once: int):
        self.model, self.batches, self.given, self.at_once = model, batches, loss, at_once
        self.examples = sum(size(batch) for batch in batches)
        if not self.examples:
            raise Error("refine needs at least one batch of data, got none")
        self.own = dict(model.named_parameters())

    def masked(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.where(mask, self.own[name].detach(), 0.0) for name, mask in kept.items()}

    def loss(self, kept: Mapping[str, Tensor]) -> float:
        """The mean loss of an example."""
        with free_parameters(self.model, []), torch.no_grad():
            masked = self.masked(kept)
            total = sum(float(called_loss(self.model, masked, b, self.given, tied=True)) for b in self.batches)
        if not total - total == 0:
            raise Error("the loss of the pruned model is not finite; are the weights and the data?")
        return total / self.examples

    def slope(self, kept: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """The mean gradient by the elements of some tensors, ``[elements]``."""
        with free_parameters(self.model, []):
            masked = self.masked(kept)
            free = [masked[name].requires_grad_() for name in names]
            total = torch.zeros_like(torch.cat([working(value.detach()).flatten() for value in free]))
            for batch in self.batches:
                value = called_loss(self.model, masked, batch, self.given, tied=True)
                found = torch.autograd.grad(value, free, materialize_grads=True)
                total += torch.cat([working(part).flatten() for part in found])
        return total / self.examples

    def slopes(self, kept: Mapping[str, Tensor], names: Sequence[str], chosen: Tensor) -> Tensor:
        """The gradients of examples by some elements of these tensors, ``[n, chosen]``."""
        weights = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        weights |= self.masked(kept)
        found = slopes_of_examples(self.model, self.batches, names, self.at_once, self.given, weights)
        return torch.cat([slopes[:, chosen] for slopes in found])
