"""Remove what carries the least of the flow: of ones through the network, or of gradients back through it.

A network that has not been trained yet has no small weights that mean anything. What can be known is which weights the
signal needs on its way. Weights are scored by how much of a flow would be missing without them: all of the paths that
run through a weight (synaptic flow), or the size of the gradient that training starts with (GraSP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune._autograd import free_parameters, scored_names
from weightsmith.stats import hessian_gradient
from weightsmith.stats.room import Batch, Loss, default_loss
from weightsmith.weights import Pattern, Weights, working


@card(
    paper="Tanaka, Kunin, Yamins, Ganguli 2020, 'Pruning neural networks without any data by iteratively conserving "
    "synaptic flow'",
    needs=("data",),
    unit="model",
    claim="in enough rounds, no layer is emptied while others have weights to lose",
)
def synflow(
    model: nn.Module, example: Tensor, sparsity: float, *, rounds: int = 100, pattern: Pattern | None = None
) -> Weights:
    r"""Scores by synaptic flow, found again after each round of pruning, without any data.

    .. math:: R = \mathbf 1^\top \Bigl( \prod_l |W_l| \Bigr) \mathbf 1, \qquad
        s = \Bigl| w \frac{\partial R}{\partial |w|} \Bigr|

    After round :math:`t` of :math:`T` the share :math:`(1 - \text{sparsity})^{t/T}` is left, of all tensors together.
    Cut with ``by_score(model, scores, sparsity, scope="global")``; a lower sparsity keeps what went last.

    Args:
        model: asked in evaluation mode, in float64, with the absolute values of its parameters and buffers, and left as
            it was.
        example: inputs ``[n, ...]`` of floats; ones of the shape of the first are what it is asked with.
        sparsity: share that will be removed, in [0, 1).
        rounds: T.
        pattern: which parameters; by default `prunable` ones.

    Returns:
        Weights: ``[*shape]`` float32. From 0 to 1/2, the flow through a weight in the last round over the largest, for
        weights that are left; below zero for those that went, the lower the earlier.

    Raises:
        Error: inputs that are not floats, a sparsity or rounds out of range, or a flow that is not finite.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> for layer, value in zip(model, ([[1.0, 2.0], [3.0, 4.0]], [[5.0, -1.0]])):
    ...     layer.weight.data = torch.tensor(value)
    >>> synflow(model, torch.ones(1, 2), 0.5, rounds=1)["0.weight"]      # 5, 10, 3 and 4, of at most 15
    tensor([[-0.8333,  0.3333],
            [-0.9000, -0.8667]])
    """
    if not 0 <= sparsity < 1:
        raise Error(f"synflow needs a sparsity of at least 0 and below 1, got {sparsity}")
    return Weights.of(flow_scores(model, example, sparsity, scored_names(model, pattern), rounds))


def flow_scores(
    model: nn.Module, example: Tensor, sparsity: float, names: Sequence[str], rounds: int
) -> dict[str, Tensor]:
    """The scores of `synflow` by name; at least one weight scores 0 or more."""
    if not example.is_floating_point() or example.dim() < 1 or not len(example):
        raise Error(f"synaptic flow needs inputs of floats [n, ...], got {example.dtype} {list(example.shape)}")
    if rounds < 1:
        raise Error(f"synaptic flow needs at least 1 round, got {rounds}")
    with free_parameters(model, names) as given, progress.task("synaptic flow", rounds) as advance:
        scores = [
            torch.zeros_like(value, dtype=torch.float32, requires_grad=False).flatten() for value in given.values()
        ]
        every = torch.cat(scores)
        left = torch.ones_like(every, dtype=torch.bool)
        sizes = [score.numel() for score in scores]
        flow = _Flow(model, example)
        for turn in range(1, rounds + 1):
            masks = [mask.view_as(value) for mask, value in zip(left.split(sizes), given.values(), strict=True)]
            found = torch.cat([part.flatten() for part in flow(dict(zip(given, masks, strict=True)))])
            gone = sparsity if turn == rounds else 1 - (1 - sparsity) ** (turn / rounds)
            keep = max(len(left) - round(len(left) * gone), 1)  # rounded as `by_score` does
            kept = torch.zeros_like(left)
            kept[torch.where(left, found, -torch.inf).topk(keep).indices] = True
            share = (found / found.amax().clamp(min=1e-300) / 2).float()
            # Whole numbers tell the round in which a weight went, fractions its flow then.
            every = torch.where(left, torch.where(kept, share, share + (turn - rounds - 1)), every)
            left = kept
            advance(1)
        parts = every.split(sizes)
    return {name: part.view(value.shape) for (name, value), part in zip(given.items(), parts, strict=True)}


class _Flow:
    """The flow through each weight of a network of absolute values, ``[*shape]`` float64 for each masked tensor."""

    def __init__(self, model: nn.Module, example: Tensor):
        self.model = model
        self.ones = torch.ones_like(example[:1], dtype=torch.float64)
        self.values = {name: value.detach().abs().double() for name, value in model.named_parameters()}
        self.values |= {n: b.abs().double() if b.is_floating_point() else b for n, b in model.named_buffers()}

    def __call__(self, masks: dict[str, Tensor]) -> list[Tensor]:
        masked = {name: (self.values[name] * mask).requires_grad_() for name, mask in masks.items()}
        out: Any = functional_call(self.model, self.values | masked, (self.ones,))
        out = getattr(out, "logits", out)
        slopes = torch.autograd.grad(out.sum(), list(masked.values()), materialize_grads=True)
        # Where not all paths add (norms of layers, attention) a slope may be below zero; its size counts.
        found = [(value.detach() * slope).abs() for value, slope in zip(masked.values(), slopes, strict=True)]
        if not all(bool(part.isfinite().all()) for part in found):
            raise Error("the synaptic flow is not finite: too deep a network, or weights that are not finite")
        return found


@card(
    paper="Wang, Zhang, Grosse 2020, 'Picking Winning Tickets Before Training by Preserving Gradient Flow'",
    needs=("data",),
    unit="model",
    claim="before any training, a larger gradient norm after pruning than by magnitude",
    departs="higher is more worth keeping, so the sign is the other one; in evaluation mode (the authors' code is in "
    "training mode); not divided by the sum of all scores, which changes no order",
)
def grasp(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    temperature: float = 200.0,
    pattern: Pattern | None = None,
    loss: Loss | None = None,
) -> Weights:
    r"""Scores by how much the squared gradient would shrink without a weight.

    .. math:: s = \theta \odot H g, \qquad
        \lVert \nabla L(\theta - \theta_i e_i) \rVert^2 \approx \lVert g \rVert^2 - 2 s_i

    with :math:`g` the gradient and :math:`H` the Hessian of the mean loss, both by the scored tensors alone. The
    authors take ten examples of each class of CIFAR-10, and one threshold for all tensors:
    ``by_score(..., scope="global")``.

    Args:
        model: asked in evaluation mode and left as it was.
        batches: ``(inputs, labels)`` or mappings; read twice, so that what can be read only once is held.
        temperature: what the logits are divided by, so that no class is all but certain; the authors' code has 200.
        pattern: which parameters; by default `prunable` ones. A tied parameter is scored under its first name.
        loss: ``(model, batch) -> number``, summed over examples, of a model that returns the divided logits; the
            default is cross-entropy.

    Returns:
        Weights: ``[*shape]`` float32; below zero where the gradient would grow. Memory is that of a backward pass with
        a graph of its own, and a few times the scored parameters.

    Raises:
        Error: no batch, a temperature of 0 or less, or scores that are not finite.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
    >>> square = lambda model, x: (model(x) ** 2).sum() / 2              # g = 18, H = 9
    >>> grasp(layer, [torch.tensor([[3.0]])], temperature=1.0, loss=square)["weight"]
    tensor([[324.]])
    """
    if not temperature > 0:
        raise Error(f"grasp needs a temperature above 0, got {temperature}")
    names = scored_names(model, pattern)
    bent = hessian_gradient(model, batches, pattern=names.__contains__, loss=_cooled(loss or default_loss, temperature))
    own = dict(model.named_parameters(remove_duplicate=False))
    scores = {name: (working(own[name].detach()) * bent[name]).float() for name in names}
    for name, score in scores.items():
        if not score.isfinite().all():
            raise Error(f"the scores of {name} are not finite; are the weights and the data?")
    return Weights.of(scores)


def _cooled(loss: Loss, temperature: float) -> Loss:
    """The loss of a model whose logits are divided."""

    def cooled(model: Callable[..., Any], batch: Batch) -> Tensor:
        def divided(*inputs: Any, **named: Any) -> Any:
            found = model(*inputs, **named)
            return getattr(found, "logits", found) / temperature

        return loss(divided, batch)

    return cooled
