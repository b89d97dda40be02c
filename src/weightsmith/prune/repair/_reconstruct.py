"""Train one block of a pruned model until it gives what the whole one gave.

A block is small, its inputs are at hand, and what it should give is known for every unit: so a few dozen steps on few
texts do what takes far more with the last layer's loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune.repair._lora import carried_masks, checked_masks
from weightsmith.solve import seed_for
from weightsmith.stats import Batch

Forward = Callable[[Any, Batch], Tensor]


@card(
    paper="Zimmer, Andoni, Spiegel, Pokutta 2023, 'PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs'",
    covers=("perp",),
    needs=("data",),
    unit="model",
    claim="the outputs of a block come closer to what they were, from few inputs",
    departs="the error is relative to the outputs; no warm-up",
)
def reconstruct(
    block: nn.Module,
    dense_block: nn.Module,
    inputs: Iterable[Batch],
    *,
    steps: int = 100,
    rate: float = 1e-3,
    masks: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> list[float]:
    r"""Train a pruned block on the outputs of the whole one.

    .. math:: \min_\theta \frac{\lVert f_{M \odot \theta}(x) - f_0(x) \rVert^2}{\lVert f_0(x) \rVert^2}

    Args:
        block: trained in place, by Adam with a rate that falls along a line to zero: those of its parameters that need
            gradients. In evaluation mode meanwhile.
        dense_block: gives the targets; unchanged.
        inputs: what the block is given, one batch a step, in an order drawn anew for every round.
        steps: of training.
        rate: at first.
        masks: boolean by the names of parameters, true for what is kept; default: the zeros that the weights hold
            stay zeros.
        forward: ``(block, batch) -> [n, ...]``, where a block is called with something else than a tensor, a tuple's
            members or a mapping's words.
        seed: of the order.

    Returns:
        The loss at each step. Memory: the targets of all inputs, and Adam's two copies of the block.

    Raises:
        Error: no input, nothing that needs gradients, masks that do not fit, or a loss that is not finite.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator ...>
    >>> dense, pruned = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    >>> pruned.weight.data = dense.weight.data * torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> losses = reconstruct(pruned, dense, [1 + torch.randn(8, 4)], rate=0.1)
    >>> losses[-1] < losses[0] / 2, int((pruned.weight == 0).sum())
    (True, 4)
    """
    ask = forward or _called
    batches = list(inputs)
    with torch.no_grad(), evaluating(dense_block):
        targets = [ask(dense_block, batch) for batch in batches]
    return fit(block, batches, targets, ask, steps=steps, rate=rate, masks=masks, seed=seed)


def _called(block: Any, batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        found = block(**batch)
    else:
        found = block(*batch) if isinstance(batch, list | tuple) else block(batch)
    return found[0] if isinstance(found, tuple) else found


def fit(
    block: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    forward: Forward,
    *,
    steps: int,
    rate: float,
    masks: Mapping[str, Tensor] | None,
    seed: int,
) -> list[float]:
    """Train a block on targets; see `reconstruct`."""

    def loss(number: int) -> Tensor:
        given = _real(forward(block, batches[number]), batches[number]).float()
        target = _real(targets[number], batches[number]).to(given)
        off = (given - target).square().sum()
        return off / target.square().sum().clamp(min=torch.finfo(torch.float32).tiny)

    own = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return descend(block, own, loss, len(batches), steps=steps, rate=rate, masks=masks, seed=seed)


def _real(value: Tensor, batch: Batch) -> Tensor:
    """Without padded tokens."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool().to(value.device)]


def descend(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[int], Tensor],
    count: int,
    *,
    steps: int,
    rate: float,
    masks: Mapping[str, Tensor] | None,
    seed: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[float]:
    """Adam on the loss of one batch a step; after each step the masks hold again.

    Args:
        loss: ``number of a batch -> loss``.
        count: of batches.
    """
    if count < 1 or steps < 0 or not rate > 0:
        raise Error(f"training needs at least 1 batch, steps from 0 and a rate above 0; got {count}, {steps}, {rate}")
    if not parameters:
        raise Error("nothing in the module needs gradients, so there is nothing to train")
    found = carried_masks(module) if masks is None else checked_masks(module, masks) if masks else {}
    named = dict(module.named_parameters())
    held = [(named[name], ~mask) for name, mask in found.items()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    generator = torch.Generator().manual_seed(seed_for(seed, "order"))
    losses: list[float] = []
    order: list[int] = []
    with evaluating(module), torch.enable_grad():
        for step in range(steps):
            order = order or torch.randperm(count, generator=generator).tolist()
            now = loss(order.pop())
            losses.append(float(now.detach()))
            if not math.isfinite(losses[-1]):
                raise Error(f"the loss is {losses[-1]} at step {step}; train with a smaller rate than {rate:g}")
            optimizer.zero_grad(set_to_none=True)
            now.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            optimizer.step()
            with torch.no_grad():
                for parameter, gone in held:
                    parameter.masked_fill_(gone, 0)
            advance(1)
        optimizer.zero_grad(set_to_none=True)
    return losses


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; what was training trains again outside."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
