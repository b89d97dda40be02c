"""How well a network recovers from a pruning: what it can do after some more training, less what it could before.

Early in training, after small prunings, and at large learning rates networks recover best; that is why pruning in many
small steps while training goes on works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune.room import chosen_targets
from weightsmith.prune.sparse._controller import control
from weightsmith.prune.sparse._rules import Moment, Rule, Span, static, updated
from weightsmith.weights import Pattern, open

Held = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class Plasticity:
    """Scores around a pruning."""

    before: float
    pruned: float
    """Right after it."""
    after: float
    """After the training that followed."""

    @property
    def gain(self) -> float:
        """The pruning plasticity: below zero where the network did not recover."""
        return self.after - self.before


@card(
    paper="Liu et al. 2021, 'Sparse Training via Boosting Pruning Plasticity with Neuroregeneration' "
    "(pruning plasticity)",
    unit="model",
    needs=("data", "evaluate"),
    claim="networks recover from many small prunings during training better than from a late large one",
)
def plasticity(
    model: nn.Module,
    train: Callable[[nn.Module, Held], Any],
    evaluate: Callable[[nn.Module], float],
    sparsity: float,
    *,
    regrow: float = 0.0,
    gradients: Mapping[str, Tensor] | None = None,
    scope: Span = "global",
    pattern: Pattern | None = None,
) -> Plasticity:
    r"""Prune by magnitude, train on for a while, and compare.

    .. math:: \text{plasticity} = q_{t + k} - q_t

    Args:
        model: as it is now, maybe sparse already; left as it is.
        train: ``(model, hold)``: trains the copy it is given for k epochs, and calls ``hold(optimizer)`` once, which
            keeps the zeros.
        evaluate: the score of a model, higher is better.
        sparsity: share that is removed after the pruning, of what there ever was.
        regrow: share of what is left that is exchanged for the places with the largest gradients (neuroregeneration).
        gradients: ``[*shape]`` by weight, where ``regrow`` is above 0.
        scope: whether the smallest of all tensors go, or of each the same share.
        pattern: which weights; by default those that are usually pruned.

    Returns:
        Plasticity: ``gain`` is the figure.

    Raises:
        Error: gradients are needed and lack, or ``train`` did not hold the zeros.

    >>> layer = nn.Linear(4, 2)
    >>> found = plasticity(layer, lambda model, hold: None, lambda model: float((model.weight != 0).sum()), 0.5)
    >>> found.before, found.pruned, found.gain
    (8.0, 4.0, -4.0)
    """
    names = chosen_targets(open(model), pattern)
    if regrow > 0 and (gradients is None or any(name not in gradients for name in names)):
        raise Error("plasticity: regrow goes by gradients; give gradients= of every weight, such as those of one batch")
    made = copy.deepcopy(model)
    state = made.state_dict()
    weights = {name: state[name] for name in names}
    there = {name: weight != 0 for name, weight in weights.items()}
    rule = Rule("plasticity", sparsity, None, 1, 0, 1, fraction=regrow, decay=False, grow="gradient", scope=scope)
    shares = {name: (1 - sparsity) * weight.numel() for name, weight in weights.items()}
    masks = updated(rule, Moment(1, weights, there, gradients or {}), shares)
    before = float(evaluate(model))
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0)
    pruned = float(evaluate(made))

    def hold(optimizer: torch.optim.Optimizer) -> Any:
        return control(made, optimizer, static(), masks=masks)

    train(made, hold)
    grown = [name for name, mask in masks.items() if bool((weights[name][~mask] != 0).any())]
    if grown:
        raise Error(f"plasticity: zeros of {listed(grown)} were not kept; train calls hold(optimizer) before it steps")
    return Plasticity(before, pruned, float(evaluate(made)))
