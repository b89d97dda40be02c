"""Let weights fade out of an N:M pattern instead of cutting them, so that their gradients stay clean.

With a hard mask from the first step on, weights that are masked learn from the outputs of a network that never saw
them. Here they keep a share of their effect that falls to nothing: all weights stay free to enter the pattern while
there is still time, and in the last phase the pattern is exact.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.adapt import parametrized
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune._select import kept_of_groups, pattern_of
from weightsmith.prune.sparse._parametrizations import Scheduled, fan_in, weights_of
from weightsmith.weights import Pattern, PerTensor
from weightsmith.weights import resolve as resolved

Decay = Literal["linear", "exponential", "structure", "hard"]

STEEPNESS = 5.0
"""Of an exponential decay: so many factors of e until the hard phase, so that the last jump is below a hundredth."""


class _Fading(torch.autograd.Function):
    """Weights outside of the mask times ``share``; backwards all weights get the whole gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, share: float, pull: float) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, weight * share if share else torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if ctx.pull:
            weight, mask = ctx.saved_tensors
            gradient = gradient + ctx.pull * torch.where(mask, torch.zeros_like(weight), weight)
        return gradient, None, None, None


class NMDecay(Scheduled):
    """The parametrization ``W -> W * (mask + (1 - mask) * share)``; see `nm_decay`.

    Args:
        keep: N.
        group: M.
        decay: how the share or the pattern falls.
        start: progress at which it begins; before, the weight is dense.
        end: progress at which the mask is hard.
        pull: added to the gradient is this much of each weight that is masked.
    """

    def __init__(self, keep: int, group: int, decay: Decay, start: float, end: float, pull: float):
        super().__init__()
        self.keep, self.group, self.decay = keep, group, decay
        self.start, self.end, self.pull = start, end, pull

    def now(self) -> tuple[int, float]:
        """So many of a group count in full now, and the others this share of it."""
        if self.decay == "hard" or self.progress >= self.end:
            return self.keep, 0.0
        if self.progress < self.start:
            return self.group, 1.0
        done = (self.progress - self.start) / (self.end - self.start)
        if self.decay == "structure":
            levels = levels_of(self.keep, self.group)
            return levels[min(int(done * len(levels)), len(levels) - 1)], 0.0
        return self.keep, 1 - done if self.decay == "linear" else math.exp(-STEEPNESS * done)

    def forward(self, weight: Tensor) -> Tensor:
        keep, share = self.now()
        if keep == self.group or share == 1:
            return weight
        mask = kept_of_groups(weight.detach().abs(), keep=keep, group=self.group)
        return _Fading.apply(weight, mask, share, self.pull)  # type: ignore[return-value]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def levels_of(keep: int, group: int) -> list[int]:
    """How many of a group are kept, phase by phase.

    >>> levels_of(1, 16), levels_of(2, 4), levels_of(3, 8)
    ([15, 8, 4, 2, 1], [3, 2], [7, 4, 3])
    """
    levels = [group - 1]
    half = group // 2
    while half > keep:
        levels.append(half)
        half //= 2
    return sorted({*levels, keep}, reverse=True)


@card(
    paper="Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna 2024, 'Progressive Gradient Flow for "
    "Robust N:M Sparsity Training in Transformers'",
    covers=("nm-mask-decay",),
    unit="model",
    claim="in transformers, at 1:8 and 1:16, it is more accurate than a hard mask with SR-STE",
    departs="the decay ends where the hard phase begins, instead of being given as a rate for each step; groups of a "
    "convolution run over its flattened inputs, as everywhere in this room, not over channels alone",
)
def nm_decay(
    module: nn.Module,
    sparsity: PerTensor[str] = "2:4",
    *,
    pattern: Pattern | None = None,
    decay: Decay = "linear",
    start: float = 0.0,
    end: float = 0.8,
    pull: float = 0.0,
) -> dict[str, NMDecay]:
    r"""Train weights into an N:M pattern whose masked part fades.

    .. math:: \tilde W = W \odot \bigl( m + (1 - m)\, \beta_t \bigr), \qquad
              \frac{\partial}{\partial W} := \frac{\partial}{\partial \tilde W} + \lambda\, (1 - m) \odot W

    with ``m`` the N largest magnitudes of every M inputs, found anew in every forward pass. Call `advance` after every
    step: it is what makes :math:`\beta_t` fall. At a progress of ``end`` the mask is hard, and `weightsmith.adapt.fold`
    leaves weights that satisfy N:M exactly.

    Args:
        module: changed in place; its weights stay ordinary parameters.
        sparsity: ``"N:M"``, possibly by tensor.
        pattern: of the names of weights, ``[out, ...]`` each; default the usual ones.
        decay: ``"linear"`` or ``"exponential"`` for :math:`\beta_t`; ``"structure"`` for hard masks that go from M-1:M
            by halves to N:M in equal phases; ``"hard"`` for N:M from the first step on. ``"hard"`` with ``pull=2e-4``
            is SR-STE.
        start: progress at which the decay begins; before, weights are dense.
        end: progress at which the mask is hard, at most 1.
        pull: :math:`\lambda`, shrinks masked weights; 0 in the paper's own method.

    Returns:
        name of a weight -> its parametrization, in order.

    Raises:
        Error: inputs that cannot be cut into groups of M, no weight that fits, or phases out of order.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    >>> _ = nm_decay(model, "2:4", end=1.0)
    >>> from weightsmith.prune.sparse import advance
    >>> advance(model, 0.5)
    >>> model.weight.tolist()
    [[4.0, 0.5, 3.0, 1.0]]
    >>> advance(model, 1.0)
    >>> model.weight.tolist()
    [[4.0, 0.0, 3.0, 0.0]]
    """
    if decay not in get_args(Decay):
        raise Error(f"nm_decay: decay is one of {', '.join(get_args(Decay))}; got {decay!r}")
    if not 0 <= start < end <= 1 or pull < 0:
        raise Error(f"nm_decay needs 0 <= start < end <= 1 and pull >= 0, got {start}, {end} and {pull}")
    targets = weights_of(module, pattern)
    patterns: dict[str, tuple[int, int]] = {}
    for name, said in resolved(sparsity, targets, "sparsity").items():
        keep, group = patterns[name] = pattern_of(str(said), f"sparsity of {name}")
        if not 0 < keep < group:
            raise Error(f"nm_decay: {said!r} for {name} keeps nothing or everything")
        if fan_in(targets[name]) % group:
            raise Error(f"{name}: its {fan_in(targets[name])} inputs a row cannot be cut into groups of {group}")
    found: dict[str, NMDecay] = {}
    for name, (keep, group) in patterns.items():
        found[name] = NMDecay(keep, group, decay, start, end, pull)
        parametrized(module, name, found[name])
    return found
