"""Weights in fewer bytes and back: what every codec of the room shares."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from weightsmith.card import card
from weightsmith.errors import Error, FormatError, did_you_mean, listed
from weightsmith.lifting import dressed, example, options_of, per_tensor_options, tried
from weightsmith.prune import prunable
from weightsmith.share import _exponents, _grouped_codebooks
from weightsmith.share._exponents import DTYPES, Plan, pays, planned, shape_of
from weightsmith.weights import Entire, Inputs, Lazy, Output, Pattern, Spec, Step, Weights, Work, as_dtype, dtype_name
from weightsmith.weights import open as open_weights

if TYPE_CHECKING:
    from weightsmith.inspect import Report

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

METADATA = "weightsmith.shared"
"""Under this word the header says how every tensor was encoded."""

CODECS = ("exponents",)

CONFIG, ASIDE = "config.json", "config.decoded.json"
"""What a model's config is called, and where it is put so that nobody loads codes for plain weights."""


@card(
    paper="Zhang et al. 2025, '70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via "
    "Dynamic-Length Float (DFloat11)'",
    covers=("dfloat11",),
    unit="model",
    claim="bfloat16 weights take about 70 % of their bytes and come back equal to the bit",
    departs="lanes of 4,096 exponents of whole bytes, with their sizes, take the place of the paper's gaps and block "
    "positions, so that any run decodes by itself on a processor, and all lanes together on a device in plain PyTorch "
    "(no kernel of its own, nothing decoded inside a forward pass); codes of at most 12 bits; other floats than "
    "bfloat16; any plane of bytes is coded where that pays, and one of a single value is told once, so that float32 "
    "that was bfloat16 before shrinks to the same",
)
def encode(
    weights: Source,
    codec: Literal["exponents"] = "exponents",
    *,
    pattern: Pattern | None = None,
    threads: int | None = None,
) -> Weights:
    """The same weights in fewer bytes, equal to the bit; `decode` leads back.

    Of ``name`` it makes ``name_stream`` uint8 (Huffman codes of the exponents), ``name_rest`` uint8 (signs and
    mantissas), ``name_sizes`` int16 (bytes of each 4,096 codes), ``name_table`` (256 code lengths a byte of a value)
    and ``name_shape``. A value takes ``8 + H`` bits in bfloat16 and ``24 + H`` in float32, with ``H`` the entropy of
    the exponents, about 2.6 bits, and half a percent more than that. ``config.json`` is put aside as
    ``config.decoded.json``, so that other programs refuse the folder rather than load it without these tensors.

    Args:
        weights: anything that `weightsmith.open` opens.
        codec: how; there is one that loses nothing.
        pattern: which tensors; by default those with floats that get smaller.
        threads: workers of the two passes that count; default one a core.

    Returns:
        Weights: lazy. How long the codes get must be known, so the tensors are read (computed) twice here and once more
        for each part that is written: save what takes long to compute before. About 10 MB are held a thread, and two
        bytes in a thousand of the weights.

    Raises:
        ValueError: nothing fits or gets smaller, a tensor that holds no floats or belongs to one that is encoded, or a
            name that is taken.

    >>> weights = {"w": torch.linspace(-1, 1, 10_000).bfloat16()}
    >>> encoded = encode(weights)
    >>> encoded.nbytes < 0.7 * 20_000, torch.equal(decode(encoded)["w"], weights["w"])
    (True, True)
    """
    if codec not in CODECS:
        raise Error(f"no codec {codec!r}{did_you_mean(str(codec), CODECS)}; known: {', '.join(CODECS)}")
    opened = open_weights(weights)
    names = _able(opened, pattern)
    plans = planned([opened.node(name) for name in names], threads)
    made = {name: plan.parts() for name, plan in zip(names, plans, strict=True) if _kept(plan, pattern)}
    if not made:
        raise Error("nothing here gets smaller; name with pattern= what to encode all the same")
    told = {name: {"codec": codec, "dtype": dtype_name(opened.spec(name).dtype)} for name in made}
    return replaced(opened, made, told, Step("share.encode", {"codec": codec}, (opened.lineage,)))


def _able(weights: Weights, pattern: Pattern | None) -> list[str]:
    names = _chosen(weights, list(weights) if pattern is None else weights.names(pattern), pattern)
    unfit = [name for name in names if weights.spec(name).dtype not in DTYPES or not weights.spec(name).numel]
    if pattern is not None and unfit:
        raise Error(f"{unfit[0]} is {weights.spec(unfit[0])}; what is encoded are floats, and at least one")
    able = [name for name in names if name not in unfit]
    if not able:
        raise Error(f"no tensor to encode fits {pattern=}; there are {listed(weights)}")
    return able


def _chosen(weights: Weights, fitting: list[str], pattern: Pattern | None) -> list[str]:
    """Of tied names the first; without what tensors have become that are encoded already."""
    parts = {} if METADATA not in weights.metadata else _parts(_said(weights))
    inside = next((name for name in fitting if name in parts), None)
    if inside is not None and pattern is not None:
        raise Error(f"{inside} belongs to {parts[inside]}, which is encoded already; decode it first, or name others")
    ties = weights.ties
    return list(dict.fromkeys(ties.get(name, name) for name in fitting if name not in parts))


def _parts(told: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name of a part -> of the tensor that it belongs to."""
    return {name + ending: name for name, entry in told.items() for ending in _codec(name, entry)[0]}


def _kept(plan: Plan, pattern: Pattern | None) -> bool:
    return pattern is not None or pays(plan.parts(), plan.source)


def replaced(
    weights: Weights, made: Mapping[str, Mapping[str, Lazy]], told: Mapping[str, Mapping[str, Any]], step: Step
) -> Weights:
    """Weights with each encoded tensor's parts in its place; other names of one tensor follow it."""
    nodes: dict[str, Lazy] = {}
    said = _said(weights) if METADATA in weights.metadata else {}
    for name in weights:
        first = weights.ties.get(name, name)
        if first not in made:
            parts: dict[str, Lazy] = {name: weights.node(name)}
        else:
            parts = {name + ending: part for ending, part in made[first].items()}
            said[name] = dict(told[first])
        taken = next((one for one in parts if one in nodes or (first in made and one in weights)), None)
        if taken is not None:
            raise Error(f"{name} cannot be encoded: there is a tensor called {taken} already")
        nodes |= parts
    files = dict(weights.files)
    if CONFIG in files:
        files[ASIDE] = files.pop(CONFIG)
    return Weights(nodes, step, files, {**weights.metadata, METADATA: json.dumps(said)})


# The way back


def decode(weights: Source) -> Weights:
    """The weights that a function of this room encoded, lazily and under the names that they had.

    Args:
        weights: what `encode` or `grouped_codebooks` made, or a file or folder of it.

    Returns:
        Weights: lazy; any run of a tensor is decoded by itself, on the device where the codes are. Sizes of lanes and
        codebooks are read at once, codes when they are asked for.

    Raises:
        FormatError: the header, a table or a part is missing, damaged or lies; for codes, when they are read.
        ValueError: nothing here is encoded.

    >>> weights = {"w": torch.linspace(-1, 1, 10_000), "b": torch.zeros(3)}
    >>> decoded = decode(encode(weights))
    >>> list(decoded), torch.equal(decoded["w"], weights["w"])
    (['w', 'b'], True)
    """
    opened = open_weights(weights)
    if METADATA not in opened.metadata:
        raise Error(f"nothing here is encoded: the header has no word {METADATA}")
    told = _said(opened)
    made: dict[object, Lazy] = {}
    nodes: dict[str, Lazy] = {}
    gone = _parts(told)
    lacking = next((part for part in gone if part not in opened), None)
    if lacking is not None:
        raise FormatError(f"{gone[lacking]} is encoded, but {lacking} is missing")
    both = next((name for name in told if name in opened and name not in gone), None)
    if both is not None:
        raise FormatError(f"{both} is there encoded and as it is")
    for name in opened:
        own = gone.get(name, name)
        if own in nodes:
            continue
        if name in gone:
            ends, decoded = _codec(own, told[own])
            key = tuple(id(opened.node(own + end)) for end in ends), json.dumps(told[own], sort_keys=True)
            if key not in made:
                made[key] = decoded(opened, own)
            nodes[own] = made[key]
        else:
            nodes[name] = opened.node(name)
    files = dict(opened.files)
    if ASIDE in files:
        aside = files.pop(ASIDE)
        files.setdefault(CONFIG, aside)
    metadata = {key: word for key, word in opened.metadata.items() if key != METADATA}
    return Weights(nodes, Step("share.decode", {}, (opened.lineage,)), files, metadata)


def _said(weights: Weights) -> dict[str, dict[str, Any]]:
    """What the header says of every encoded tensor. It is untrusted."""
    try:
        found = json.loads(weights.metadata[METADATA])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise FormatError(f"the header's words {METADATA} do not say how tensors were encoded")
    return found


def _codec(name: str, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], Callable[[Weights, str], Lazy]]:
    """The endings of a tensor's parts, and what makes a node of them."""
    codec, word, bits = entry.get("codec"), entry.get("dtype"), entry.get("bits")
    try:
        dtype = as_dtype(word)  # type: ignore[arg-type]
    except (Error, TypeError):
        raise FormatError(f"{name}: the header says no dtype that is known, but {word!r}") from None
    if codec == "exponents":
        return _exponents.ENDINGS, partial(_exponents.floats, dtype=dtype)
    if codec == "grouped_codebooks" and isinstance(bits, int) and dtype.is_floating_point:
        return _grouped_codebooks.ENDINGS, partial(_looked_up, dtype=dtype, bits=bits)
    raise FormatError(f"{name}: the header says no codec that is known, but {dict(entry)}")


# Codebooks


def lift(kernel: Callable[..., Any]) -> Any:
    """``(weights, *, stats=None, pattern=None, ...) -> Weights`` from a codebook kernel. See `grouped_codebooks`."""

    def share(weights: Any, *given: Any, **options: Any) -> Any:
        if isinstance(weights, torch.Tensor):
            return kernel(weights, *given, **options)
        if given:
            raise Error(f"{kernel.__name__} takes weights; all else goes by name")
        stats, pattern = options.pop("stats", None), options.pop("pattern", None)
        opened = open_weights(weights)
        fitting = prunable(opened) if pattern is None else opened.names(pattern, floating=True)
        names = _chosen(opened, fitting, pattern)
        small = [name for name in names if len(opened.spec(name).shape) < 2 or not opened.spec(name).numel]
        if small or not names:
            what = f"{small[0]} is {opened.spec(small[0])}" if small else f"there are {listed(opened)}"
            raise Error(f"no matrix to share codebooks in fits {pattern=}: {what}")
        chosen = per_tensor_options(kernel, options, names)
        tried(kernel, chosen.values(), example(2, 2))
        grams = {} if stats is None else _grams(opened, stats, names, kernel.__name__)
        made, told = {}, {}
        for name in names:
            plan = options_of(kernel) | chosen[name]
            made[name] = _looked_for(kernel, opened.node(name), grams.get(name), plan)
            dtype = dtype_name(opened.spec(name).dtype)
            told[name] = {"codec": "grouped_codebooks", "dtype": dtype, "bits": plan["bits"]}
        return replaced(opened, made, told, Step(f"share.{kernel.__name__}", options, (opened.lineage,)))

    return dressed(share, kernel, _PARAMETERS)


_KIND = inspect.Parameter
_PARAMETERS = (
    _KIND("weights", _KIND.POSITIONAL_OR_KEYWORD, annotation="Source"),
    _KIND("stats", _KIND.KEYWORD_ONLY, default=None, annotation="Source | None"),
    _KIND("pattern", _KIND.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
)


def _grams(weights: Weights, stats: Source, names: list[str], method: str) -> dict[str, Entire]:
    """Name -> the Gram matrix of its inputs. A tied weight may be known under any of its names."""
    opened = open_weights(stats)
    known = {id(weights.node(name)): name for name in weights if name in opened}
    found = {}
    for name in names:
        own = known.get(id(weights.node(name)))
        if own is None:
            raise Error(
                f"{method}: stats say nothing of {name}. Was this layer never called, or another model looked at? Name "
                "with pattern= what is to be encoded"
            )
        found[name] = Entire(opened.node(own))
    return found


def _looked_for(
    kernel: Callable[..., Any], node: Lazy, gram: Entire | None, options: Mapping[str, Any]
) -> dict[str, Lazy]:
    shape, bits = node.spec.shape, options["bits"]
    inputs = torch.Size(shape[1:]).numel()
    outputs = {
        "_codes": Spec((shape[0], _grouped_codebooks.packed_width(inputs, bits)), torch.uint8),
        "_codebooks": Spec((min(options["groups"], shape[0]), 2**bits), torch.float32),
        "_rows": Spec((shape[0],), torch.uint8),
    }
    function = partial(_grouped_codebooks.packed_parts, kernel, tuple(sorted(options.items())))
    work = Work(function, Inputs([node] if gram is None else [node, gram], "tensor"), outputs)
    parts: dict[str, Lazy] = {key: Output(work, key) for key in outputs}
    return parts | {"_shape": _exponents.Noted(torch.tensor(shape, dtype=torch.int64))}


def _looked_up(weights: Weights, name: str, *, dtype: torch.dtype, bits: int) -> Lazy:
    shape = shape_of(weights, f"{name}_shape")
    codes, rows, books = (weights.node(f"{name}_{word}") for word in ("codes", "rows", "codebooks"))
    spec, inputs = Spec(shape, dtype), torch.Size(shape[1:]).numel()
    if not 1 <= bits <= 8 or len(shape) < 2:
        raise FormatError(f"{name}: no codes of {bits} bits for a tensor {list(shape)}")
    fits = codes.spec == Spec((shape[0], _grouped_codebooks.packed_width(inputs, bits)), torch.uint8)
    fits &= rows.spec == Spec(shape[:1], torch.uint8)
    fits &= len(books.spec.shape) == 2 and books.spec.shape[1] == 2**bits and books.spec.dtype.is_floating_point
    if not fits or not 1 <= books.spec.shape[0] <= 256:
        raise FormatError(f"{name}: codes {codes.spec}, groups of rows {rows.spec} and codebooks {books.spec} do not "
                          f"make a tensor {list(shape)}")  # fmt: skip
    function = partial(_grouped_codebooks.unpacked_values, bits=bits, shape=shape)
    # What is not computed yet comes in one piece, and all three parts from one computation.
    whole = 1 < codes.spec.numel <= codes.grain
    inputs_of = Inputs([codes, rows, books], "tensor") if whole else Inputs([codes, rows, Entire(books)], "row")
    return Output(Work(function, inputs_of, {"": spec}))


# What it brings


def sizes(encoded: Source) -> Report:
    """How many bytes encoded weights take, and take decoded.

    Args:
        encoded: what a function of this room made, or a folder of it; only headers and shapes are read.

    Returns:
        Report: a row an encoded tensor: ``before``, ``after`` (bytes), ``after, share`` and ``bits`` (a value, with all
        that belongs to it). The figures are of all tensors, encoded or not.

    Raises:
        ValueError: nothing here is encoded.

    >>> found = sizes(encode({"w": torch.linspace(-1, 1, 10_000).bfloat16()}))
    >>> found["before"], found["bits"][0] < 11.5
    ([20000], True)
    """
    from weightsmith.inspect import Report

    opened, whole = open_weights(encoded), decode(encoded)
    rows, seen = [], set[int]()
    for name, entry in _said(opened).items():
        spec = whole.spec(name)
        if id(whole.node(name)) in seen:
            continue
        seen.add(id(whole.node(name)))
        after = sum(opened.spec(name + ending).nbytes for ending in _codec(name, entry)[0])
        rows.append(
            {
                "tensor": name,
                "shape": "x".join(map(str, spec.shape)),
                "codec": entry["codec"],
                "before": spec.nbytes,
                "after": after,
                "after, share": after / max(spec.nbytes, 1),
                "bits": 8 * after / max(spec.numel, 1),
            }
        )
    figures = {
        "encoded tensors": len(rows),
        "bytes before": whole.nbytes,
        "bytes after": opened.nbytes,
        "after, share": opened.nbytes / max(whole.nbytes, 1),
    }
    return Report("Encoded weights", figures, rows)
