"""Press small weights to zero, large ones hardly at all, and a little harder every epoch.

A plain L1 penalty takes from all weights alike, also from those that will stay. This one has the slope of L1 for the
smallest weights and almost none above the magnitude at which the cut will be, and as it grows the knowledge of a
network moves into the weights that are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.room import apply_mask
from weightsmith.prune.sparse._parametrizations import all_but_smallest, snapshot, weights_of, wide
from weightsmith.weights import Pattern, Weights

BEND = math.atanh(1 / math.sqrt(3))
"""0.6585: where the slope of tanh falls fastest, so that it falls around the magnitude of the cut."""


@card(
    paper="Glandorf, Kaiser, Rosenhahn 2023, 'HyperSparse Neural Networks: Shifting Exploration to Exploitation "
    "through Adaptive Regularization'",
    covers=("hypersparse-neural-networks",),
    unit="model",
    claim="after a magnitude cut of 95 % it is more accurate than the same training with L1",
)
def hypersparse(weights: Iterable[Tensor], sparsity: float) -> Tensor:
    r"""What to add to the loss: zero, but with a gradient that shrinks small weights and leaves large ones.

    .. math:: R = \frac{\sum_i |w_i| \sum_j \tanh(s |w_j|)}{\operatorname{sg} \sum_j \tanh(s |w_j|)} - \sum_i |w_i|,
              \qquad s = \frac{0.6585}{|w|_{(\kappa)}}
    .. math:: \frac{\partial R}{\partial w_i} = \operatorname{sgn}(w_i)\, s\, \bigl(1 - \tanh^2(s |w_i|)\bigr)\,
              \frac{\sum_j |w_j|}{\sum_j \tanh(s |w_j|)}

    Args:
        weights: tensors with gradients, taken as one; ``weights_of(module).values()`` as a rule.
        sparsity: :math:`\kappa`, the share that will be removed: :math:`|w|_{(\kappa)}` is the magnitude of the first
            that stays, exact over all weights.

    Returns:
        A number, 0. Some four numbers in float32 are held for each weight. Where the share is zero already, nothing
        is left to press and the gradient is 0.

    Raises:
        Error: no weights, or a share outside [0, 1).

    >>> w = torch.tensor([0.1, -0.2, 3.0], requires_grad=True)
    >>> value = hypersparse([w], 0.5)
    >>> value.backward()
    >>> value.item(), [round(g, 3) for g in w.grad.tolist()]
    (0.0, [5.154, -3.822, 0.0])
    """
    found = list(weights)
    if not found or not 0 <= sparsity < 1:
        raise Error(f"hypersparse needs weights and a share in [0, 1), got {len(found)} tensors and {sparsity}")
    with torch.no_grad():
        home = found[0].device
        size = torch.cat([w.detach().flatten().to(home, wide(w)).abs() for w in found])
        if not len(size):
            raise Error("hypersparse: all of these weights are empty")
        first = size.kthvalue(min(math.floor(sparsity * len(size)), len(size) - 1) + 1).values
        # Of a magnitude of zero s is infinite; every weight is zero or above the bend, and none is pressed.
        slope = torch.where(first > 0, BEND / first.clamp(min=torch.finfo(size.dtype).tiny), 0)
        bent = (size * slope).tanh_()
        ratio = torch.where(first > 0, size.sum() / bent.sum().clamp(min=torch.finfo(size.dtype).tiny), 0) * slope
        pressed = (1 - bent.square_()).mul_(ratio.clamp(max=torch.finfo(size.dtype).max))  # infinite times 0 is NaN
    total = torch.zeros((), device=home, dtype=size.dtype)
    for weight, part in zip(found, pressed.split([w.numel() for w in found]), strict=True):
        held = weight.to(home, size.dtype).flatten()
        total = total + torch.dot(held, part * held.detach().sign())
    return total - total.detach()


class Candidate(NamedTuple):
    """A pruned network on the way."""

    accuracy: float
    weights: Weights
    masks: Weights
    epoch: int


@dataclass(frozen=True)
class Press:
    """Where the pressing stands: what the next epoch needs."""

    epoch: int = 0
    recent: tuple[Candidate, ...] = ()
    best: Candidate | None = None
    best_mean: float = -math.inf
    done: bool = False


def press_step(state: Press, candidate: Candidate, dense: float, window: int = 3) -> Press:
    """The state after an epoch; the one that goes in is not changed.

    Of the last ``window`` epochs the middle one is the best so far where their mean accuracy is the highest so far;
    once that mean exceeds the accuracy of the network that is not pruned, it is done.

    Args:
        state: before the epoch.
        candidate: the network cut after it.
        dense: accuracy on the training data without the cut.
        window: an odd number of epochs.
    """
    recent = (*state.recent, candidate)[-window:]
    best, best_mean = state.best, state.best_mean
    mean = sum(one.accuracy for one in recent) / len(recent)
    if mean > best_mean:
        best, best_mean = recent[len(recent) // 2], mean
    return Press(state.epoch + 1, recent, best, best_mean, best_mean > dense)


@card(
    paper="Glandorf, Kaiser, Rosenhahn 2023, 'HyperSparse Neural Networks: Shifting Exploration to Exploitation "
    "through Adaptive Regularization' (Adaptive Regularized Training)",
    unit="model",
    claim="it finds by itself when the pruned network has caught up with the dense one",
)
def adaptive_training(
    module: nn.Module,
    train: Callable[[nn.Module, Callable[[], Tensor]], object],
    accuracy: Callable[[nn.Module], float],
    sparsity: float = 0.9,
    *,
    pattern: Pattern | None = None,
    amount: float = 5e-6,
    growth: float = 1.05,
    window: int = 3,
    epochs: int = 200,
    penalty: Callable[[Iterable[Tensor], float], Tensor] = hypersparse,
) -> Press:
    r"""Train with a penalty that grows until the network cut by magnitude is better than the one that is not.

    .. math:: \ell + \lambda_0\, \eta^{e} R(w), \qquad e = 0, 1, 2, \dots

    Args:
        module: trained for some epochs without a penalty. In the end it holds the best network that was cut; fine-tune
            it with the mask held.
        train: ``(module, penalty)``: one epoch, in which ``penalty()`` is added to every loss.
        accuracy: ``(module) -> number`` on the training data; it must leave the module as it was.
        sparsity: the share cut, of all weights together.
        pattern: which weights; default the usual ones.
        amount: :math:`\lambda_0`.
        growth: :math:`\eta`.
        window: epochs whose accuracies are averaged, an odd number; so many copies of the model are held, and up to
            three more.
        epochs: the most of them.
        penalty: ``(weights, sparsity) -> number``.

    Returns:
        Press: ``.best`` has the weights, the masks, the accuracy and the epoch; ``.done`` says whether the cut network
        caught up before ``epochs`` were over.

    Raises:
        Error: a share outside [0, 1), a window that is even, no epoch, an amount or growth that is not above 0, or
            accuracies that are NaN.
    """
    if not 0 <= sparsity < 1 or window < 1 or window % 2 == 0 or epochs < 1 or not amount > 0 or not growth > 0:
        raise Error(
            f"adaptive_training: needs a share in [0, 1), an odd window, epochs, amount and growth above 0; got "
            f"{sparsity}, {window}, {epochs}, {amount}, {growth}"
        )
    targets, state = weights_of(module, pattern), Press()
    with progress.task("adaptive training", epochs, "steps") as advance:
        while not state.done and state.epoch < epochs:
            strength = amount * growth**state.epoch
            train(module, lambda strength=strength: strength * penalty(targets.values(), sparsity))
            state = press_step(state, *_cut(module, list(targets), sparsity, accuracy, state.epoch), window)
            advance(1)
    if state.best is None:
        raise Error("adaptive_training: accuracy(module) of every pruned network was NaN; the module is as trained")
    state.best.weights.load_into(module)
    return state


def _cut(
    module: nn.Module, names: list[str], sparsity: float, accuracy: Callable[[nn.Module], float], epoch: int
) -> tuple[Candidate, float]:
    """The network cut by magnitude, and the accuracy of the one that is not; the module is left as it was."""
    dense = accuracy(module)
    before = snapshot(module)
    masks = all_but_smallest(before, names, sparsity)
    cut = Weights.of(apply_mask(before, masks).to_dict())
    try:
        cut.load_into(module)
        found = accuracy(module)
    finally:
        before.load_into(module)
    return Candidate(found, cut, masks, epoch), dense
