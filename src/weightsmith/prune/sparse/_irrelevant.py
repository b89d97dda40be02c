"""Weight decay only for the weights that the loss does not feel.

Where the gradient is small, a weight can shrink without harm; where it is large, the weight is needed and only learns.
So decay gathers what can be cut, and a threshold is raised as far as a validation score allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.room import apply_mask
from weightsmith.prune.sparse._parametrizations import all_but_smallest, snapshot, weights_of, wide
from weightsmith.weights import Pattern, Weights

Gate = Callable[[Tensor], Tensor]
"""``gradient [*shape] -> [*shape]`` in [0, 1]: the share of the decay that a weight gets."""


def exponential_gate(gradient: Tensor, scale: float | None = None) -> Tensor:
    """``exp(-|g| / scale)``: all of the decay where nothing is felt.

    Args:
        gradient: ``[*shape]``.
        scale: what counts as a large gradient; None: the root mean square of this tensor's.

    >>> [round(share, 3) for share in exponential_gate(torch.tensor([0.0, 1.0, -2.0]), 1.0).tolist()]
    [1.0, 0.368, 0.135]
    """
    return (-_measured(gradient, scale)).exp_()


def linear_gate(gradient: Tensor, scale: float | None = None) -> Tensor:
    """``max(0, 1 - |g| / scale)``: no decay at all from a gradient of ``scale`` on; see `exponential_gate`.

    >>> linear_gate(torch.tensor([0.0, 0.25, -2.0]), 1.0).tolist()
    [1.0, 0.75, 0.0]
    """
    return (1 - _measured(gradient, scale)).clamp_(min=0)


def _measured(gradient: Tensor, scale: float | None) -> Tensor:
    size = gradient.abs()
    least = torch.finfo(size.dtype).tiny
    if scale is not None or not size.numel():
        return size / max(scale or 0.0, least)
    unit = size.square().mean().sqrt()
    unit = torch.where((unit > 0) & unit.isfinite(), unit, size.amax())  # squares leave the range before numbers do
    return size / unit.clamp(min=least)


def decayed(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rate: float | Tensor, gate: Gate = exponential_gate
) -> None:
    r"""One step of the decay, in place: :math:`w \leftarrow w - \rho\, \Gamma(g) \odot w`.

    Args:
        weights: changed; those without a gradient are not.
        gradients: of the same shapes.
        rate: :math:`\rho`, learning rate times decay as a rule.
        gate: :math:`\Gamma`, of gradients in float32 or wider; 1 for all is plain decoupled weight decay.

    >>> w = torch.tensor([1.0, 1.0])
    >>> decayed([w], [torch.tensor([0.0, 9.0])], 0.1, gate=lambda g: (g == 0).float())
    >>> w
    tensor([0.9000, 1.0000])
    """
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.mul_(gate(gradient.to(wide(gradient))).mul(-rate).add_(1))


@card(
    paper="Bonetta, Ribero, Cancelliere 2022, 'Regularization-based Pruning of Irrelevant Weights in Deep Neural "
    "Architectures'",
    covers=("regularization-based-pruning-irrelevant-weights",),
    unit="model",
    claim="at equal accuracy more weights can be cut than after plain weight decay",
    departs="the gate is a function that can be chosen; the paper's own could not be looked up. exp(-|g|) is one with "
    "scale=1; by default gradients count in units of their root mean square, so that the loss's own unit does not",
)
def irrelevant_decay(
    optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], amount: float = 1e-2, *, gate: Gate = exponential_gate
) -> RemovableHandle:
    r"""Let an optimizer decay the weights whose gradient is small, before each of its steps.

    .. math:: w \leftarrow w - \eta \lambda\, \Gamma(g) \odot w

    Decoupled, as in AdamW: the optimizer's own moments do not see it. With :math:`\Gamma = 1` it is AdamW's decay.
    Set the optimizer's own ``weight_decay`` of these weights to 0. Where ``step`` is given a closure, the gradients
    that count are those from before it.

    Args:
        optimizer: any; :math:`\eta` is the learning rate of each of its groups at the time.
        weights: parameters of it; ``weights_of(module).values()`` as a rule.
        amount: :math:`\lambda`.
        gate: :math:`\Gamma`, `exponential_gate`, `linear_gate` or your own.

    Returns:
        A handle; ``.remove()`` ends the decay.

    Raises:
        Error: no weights, one that the optimizer does not have, or an amount below 0.

    >>> w = nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = torch.optim.SGD([w], lr=0.5)
    >>> handle = irrelevant_decay(optimizer, [w], 0.2)
    >>> w.grad = torch.zeros(2)
    >>> _ = optimizer.step()
    >>> w.tolist()
    [0.8999999761581421, 0.8999999761581421]
    """
    if not amount >= 0:
        raise Error(f"irrelevant_decay: amount must not be below 0, got {amount}")
    chosen = {id(weight) for weight in weights}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not chosen:
        raise Error("irrelevant_decay needs weights, such as weights_of(module).values(); got none")
    if not chosen <= known:
        raise Error(
            f"irrelevant_decay: {len(chosen - known)} of {len(chosen)} weights are none of the optimizer's; name those "
            "that it was made with"
        )

    def before(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        for group in optimizer.param_groups:
            ours = [p for p in group["params"] if id(p) in chosen]
            decayed(ours, [p.grad for p in ours], group["lr"] * amount, gate)

    return optimizer.register_step_pre_hook(before)


class Cut(NamedTuple):
    """How far a threshold went."""

    sparsity: float
    score: float
    masks: Weights


@card(
    paper="Bonetta, Ribero, Cancelliere 2022, 'Regularization-based Pruning of Irrelevant Weights in Deep Neural "
    "Architectures' (iterative pruning)",
    unit="model",
    needs=("evaluate",),
    claim="where the score falls with the threshold, no larger one keeps it within the tolerance",
    departs="the threshold is found by halving, as if the score fell with it; train on and call it again to iterate",
)
def threshold_within(
    module: nn.Module,
    evaluate: Callable[[nn.Module], float],
    tolerance: float = 0.005,
    *,
    reference: float | None = None,
    pattern: Pattern | None = None,
    resolution: float = 1e-3,
) -> Cut:
    """Cut the smallest weights of all tensors together, as many as a validation score allows.

    Args:
        module: changed in place: what is cut is zero.
        evaluate: ``(module) -> score``, higher is better; it must leave the module as it was.
        tolerance: how much of the score may go.
        reference: the score it is measured from; default that of the module as it is.
        pattern: which weights; default the usual ones.
        resolution: the share of weights to which the search is exact. It takes log2(1 / resolution) evaluations.

    Returns:
        Cut: the share cut (weights that were zero before count), its score, and the masks of what is left. Nothing is
        cut where the module as it is falls short of the reference by more than the tolerance.

    Raises:
        Error: no weight fits, or a tolerance or resolution out of range.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 0.1, 3.0, 0.2]]))
    >>> threshold_within(model, lambda m: m.weight.sum().item(), tolerance=0.5).sparsity
    0.5
    """
    if not tolerance >= 0 or not 0 < resolution <= 1:
        raise Error(f"threshold_within needs tolerance >= 0 and resolution in (0, 1], got {tolerance}, {resolution}")
    names = list(weights_of(module, pattern))
    least = evaluate(module) if reference is None else reference
    before, total = snapshot(module), sum(module.get_parameter(name).numel() for name in names)

    def tried(count: int) -> tuple[Weights, float]:
        masks = all_but_smallest(before, names, count / total)
        apply_mask(before, masks).load_into(module)
        return masks, evaluate(module)

    low, high = 0, total + 1
    try:
        best = tried(0)
        while high - low > max(1, math.floor(resolution * total)):
            middle = (low + high) // 2
            found = tried(middle)
            low, high, best = (middle, high, found) if found[1] >= least - tolerance else (low, middle, best)
    except BaseException:
        before.load_into(module)
        raise
    masks, score = best
    apply_mask(before, masks).load_into(module)
    return Cut(low / total, score, masks)
