"""Go only part of the way from a model to its fine-tune, and keep more of what it could do before.

On the straight line between a model and its fine-tune the loss has no barrier as a rule. Part of the
way, most of what was learnt is there already, and most of what the first model could do (under
shift, or on the examples that its users rely on) is there still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.merge import _mean
from weightsmith.merge._parts import at_least, wide
from weightsmith.merge._soups import Evaluate
from weightsmith.merge.room import Source, aligned, check_alike, lift, opened_models
from weightsmith.weights import Lazy, Spec, Weights, apply, materialize, open


@card(
    paper="Wortsman et al. 2022, 'Robust fine-tuning of zero-shot models' (WiSE-FT, Equation 1)",
    covers=("spurious-feature-diversification-improves",),
    needs=("base",),
    unit="element",
    laws=("model_order", "translation", "scale", "rotation"),
    claim="part of the way, more accurate under shift than either end",
)
def wise_ft(models: Tensor, base: Tensor, *, amount: float = 0.5) -> Tensor:
    r"""Weights on the line from ``base`` to its fine-tune.

    .. math:: w = (1 - \alpha)\, w_0 + \alpha\, \bar w

    with :math:`\alpha` the ``amount`` and :math:`\bar w` the mean of the fine-tunes, if there are several.

    Args:
        models: ``[k, *shape]``, k >= 1 fine-tunes of ``base``.
        base: ``[*shape]``, the weights they were started from.
        amount: 0 is the base, 1 the fine-tune; beyond 1 the line goes on.

    Returns:
        ``[*shape]``, in the dtype of ``models``; computed in float32 or wider.

    Raises:
        ValueError: no model, or an ``amount`` that is not finite.

    >>> wise_ft(torch.tensor([[4.0, 8.0]]), torch.zeros(2), amount=0.25)
    tensor([1., 2.])
    """
    at_least(1, models, "wise_ft")
    if not math.isfinite(amount):
        raise Error(f"wise_ft: amount must be a finite number, got {amount}")
    wider, start = wide(models, base)
    return start.lerp(wider.mean(dim=0), float(amount)).to(models.dtype)


_mean_of = lift(_mean.mean)
_between = lift(wise_ft)


@dataclass(frozen=True)
class Update:
    """What the next step needs."""

    new: Weights
    old: Weights
    least: float
    """The quality that must not be lost."""
    importance: Mapping[str, Lazy] | None = None
    """How much each weight matters to the old model, in units of the mean; None for equally."""


@dataclass(frozen=True)
class Trial:
    """What a person wants to see of a step."""

    amount: float
    score: float
    accepted: bool


def init(
    models: Sequence[Weights],
    base: Weights,
    evaluate: Evaluate,
    tolerance: float = 0.0,
    importance: Mapping[str, Lazy] | None = None,
) -> Update:
    """The new model (the mean of several), the old one, and what may not be lost."""
    new = models[0] if len(models) == 1 else _mean_of(models)
    return Update(new, base, evaluate(new) - tolerance, importance)


def step(update: Update, amount: float, evaluate: Evaluate) -> tuple[Weights, Trial]:
    """Go back by ``amount`` of the way to the old model, and see whether that loses anything."""
    mixed = _held(update, amount) if update.importance else _between([update.new], update.old, amount=1 - amount)
    score = evaluate(mixed)
    return mixed, Trial(amount, score, score >= update.least)


def _held(update: Update, amount: float) -> Weights:
    """Back to the old model by ``amount``, and further where a weight matters more to it."""
    told = update.importance or {}

    def build(name: str, new: Lazy, old: Lazy) -> Lazy:
        if not new.spec.dtype.is_floating_point:
            return old
        given = (new, old, told[name]) if name in told else (new, old)
        return apply(held, *given, spec=new.spec, options={"amount": amount})

    return update.new.zip_nodes(build, (update.old,), "merge.held", {"amount": amount})


def held(new: Tensor, old: Tensor, importance: Tensor | None = None, *, amount: float) -> Tensor:
    """``(a f old + (1 - a) new) / (a f + 1 - a)`` with ``f`` the importance ``[*shape]``, 1 by default.

    With ``a = 1`` it is the old weight, where ``f`` is 0 as well.

    >>> held(torch.tensor([4.0, 4.0, 4.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 3.0]), amount=0.5)
    tensor([4., 2., 1.])
    """
    new, old = wide(new, old)
    if amount == 1:
        return old.clone()
    free = 1 - amount
    share = free if importance is None else free / (amount * importance.to(new.dtype) + free)
    return old + share * (new - old)


def importance_of(stats: Weights, old: Weights) -> dict[str, Lazy]:
    """Fisher information over its mean, for the weights of which it speaks; the mean is that of all of them."""
    stacks = aligned((stats,), old.select(floating=True), "stats.fisher", "backward_compatible")
    nodes = {name: stack.members[0] for name, stack in stacks.items()}
    total, count, wrong = 0.0, 0, []
    for name, node in {id(node): (name, node) for name, node in nodes.items()}.values():
        values = materialize(node)
        total, count = total + float(values.sum(dtype=torch.float64)), count + values.numel()
        if not (values >= 0).all() or not values.isfinite().all():
            wrong.append(name)
    if wrong:
        raise Error(f"backward_compatible: Fisher information must be finite and not negative; {listed(wrong)} is not")
    if not total > 0:
        raise Error("backward_compatible: the Fisher information is zero everywhere")
    over = count / total
    return {name: apply(_times, node, over, spec=Spec(node.spec.shape, torch.float32)) for name, node in nodes.items()}


def _times(values: Tensor, factor: float) -> Tensor:
    return values * factor


@card(
    paper="Schumann et al. 2023, 'Backward Compatibility During Data Updates by Weight Interpolation'",
    covers=("backward-compatible-interpolation",),
    needs=("base", "evaluate"),
    unit="model",
    claim="fewer right answers turn wrong than with the new model, at no loss on held-out data",
    departs="the amount is searched on a grid from the old model down; Fisher information is divided by its mean, so "
    "that equal information is the straight line",
)
def backward_compatible(
    models: Sequence[Source],
    base: Source,
    evaluate: Evaluate,
    steps: int = 20,
    tolerance: float = 0.0,
    on_step: Callable[[Trial], None] | None = None,
    stats: Source | None = None,
) -> Weights:
    r"""An update of a model that turns as few right answers wrong as it can without a loss of quality.

    .. math:: w = \frac{a\, f\, w_0 + (1 - a)\, \bar w}{a\, f + 1 - a}

    with :math:`w_0` the old model, :math:`\bar w` the mean of the new ones, and :math:`a` the largest of
    :math:`1, 1 - 1/s, \dots, 1/s, 0` that does not lose on held-out data against :math:`\bar w`. Without
    statistics :math:`f = 1`, the straight line; with Fisher information of the old model, over its mean, weights that
    matter to it are held more firmly.

    Args:
        models: one new model or several, trained on from ``base``; anything that `weightsmith.open` opens.
        base: the old model.
        evaluate: ``weights -> quality`` on held-out data, higher is better; called at most ``steps`` + 1 times.
        steps: how finely :math:`a` is searched.
        tolerance: how much quality may be lost.
        on_step: told of every amount that was tried.
        stats: diagonal Fisher information of the old model (`weightsmith.stats.fisher`), read once beforehand.
            Weights of which it does not speak have :math:`f = 1`. It is spread over orders of magnitude, so most
            weights go back only at amounts close to 1: take more ``steps``.

    Returns:
        Weights: lazy, like every merge. ``lineage`` names the amount of the old model that is in it.

    Raises:
        ValueError: no model, models of different architectures, no step, or statistics of other weights.

    >>> new, old = ws.Weights.of({"w": torch.tensor([4.0])}), ws.Weights.of({"w": torch.tensor([0.0])})
    >>> backward_compatible([new], old, lambda w: min(float(w["w"]), 3.0))["w"]     # a quarter of the way is free
    tensor([3.])
    """
    if steps < 1:
        raise Error(f"backward_compatible needs at least 1 step, got {steps}")
    if not tolerance >= 0:
        raise Error(f"backward_compatible: tolerance must be at least 0, got {tolerance}")
    opened, old = opened_models(models, "backward_compatible"), open(base)
    check_alike(opened, old, "backward_compatible")
    importance = None if stats is None else importance_of(open(stats), old)
    with progress.task("backward compatible", steps + 1) as advance:

        def counted(weights: Weights) -> float:
            score = float(evaluate(weights))
            advance(1)
            return score

        update = init(opened, old, counted, tolerance, importance)
        chosen, amount = update.new, 0.0
        for number in range(steps, 0, -1):
            mixed, trial = step(update, number / steps, counted)
            if on_step is not None:
                on_step(trial)
            if trial.accepted:
                chosen, amount = mixed, trial.amount
                break
    options = {"amount": amount, "least": update.least}
    return chosen.zip_nodes(lambda name, node: node, (), "merge.backward_compatible", options)
