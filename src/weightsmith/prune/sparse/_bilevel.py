"""Choose the mask knowing that the weights will adapt to it.

Pruning is two problems, one inside the other: which weights to keep, and how those that are kept should be. Taking
turns at both treats the second as if it did not answer to the first. It does, and how can be said in closed form where
the loss is nearly linear in the masked weights: then a step on the mask counts also what retraining would do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.prune.sparse._parametrizations import original, standing, whole_named
from weightsmith.prune.sparse._score_masks import Scored, put
from weightsmith.weights import Pattern, PerTensor


def implicit_gradient(weight: Tensor, mask: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    r"""How the loss changes with the mask where the weights answer to it.

    .. math:: \Bigl( \theta - \tfrac{1}{\gamma}\, m \odot g \Bigr) \odot g, \qquad g = \nabla_z\, \ell(z),
              \quad z = m \odot \theta

    From :math:`m \odot g + \gamma \theta = 0`, which holds for the weights that are best for a mask, with a loss that
    does not bend in z (a network of ReLU is linear in pieces): :math:`d\theta / dm = -\operatorname{diag}(g) / \gamma`.

    Args:
        weight: :math:`\theta`, ``[*shape]``.
        mask: ``[*shape]``, any numbers; boolean as a rule.
        gradient: g, ``[*shape]``, of all elements, also of those that are masked.
        gamma: how strongly weights are held to zero in the lower problem.

    >>> one = torch.tensor
    >>> implicit_gradient(one([2.0, 2.0]), one([True, False]), one([0.5, 0.5]), gamma=1.0)
    tensor([0.7500, 1.0000])
    """
    if not gamma > 0:
        raise Error(f"implicit_gradient: gamma must be positive, got {gamma}")
    return (weight - mask * gradient / gamma) * gradient


@card(
    paper="Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu 2022, 'Advancing Model Pruning via Bi-level Optimization'",
    covers=("advancing-model-pruning-bi-level",),
    unit="model",
    claim="in a third of the steps of iterative magnitude pruning it is as accurate at 95 %",
    departs="the implicit gradient is the paper's; that of the authors' code has one more factor of the weight in its "
    "second term, and it goes by the magnitude of scores. Rows and columns count by the mean of their scores, not by a "
    "norm. In the lower step the optimizer's own weight decay stands for gamma, as in that code",
)
def bilevel(
    module: nn.Module,
    sparsity: PerTensor[float] = 0.9,
    *,
    pattern: Pattern | None = None,
    structure: str = "element",
) -> dict[str, Scored]:
    r"""Put masks on a module whose scores and weights both learn; `bilevel_step` trains them in turns.

    .. math:: \min_m \ell\bigl(m \odot \theta^*(m)\bigr), \qquad
              \theta^*(m) = \arg\min_\theta \ell(m \odot \theta) + \tfrac{\gamma}{2} \lVert \theta \rVert^2

    Scores begin at :math:`|\theta|`, and the mask is that of the highest scores at any time, so the sparsity is exact.
    Make the optimizer of scores afterwards. `weightsmith.adapt.fold` leaves the pruned module.

    Args:
        module: trained; changed in place: its weights get the parametrization `Scored`.
        sparsity: the share removed of each tensor, possibly by tensor.
        pattern: of the names of weights; default the usual ones.
        structure: ``"element"``; ``"row"``, what makes one output (a filter); ``"column"``, an index of the second axis
            (an input channel). Rows and columns count by the mean of their scores.

    Returns:
        name of a weight -> its parametrization, in order; its ``.score`` belongs to the upper problem.

    Raises:
        Error: no weight fits, a share outside [0, 1], an unknown structure.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 1.0], [3.0, 2.0]]))
    >>> masks = bilevel(model, 0.5, structure="column")
    >>> model.weight.tolist()
    [[4.0, 0.0], [3.0, 0.0]]
    """
    return put(module, sparsity, pattern, "magnitude", whole_named(structure, "bilevel"), None, 0)


def bilevel_step(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    lower_batch: Any,
    upper_batch: Any,
    *,
    lower: torch.optim.Optimizer,
    upper: torch.optim.Optimizer,
    gamma: float = 1.0,
) -> tuple[float, float]:
    """One step on the weights under the mask, then one on the scores, along `implicit_gradient`.

    Args:
        module: has masks of `bilevel`.
        loss: ``(module, batch) -> number``.
        lower_batch: for the weights.
        upper_batch: for the scores; another one, or the mask learns what the weights just fitted.
        lower: optimizer of the weights under the masks, and of whatever else learns.
        upper: optimizer of the scores, ``[made.score for made in masks.values()]``, and of nothing else.
        gamma: see `implicit_gradient`; infinity drops its second term.

    Returns:
        The losses before the lower and before the upper step.

    Raises:
        Error: the module has no such masks, an optimizer lacks or shares what it should learn, or a weight that is
            masked is frozen or plays no part in the loss.
    """
    masks = standing(module, Scored)
    if not masks:
        raise Error("bilevel_step needs the masks of bilevel(module, ...) on the module")
    if not gamma > 0:
        raise Error(f"bilevel_step: gamma must be positive, got {gamma}")
    weights = {name: original(module, name) for name in masks}
    ours, others = ({id(p) for group in one.param_groups for p in group["params"]} for one in (upper, lower))
    if ours != {id(made.score) for made in masks.values()}:
        raise Error("bilevel_step: the scores of all masks, and nothing else, belong in the upper optimizer")
    lacking = [name for name, weight in weights.items() if id(weight) not in others]
    if lacking or ours & others:
        raise Error(
            "bilevel_step: the weights under the masks, and no scores, belong in the lower optimizer; it "
            + (f"lacks {listed(lacking)}" if lacking else "has scores")
        )
    if still := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise Error(f"bilevel_step: {listed(still)} is frozen; weights under the masks need gradients")
    lower.zero_grad()
    before = loss(module, lower_batch)
    before.backward()
    lower.step()

    lower.zero_grad()
    upper.zero_grad()
    between = loss(module, upper_batch)
    between.backward()
    for name, made in masks.items():
        weight = weights[name]
        if made.score.grad is None or weight.grad is None:
            raise Error(f"bilevel_step: the loss says nothing of {name}; leave it out of bilevel with pattern=")
        # The score's gradient is weight * g, the weight's is mask * g; of a mask of zeros and ones mask * g^2 is the
        # square of the second.
        made.score.grad.sub_(weight.grad.to(made.score.dtype).square(), alpha=1 / gamma)
    upper.step()
    lower.zero_grad()
    upper.zero_grad()
    return float(before.detach()), float(between.detach())
