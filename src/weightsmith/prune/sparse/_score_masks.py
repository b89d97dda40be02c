"""Find a good mask of weights that were trained already, without changing one of them.

Every weight gets a score that learns: the highest stay. Among the weights of a trained network lie subnetworks that
work as they are, and where one begins the search matters: at the mask of magnitudes, moving only a few weights in and
out at a time.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.adapt import parametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.sparse._exchange import highest
from weightsmith.prune.sparse._parametrizations import (
    Scheduled,
    Straight,
    frozen,
    kept_wholes,
    of_each,
    of_wholes,
    weights_of,
    whole_named,
    wide,
)
from weightsmith.solve import uniform
from weightsmith.weights import Pattern, PerTensor


class Scored(Scheduled):
    """The parametrization ``W -> mask(score) * W``; backwards the score stands for the mask.

    Args:
        weight: ``[out, ...]``.
        score: ``[*shape]``, what the scores begin as.
        sparsity: the share removed.
        structure: what goes as one.
        restriction: None: the mask is that of the scores, at once. A number: the mask changes in `advance` alone, by a
            share ``(1 - progress) ** restriction`` of the swaps that the scores ask for.
    """

    held: Tensor | None
    """The mask where it changes in `advance` alone, else None."""

    def __init__(
        self,
        weight: Tensor,
        score: Tensor,
        sparsity: float,
        structure: str = "element",
        restriction: float | None = None,
    ):
        super().__init__()
        self.score = nn.Parameter(score.to(weight.device, wide(weight)).contiguous())
        self.sparsity, self.structure, self.restriction = sparsity, structure, restriction
        self.register_buffer("held", None if restriction is None else self.asked().contiguous())

    def mask(self) -> Tensor:
        """``[*shape]`` boolean, true where a weight stays; of rows or columns with axes of length 1 for the rest."""
        return self.asked() if self.held is None else self.held

    def asked(self) -> Tensor:
        """The mask that the scores ask for."""
        return kept_wholes(self.score.detach(), self.sparsity, self.structure)

    def moved(self, progress: float) -> None:
        super().moved(progress)
        if self.held is not None and self.restriction is not None:
            scores = of_wholes(self.score.detach(), self.structure)
            self.held.copy_(swapped(self.held, scores, self.asked(), (1 - progress) ** self.restriction))

    def forward(self, weight: Tensor) -> Tensor:
        return Straight.apply(weight, self.score, self.mask())  # type: ignore[return-value]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def swapped(mask: Tensor, score: Tensor, asked: Tensor, share: float) -> Tensor:
    """A mask after a share of the swaps that lead from it to another: highest scores in first, lowest out first.

    Args:
        mask: ``[*shape]``, boolean.
        score: ``[*shape]``.
        asked: ``[*shape]``, boolean, with as many kept: the mask of the highest scores.
        share: of the swaps, from 0 to 1; rounded up.

    >>> now, best = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    >>> swapped(now, torch.tensor([1.0, 2.0, 3.0, 4.0]), best, 0.5)
    tensor([False,  True, False,  True])
    """
    coming = asked & ~mask
    swaps = math.ceil(share * int(coming.sum()))
    if swaps == 0:
        return mask.clone()
    return (mask | highest(score, swaps, coming)) & ~highest(-score, swaps, mask & ~asked)


@card(
    paper="Zhang, Lin, Zhong, Chao, Ji 2021, 'Lottery Jackpots Exist in Pre-trained Models'",
    covers=("lottery-jackpots-exist-pre-trained",),
    unit="model",
    claim="at 95 % a mask found over frozen trained weights is more accurate than that of their magnitudes",
    departs="scores begin at magnitudes; those of the authors' code, 1 for what is kept and 0.99 for the rest, are "
    "start='equal'. There the share of swaps, (1 - t) ** 4, is rounded up to 1, so nothing is restricted; here it is "
    "as written",
)
def score_masks(
    module: nn.Module,
    sparsity: PerTensor[float] = 0.9,
    *,
    pattern: Pattern | None = None,
    start: Literal["magnitude", "equal", "random"] = "magnitude",
    structure: str = "element",
    restriction: float | None = 4.0,
    seed: int = 0,
) -> dict[str, Scored]:
    r"""Let a module learn which of its frozen weights to keep; everything else stands still.

    .. math:: \tilde W = m \odot W, \qquad m = \text{top}_{1 - s}(S), \qquad
              \frac{\partial}{\partial S} := W \odot \frac{\partial}{\partial \tilde W}

    In every forward pass exactly the share ``sparsity`` of each tensor is masked. Make the optimizer afterwards, of the
    parameters that still need gradients. `weightsmith.adapt.fold` leaves the pruned module.

    Args:
        module: changed in place: its weights get the parametrization `Scored` and everything but scores is frozen.
        sparsity: the share removed of each tensor, possibly by tensor.
        pattern: of the names of weights; default the usual ones.
        start: of the scores: ``"magnitude"``, :math:`|W|`; ``"equal"``, 1 for the largest magnitudes and
            0.99 for the rest; ``"random"``, uniform in [0, 1).
        structure: what goes as one: ``"element"``, ``"row"`` or ``"column"`` (an index of the second axis).
        restriction: a. Call `advance` after every step: of the swaps that the scores ask for then, the share
            :math:`(1 - t)^a` is made, the highest scores in and the lowest out. Without that call the mask stays.
            None: the mask follows the scores at once and no call is needed.
        seed: of a random start; each tensor has random numbers of its own.

    Returns:
        name of a weight -> its parametrization, in order; ``.score`` learns and ``.mask()`` is the mask.

    Raises:
        Error: no weight fits, a share outside [0, 1], a word that is not known.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    >>> masks = score_masks(model, 0.5)
    >>> model.weight.tolist(), [name for name, p in model.named_parameters() if p.requires_grad]
    ([[4.0, 0.0, 3.0, 0.0]], ['parametrizations.weight.0.score'])
    """
    if restriction is not None and not restriction >= 0:
        raise Error(f"score_masks: restriction is a power from 0 on, or None; got {restriction}")
    found = put(module, sparsity, pattern, start, whole_named(structure, "score_masks"), restriction, seed)
    frozen(module)
    for made in found.values():
        made.score.requires_grad_(True)
    return found


def put(
    module: nn.Module,
    sparsity: PerTensor[Any],
    pattern: Pattern | None,
    start: str,
    structure: str,
    restriction: float | None,
    seed: int,
) -> dict[str, Scored]:
    """Scores on the weights of a module."""
    targets = weights_of(module, pattern)
    shares = of_each(sparsity, targets, "sparsity")
    found: dict[str, Scored] = {}
    for name, weight in targets.items():
        score = first_scores(weight.detach(), start, shares[name], seed, name)
        found[name] = Scored(weight, score, shares[name], structure, restriction)
    for name, made in found.items():
        parametrized(module, name, made)
    return found


def first_scores(weight: Tensor, start: str, sparsity: float, seed: int, name: str) -> Tensor:
    """What scores begin as, ``[*shape]`` float32 or wider; none of them NaN where no weight is."""
    size = weight.to(wide(weight)).abs()
    if start == "magnitude":
        return size
    if start == "equal":
        return torch.where(kept_wholes(size, sparsity), 1.0, 0.99)
    if start == "random":
        return uniform(weight.numel(), start=0, seed=seed, key=f"{name} score").reshape(weight.shape)
    raise Error(f"scores start as 'magnitude', 'equal' or 'random'; got {start!r}")
