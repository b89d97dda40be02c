"""Prune a trained checkpoint in one go: score, budget, repair and healing by name, from texts or batches.

What the single functions do one by one, with the model built, asked and put away where that is needed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from weightsmith.card import card, card_of
from weightsmith.errors import Error, did_you_mean
from weightsmith.prune.room import Scope, Source, Sparsity, chosen_targets, needed
from weightsmith.weights import Pattern, PerTensor, Weights, as_dtype, open


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
    propagate: str = "changed",
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
        Weights: in the dtype they had, with exact zeros.

    Raises:
        ValueError: a name that is not there, a text that is too short, or what the parts refuse.
    """
    from weightsmith.prune import METHODS

    opened = open(weights)
    _known("score", score, METHODS)
    _known("repair", repair, _room("repair").METHODS)
    _known("allocate", allocate, _room("allocation").METHODS)
    if score is None and repair is None:
        raise Error("one_shot needs a score, or a repair that chooses what goes, such as sparsegpt")
    batches = batches_of(opened, calibrate, samples, length, seed)
    if allocate is not None:
        sparsity = shares(opened, allocate, score, sparsity, batches, pattern, dtype, device)
    from weightsmith.prune import sequential

    ways = {"scope": scope, "structure": structure, "propagate": propagate, "store": store, "resume": resume}
    way: Any = score
    if score is not None and needed(METHODS[score]) in ("stats.gradients", "stats.fisher"):
        masks = _by_gradients(opened, batches, score, sparsity, scope, structure, pattern, dtype, device)
        way, ways = _kept(masks), ways | {"scope": "tensor", "structure": "element"}
        if not _is_pattern(sparsity):
            sparsity = {name: 1 - float(masks[name].double().mean()) for name in masks}
    pruned = sequential(
        opened,
        batches,
        sparsity,
        score=way,
        repair=repair,
        pattern=pattern,
        dtype=as_dtype(dtype),
        device=device,
        **ways,
    )
    if heal:
        pruned = _room("repair").heal_weights(pruned, opened, batches, steps=heal, seed=seed)
    return pruned


def batches_of(weights: Weights, given: Any, samples: int, length: int, seed: int) -> list[Any]:
    """Batches from text files, or those that are given."""
    if isinstance(given, str | os.PathLike):
        given = [given]
    listed = list(given)
    if listed and all(isinstance(one, str | os.PathLike) for one in listed):
        from weightsmith import calibration

        return list(calibration.texts(weights, listed, samples=samples, length=length, seed=seed))
    if not listed:
        raise Error("pruning by data needs calibrate=, a text file or batches; got none")
    return listed


def shares(
    weights: Weights, name: str, score: str | None, sparsity: Any, batches: Sequence[Any], pattern: Pattern | None,
    dtype: str, device: str,
) -> dict[str, float]:  # fmt: skip
    """What an allocation gives each tensor, with the data that it asks for; curves are of what the score removes."""
    from weightsmith.prune import METHODS

    room = _room("allocation")
    method = room.METHODS[name]
    if not isinstance(sparsity, int | float):
        raise Error(f"allocate={name!r} shares one number among the tensors; got sparsity={sparsity!r}")
    options: dict[str, Any] = {} if pattern is None else {"pattern": pattern}
    first = next(iter(inspect.signature(method).parameters))
    by_curves = first == "curves"
    if needed(method) != "stats.gram" and not by_curves:
        return method(weights, sparsity, **options)
    told = energies(weights, batches, chosen_targets(weights, pattern), dtype, device)
    if not by_curves:
        return method(weights, sparsity, stats=told, **options)
    own = METHODS[score or "wanda"]
    removed = functools.partial(own, stats=told) if needed(own) == "stats.gram" else own
    curves = room.gram_curves(weights, stats=told, method=removed, **options)
    return method(curves, sparsity)


def energies(weights: Weights, batches: Sequence[Any], names: Sequence[str], dtype: str, device: str) -> Weights:
    """Diagonals of the Gram matrices of the dense model, gathered block by block."""
    from weightsmith.stats import Gram, walk

    found: dict[str, Any] = {}

    def visit(block: Any) -> None:
        for one in block.statistics["gram"]:
            found[one] = block.statistics["gram"][one]

    chosen = frozenset(names)
    statistics = {"gram": Gram(pattern=chosen.__contains__, form="diagonal")}
    walk(weights, batches, visit, statistics=statistics, propagate="dense", dtype=as_dtype(dtype), device=device)
    return Weights.of(found)


def _by_gradients(
    weights: Weights, batches: Sequence[Any], score: str, sparsity: Any, scope: Scope | None, structure: Any,
    pattern: Pattern | None, dtype: str, device: str,
) -> Weights:  # fmt: skip
    """The masks of a score that asks for gradients: these come from the whole model."""
    from weightsmith import stats
    from weightsmith.prune import METHODS

    model = _model(weights, dtype).to(device)
    need = needed(METHODS[score])
    gather: Callable[..., Weights] = stats.gradients if need == "stats.gradients" else stats.fisher
    options: dict[str, Any] = {} if need == "stats.gradients" else {"labels": "given"}
    told = gather(model, batches, pattern=chosen_targets(weights, pattern), **options)
    how: dict[str, Any] = {"structure": structure, "action": "mask"} | ({} if scope is None else {"scope": scope})
    return METHODS[score](weights, sparsity, stats=told, pattern=pattern, **how)


def _kept(masks: Weights) -> Callable[..., Tensor]:
    """A score that says again what a mask says."""

    def kept(weight: Tensor, *, key: str) -> Tensor:
        return masks[key].float() if key in masks else weight.float().abs()

    return card(paper="")(kept)


def _is_pattern(sparsity: Any) -> bool:
    return isinstance(sparsity, str)


def _model(weights: Weights, dtype: str) -> nn.Module:
    from weightsmith.language import carried, described, with_weights

    config, _ = described(carried(weights))
    return with_weights(config, weights, as_dtype(dtype)).eval()


def _known(option: str, name: str | None, methods: Mapping[str, Any]) -> None:
    if name is not None and name not in methods:
        there = ", ".join(methods)
        raise Error(f"{option} is one of {there}; got {name!r}{did_you_mean(name, methods)}")
    if name is not None and option == "score" and card_of(methods[name]).unit == "model":
        raise Error(f"score={name!r} is not a score of single weights; give it on the model with by_score")


def _room(name: str) -> Any:
    return importlib.import_module(f"weightsmith.prune.{name}")
