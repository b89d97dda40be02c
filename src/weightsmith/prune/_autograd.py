"""The loss of a model as a function of its parameters, which are left as they are.

What a score says of a weight is what the loss would do without it: a gradient or a curvature of this function.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.prune.room import chosen_targets
from weightsmith.stats import example_gradients
from weightsmith.stats.room import Batch, Loss, default_loss, mapped, restored, size
from weightsmith.weights import Pattern, open


def scored_names(model: nn.Module, pattern: Pattern | None) -> list[str]:
    """The parameters that a score of a whole model is asked for: those that `prunable` names, or a pattern does.

    Raises:
        Error: there is none, or the pattern names something that is no parameter.
    """
    names = chosen_targets(open(model), pattern)
    own = dict(model.named_parameters(remove_duplicate=False))
    if pattern is None:
        names = [name for name in names if name in own]
    buffers = [name for name in names if name not in own]
    if buffers or not names:
        raise Error(
            f"{listed(buffers) or 'what would be pruned'} is no parameter of the model; say which with pattern="
        )
    return names


@contextmanager
def free_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Stand-ins for parameters, to be differentiated by; tied names have one each.

    The model is in evaluation mode inside, and afterwards as it was; so is the random state.

    Raises:
        Error: the model has no such parameter.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    absent = [name for name in names if name not in own]
    if absent:
        raise Error(f"the model has no parameter {absent[0]!r}{did_you_mean(absent[0], own)}")
    with restored(model), torch.random.fork_rng(devices=cuda_devices(model)), torch.enable_grad():
        yield {name: own[name].detach().requires_grad_() for name in names}


def gradients(model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss | None) -> dict[str, Tensor]:
    """The gradient of a batch's loss by parameters that stand in for the model's own; see `called_loss`."""
    value = called_loss(model, parameters, batch, loss)
    found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def called_loss(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss | None, tied: bool = False
) -> Tensor:
    """The loss of a batch with other parameters in the model.

    With ``tied``, what stands in for a tied parameter under one of its names does so under all; without, each use is
    known apart.

    Raises:
        Error: it is not one number.
    """

    def called(*inputs: Any, **named: Any) -> Any:
        return functional_call(model, dict(parameters), inputs, named, tie_weights=tied)

    value = (loss or default_loss)(called, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise Error(f"loss= must return one number, got {list(getattr(value, 'shape', ()))}")
    return value.sum()


def slopes_of_examples(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str],
    at_once: int,
    loss: Loss | None,
    weights: Any = None,
) -> Iterator[Tensor]:
    """The gradients of examples by some parameters, ``[at_once, elements]`` at a time, tensors in the model's order.

    Args:
        names: first names of parameters.
        at_once: examples whose gradients are held together.
        weights: what the model has in place of its own weights.

    Raises:
        Error: ``at_once`` below 1.
    """
    if at_once < 1:
        raise Error(f"at_once is at least 1, got {at_once}")
    for batch in batches:
        for start in range(0, size(batch), at_once):
            part = mapped(lambda value, start=start: value[start : start + at_once], batch)
            yield example_gradients(
                model, [part], pattern=names.__contains__, weights=weights, at_once=at_once, loss=loss
            )


def cuda_devices(model: nn.Module) -> list[int]:
    """The numbers of the devices whose random state drawing for a module may change."""
    return sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
