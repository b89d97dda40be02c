"""The signature of pruning, and the one loop ``score -> allocate -> select -> act``."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, cast, overload

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, listed
from weightsmith.lifting import dressed, example, per_tensor_options, sole, staged, tried
from weightsmith.prune._select import kept_of_groups, pattern_of
from weightsmith.solve import Cut, cut_at, kept
from weightsmith.weights import Inputs, Lazy, Output, Pattern, PerTensor, Reduction, Spec, Weights, Work, apply, open
from weightsmith.weights import resolve as resolved

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
Sparsity = PerTensor[float | str]
"""Share removed, in [0, 1], or an N:M pattern such as ``"2:4"``; may differ by tensor."""

_NOT_BY_DEFAULT = re.compile(r"embed|wte|wpe|tok_|lm_head|^shared\.|^output\.weight$", re.IGNORECASE)


class Prune(Protocol):
    """What a user calls."""

    kernel: Callable[..., Tensor]

    @overload
    def __call__(
        self,
        weights: Source,
        sparsity: Sparsity = 0.5,
        *,
        scope: Literal["tensor", "global"] = "tensor",
        pattern: Pattern | None = None,
        action: Literal["zero", "mask"] = "zero",
        **options: Any,
    ) -> Weights: ...

    @overload
    def __call__(self, weights: Tensor) -> Tensor: ...


_KINDS = inspect.Parameter
_PARAMETERS = (
    _KINDS("weights", _KINDS.POSITIONAL_OR_KEYWORD, annotation="Source"),
    _KINDS("sparsity", _KINDS.POSITIONAL_OR_KEYWORD, default=0.5, annotation="PerTensor[float | str]"),
    _KINDS("scope", _KINDS.KEYWORD_ONLY, default="tensor", annotation='Literal["tensor", "global"]'),
    _KINDS("pattern", _KINDS.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
    _KINDS("action", _KINDS.KEYWORD_ONLY, default="zero", annotation='Literal["zero", "mask"]'),
)


def lift(kernel: Callable[..., Tensor]) -> Prune:
    """``(weights, sparsity, ...) -> Weights`` from a score on tensors.

    The public function takes, beside the score's own options (each possibly `PerTensor`):
    ``sparsity``, the share to remove or an N:M pattern; ``scope``, whether each tensor loses that
    share or all together do; ``pattern``, which tensors (default `prunable`); ``action``, ``"zero"``
    for pruned weights or ``"mask"`` for the boolean mask of what is kept. Called with a tensor it
    is the kernel.
    """

    def prune(
        weights: Any,
        sparsity: Sparsity = 0.5,
        *,
        scope: Literal["tensor", "global"] = "tensor",
        pattern: Pattern | None = None,
        action: Literal["zero", "mask"] = "zero",
        **options: Any,
    ) -> Any:
        if isinstance(weights, Tensor):
            return kernel(weights, **options)
        opened = open(weights)
        targets = chosen_targets(opened, pattern)
        chosen = per_tensor_options(kernel, options, targets)
        tried(kernel, chosen.values(), example(2, 2))
        scores = {name: scored(kernel, opened.node(name), chosen[name]) for name in targets}
        masks = selected(scores, allocated(scores, sparsity, scope), scope)
        said = {"sparsity": sparsity, "scope": scope} | options
        return acted(opened, masks, action, f"prune.{kernel.__name__}", said)

    return dressed(prune, kernel, _PARAMETERS)


# Which tensors


def prunable(weights: Weights) -> list[str]:
    """Matrices and convolutions, but not embeddings and the head: what is usually pruned."""
    ties = weights.ties
    return [
        name
        for name in weights.names(floating=True)
        if len(weights.spec(name).shape) >= 2 and not _NOT_BY_DEFAULT.search(name) and name not in ties
    ]


def chosen_targets(weights: Weights, pattern: Pattern | None) -> list[str]:
    """The tensors that a pattern names, or the usual ones, tied ones under their first name; an error if none."""
    if pattern is None:
        names = prunable(weights)
        if not names:
            raise Error(f"no matrix to prune among {listed(weights)}; say which with pattern=")
        return names
    ties = weights.ties
    names = list(dict.fromkeys(ties.get(name, name) for name in weights.names(pattern, floating=True)))
    if not names:
        raise Error(f"no float tensor fits pattern={pattern!r}; there are {listed(weights)}")
    return names


# score


def scored(kernel: Callable[..., Tensor], node: Lazy, options: Mapping[str, Any]) -> Output:
    """The score of one tensor, float32 and of its shape."""
    return sole(staged(kernel, [node], options, {"": Spec(node.spec.shape, torch.float32)}))


# allocate


def allocated(
    scores: Mapping[str, Lazy], sparsity: Sparsity, scope: Literal["tensor", "global"]
) -> dict[str, float | tuple[int, int]]:
    """Tensor -> the share to remove, or its N:M pattern; everything checked."""
    if scope not in ("tensor", "global"):
        raise Error(f"scope must be 'tensor' or 'global', got {scope!r}")
    shares = {name: _share(value, name) for name, value in resolved(sparsity, scores, "sparsity").items()}
    if scope == "global" and (len(set(shares.values())) > 1 or any(isinstance(s, tuple) for s in shares.values())):
        raise Error('scope="global" shares one budget among all tensors: sparsity must be one number')
    for name, share in shares.items():
        shape = scores[name].spec.shape
        inputs = scores[name].spec.numel // max(shape[0], 1) if shape else 1
        if isinstance(share, tuple) and inputs % share[1]:
            raise Error(f"{name}: its {inputs} inputs a row cannot be cut into groups of {share[1]}")
    return shares


def _share(value: float | str, name: str) -> float | tuple[int, int]:
    if isinstance(value, str):
        return pattern_of(value, f"sparsity of {name}")
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Error(f"sparsity of {name} must lie between 0 and 1, got {value}")
    return float(value)


# select


def selected(
    scores: Mapping[str, Output], shares: Mapping[str, float | tuple[int, int]], scope: Literal["tensor", "global"]
) -> dict[str, Output]:
    """The masks: boolean nodes, true where a weight is kept."""
    if scope == "global":
        return _cut_together(scores, cast(float, next(iter(shares.values()))))
    return {name: _cut_alone(scores[name], share) for name, share in shares.items()}


def _cut_alone(score: Output, share: float | tuple[int, int]) -> Output:
    if isinstance(share, tuple):
        keep, group = share
        spec = Spec(score.spec.shape, torch.bool)
        return apply(kept_of_groups, score, unit="row", spec=spec, options={"keep": keep, "group": group})
    return _cut_together({"": score}, share)[""]


def _cut_together(scores: Mapping[str, Output], share: float) -> dict[str, Output]:
    total = sum(score.spec.numel for score in scores.values())
    keep = total - round(share * total)
    reduction = Reduction([Inputs([score], "element") for score in scores.values()], partial(cut_at, keep, total))
    return {
        name: sole(
            Work(_mask, Inputs([score], "element"), {"": Spec(score.spec.shape, torch.bool)}, None, reduction, offset)
        )
        for (name, score), offset in zip(scores.items(), reduction.offsets, strict=False)
    }


def _mask(score: Tensor, *, solved: Cut, start: int) -> Tensor:
    return kept(score, solved, start)


# act


def acted(weights: Weights, masks: Mapping[str, Lazy], action: str, method: str, options: Mapping[str, Any]) -> Weights:
    """The pruned weights, or the masks themselves."""
    if action == "mask":
        chosen = weights.select(masks.__contains__)
        return chosen.zip_nodes(lambda name, node: masks[name], (), f"{method}.mask", options)
    if action != "zero":
        raise Error(f"action must be 'zero' or 'mask', got {action!r}")

    def build(name: str, node: Lazy) -> Lazy:
        if name not in masks:
            return node
        return apply(masked, node, masks[name], spec=node.spec)

    return weights.zip_nodes(build, (), method, options)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where the mask is true, else zero (also where the weight is not finite)."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def apply_mask(weights: Source, mask: Weights) -> Weights:
    """Zero what a mask leaves out; tensors without a mask stay.

    >>> pruned = apply_mask({"w": torch.tensor([1.0, 2.0])}, Weights.of({"w": torch.tensor([True, False])}))
    >>> pruned["w"]
    tensor([1., 0.])
    """
    opened = open(weights)
    ties = opened.ties
    masks: dict[str, Lazy] = {}
    for name in mask:
        if name not in opened or opened.spec(name).shape != mask.spec(name).shape:
            raise Error(f"the mask of {name} fits no tensor of that name and shape {list(mask.spec(name).shape)}")
        if mask.spec(name).dtype != torch.bool:
            raise Error(f"the mask of {name} is {mask.spec(name)}; a mask is boolean, such as mask_of(...) makes")
        first = ties.get(name, name)
        if masks.setdefault(first, mask.node(name)) is not mask.node(name):
            raise Error(f"{name} and {first} are one tensor, but have two masks")
    return acted(opened, masks, "zero", "prune.apply_mask", {})


def mask_of(weights: Source, pattern: Pattern | None = None) -> Weights:
    """True where a weight is not zero: the mask that pruned weights carry in themselves."""
    opened = open(weights)
    names = chosen_targets(opened, pattern)
    return opened.select(frozenset(names).__contains__).map(_not_zero, spec=lambda name: _boolean(opened, name))


def _not_zero(weight: Tensor) -> Tensor:
    return weight != 0


def _boolean(weights: Weights, name: str) -> Spec:
    return Spec(weights.spec(name).shape, torch.bool)


def sparsity_of(weights: Source, pattern: Pattern | None = None) -> float:
    """The share of zeros among the prunable tensors (or those that fit a pattern), by reading them once."""
    masks = mask_of(weights, pattern)
    kept_count = sum(int(masks[name].sum()) for name in masks)
    return 1 - kept_count / max(masks.numel, 1)
