"""Remove the weights that training moves towards zero.

While a network that was trained for one thing is trained for another, large weights may be shrinking because they are
in the way, and small ones growing because they are needed. How far and which way a weight is moved tells more than
where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune._autograd import scored_names
from weightsmith.weights import Pattern, Weights, working, working_dtype


@dataclass(frozen=True)
class State:
    """What the next step needs: the scores so far, float32 or wider, and how many steps they are of."""

    totals: Mapping[str, Tensor]
    count: int = 0


@dataclass(frozen=True)
class Info:
    """What a person wants to see: the steps so far, and the share of weights that this one moves towards zero."""

    count: int
    shrinking: float


@card(
    paper="Sanh, Wolf, Rush 2020, 'Movement Pruning: Adaptive Sparsity by Fine-Tuning'",
    needs=("data",),
    unit="model",
    claim="of a fine-tuned network at high sparsity, better than by magnitude",
    departs="beside any training loop, as a sum of what the loop computes anyhow; the scores are not trained by an "
    "optimizer of their own",
)
def movement(model: nn.Module, *, pattern: Pattern | None = None) -> Movement:
    r"""Scores that grow along training: the sum of what each step moves a weight away from zero.

    .. math:: S \leftarrow S - \frac{\partial L}{\partial W} \odot W

    Args:
        model: the one that is trained.
        pattern: which parameters; by default `prunable` ones.

    Returns:
        Movement: call ``update()`` after each backward pass and before the optimizer's step; at the end, or now and
        then, ``by_score(model, recorder.scores(), sparsity)``. Gradients are to be those of the loss by the weights it
        saw: where weights are masked, by the masked ones, of all elements, so that a score can recover.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, -3.0]])
    >>> recorder = movement(layer)
    >>> layer(torch.tensor([[2.0, 5.0]])).sum().backward()      # a step makes both smaller: the first nears zero
    >>> recorder.update().shrinking, recorder.scores()["weight"]
    (0.5, tensor([[-2., 15.]]))
    """
    return Movement(model, pattern)


def init(model: nn.Module, names: list[str]) -> State:
    """Zeros for the parameters of these names."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return State({name: torch.zeros_like(own[name], dtype=working_dtype(own[name].dtype)) for name in names})


@torch.no_grad()
def step(state: State, parameters: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> tuple[State, Info]:
    """Add what one gradient says; parameters without one count as not moved. The state that goes in stays."""
    totals = dict(state.totals)
    falling = 0
    for name, slope in slopes.items():
        towards = working(slope) * working(parameters[name])
        totals[name] = state.totals[name] - towards
        falling += int((towards > 0).sum())
    every = sum(total.numel() for total in totals.values())
    return State(totals, state.count + 1), Info(state.count + 1, falling / max(every, 1))


class Movement:
    """A recorder beside a training loop; see `movement`."""

    def __init__(self, model: nn.Module, pattern: Pattern | None = None):
        self.model = model
        self.state = init(model, scored_names(model, pattern))

    def update(self) -> Info:
        """Take in the gradients that the parameters have now.

        Raises:
            Error: none of the parameters has a gradient, or one is not finite; the scores are then what they were.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        slopes = {name: slope for name in self.state.totals if (slope := own[name].grad) is not None}
        if not slopes:
            raise Error("movement found no gradient: call update() after backward() and before zero_grad()")
        wrong = [name for name, slope in slopes.items() if not slope.isfinite().all()]
        if wrong:
            raise Error(f"the gradients of {listed(wrong)} are not finite; skip update() on steps that overflow")
        self.state, info = step(self.state, own, slopes)
        return info

    def scores(self) -> Weights:
        """The scores so far, ``[*shape]`` float32.

        Raises:
            Error: no step yet, or scores that are not finite, since a weight was not.
        """
        if not self.state.count:
            raise Error("there are no scores yet: call update() after each backward pass")
        wrong = [name for name, total in self.state.totals.items() if not total.isfinite().all()]
        if wrong:
            raise Error(f"the scores of {listed(wrong)} are not finite; were the weights?")
        return Weights.of({name: total.float() for name, total in self.state.totals.items()})

    def above(self, threshold: float) -> Weights:
        r"""The masks of soft movement pruning, :math:`\sigma(S) > \tau`: how much goes follows from the scores.

        There, a penalty on :math:`\sigma(S)` drives the scores down; here nothing does.

        Args:
            threshold: :math:`\tau`, above 0 and below 1; the authors' runs have 0.1.

        Returns:
            Weights: boolean, true where a weight is kept.

        Raises:
            Error: a threshold out of range, or what `scores` refuses.
        """
        if not 0 < threshold < 1:
            raise Error(f"a threshold of sigmoids lies between 0 and 1, got {threshold}")
        scores = self.scores()
        return Weights.of({name: scores[name].sigmoid() > threshold for name in scores})

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"count": self.state.count, "totals": dict(self.state.totals)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            Error: it is of other parameters.
        """
        totals, own = saved["totals"], self.state.totals
        if totals.keys() != own.keys() or any(totals[name].shape != total.shape for name, total in own.items()):
            raise Error(f"the saved scores are of other parameters: {listed(totals)}")
        self.state = State({name: totals[name].to(total) for name, total in own.items()}, int(saved["count"]))
