"""Rules of sparse training: when masks move, what goes, what comes.

One rule in several rows. At a step that is due, (1) the smallest weights go until as many are left as the schedule
says, (2) a further share of the smallest is dropped and (3) as many come, at random, or where the gradient or the
momentum is largest, and begin as zeros; who went in the same change may come back, and is as it was. A rule is data;
`updated` is what it does, a pure function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.sparse._exchange import apportioned, highest
from weightsmith.prune.sparse._schedules import cosine, cubic
from weightsmith.solve import generator_for

Grow = Literal["random", "gradient", "momentum"]
Span = Literal["tensor", "global"]


@dataclass(frozen=True)
class Rule:
    """A rule of sparse training; rows such as `rigl` fill it in.

    Raises:
        Error: a share outside [0, 1), a period below one step or without an exchange before the end, an end that is not
            after the beginning.
    """

    name: str
    sparsity: float | None
    """Share removed in the end; None for that of the masks or densities that are given."""
    initial: float | None = None
    """Share removed at first, from where a cubic schedule leads on; None: `sparsity` all along."""
    every: int = 0
    """Steps between two changes of the masks; 0 for never."""
    start: int = 0
    stop: int = 0
    """The step of the last change, and of the end of the schedule."""
    last: int = 0
    """The exchange goes on until here, where that is later than `stop`."""
    fraction: float = 0.0
    """Share of the weights that is dropped and grown again at a change; falls to nothing along a cosine."""
    decay: bool = True
    """Whether it falls."""
    grow: Grow = "random"
    scope: Span = "tensor"
    """Whether the schedule is each tensor's (of its density), or that of all together."""
    redistribute: bool = False
    """Whether what was dropped comes back in tensors in proportion to their mean momentum."""
    shrink: float = 0.0
    """Share by which weights outside the mask become smaller each step until `stop`, instead of being zero."""

    def __post_init__(self) -> None:
        shares = {"sparsity": self.sparsity, "initial": self.initial, "fraction": self.fraction, "shrink": self.shrink}
        for option, share in shares.items():
            top = share is not None and option == "shrink" and share == 1
            if share is not None and not (0 <= share < 1 or top):
                raise Error(f"{self.name}: {option} is a share from 0 to below 1, got {share}")
        if self.initial is not None and self.sparsity is not None and self.initial > self.sparsity:
            raise Error(f"{self.name}: initial={self.initial:g} is sparser than sparsity={self.sparsity:g}")
        if self.grow not in get_args(Grow) or self.scope not in get_args(Span):
            raise Error(f"{self.name}: grow is one of {get_args(Grow)} and scope one of {get_args(Span)}")
        if self.every < 0 or (self.every and not 0 <= self.start < self.stop):
            raise Error(
                f"{self.name}: masks move every 1 or more steps, from start to a later stop; got every={self.every}, "
                f"start={self.start}, stop={self.stop}"
            )
        if self.every and self.decay and self.fraction > 0 and not self.start and self.every >= self.end:
            raise Error(
                f"{self.name}: every={self.every} leaves no exchange before step {self.end}, where the share is zero; "
                "take a smaller every, or a later stop"
            )

    @property
    def end(self) -> int:
        """The last step at which masks may move."""
        return max(self.stop, self.last)

    @property
    def dense_momentum(self) -> bool:
        """Whether the optimizer sees gradients of weights that are not there, so that their momentum is known."""
        return self.grow == "momentum" and self.fraction > 0

    def due(self, step: int) -> bool:
        """Whether masks move after this step; steps count from 1."""
        if not self.every or not max(self.start, 1) <= step <= self.end:
            return False
        return (step - self.start) % self.every == 0 or step in (self.stop, self.end)

    def sparsity_at(self, step: int) -> float:
        """The share that is removed after a step that is due."""
        if self.sparsity is None:
            raise Error(f"{self.name}: say sparsity=, or give masks= or densities by tensor to control")
        if self.initial is None:
            return self.sparsity
        return cubic(step, self.initial, self.sparsity, self.start, self.stop)

    def fraction_at(self, step: int) -> float:
        """The share that is exchanged."""
        return cosine(step, self.fraction, self.start, self.end) if self.decay and self.every else self.fraction

    def soft(self, step: int) -> bool:
        """Whether weights outside the mask are still there after this step, only smaller."""
        return self.shrink > 0 and step < self.stop


@dataclass(frozen=True)
class Moment:
    """What a rule sees."""

    step: int
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    """True where a weight is there."""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """Of all places, also where no weight is; tensors without one are not exchanged."""
    momenta: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0


@torch.no_grad()
def updated(rule: Rule, moment: Moment, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The masks after a step that is due. Nothing that goes in is changed.

    Args:
        rule: what to do.
        moment: what is known.
        shares: tensor -> how many weights the schedule wants there, not yet whole numbers.

    Returns:
        ``[*shape]`` bool masks, together with exactly ``n - round(s n)`` weights.

    >>> rule = gmp(0.5, every=1, stop=1)
    >>> now = Moment(1, {"w": torch.tensor([3.0, 1.0, 2.0, 4.0])}, {"w": torch.ones(4, dtype=torch.bool)})
    >>> updated(rule, now, {"w": 2.0})
    {'w': tensor([ True, False, False,  True])}
    """
    masks = thinned(rule, moment, shares)
    fraction = rule.fraction_at(moment.step)
    return exchanged(rule, moment, masks, fraction) if fraction > 0 else masks


def thinned(rule: Rule, moment: Moment, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The smallest go, until as many are left as the schedule says; while they only shrink, anyone can come back."""
    masks, weights = moment.masks, moment.weights
    numels = {name: mask.numel() for name, mask in masks.items()}
    total = sum(numels.values())
    keep = total - round(rule.sparsity_at(moment.step) * total)
    if rule.scope == "global":
        scores = torch.cat([weights[name].abs().reshape(-1).float() for name in masks])
        among = None if rule.shrink else torch.cat([mask.reshape(-1) for mask in masks.values()])
        parts = highest(scores, keep, among).split(list(numels.values()))
        return {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}
    room = numels if rule.shrink else {name: int(mask.sum()) for name, mask in masks.items()}
    counts = apportioned(shares, keep, room)
    return {name: highest(weights[name].abs(), counts[name], None if rule.shrink else masks[name]) for name in masks}


def exchanged(rule: Rule, moment: Moment, masks: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The smallest share of each tensor goes; as many weights come, anywhere but where one is left."""
    found = dict(masks)
    told = {"gradient": moment.gradients, "momentum": moment.momenta}.get(rule.grow)
    names = [name for name in masks if told is None or name in told]
    left, freed, sizes = {}, {}, {}
    for name in names:
        count = int(masks[name].sum())
        freed[name] = round(fraction * count)
        left[name] = highest(moment.weights[name].abs(), count - freed[name], masks[name])
        if rule.redistribute:
            sizes[name] = float(moment.momenta[name].abs()[masks[name]].double().mean()) if count else 0.0
    if rule.redistribute:
        room = {name: int((~left[name]).sum()) for name in names}
        freed = apportioned(sizes, sum(freed.values()), room)
    for name in names:
        free = ~left[name]
        score = told[name].abs() if told is not None else drawn(free.shape, moment.seed, name, moment.step, free.device)
        found[name] = left[name] | highest(score, freed[name], free)
    return found


def drawn(shape: torch.Size, seed: int, name: str, step: int, device: torch.device | None = None) -> Tensor:
    """Random scores of a tensor, the same on every device and in every process."""
    return torch.rand(shape, generator=generator_for(seed, name, step)).to(device)


# The rows


@card(
    paper="Mocanu et al. 2018, 'Scalable training of artificial neural networks with adaptive sparse connectivity "
    "inspired by network science': the sparse start, kept",
    unit="model",
    claim="what a fixed mask can do, which every mask that moves should beat",
)
def static(sparsity: float | None = None) -> Rule:
    """One mask from beginning to end: random, or the one given to `control`.

    Args:
        sparsity: share removed; None for that of the masks or densities given to `control`.

    >>> static(0.9).due(100)
    False
    """
    return Rule("static", sparsity)


@card(
    paper="Zhu, Gupta 2018, 'To prune, or not to prune: exploring the efficacy of pruning for model compression'",
    unit="model",
    claim="a large network pruned while it learns beats a small dense one of as many weights",
)
def gmp(
    sparsity: float | None, *, every: int, stop: int, start: int = 0, initial: float = 0.0, scope: Span = "tensor"
) -> Rule:
    r"""Gradual magnitude pruning: the smallest weights go, many at first and few in the end; none comes back.

    .. math:: s_t = s_f + (s_i - s_f) \Bigl( 1 - \frac{t - t_0}{t_1 - t_0} \Bigr)^3

    Args:
        sparsity: :math:`s_f`, share removed in the end; None for that of densities given to `control`.
        every: steps between two prunings.
        stop: :math:`t_1`, the step of the last.
        start: :math:`t_0`.
        initial: :math:`s_i`; above 0 the run begins with a random mask.
        scope: whether each tensor loses its share (see ``densities`` of `control`), or the smallest of all go.

    >>> [round(gmp(0.8, every=5, stop=20).sparsity_at(step), 3) for step in (0, 5, 10, 20)]
    [0.0, 0.463, 0.7, 0.8]
    """
    return Rule("gmp", sparsity, initial, _period(every, "gmp"), start, stop, scope=scope)


@card(
    paper="Mocanu et al. 2018, 'Scalable training of artificial neural networks with adaptive sparse connectivity "
    "inspired by network science' (SET)",
    unit="model",
    claim="connections that are replaced at random learn more than fixed ones",
    departs="the smallest absolute values go, where the paper takes as large a share of the positive and of the "
    "negative ones",
)
def sparse_evolutionary(sparsity: float | None = None, *, every: int, stop: int, fraction: float = 0.3) -> Rule:
    """SET: a share of the smallest weights goes, as many random ones come.

    Args:
        sparsity: share removed, the same all along.
        every: steps between two exchanges; in the paper an epoch.
        stop: the step of the last.
        fraction: share exchanged; stays the same.

    >>> sparse_evolutionary(0.9, every=100, stop=1000).fraction_at(900)
    0.3
    """
    period = _period(every, "sparse_evolutionary")
    return Rule("sparse_evolutionary", sparsity, None, period, 0, stop, fraction=fraction, decay=False)


@card(
    paper="Evci, Gale, Menick, Castro, Elsen 2020, 'Rigging the Lottery: Making All Tickets Winners' (Algorithm 1)",
    unit="model",
    claim="weights grown where the gradient is largest learn more than random ones",
    departs="an exchange follows the step whose gradient it uses, where the paper exchanges instead of stepping",
)
def rigl(sparsity: float | None = None, *, every: int = 100, stop: int, fraction: float = 0.3) -> Rule:
    r"""RigL: the smallest weights go, as many come where the gradient is largest.

    .. math:: f_t = \tfrac{\alpha}{2} (1 + \cos \tfrac{\pi t}{t_1})

    Needs gradients of all places only at the steps of an exchange; the optimizer never sees them.

    Args:
        sparsity: share removed, the same all along.
        every: steps between two exchanges.
        stop: :math:`t_1`, the step of the last; in the paper three quarters of the run.
        fraction: :math:`\alpha`, share exchanged at first.

    >>> rigl(0.9, every=100, stop=1000).fraction_at(500)
    0.15
    """
    return Rule("rigl", sparsity, None, _period(every, "rigl"), 0, stop, fraction=fraction, grow="gradient")


@card(
    paper="Dettmers, Zettlemoyer 2019, 'Sparse Networks from Scratch: Faster Training without Losing Performance'",
    covers=("sparse-networks-from-scratch",),
    unit="model",
    claim="with momentum saying where weights are wanted, sparse training beats fixed masks and random growth",
    departs="the number of weights is exact at every step; momentum of places without weights is kept, not reset; "
    "nearly dense layers are dropped from like others",
)
def sparse_momentum(sparsity: float | None = None, *, every: int, stop: int, fraction: float = 0.5) -> Rule:
    r"""Sparse momentum: weights come in the layers, and at the places, where the momentum is largest.

    .. math:: g_l \propto \operatorname{mean}_{i \in l} |m_i|, \qquad \sum_l g_l = \sum_l d_l

    with :math:`d_l` the weights dropped in a layer, :math:`g_l` those grown, and the mean over weights that are there
    before any is dropped.
    Of optimizers with second moments, :math:`m` is :math:`\hat m / (\sqrt{\hat v} + 10^{-8})`.

    The optimizer sees gradients of all places, so that their momentum is known: gradients are dense at every step.

    Args:
        sparsity: share removed of all tensors together, the same all along.
        every: steps between two exchanges; in the paper an epoch.
        stop: the step of the last.
        fraction: share exchanged at first; falls to nothing along a cosine.

    >>> sparse_momentum(0.95, every=38, stop=380).dense_momentum
    True
    """
    period = _period(every, "sparse_momentum")
    return Rule(
        "sparse_momentum", sparsity, None, period, 0, stop, fraction=fraction, grow="momentum", redistribute=True
    )


@card(
    paper="Liu et al. 2021, 'Sparse Training via Boosting Pruning Plasticity with Neuroregeneration' (GraNet)",
    covers=("granet",),
    unit="model",
    claim="gradual pruning that regrows as it prunes ends better than gradual pruning alone",
    departs="the number of weights is exact at every step; weights that are pruned and grown in one change keep their "
    "value",
)
def granet(
    sparsity: float | None,
    *,
    every: int,
    stop: int,
    start: int = 0,
    initial: float = 0.5,
    fraction: float = 0.5,
    last: int | None = None,
    scope: Span = "global",
) -> Rule:
    r"""GraNet: gradual pruning; at each pruning a share of what is left is exchanged for places with large gradients.

    Args:
        sparsity: share removed in the end; None for that of densities given to `control`.
        every: steps between two prunings.
        stop: the step at which the schedule (see `gmp`) ends.
        start: the step at which it begins.
        initial: share removed at first: 0 for dense-to-sparse, above it sparse-to-sparse.
        fraction: share exchanged at first, in each tensor; falls to nothing along a cosine.
        last: the step of the last exchange, by default ``stop``; in the authors' code the end of training.
        scope: whether the smallest of all tensors are pruned, or each tensor's share.

    >>> granet(0.9, every=10, stop=100).sparsity_at(100)
    0.9
    """
    period, last = _period(every, "granet"), stop if last is None else last
    return Rule("granet", sparsity, initial, period, start, stop, last, fraction, grow="gradient", scope=scope)


@card(
    paper="Wang, Wang, Zhang, Fu, Tao 2023, 'Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution' "
    "(ISS-P)",
    covers=("iterative-soft-shrinkage-learning",),
    unit="model",
    claim="shrinking the smallest weights a little each step ends better than zeroing them each step",
)
def soft_shrinkage(
    sparsity: float | None, *, stop: int, amount: float = 0.05, every: int = 1, initial: float | None = None
) -> Rule:
    r"""ISS-P: each step the smallest weights become a little smaller; who grows back is let alone.

    .. math:: w \leftarrow w - a |w| \operatorname{sign}(w) \quad \text{for the smallest share } p_t

    At ``stop`` the smallest share is set to zero, and the mask stays. Until then nothing is zero, gradients are dense,
    and masks say which weights do not shrink; with ``amount=1`` it is iterative hard thresholding.

    Args:
        sparsity: :math:`p`, of each tensor by its density; None for that of densities given to `control`.
        stop: the step at which shrinking ends.
        amount: :math:`a`; 0.05 in the authors' commands.
        every: steps after which it is found out anew which are the smallest.
        initial: where given, :math:`p_t` grows from it along the cubic schedule of `gmp`.

    >>> soft_shrinkage(0.9, stop=100).soft(99), soft_shrinkage(0.9, stop=100).soft(100)
    (True, False)
    """
    if not amount > 0:
        raise Error(f"soft_shrinkage: amount is above 0 and at most 1, got {amount}")
    return Rule("soft_shrinkage", sparsity, initial, _period(every, "soft_shrinkage"), 0, stop, shrink=amount)


def _period(every: int, rule: str) -> int:
    if every < 1:
        raise Error(f"{rule}: masks move every 1 or more steps, got every={every}")
    return every
