"""Prune a trained checkpoint in one go: score, budget, repair and healing by name, from texts or batches.

What the single functions do one by one, with the model built, asked and put away where that is needed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith import calibration
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.language import whole as whole_model
from weightsmith.lifting import options_of
from weightsmith.prune.room import Scope, Source, Sparsity, chosen_targets, needed
from weightsmith.weights import Pattern, PerTensor, Weights, as_dtype, open

BY_GRADIENTS = ("stats.gradients", "stats.fisher")
"""Statistics that are gathered from the whole model at once."""


@card(
    paper="Frantar, Alistarh 2023, 'SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot' (block "
    "after block on calibration texts)",
    needs=("data",),
    unit="model",
    claim="the same weights as its parts called one by one",
)
def one_shot(
    weights: Source,
    sparsity: Sparsity = 0.5,
    *,
    calibrate: str | Sequence[str] | Iterable[Any],
    score: str | None = "wanda",
    repair: str | None = None,
    allocate: str | None = None,
    heal: int = 0,
    scope: Scope | None = None,
    structure: PerTensor[str] = "element",
    pattern: Pattern | None = None,
    samples: int = 128,
    length: int = 512,
    propagate: Literal["changed", "dense"] = "changed",
    dtype: str = "float32",
    device: str = "cpu",
    store: str | None = None,
    resume: bool = False,
    seed: int = 0,
) -> Weights:
    """Prune a language model on a text, block after block.

    Args:
        weights: a folder of transformers, or what else `weightsmith.open` opens that carries a config and a tokenizer.
        sparsity: share to remove, or an N:M pattern such as ``"2:4"``; possibly by tensor.
        calibrate: text files, or batches as `weightsmith.stats.collect` takes them.
        score: which weights go: a method of this room; None where the repair chooses.
        repair: what is done with those that are left: a method of `weightsmith.prune.repair`; None leaves them.
        allocate: how the budget is shared among the tensors: a method of `weightsmith.prune.allocation`; by default
            every tensor loses the same share.
        heal: steps of training after pruning, towards the outputs of the dense model; zeros stay.
        scope: among what the budget of a tensor is shared; by default what the score's paper has.
        structure: what is removed as one: element, row, column or a block such as 16x16.
        pattern: names of tensors; by default matrices, but not embeddings and the head.
        samples: windows of the texts.
        length: tokens of a window.
        propagate: whether blocks are given what the pruned ones before them give (``changed``) or the dense ones
            (``dense``).
        dtype: in what the model computes.
        device: where.
        store: a folder that keeps finished blocks, for a job that may be interrupted.
        resume: go on with what the folder holds.
        seed: of random choices.

    Returns:
        Weights: in the dtype they had, with exact zeros. Memory: that of `sequential`; with ``allocate`` that asks the
        data, diagonals of Gram matrices (whole ones for curves of a score that needs them); with a score that asks for
        gradients, or healing, whole models.

    Raises:
        Error: a name that is not there or cannot be used here, a text that is too short, or what the parts refuse.
    """
    from weightsmith.prune import sequential

    opened, width = open(weights), as_dtype(dtype)
    whole = _checked(opened, sparsity, score, repair, allocate, scope, structure, pattern, propagate, heal)
    if resume and store is None:
        raise Error("resume=True continues what is in store=, and no folder is given")
    batches = list(calibration.batches(opened, calibrate, samples, length, seed=seed))
    if allocate is not None:
        way = {"structure": structure} | ({} if scope is None else {"scope": scope})
        sparsity = shares(opened, allocate, score, sparsity, batches, pattern, dtype, device, way)
    by: Any = score
    if whole:
        assert score is not None
        masks = _by_gradients(opened, batches, score, sparsity, scope, structure, pattern, dtype, device)
        by, scope, structure = _kept(masks, score), "tensor", "element"
        if not isinstance(sparsity, str):
            sparsity = {name: 1 - int(mask.sum()) / max(mask.numel(), 1) for name, mask in masks.items()}
    pruned = sequential(
        opened, batches, sparsity, score=by, repair=repair, scope=scope, structure=structure, propagate=propagate,
        pattern=pattern, dtype=width, device=device, store=store, resume=resume, **_seeded(score, repair, seed),
    )  # fmt: skip
    if heal:
        teacher = whole_model(opened, device=device)
        pruned = _room("repair").heal_weights(pruned, teacher, batches, model=teacher, steps=heal, seed=seed)
    return pruned


def _checked(
    weights: Weights, sparsity: Any, score: str | None, repair: str | None, allocate: str | None, scope: Scope | None,
    structure: Any, pattern: Pattern | None, propagate: str, heal: int,
) -> bool:  # fmt: skip
    """Whether the score needs the whole model; what does not go together is found now, before any data are read."""
    from weightsmith.prune import METHODS
    from weightsmith.prune._sequential import _Plan

    lifted = "it is not a score of single weights"
    _known("score", score, METHODS, lambda method: hasattr(method, "kernel"), lifted)
    repairs = _room("repair").METHODS
    _known("repair", repair, repairs, lambda method: hasattr(method, "kernel"), "it does not repair layer by layer")
    allocations = _room("allocation").METHODS
    _known("allocate", allocate, allocations, _gives_shares, "it asks for more than weights and Gram matrices")
    if score is None and repair is None:
        raise Error("one_shot needs a score, or a repair that chooses what goes, such as sparsegpt")
    whole = score is not None and needed(METHODS[score]) in BY_GRADIENTS
    # A score that asks for gradients gives masks beforehand; these have any scope.
    _Plan(weights, sparsity, "magnitude" if whole else score, repair, None if whole else scope, structure, pattern, {})
    if allocate is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, int | float)):
        raise Error(f"allocate={allocate!r} shares one number among the tensors; got sparsity={sparsity!r}")
    if allocate is not None and scope == "global":
        raise Error(f'allocate={allocate!r} shares the budget among the tensors, and so does scope="global"; give one')
    if propagate not in ("changed", "dense"):
        raise Error(f"propagate is 'changed' or 'dense', got {propagate!r}")
    if heal < 0:
        raise Error(f"heal is a number of steps, got {heal}")
    return whole


def _seeded(score: str | None, repair: str | None, seed: int) -> dict[str, Any]:
    """The seed, for those that draw."""
    from weightsmith.prune import METHODS

    parts = [METHODS[score]] if score is not None else []
    parts += [_room("repair").METHODS[repair]] if repair is not None else []
    return {"seed": seed} if any("seed" in options_of(part.kernel) for part in parts) else {}


def _gives_shares(method: Callable[..., Any]) -> bool:
    """Whether weights, or curves of what pruning them does, are all that an allocation asks for."""
    signature = inspect.signature(method)
    return (
        next(iter(signature.parameters)) in ("weights", "curves") and signature.return_annotation == "dict[str, float]"
    )


def shares(
    weights: Weights, name: str, score: str | None, sparsity: Any, batches: Sequence[Any], pattern: Pattern | None,
    dtype: str, device: str, way: Mapping[str, Any],
) -> dict[str, float]:  # fmt: skip
    """What an allocation gives each tensor, with the data that it asks for; curves are of what the score removes."""
    from weightsmith.prune import METHODS
    from weightsmith.prune._sequential import _diagonal_will_do

    room = _room("allocation")
    method = room.METHODS[name]
    options: dict[str, Any] = {} if pattern is None else {"pattern": pattern}
    by_curves = next(iter(inspect.signature(method).parameters)) == "curves"
    if needed(method) != "stats.gram" and not by_curves:
        return method(weights, sparsity, **options)
    own = METHODS[score or "wanda"]
    whole = by_curves and needed(own) == "stats.gram" and not _diagonal_will_do(own.kernel, {})
    told = grams(weights, batches, chosen_targets(weights, pattern), dtype, device, "full" if whole else "diagonal")
    if not by_curves:
        return method(weights, sparsity, stats=told, **options)
    need = needed(own)
    if need is not None:
        seen = _gradients(weights, batches, need, pattern, dtype, device) if need in BY_GRADIENTS else told
        own = functools.partial(own, stats=seen)
    curves = room.gram_curves(weights, stats=told, method=functools.partial(own, pattern="*", **way), **options)
    return method(curves, sparsity)


def grams(
    weights: Weights, batches: Sequence[Any], names: Sequence[str], dtype: str, device: str,
    form: Literal["full", "diagonal"],
) -> Weights:  # fmt: skip
    """Gram matrices of the dense model, or their diagonals, gathered block by block."""
    from weightsmith.stats import Gram, walk

    found: dict[str, Any] = {}

    def visit(block: Any) -> None:
        found.update({name: gram.cpu() for name, gram in block.statistics["gram"].items()})

    chosen = frozenset(names)
    statistics = {"gram": Gram(pattern=chosen.__contains__, form=form)}
    walk(weights, batches, visit, statistics=statistics, propagate="dense", dtype=as_dtype(dtype), device=device)
    return Weights.of(found)


def _by_gradients(
    weights: Weights, batches: Sequence[Any], score: str, sparsity: Any, scope: Scope | None, structure: Any,
    pattern: Pattern | None, dtype: str, device: str,
) -> dict[str, Tensor]:  # fmt: skip
    """The masks of a score that asks for gradients: these come from the whole model."""
    from weightsmith.prune import METHODS

    told = _gradients(weights, batches, needed(METHODS[score]), pattern, dtype, device)
    how: dict[str, Any] = {"structure": structure, "action": "mask"} | ({} if scope is None else {"scope": scope})
    return METHODS[score](weights, sparsity, stats=told, pattern=pattern, **how).to_dict()


def _gradients(
    weights: Weights, batches: Sequence[Any], need: str | None, pattern: Pattern | None, dtype: str, device: str
) -> Weights:
    """Gradients of the dense model, or the empirical Fisher information."""
    from weightsmith.stats import fisher, gradients
    from weightsmith.stats.room import mapped

    model = whole_model(weights, dtype, device)
    gather = gradients if need == "stats.gradients" else functools.partial(fisher, labels="given")
    moved = (mapped(lambda value: value.to(device), batch) for batch in batches)
    found = gather(model, moved, pattern=chosen_targets(weights, pattern))
    return Weights.of({name: value.cpu() for name, value in found.items()})


def _kept(masks: Mapping[str, Tensor], score: str) -> Callable[..., Tensor]:
    """A score that says again what masks say."""

    def kept(weight: Tensor, *, key: str = "") -> Tensor:
        return masks[key].to(weight.device, torch.float32) if key else weight.float().abs()

    kept.__name__ = score  # what a store is known by
    return card(paper="")(kept)


def _known(
    option: str, name: str | None, methods: Mapping[str, Any], fits: Callable[[Any], bool], why: str
) -> None:  # fmt: skip
    """An error for a name that is not there, or that of a method that is called otherwise."""
    if name is None:
        return
    usable = [one for one in methods if fits(methods[one])]
    if name not in methods:
        raise Error(f"{option} is one of {', '.join(usable)}; got {name!r}{did_you_mean(name, usable)}")
    if name not in usable:
        raise Error(f"{option}={name!r}: {why}, so call it by itself; known here are {', '.join(usable)}")


def _room(name: str) -> Any:
    return importlib.import_module(f"weightsmith.prune.{name}")
