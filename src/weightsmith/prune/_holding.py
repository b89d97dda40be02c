"""Keep a mask while somebody else's training runs, whatever optimizer it makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from weightsmith.errors import Error, listed
from weightsmith.weights import Weights


@contextmanager
def holding(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, weights outside the masks are zero before and after every step of any optimizer.

    Gradients of such weights are zero, so that neither momenta nor the norms that gradients are clipped by hear of
    them; and after each step they are zero again, whatever noise, decay or a whole-matrix step did. Parameters keep
    their names and identities, so training may make its own optimizers and move the module.

    Args:
        module: changed in place: pruned on the way in, and again on the way out.
        masks: parameter -> ``[*shape]`` boolean, true where a weight is kept; in memory for as long.

    Raises:
        Error: a mask that fits no parameter or is not boolean, names of one tied parameter with masks that differ;
            afterwards, parameters that were replaced.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    >>> with holding(layer, {"weight": torch.tensor([[True, False]])}):
    ...     layer(torch.ones(2)).backward()
    ...     optimizer.step()
    >>> layer.weight[0, 1].item(), layer.weight.grad[0, 1].item()
    (0.0, 0.0)
    """
    outside = _outside(module, masks)

    @torch.no_grad()
    def zero(*_: Any) -> None:
        for parameter, out in outside.items():
            parameter.masked_fill_(out.on(parameter), 0)

    zero()
    handles: list[RemovableHandle] = []
    try:
        for parameter, out in outside.items():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(lambda slope, out=out: slope.masked_fill(out.on(slope), 0)))
        handles.append(register_optimizer_step_post_hook(zero))
        yield
    finally:
        for handle in handles:
            handle.remove()
        zero()
    now = dict(module.named_parameters(remove_duplicate=False))
    replaced = [name for name in masks if now.get(name) not in outside]
    if replaced:
        raise Error(
            f"training put other parameters in the place of {listed(replaced)}, so their masks were not kept; wrap, "
            "shard or parametrize the module before, and copy values in place"
        )


class _Out:
    """Where no weight is, on whatever device it is asked for: a module may be moved by its training."""

    def __init__(self, out: Tensor):
        self.out = out

    def on(self, like: Tensor) -> Tensor:
        if self.out.device != like.device:
            self.out = self.out.to(like.device)
        return self.out


def checked(module: nn.Module, masks: Mapping[str, Tensor], kind: torch.dtype | None = None) -> None:
    """An error if masks do not fit a module; `Weights` are not read for it."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        raise Error(f"masks of {listed(unknown)}: the module has no such parameters; it has {listed(parameters)}")
    for name in masks:
        mask, shape = masks.spec(name) if isinstance(masks, Weights) else masks[name], parameters[name].shape
        if tuple(mask.shape) != shape or kind not in (None, mask.dtype):
            raise Error(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}; needed is a boolean one of {list(shape)}"
            )


def _outside(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[nn.Parameter, _Out]:
    checked(module, masks, torch.bool)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, _Out] = {}
    for name, mask in masks.items():
        parameter = parameters[name]
        out = ~mask.to(parameter.device)
        if parameter in found and not torch.equal(found[parameter].out, out):
            raise Error(f"{name} is tied to another parameter with a mask, and their masks differ; give one of them")
        found[parameter] = _Out(out)
    return found
