"""Quantize a trained checkpoint in one go: budget, transform, grid and rounding by name, from texts or batches.

What the single functions do one by one, with the model built, asked and put away where that is needed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from weightsmith import calibration
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.language import whole
from weightsmith.prune import prunable
from weightsmith.quantize._end_to_end import end_to_end
from weightsmith.quantize._flexround import learns_steps
from weightsmith.quantize._guided import guidedquant
from weightsmith.quantize._judged import moved
from weightsmith.quantize._reconstruct import check_options, reconstruct
from weightsmith.quantize._rsq import AttentionGram
from weightsmith.quantize._sequential import asks, kernel_of, sequential
from weightsmith.quantize.budget import curves, mixed
from weightsmith.quantize.grids import Grid
from weightsmith.quantize.room import Source, planned, takes_gram
from weightsmith.weights import Pattern, PerTensor, Weights, as_dtype, open

Allocate = Literal["loss", "output"]
Guide = Literal["attention", "loss"]

HEALING = 3e-3
"""The rate at which steps learn end to end, as a share of themselves."""

LEARNED = "reconstruct"
"""What rounds whole blocks and not one layer at a time."""

GROUPS, GRAMS = 4, 2**31
"""Guided by the loss: Gram matrices of a layer, and bytes that those of several may take together."""

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Among which a mean is shared."""

AROUND = ("group", "scale_dtype", "indivisible")
"""What embeddings are coded with as the other tensors are."""


@card(
    paper="Frantar, Ashkboos, Hoefler, Alistarh 2022, 'GPTQ: Accurate Post-Training Quantization for Generative "
    "Pre-trained Transformers' (block after block on calibration texts)",
    needs=("data",),
    unit="model",
    claim="the same codes as its parts called one by one",
)
def one_shot(
    weights: Source,
    bits: PerTensor[float] | None = None,
    *,
    calibrate: str | Sequence[str] | Iterable[Any],
    method: str = "gptq",
    group: PerTensor[int | None] = None,
    grid: PerTensor[str | Grid] | None = None,
    symmetric: PerTensor[bool] | None = None,
    scale_dtype: PerTensor[torch.dtype | str] | None = None,
    indivisible: Literal["error", "ragged", "pad", "shrink", "skip"] = "error",
    transform: str | None = None,
    guide: Guide | None = None,
    allocate: Allocate = "loss",
    embeddings: int | None = None,
    heal: int = 0,
    pattern: Pattern | None = None,
    samples: int = 128,
    length: int = 512,
    propagate: Literal["changed", "dense"] = "changed",
    dtype: str = "float32",
    device: str = "cpu",
    store: str | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> Weights:
    """Quantize a language model on a text, block after block.

    Args:
        weights: a folder of transformers, or what else `weightsmith.open` opens that carries a config and a tokenizer.
        bits: of a code, possibly by tensor; a number between two whole ones is the mean of a mixed budget, which the
            data share among the tensors. Default: the grid's own.
        calibrate: text files, or batches as `weightsmith.stats.collect` takes them.
        method: a rounding of this room, or ``"reconstruct"``, in which whole blocks learn.
        group: inputs that share parameters; None for the grid's own.
        grid: a word of `weightsmith.quantize.grids`, or a grid; None for the method's own.
        symmetric: whether zero is in the middle of an integer grid.
        scale_dtype: in what steps are stored; None for that of the weights.
        indivisible: what is done where groups do not fill a row.
        transform: what is done to the weights before, the function staying as it is: a method of
            `weightsmith.quantize.transforms` that asks for no more than data.
        guide: what says how much each token counts: the ``"attention"`` it receives (`rsq`), or how far the ``"loss"``
            hangs on what a layer gives for it (`guidedquant`); None for all alike.
        allocate: by what a mixed budget is shared, see `weightsmith.quantize.budget.curves`.
        embeddings: bits of embeddings and head, rounded to nearest; None leaves them as they are.
        heal: optimizer steps in which the steps of all groups learn, through the whole model, to say what it said
            (`end_to_end` with itself as the teacher); with 2 bits worth more than all else, and the most work.
        pattern: names of tensors; by default matrices, but not embeddings and the head.
        samples: windows of the texts.
        length: tokens of a window.
        propagate: whether blocks are given what the quantized ones before them give (``changed``) or the dense ones;
            guided by the loss, all see what the whole model gives.
        dtype: in what the model computes.
        device: where.
        store: a folder that keeps finished blocks, for a job that may be interrupted.
        resume: go on with what the folder holds.
        seed: of the choice of windows, and of roundings that draw.
        options: of the method.

    Returns:
        Weights: with codes for tensors. Memory: that of `sequential`; for a mixed budget by loss, and for a transform
        that runs it, the whole model; guided by the loss, also two gigabytes of Gram matrices; healed, that of
        `end_to_end`.

    Raises:
        Error: a name that is not there or cannot be used here, a text that is too short, or what the parts refuse.
    """
    from weightsmith.quantize import METHODS

    opened = open(weights)
    learned = method == LEARNED
    kernel = kernel_of("rtn" if learned else method)
    about: dict[str, Any] = {
        "group": group, "grid": grid, "symmetric": symmetric, "scale_dtype": scale_dtype, "indivisible": indivisible,
        "pattern": pattern,
    }  # fmt: skip
    about = {name: value for name, value in about.items() if value is not None}
    if learned or "seed" in inspect.signature(kernel).parameters:
        options = {"seed": seed, **options}
    if learned:
        check_options(options)
    _check_guide(guide, method, kernel, options, store)
    if not isinstance(heal, int) or isinstance(heal, bool) or heal < 0:
        raise Error(f"heal is a whole number of steps from 0, got {heal!r}")
    own = {} if learned else options
    mean = bits if isinstance(bits, float) and not bits.is_integer() else None
    width: Any = int(bits) if isinstance(bits, float) else bits
    plans = planned(kernel, opened, {**about, **own, "bits": width})  # what does not go together is found now
    if heal and not any(learns_steps(plan.grid) for plan in plans.values()):
        raise Error(f"heal= trains steps that are plain floats, which the grids of {method} do not have")
    widths = [one for one in WIDTHS if mean is not None and _can_be(kernel, opened, {**about, **own, "bits": one})]
    if allocate not in get_args(Allocate):
        raise Error(f"allocate is 'loss' or 'output', got {allocate!r}")
    if embeddings is not None:
        with_embeddings(opened, embeddings, {name: about[name] for name in AROUND if name in about})  # nothing is read
    if transform is not None:
        transforming(transform)
    if resume and store is None:
        raise Error("resume=True continues what is in store=, and no folder is given")
    batches = list(calibration.batches(opened, calibrate, samples, length, seed=seed))
    running: dict[str, Any] = {"dtype": as_dtype(dtype), "device": device}
    if mean is not None:
        found = curves(opened, batches, bits=widths, by=allocate, **about, **running)  # to nearest: it ranks alike
        width = mixed(found, mean)
        about["pattern"] = list(width)
    told = {name: value for name, value in about.items() if name != "pattern"}
    changed = opened
    if transform is not None:
        changed = transformed(transform, opened, batches, {**about, "bits": width}, running)
    how: dict[str, Any] = {**about, **options, "bits": width}
    kept: dict[str, Any] = {"propagate": propagate, "store": store, "resume": resume}
    compute = None if running["dtype"] == torch.float32 else dtype
    if learned:
        done = reconstruct(changed, batches, compute=compute, device=device, **kept, **how)
    elif not asks(kernel, plans):
        done = METHODS[method](changed, **how)
    elif guide == "loss":
        done = _by_loss(changed, batches, kernel, how, running)
    else:
        gram = AttentionGram(sums=torch.float32) if guide == "attention" else None
        done = sequential(changed, batches, kernel, gram=gram, **kept, **running, **how)
    if heal:
        model, data = whole(changed, torch.float32, device), moved(batches, device)
        done = end_to_end(done, data, model, teacher=True, steps=heal, lr=HEALING, compute=compute, seed=seed)
    if embeddings is None:
        return done
    return with_embeddings(done, embeddings, {name: told[name] for name in AROUND if name in told})


def _check_guide(guide: Guide | None, method: str, kernel: Any, options: Mapping[str, Any], store: str | None) -> None:
    if guide is None:
        return
    if guide not in get_args(Guide):
        raise Error(f"guide is 'attention' or 'loss', got {guide!r}")
    if method == LEARNED or not takes_gram(kernel) or (method == "rtn" and not options.get("clip")):
        raise Error(f"guide={guide!r} weighs Gram matrices, and {method} asks for none")
    if guide == "loss" and store is not None:
        raise Error("guide='loss' asks the whole model at once, so there are no finished blocks to keep in store=")


def _by_loss(
    weights: Weights, batches: Sequence[Any], kernel: Any, how: Mapping[str, Any], running: Mapping[str, Any]
) -> Weights:
    """Rounded with Gram matrices that know the loss, some layers at a time."""
    plans = planned(kernel, weights, how)
    widest = max(plan.layout.inputs for plan in plans.values())
    at_once = max(GRAMS // (8 * GROUPS * widest**2), 1)
    model, data = whole(weights, **running), moved(batches, running["device"])
    return guidedquant(
        model, data, kernel, weights=weights, groups=GROUPS, at_once=at_once, **{**how, "pattern": list(plans)}
    )


def _can_be(kernel: Any, weights: Weights, options: Mapping[str, Any]) -> bool:
    """Whether a grid has codes of a width."""
    try:
        planned(kernel, weights, options)
    except Error:
        return False
    return True


def with_embeddings(
    weights: Weights, bits: int, about: Mapping[str, Any], names: Sequence[str] | None = None
) -> Weights:
    """Embeddings and head as codes too, rounded to nearest; tied ones once."""
    from weightsmith.quantize import rtn

    names = embeddings_of(weights) if names is None else list(names)
    if not names:
        raise Error("embeddings= is given, and no matrix here is named as an embedding or a head")
    return rtn(weights, **{**about, "pattern": names, "bits": bits, "clip": 8, "symmetric": False})


def embeddings_of(weights: Weights) -> list[str]:
    """Matrices with a row for each word, tied ones once."""
    known = {*prunable(weights), *weights.ties}
    return [name for name in weights.names(floating=True) if len(weights.spec(name).shape) == 2 and name not in known]


def transforming(name: str) -> Any:
    """A transform that asks for no more than weights and data."""
    known = importlib.import_module("weightsmith.quantize.transforms").METHODS
    usable = [name for name, one in known.items() if _asks(one) <= {"weights", "batches"}]
    if name not in usable:
        raise Error(f"transform is one of {', '.join(usable)}; got {name!r}{did_you_mean(name, usable)}")
    return known[name]


def _asks(method: Any) -> set[str]:
    """What must be given."""
    return {
        p.name for p in inspect.signature(method).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }  # fmt: skip


def transformed(
    name: str, weights: Weights, batches: Sequence[Any], about: Mapping[str, Any], running: Mapping[str, Any]
) -> Weights:
    """What a transform makes of weights, with those options that it takes; one that runs the whole model gets it."""
    method = transforming(name)
    signature = inspect.signature(method).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    options = {key: value for key, value in about.items() if every or key in signature}
    options |= {key: value for key, value in running.items() if key in signature}
    if "loss" in signature:
        options["model"] = whole(weights, **running)
        batches = moved(batches, running["device"])
    return method(weights, batches, **options) if "batches" in signature else method(weights, **options)
