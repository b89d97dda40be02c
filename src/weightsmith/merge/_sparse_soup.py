"""Average models that were pruned alike, so that the average is as sparse as they are.

Copies of one pruned model that were retrained with its mask, each in another way, lie in one valley of the loss
like fine-tunes do. Their average is better than any of them and has the very same zeros, which the average of
models that were pruned each by itself has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.merge import _mean
from weightsmith.merge.room import Source, check_alike, lift, opened_models
from weightsmith.prune import apply_mask, prunable
from weightsmith.weights import (
    Inputs,
    Lazy,
    Pattern,
    PerTensor,
    Reduction,
    Spec,
    Stack,
    Weights,
    apply,
    open,
    single,
    solve_all,
)

Agreement = Literal["same", "union", "intersection"]

_mean_of = lift(_mean.mean)


@card(
    paper="Zimmer, Spiegel, Pokutta 2024, 'Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging'",
    covers=("sparse-model-soups",),
    unit="model",
    claim="at one sparsity, at least as accurate as the best single retrained model",
    departs="one phase of the recipe; pruning, retraining and the next phase are the caller's loop",
)
def sparse_soup(
    models: Sequence[Source],
    *,
    weight: PerTensor[float | Sequence[float]] | None = None,
    mask: Agreement | Mapping[str, Tensor] = "same",
    pattern: Pattern | None = None,
    nonfinite: Literal["refuse", "allow"] = "refuse",
) -> Weights:
    r"""The mean of models that were retrained from one pruned parent, with the parent's mask.

    .. math:: w = m \odot \frac{\sum_i a_i w_i}{\sum_i a_i}

    After it, statistics of batch norm are to be estimated anew (`weightsmith.stats.batch_norm`); the soup can be
    pruned further and serve as the next parent.

    Args:
        models: k >= 1 retrained models; anything that `weightsmith.open` opens. The pruned tensors are read once to
            compare their zeros, before anything is averaged.
        weight: :math:`a_i`, one number for each model; all equal by default. May differ by tensor.
        mask: :math:`m`. ``"same"``: the places where the models are zero, an error if these differ;
            ``"intersection"``: kept is only what no model has pruned; ``"union"``: what any has kept; or a mask such
            as `weightsmith.prune.mask_of` finds in the parent, an error if a model is not zero outside of it.
        pattern: the pruned tensors; by default `weightsmith.prune.prunable`, or those of a given mask.
        nonfinite: ``"allow"`` lets NaN and infinity of the models through, which are refused else.

    Returns:
        Weights: lazy, like `mean`; zero wherever the mask is false.

    Raises:
        ValueError: no model, different architectures, weights that sum to zero, or different masks.

    >>> a, b = ({"w": torch.tensor([[x, 0.0]])} for x in (1.0, 2.0))
    >>> sparse_soup([a, b])["w"]
    tensor([[1.5000, 0.0000]])
    """
    opened = opened_models(models, "sparse_soup")
    check_alike(opened, None, "sparse_soup")
    given = None if isinstance(mask, str) else open(mask)
    if given is None and mask not in get_args(Agreement):
        raise Error(f"sparse_soup: mask is one of {', '.join(get_args(Agreement))} or a boolean mask; got {mask!r}")
    soup = _mean_of(opened, weight=weight, nonfinite=nonfinite)
    targets = _targets(opened[0], given, pattern)
    chosen = frozenset(targets).__contains__
    if given is not None:
        # For what it refuses: where the models are zero, so is their mean.
        apply_mask(soup, given.select(chosen))
    if mask == "intersection":
        first, *others = (model.select(chosen) for model in opened)
        kept = first.zip_nodes(_in_all, tuple(others), "in_all", {})
        soup = apply_mask(soup, kept)
    elif mask != "union":
        _check(opened, given, targets)
    options = {"mask": mask if isinstance(mask, str) else "given"}
    return soup.zip_nodes(lambda name, node: node, (), "merge.sparse_soup", options)


def _targets(model: Weights, mask: Weights | None, pattern: Pattern | None) -> list[str]:
    able = model if mask is None else mask
    names = able.names(pattern) if pattern is not None else (prunable(model) if mask is None else list(mask))
    if not names:
        raise Error(f"sparse_soup: no tensor fits pattern={pattern!r}; there are {listed(able)}")
    return names


def _in_all(name: str, *members: Lazy) -> Lazy:
    return apply(_nowhere_zero, Stack(members), spec=Spec(members[0].spec.shape, torch.bool))


def _nowhere_zero(models: Tensor) -> Tensor:
    return (models != 0).all(dim=0)


def _check(models: Sequence[Weights], mask: Weights | None, targets: Sequence[str]) -> None:
    """An error that names the tensors whose zeros are not those of the mask, or not the same in all models."""
    masks = {name: None if mask is None else mask.node(name) for name in targets}
    counts = {name: _counting([model.node(name) for model in models], masks[name]) for name in targets}
    solve_all(counts.values())
    sizes = {name: models[0].spec(name).numel for name in targets}
    wrong = [f"{name} ({count.value()} of {sizes[name]} elements)" for name, count in counts.items() if count.value()]
    if wrong and mask is not None:
        raise Error(f"sparse_soup: models are not zero where the mask is: {listed(wrong)}; apply_mask them first")
    if wrong:
        raise Error(
            f"sparse_soup: the models are not zero in the same places: {listed(wrong)}; retrain them with the mask of "
            'one parent, and give it with mask= where one of its weights has become zero; or pass mask="intersection" '
            'or "union", or prune their mean instead: prune.magnitude(merge.mean(models))'
        )


def _counting(members: Sequence[Lazy], mask: Lazy | None) -> Reduction:
    arguments = [Stack(tuple(members)), *([] if mask is None else [mask])]
    return Reduction([Inputs(arguments, "element")], partial(single, _differing, int))


def _differing(models: Tensor, mask: Tensor | None = None) -> Tensor:
    """Elements that are zero in some models only; or, with a mask, that are not zero where it is false."""
    kept = models != 0
    return (kept.any(dim=0) & ~(kept.all(dim=0) if mask is None else mask)).sum()
