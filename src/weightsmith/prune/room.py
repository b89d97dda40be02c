"""The signature of pruning, and the one loop ``score -> allocate -> select -> act``."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast, get_args, overload

import torch
from torch import Tensor, nn

from weightsmith.card import card_of
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.lifting import dressed, example, per_tensor_options, sole, staged, tried
from weightsmith.prune._select import kept_of_groups, pattern_of, pooled, spread, whole_of
from weightsmith.solve import Cut, cut_at, kept
from weightsmith.weights import (
    Entire,
    Inputs,
    Lazy,
    Output,
    Pattern,
    PerTensor,
    Reduction,
    Spec,
    Weights,
    Work,
    apply,
    open,
)
from weightsmith.weights import resolve as resolved

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
Sparsity = PerTensor[float | str]
"""Share removed, in [0, 1], or an N:M pattern such as ``"2:4"``; may differ by tensor."""

_NOT_BY_DEFAULT = re.compile(r"embed|wte|wpe|tok_|lm_head|^shared\.|^output\.weight$", re.IGNORECASE)


Scope = Literal["tensor", "row", "global"]
"""Among what a budget is shared: one tensor, one row of it (what makes one output; all of a tensor of one axis), or all
tensors."""

Action = Literal["zero", "mask"]


class Prune(Protocol):
    """What a user calls."""

    kernel: Callable[..., Tensor]

    @overload
    def __call__(
        self,
        weights: Source,
        sparsity: Sparsity = 0.5,
        *,
        scope: Scope = "tensor",
        structure: PerTensor[str] = "element",
        pattern: Pattern | None = None,
        action: Action = "zero",
        **options: Any,
    ) -> Weights: ...

    @overload
    def __call__(self, weights: Tensor, *given: Any, **options: Any) -> Tensor: ...


_KINDS = inspect.Parameter
_PARAMETERS = (
    _KINDS("weights", _KINDS.POSITIONAL_OR_KEYWORD, annotation="Source"),
    _KINDS("sparsity", _KINDS.POSITIONAL_OR_KEYWORD, default=0.5, annotation="PerTensor[float | str]"),
    _KINDS("scope", _KINDS.KEYWORD_ONLY, default="tensor", annotation='Literal["tensor", "row", "global"]'),
    _KINDS("structure", _KINDS.KEYWORD_ONLY, default="element", annotation="PerTensor[str]"),
    _KINDS("pattern", _KINDS.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
    _KINDS("action", _KINDS.KEYWORD_ONLY, default="zero", annotation='Literal["zero", "mask"]'),
)
_STATS = _KINDS("stats", _KINDS.KEYWORD_ONLY, annotation="Source")


def lift(kernel: Callable[..., Tensor], scope: Scope = "tensor") -> Any:
    """``(weights, sparsity, ...) -> Weights`` from a score on tensors.

    The public function takes, beside the score's own options (each possibly `PerTensor`):
    ``sparsity``, the share to remove or an N:M pattern; ``scope``, whether each tensor loses that
    share, each of its rows does, or all together do (by default ``scope`` here); ``structure``, what is removed as
    one: ``"element"``, ``"row"``, ``"column"`` or blocks of rows x columns such as ``"16x16"``; ``pattern``, which
    tensors (default `prunable`); ``action``, ``"zero"`` for pruned weights or ``"mask"`` for the boolean mask of what
    is kept. Where the card needs a statistic, ``stats`` is what `weightsmith.stats` found, and the kernel's second
    argument is that of the tensor. A kernel that names ``key`` is told the tensor's name. Called with a tensor it is
    the kernel.

    Blocks go in the order of their mean scores, and ``sparsity`` is a share of them: with ``scope="row"`` of those side
    by side, with ``scope="global"`` of the blocks of all tensors, of which large and small ones count alike.
    """
    statistic = needed(kernel)
    keyed = "key" in inspect.signature(kernel).parameters

    def prune(weights: Any, *given: Any, **options: Any) -> Any:
        return (kernel if isinstance(weights, Tensor) else pruned)(weights, *given, **options)

    def pruned(weights: Any, sparsity: Any = 0.5, **options: Any) -> Weights:
        how = {name: options.pop(name, usual) for name, usual in usual_settings.items()}
        said = {name: value for name, value in how.items() if value != usual_settings[name] and name != "pattern"}
        said = {"sparsity": sparsity, "scope": how["scope"]} | said | options
        told = options.pop("stats", None) if statistic else None
        opened = open(weights)
        targets = chosen_targets(opened, how["pattern"])
        chosen = per_tensor_options(kernel, options, targets)
        known = of_targets(told, statistic, opened, targets, kernel.__name__) if statistic else {}
        tried(kernel, chosen.values(), example(2, 2), *([example(2, 2)] if statistic else []))
        scores = {}
        for name in targets:
            own = chosen[name] | ({"key": name} if keyed else {})
            scores[name] = scored(kernel, [opened.node(name), *([known[name]] if statistic else [])], own)
        masks = masks_of(scores, sparsity, how["scope"], how["structure"])
        said = {name: value for name, value in said.items() if name not in ("stats", "action")}
        return acted(opened, masks, how["action"], f"prune.{kernel.__name__}", said)

    usual_settings: dict[str, Any] = {"scope": scope, "structure": "element", "pattern": None, "action": "zero"}
    leading = [p.replace(default=usual_settings.get(p.name, p.default)) for p in _PARAMETERS]
    return dressed(prune, kernel, (*leading, *([_STATS] if statistic else [])))


def by_score(
    weights: Source,
    scores: Source,
    sparsity: Sparsity = 0.5,
    *,
    scope: Scope = "tensor",
    structure: PerTensor[str] = "element",
    action: Action = "zero",
) -> Weights:
    """Prune by scores that are there already, of whatever origin; higher is more worth keeping.

    Args:
        weights: what to prune; only the tensors that have a score.
        scores: ``[*shape]`` under the names of weights.
        sparsity: the share to remove or an N:M pattern, possibly by tensor.
        scope: among what the budget is shared.
        structure: what is removed as one, in the order of mean scores; see `lift`.
        action: ``"zero"``, or ``"mask"`` for the boolean mask of what is kept.

    Returns:
        Weights: the pruned ones, or the masks. Of equal scores the first are kept; NaN counts as the highest.

    Raises:
        Error: a score that fits no weight, two scores of one tied tensor, or options that cannot be had.

    >>> by_score({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 3.0])})["w"]
    tensor([1., 0.])
    """
    opened, found = open(weights), open(scores)
    ties = opened.ties
    nodes: dict[str, Lazy] = {}
    for name in found:
        if name not in opened or opened.spec(name).shape != found.spec(name).shape:
            raise Error(f"the score of {name} fits no tensor of that name and shape {list(found.spec(name).shape)}")
        first = ties.get(name, name)
        if nodes.setdefault(first, found.node(name)) is not found.node(name):
            raise Error(f"{name} and {first} are one tensor, but have two scores; leave one of them out")
    if not nodes:
        raise Error("by_score needs the score of at least 1 tensor, got none")
    masks = masks_of(nodes, sparsity, scope, structure)
    said: dict[str, Any] = {"sparsity": sparsity, "scope": scope}
    said |= {} if structure == "element" else {"structure": structure}
    return acted(opened, masks, action, "prune.by_score", said)


# Statistics


def needed(kernel: Callable[..., Any]) -> str | None:
    """Which statistic a method is to be given, such as ``"stats.gram"``."""
    return next((need for need in card_of(kernel).needs if need.startswith("stats.")), None)


INPUTS = ("stats.gram", "stats.activations")
"""Statistics of the inputs of a weight; the others have its shape."""


def of_targets(
    told: Source | None, statistic: str, weights: Weights, targets: Sequence[str], method: str
) -> dict[str, Any]:
    """Target -> what is known of it, as an argument of a kernel: of inputs whole, else as the weight is cut.

    Of inputs, that is ``[in]`` or, of Gram matrices, also ``[in, in]`` or blocks ``[in / b, b, b]``. A tied weight may
    be known under any of its names.
    """
    if told is None:
        raise Error(f"{method} needs stats=, what weightsmith.{statistic} finds on data")
    opened = open(told)
    alike = {id(weights.node(name)): name for name in weights if name in opened}
    found: dict[str, Any] = {}
    lacking: list[str] = []
    for name in targets:
        known = alike.get(id(weights.node(name)))
        if known is None:
            lacking.append(name)
            continue
        shape, own = weights.spec(name).shape, opened.spec(known).shape
        if not _fits(own, shape, statistic):
            raise Error(f"{method}: {statistic} of {known} is {list(own)}, which does not fit its weight {list(shape)}")
        found[name] = Entire(opened.node(known)) if statistic in INPUTS else opened.node(known)
    if lacking:
        raise Error(
            f"{method}: stats say nothing of {listed(lacking)}. Were these layers never called, or the statistics "
            "gathered of another model? Name with pattern= what is to be pruned"
        )
    return found


def _fits(own: tuple[int, ...], shape: tuple[int, ...], statistic: str) -> bool:
    if statistic not in INPUTS:
        return own == shape
    inputs = math.prod(shape[1:])
    if own == (inputs,):
        return True
    if statistic != "stats.gram":
        return False
    return own == (inputs, inputs) or (len(own) == 3 and own[1] == own[2] and own[0] * own[1] == inputs)


# Which tensors


def prunable(weights: Weights) -> list[str]:
    """Matrices and convolutions, but not embeddings and the head, as language models usually name them."""
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


def scored(kernel: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> Output:
    """The score of one tensor (the first of the arguments), float32 and of its shape."""
    return sole(staged(kernel, arguments, options, {"": Spec(arguments[0].spec.shape, torch.float32)}))


# allocate


def masks_of(
    scores: Mapping[str, Lazy], sparsity: Sparsity, scope: Scope = "tensor", structure: PerTensor[str] = "element"
) -> dict[str, Output]:
    """Scores to masks: allocate and select."""
    shares = allocated(scores, sparsity, scope)
    words = resolved(structure, scores, "structure")
    wholes = {name: whole_of(word, name) for name, word in words.items()}
    for name, whole in wholes.items():
        if whole != (1, 1) and isinstance(shares[name], tuple):
            raise Error(f"{name}: an N:M pattern is of elements; structure={words[name]!r} does not go with it")
    merged = {name: pooled(scores[name], whole, name) for name, whole in wholes.items()}
    if scope == "row":
        for name, whole in wholes.items():
            if whole != (1, 1) and merged[name].spec.shape[1:] == (1,):
                raise Error(
                    f"{name}: structure={words[name]!r} takes whole rows, of which scope='row' cannot remove a share; "
                    "write scope='tensor'"
                )
        masks = {name: _cut_rows(score, shares[name]) for name, score in merged.items()}
    else:
        masks = selected(merged, shares, scope)
    return {name: spread(mask, wholes[name], scores[name].spec.shape) for name, mask in masks.items()}


def allocated(scores: Mapping[str, Lazy], sparsity: Sparsity, scope: Scope) -> dict[str, float | tuple[int, int]]:
    """Tensor -> the share to remove, or its N:M pattern; everything checked."""
    if scope not in get_args(Scope):
        raise Error(f"scope must be one of {', '.join(get_args(Scope))}; got {scope!r}")
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
    scores: Mapping[str, Lazy], shares: Mapping[str, float | tuple[int, int]], scope: Scope
) -> dict[str, Output]:
    """The masks: boolean nodes, true where a weight is kept."""
    if scope == "global":
        return _cut_together(scores, cast(float, next(iter(shares.values()))))
    return {name: _cut_alone(scores[name], share) for name, share in shares.items()}


def _cut_alone(score: Lazy, share: float | tuple[int, int]) -> Output:
    if isinstance(share, tuple):
        keep, group = share
        spec = Spec(score.spec.shape, torch.bool)
        return apply(kept_of_groups, score, unit="row", spec=spec, options={"keep": keep, "group": group})
    return _cut_together({"": score}, share)[""]


def _cut_rows(score: Lazy, share: float | tuple[int, int]) -> Output:
    if isinstance(share, tuple) or len(score.spec.shape) < 2:
        return _cut_alone(score, share)
    inputs = math.prod(score.spec.shape[1:])
    options = {"keep": inputs - round(share * inputs), "group": inputs}
    return apply(kept_of_groups, score, unit="row", spec=Spec(score.spec.shape, torch.bool), options=options)


def _cut_together(scores: Mapping[str, Lazy], share: float) -> dict[str, Output]:
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
    return torch.where(mask.to(weight.device), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def apply_mask(weights: Source, mask: Weights) -> Weights:
    """Zero what a mask leaves out; tensors without a mask stay.

    >>> pruned = apply_mask({"w": torch.tensor([1.0, 2.0])}, Weights.of({"w": torch.tensor([True, False])}))
    >>> pruned["w"]
    tensor([1., 0.])
    """
    opened = open(weights)
    return acted(opened, masks_for(opened, open(mask)), "zero", "prune.apply_mask", {})


def masks_for(weights: Weights, mask: Weights) -> dict[str, Lazy]:
    """Tensor -> its boolean mask, by the first name of what is tied; an error for one that fits no tensor."""
    ties = weights.ties
    masks: dict[str, Lazy] = {}
    for name in mask:
        spec = mask.spec(name)
        if name not in weights or weights.spec(name).shape != spec.shape:
            there = (
                f"; its weight is {list(weights.spec(name).shape)}" if name in weights else did_you_mean(name, weights)
            )
            raise Error(f"the mask of {name} fits no tensor of that name and shape {list(spec.shape)}{there}")
        if spec.dtype != torch.bool:
            raise Error(f"the mask of {name} is {spec}; a mask is boolean, such as mask_of(...) makes")
        first = ties.get(name, name)
        if masks.setdefault(first, mask.node(name)) is not mask.node(name):
            raise Error(f"{name} and {first} are one tensor, but have two masks")
    return masks


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
