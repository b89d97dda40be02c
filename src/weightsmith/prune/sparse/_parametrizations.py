"""What masks that live in a module share: which weights they stand on, which are kept, how gradients pass.

A mask is put on a weight as a parametrization: the module computes with ``mask * weight`` and whatever learns (the
weight, a score of it, or both) is an ordinary parameter, so any optimizer trains it. ``weightsmith.adapt.fold`` leaves
a plain module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, listed
from weightsmith.prune import magnitude
from weightsmith.prune.room import masked, prunable
from weightsmith.prune.sparse._exchange import highest
from weightsmith.stats.room import NoneFits
from weightsmith.weights import Pattern, PerTensor, Weights, matches, open
from weightsmith.weights import resolve as resolved

WHOLES = ("element", "row", "column")
"""What is kept or goes as one: a weight, what makes one output, what one input (of a convolution: a channel) feeds."""


def weights_of(module: nn.Module, pattern: Pattern | None = None) -> dict[str, nn.Parameter]:
    """The parameters of a module that are usually pruned, or those with two axes or more that fit a pattern.

    Args:
        module: only looked at. Weights that carry a parametrization already are left out.
        pattern: of names; default: matrices and convolutions, but not embeddings and the head.

    Returns:
        name -> the parameter, in order. That of a module that stands in several places has its first name.

    Raises:
        NoneFits: no weight fits.
        Error: one is held by two modules: a mask in one would not reach the other.

    >>> list(weights_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))))
    ['0.weight', '2.weight']
    """
    every = dict(module.named_parameters(remove_duplicate=False))
    usual = frozenset(prunable(open(module))) if pattern is None else frozenset()
    found = {
        name: value
        for name, value in every.items()
        if "parametrizations" not in name.split(".")
        and value.dim() > 1
        and value.numel()
        and value.is_floating_point()
        and (name in usual if pattern is None else matches(pattern, name))
    }
    if not found:
        usual_names = pattern or "the usual names"
        raise NoneFits(f"no weight of two axes or more fits {usual_names!r}; there are {listed(every)}")
    holders: dict[int, dict[tuple[nn.Module, str], str]] = {}
    for name, value in every.items():
        holders.setdefault(id(value), {}).setdefault(_holder(module, name), name)
    seen: dict[tuple[nn.Module, str], str] = {}
    for name, value in found.items():
        own = _holder(module, name)
        twins = [other for holder, other in holders[id(value)].items() if holder != own]
        if twins:
            raise Error(f"{name} is one tensor with {listed(twins)}; untie them, or leave it out with pattern=")
        seen.setdefault(own, name)
    return {name: found[name] for name in seen.values()}


def _holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    place, _, leaf = name.rpartition(".")
    return module.get_submodule(place), leaf


def of_each(option: PerTensor[Any], names: Iterable[str], word: str) -> dict[str, float]:
    """The share removed of each tensor, checked."""
    shares = resolved(option, names, word)
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise Error(f"{word} of {name} must lie between 0 and 1, got {share!r}")
    return {name: float(share) for name, share in shares.items()}


class Scheduled(nn.Module):
    """A parametrization that changes along training; ``progress`` is the share of it that is done.

    It goes along in the state dict, as a tensor, since some files hold nothing else; the module itself holds a Python
    number: no cast rounds it and no device has to be asked.
    """

    progress: float = 0.0

    def moved(self, progress: float) -> None:
        """Take note of the progress."""
        self.progress = progress

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.progress, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        self.progress = float(state)


def advance(module: nn.Module, progress: float) -> None:
    """Tell all masks of a module that follow a schedule how much of the training is done. Call it after every step.

    Args:
        module: has parametrizations such as `nm_decay` or `score_masks` put there, on itself or inside.
        progress: from 0 to 1, the share of all steps that have been taken.

    Raises:
        Error: nothing in the module follows a schedule, or the progress is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise Error(f"advance: progress is a share of the training, between 0 and 1; got {progress}")
    found = [part for part in module.modules() if isinstance(part, Scheduled)]
    if not found:
        raise Error("advance: no mask of this module follows a schedule; put one there with nm_decay or score_masks")
    with torch.no_grad():
        for part in found:
            part.moved(float(progress))


def kept_wholes(score: Tensor, sparsity: float, structure: str = "element") -> Tensor:
    """The mask that leaves the elements, rows or columns with the highest scores; the number that goes is rounded.

    Args:
        score: ``[out, in, ...]``, of each element.
        sparsity: the share removed.
        structure: one of `WHOLES`; a column is an index of the second axis.

    Returns:
        ``[*shape]``; of rows or columns ``[out, 1, ...]`` or ``[1, in, ...]``.

    >>> kept_wholes(torch.tensor([[1.0, 5.0], [2.0, 2.0]]), 0.5, "row")
    tensor([[ True],
            [False]])
    """
    size = of_wholes(score, structure)
    return highest(size, size.numel() - round(sparsity * size.numel()))


def of_wholes(score: Tensor, structure: str) -> Tensor:
    """The mean score of each row or column, with axes of length 1 for the rest; the score itself for elements."""
    if structure == "element":
        return score
    axis = WHOLES.index(structure) - 1
    return score.mean(dim=[other for other in range(score.dim()) if other != axis], keepdim=True)


class Straight(torch.autograd.Function):
    """``mask * weight``, of a boolean mask or numbers; backwards the score is moved as if it had been the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.dtype = score.dtype
        return _times(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, mask = ctx.saved_tensors
        of_weight = _times(gradient, mask) if ctx.needs_input_grad[0] else None
        of_score = gradient.to(ctx.dtype) * weight.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return of_weight, of_score, None


def _times(weight: Tensor, mask: Tensor) -> Tensor:
    return masked(weight, mask) if mask.dtype == torch.bool else weight * mask


def fan_in(weight: Tensor) -> int:
    """How many inputs an output has."""
    return math.prod(weight.shape[1:])


def wide(weight: Tensor) -> torch.dtype:
    """float32, or wider where the weight is."""
    return torch.promote_types(weight.dtype, torch.float32)


def whole_named(structure: str, method: str) -> str:
    """The structure, if there is one of that name."""
    if structure not in WHOLES:
        raise Error(f"{method}: structure is one of {', '.join(WHOLES)}; got {structure!r}")
    return structure


def standing(module: nn.Module, kind: type[Any]) -> dict[str, Any]:
    """The parametrizations of one kind, by the names of the weights they stand on."""
    found: dict[str, Any] = {}
    for place, part in module.named_modules():
        for leaf, stack in cast(Mapping[str, Any], getattr(part, "parametrizations", {})).items():
            for one in stack:
                if isinstance(one, kind):
                    found[f"{place}.{leaf}" if place else leaf] = one
    return found


def original(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that a parametrization of this name stands on."""
    owner, leaf = _holder(module, name)
    return cast(Mapping[str, Any], owner.parametrizations)[leaf].original


def frozen(module: nn.Module) -> None:
    """No parameter learns, not even from a gradient that it still has."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def snapshot(module: nn.Module) -> Weights:
    """A copy of all tensors of a module."""
    return Weights.of({name: value.detach().clone() for name, value in open(module).to_dict().items()})


def all_but_smallest(weights: Weights, names: Iterable[str], sparsity: float) -> Weights:
    """The masks that leave out a share of the elements of some tensors together, the smallest magnitudes.

    >>> weights = Weights.of({"a": torch.tensor([[1.0, -4.0]]), "b": torch.tensor([[2.0, 3.0]])})
    >>> all_but_smallest(weights, "ab", 0.5)["b"]
    tensor([[False,  True]])
    """
    chosen = frozenset(names).__contains__
    return Weights.of(magnitude(weights, sparsity, scope="global", pattern=chosen, action="mask").to_dict())
