"""Draw numbers to the levels that they will be rounded to, while there is a gradient to do it with.

What is rounded loses the more the farther it lies from a level. A penalty on that distance, small at first and larger
as training goes on, makes networks whose numbers lie near levels by themselves: potentials near "spike" or "no spike",
weights near the points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.spiking._neuron import Fire


@card(
    paper="Guo, Liu, Chen, Zhang, Peng, Zhang, Huang, Ma 2023, 'RMP-Loss: Regularizing Membrane Potential Distribution "
    "for Spiking Neural Networks'",
    covers=("rmp-loss",),
    unit="model",
    claim="potentials of spiking networks that are trained with it are nearer to their spikes",
    departs="the paper's text beyond its abstract was not at hand, so the power of the distance is ours; to the "
    "nearest of any levels: with levels 0 and 1 and a threshold in their middle that is the spike; how the weight of "
    "the penalty grows is the caller's",
)
def pull_to_levels(values: Tensor, levels: Sequence[float] | Tensor = (0.0, 1.0), *, power: float = 2.0) -> Tensor:
    r"""The mean distance of values to the nearest level, to some power.

    .. math:: R_p = \frac{1}{n} \sum_i \min_l |x_i - l|^p

    Args:
        values: any shape, floating: membrane potentials before they are compared with the threshold, or weights.
        levels: at least one, finite, in any order. A tensor ``[*shape of values, L]`` gives each value its own.
        power: :math:`p`, at least 1. With 1 the pull is the same at any distance, with 2 it grows with it.

    Returns:
        One number, float32 or wider, with a gradient; 0 for no values. At a level the gradient is 0; of two levels that
        are equally near the earlier pulls.

    Raises:
        Error: no levels, some that are not finite, or a power below 1.

    >>> float(pull_to_levels(torch.tensor([0.0, 0.25, 0.75, 2.0])))
    0.28125
    """
    if not power >= 1:
        raise Error(f"pull_to_levels needs a power of at least 1, got {power!r}")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    given = torch.as_tensor(levels, dtype=wide.dtype, device=wide.device)
    if not given.dim() or not given.shape[-1] or not bool(given.isfinite().all()):
        raise Error("pull_to_levels needs at least one level, all of them finite")
    if not wide.numel():
        return wide.sum()
    near = _nearest(wide.detach(), given)
    distance = (wide - near).abs()
    return (distance if power == 1 else distance**power).mean()


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """One level after the other, so that nothing is held L times."""
    found, least = None, None
    for level in levels.unbind(-1):
        distance = (values - level).abs()
        if found is None or least is None:
            found, least = level.expand_as(values), distance
            continue
        closer = distance < least
        found, least = torch.where(closer, level, found), torch.where(closer, distance, least)
    assert found is not None
    return found


@contextmanager
def potentials(
    model: nn.Module, chosen: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, Fire)
) -> Iterator[dict[str, list[Tensor]]]:
    """What goes into some modules while the model runs: with their defaults, what neurons compare with a threshold.

    Args:
        model: only looked at; its modules are hooked inside the ``with`` alone.
        chosen: ``(name, module)`` to whether its input is wanted; default: every `Fire`. The first positional
            argument, a tensor, is kept with its graph.

    Returns:
        name -> its inputs in the order of calls, filled as the model runs.

    Raises:
        Error: no module is chosen.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), ws.quantize.spiking.Neuron(), torch.nn.Linear(4, 2))
    >>> with potentials(model) as found:
    ...     output = model(torch.ones(5, 2, 3))                       # 5 moments
    >>> penalty = sum(pull_to_levels(one) for calls in found.values() for one in calls)
    >>> list(found), len(found["1.fire"]), penalty.requires_grad
    (['1.fire'], 5, True)
    """
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if chosen(name, module):
            found[name] = []
            hooks.append(module.register_forward_pre_hook(_keeping(found[name])))
    try:
        if not found:
            raise Error("potentials: no module of the model is chosen; by default those are its Fire modules")
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keeping(kept: list[Tensor]) -> Callable[[nn.Module, Any], None]:
    def keep(module: nn.Module, inputs: Any) -> None:
        if not inputs:
            raise Error(f"potentials: a chosen {type(module).__name__} is called with keywords alone; choose another")
        kept.append(inputs[0])

    return keep
