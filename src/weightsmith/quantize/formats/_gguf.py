"""GGUF files that llama.cpp runs: the tensors, their names, their order of rows, and the keys of the header.

Codes are kept where a packing of GGUF has the same grid: symmetric integers of blocks of 32 (Q4_0, Q5_0, Q8_0), affine
ones (Q4_1, Q5_1), ternary (TQ2_0, TQ1_0) and MXFP4, with float16 for scales.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean, listed, missing
from weightsmith.quantize._layout import METADATA, Layout, config_of, decoded, endings_of, layouts_of, plain_files
from weightsmith.quantize._parts import unpack as unpack_codes
from weightsmith.quantize.formats._gguf_blocks import TERNARY, blocks, kind_for, quantized
from weightsmith.quantize.formats._gguf_words import FILE_TYPES, MODELS, model_keys, tokenizer_keys
from weightsmith.quantize.formats._parts import weights_before
from weightsmith.weights import Inputs, Lazy, Output, Spec, Step, Weights, Work, apply
from weightsmith.weights._gguf_names import FAMILIES, Family, change_of
from weightsmith.weights._gguf_write import KINDS, WORDS

FORMATS = ("gguf",)

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALWAYS_WIDE = re.compile(r"^(position_embd|token_types)\.")
# What a checkpoint holds and GGUF does not: it follows from the config, or llama.cpp has no use for it.
_LEFT_OUT = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|pooler\.dense\.(weight|bias))$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def pack(
    weights: Weights,
    rest: str = "F16",
    requantize: str | None = None,
    ternary: str = "TQ2_0",
    keys: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
) -> Weights:
    """Codes or floats as a whole GGUF file.

    Args:
        rest: how matrices that are not coded are packed: ``"F32"``, ``"F16"``, ``"BF16"``, ``"Q8_0"`` ...
        requantize: how tensors are packed whose codes GGUF cannot hold, by gguf's own rule; None for an error.
        ternary: how ternary codes are packed: ``"TQ2_0"`` (two bits each) or ``"TQ1_0"`` (five in a byte).
        keys: strings, numbers or truth values that overrule or add to the header's.
        tokenizer: whether the vocabulary is written.
    """
    for option, kind in (("rest", rest), ("requantize", requantize)):
        if kind is not None and kind not in FILE_TYPES:
            raise Error(f"{option} is one of {', '.join(FILE_TYPES)}, got {kind!r}")
    if ternary not in TERNARY:
        raise Error(f"ternary is {' or '.join(map(repr, TERNARY))}, got {ternary!r}")
    plain = Weights({name: weights.node(name) for name in weights}, weights.lineage, plain_files(weights))
    config = config_of(plain)
    if config is None:
        raise Error("a GGUF file tells all of a model, and there is no config.json beside these weights")
    kind = config.get("model_type")
    if kind not in MODELS:
        raise Error(
            f"models of the type {kind!r} are not written to GGUF{did_you_mean(str(kind), MODELS)}; "
            f"known: {', '.join(MODELS)}"
        )
    layouts = layouts_of(weights) if METADATA in weights.metadata else {}
    held = {name: kind_for(layout, ternary) for name, layout in layouts.items()}
    if wrong := [name for name, found in held.items() if not found]:
        if requantize is None:
            raise Error(
                f"{listed(wrong)}: no packing of GGUF has this grid (integers in groups of 32, ternary ones of 256, "
                "MXFP4); "
                'requantize="Q8_0" packs such tensors by gguf\'s own rule'
            )
        weights = _decoded(weights, layouts, wrong)
        layouts = {name: layout for name, layout in layouts.items() if name not in wrong}
        held = {name: held.get(name, "") for name in layouts}
    before = weights_before(weights, layouts)
    if not len(before):
        raise Error("there are no tensors to write to GGUF")
    family, names = FAMILIES[MODELS[kind]], _names(before, FAMILIES[MODELS[kind]])
    nodes: dict[str, Lazy] = {}
    kinds: dict[str, str] = {}
    for name, theirs in names.items():
        heads = _heads(family, theirs, config, before.spec(name).shape)
        if name in layouts:
            nodes[theirs], kinds[theirs] = _coded(weights, name, layouts[name], held[name], heads), held[name]
        else:
            wanted = requantize if name in wrong and requantize else rest
            nodes[theirs], kinds[theirs] = _plain(before.node(name), theirs, wanted, heads)
    counted = Counter[str]()
    for theirs, found in kinds.items():
        counted[found] += nodes[theirs].spec.nbytes * (len(nodes[theirs].spec.shape) > 1)
    made = model_keys(config, str(config.get("_name_or_path") or kind), counted.most_common(1)[0][0])
    files = before.files if tokenizer else {}
    made += tokenizer_keys(files, config, (keys or {}).get("tokenizer.ggml.pre"))
    words = {"keys": _overruled(made, keys or {}), "kinds": {n: k for n, k in kinds.items() if k not in _FLOATS}}
    options = {"format": "gguf", "rest": rest} | ({"requantize": requantize} if requantize else {})
    step = Step("quantize.formats.pack", options, (weights.lineage,))
    return Weights(nodes, step, {WORDS: json.dumps(words, ensure_ascii=False).encode()})


def _overruled(keys: list[list[Any]], own: Mapping[str, Any]) -> list[list[Any]]:
    types = {key: kind for key, kind, _ in keys}
    found = [entry for entry in keys if entry[0] not in own]
    for key, value in own.items():
        usual = {bool: "bool", int: "uint32", float: "float32", str: "string"}.get(type(value))
        usual = "int64" if usual == "uint32" and not 0 <= value < 2**32 else usual
        if key not in types and usual is None:
            raise Error(f"keys are strings, numbers or truth values; {key} is {value!r}")
        found.append([key, types.get(key) or usual, value])
    return found


def _decoded(weights: Weights, layouts: Mapping[str, Layout], wrong: list[str]) -> Weights:
    """The weights with some of their codes as floats again."""
    floats = decoded(weights)
    nodes: dict[str, Lazy] = {}
    for name in weights:
        own = next((one for one in wrong if name.startswith(f"{one}_")), None)
        if own is None:
            nodes[name] = weights.node(name)
        elif name == f"{own}_packed":
            nodes[own] = floats.node(own)
    said = {name: word for name, word in json.loads(weights.metadata[METADATA]).items() if name not in wrong}
    metadata = {**weights.metadata, METADATA: json.dumps(said)}
    return Weights(nodes, weights.lineage, weights.files, metadata)


def _names(weights: Weights, family: Family) -> dict[str, str]:
    """Checkpoint name -> GGUF name, of every tensor that has one."""
    theirs = {stem: ours for ours, stem in family.names.items()}
    found: dict[str, str] = {}
    unknown = []
    for name in weights:
        if name in weights.ties or _LEFT_OUT.search(name):
            continue
        ours = next((n for n in (_renamed(theirs, one) for one in _spellings(name)) if n is not None), None)
        if ours is None:
            unknown.append(name)
        else:
            found[name] = ours
    if unknown:
        raise Error(f"{listed(unknown)}: GGUF has no name for them in this kind of model")
    return found


def _spellings(name: str) -> list[str]:
    """A name as classes of models with and without a head spell it."""
    return [name, name.partition(".")[2], f"model.{name}"]


def _renamed(theirs: Mapping[str, str], name: str) -> str | None:
    stem, dot, suffix = name.rpartition(".")
    number = _NUMBER.search(f".{stem}.")
    general = _NUMBER.sub("{}", f".{stem}.", count=1).strip(".")
    ours = theirs.get(general, theirs.get(stem))
    if ours is None or suffix not in ("weight", "bias"):
        return None
    return f"{ours.format(number[0] if number else '')}{dot}{suffix}"


def _heads(family: Family, theirs: str, config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """How many heads the rows of a tensor belong to whose order differs in GGUF, or 0."""
    change = change_of(family, theirs)
    if change is None:
        return 0
    if change not in ("heads", "heads_kv"):
        raise Error(f"{theirs}: the change {change} is not undone for writing")
    heads = int(config.get("num_attention_heads") or 0)
    heads = int(config.get("num_key_value_heads") or heads) if change == "heads_kv" else heads
    if heads < 1 or shape[0] % (2 * heads):
        raise Error(f"{theirs}: {shape[0]} rows are not {heads} heads of pairs")
    return heads


def paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from two halves (0, 1, ..., half, half + 1, ...) to pairs (0, half, 1, half + 1, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def _coded(weights: Weights, name: str, layout: Layout, kind: str, heads: int) -> Lazy:
    endings = list(endings_of(layout))
    _, block, nbytes = KINDS[kind]
    spec = Spec((layout.rows, layout.inputs // block * nbytes), torch.uint8)
    function = partial(_bytes, name=name, layout=layout, kind=kind, endings=tuple(endings), heads=heads)
    arguments = [weights.node(name + ending) for ending in endings]
    return Output(Work(function, Inputs(arguments, "tensor" if heads else "row"), {"": spec}))


def _bytes(
    packed: Tensor, *given: Tensor, name: str, layout: Layout, kind: str, endings: tuple[str, ...], heads: int
) -> Tensor:
    codes = paired(unpack_codes(packed, layout.grid.bits, layout.width), heads)
    params = {ending[1:]: paired(value, heads) for ending, value in zip(endings[1:], given, strict=True)}
    return blocks(codes, params, layout, kind, name)


def _plain(node: Lazy, theirs: str, kind: str, heads: int) -> tuple[Lazy, str]:
    """A tensor that is not coded, and how it is packed."""
    shape: Any = node.spec.shape
    if not node.spec.dtype.is_floating_point:
        raise Error(f"{theirs} is {node.spec}; GGUF models hold floats")
    if len(shape) < 2 or _ALWAYS_WIDE.match(theirs):
        kind = "F32"
    _, block, nbytes = KINDS[kind]
    if block > 1 and shape[-1] % block:
        kind, block = "F16", 1
    if block == 1:
        spec = Spec(shape, _FLOATS[kind])
        if not heads:
            return apply(_same, node, unit="element", spec=spec), kind
        return apply(partial(paired, heads=heads), node, unit="tensor", spec=spec), kind
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise missing("gguf", "gguf", f"packing {kind}") from None
    spec = Spec((*shape[:-1], shape[-1] // block * nbytes), torch.uint8)
    function = partial(_rounded, kind=kind, heads=heads)
    return apply(function, node, unit="tensor" if heads else "row", spec=spec), kind


def _same(values: Tensor) -> Tensor:
    return values


def _rounded(values: Tensor, kind: str, heads: int) -> Tensor:
    return quantized(paired(values, heads), kind)
