"""Reading an adapter: which tensors belong together, to which module, scaled by what.

The signature of the room: ``(model, adapter, ...) -> Weights``, where an adapter is a `Weights` too:
the tensors and the ``adapter_config.json`` of a PEFT folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from weightsmith.adapt._config import FILE, Config, config_of
from weightsmith.errors import Error, FormatError, listed
from weightsmith.weights import Lazy, Weights, open

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
"""Anything that `weightsmith.open` opens, `Weights` included."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's own modules."""

_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_FACTOR = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(?P<rest>(?:\.[^.]+)*)$")
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?(?=\.)")
_INNER = ".base_layer"


@dataclass
class Delta:
    """A change of low rank for one module: ``scale * b @ a``."""

    module: str
    """As PEFT names it, without what it puts before."""
    depth: int
    """How many wrappers stand around it inside its module: several parameters of one module are nested."""
    a: Lazy
    b: Lazy
    embedding: bool
    bias: Lazy | None
    magnitude: Lazy | None


@dataclass
class Adapter:
    """What is in an adapter, by the names of the modules it was trained on."""

    weights: Weights
    config: Config
    where: str
    deltas: list[Delta] = field(default_factory=list)
    saved: dict[str, Lazy] = field(default_factory=dict)
    """Tensor -> the values that replace it."""
    copies: dict[str, Lazy] = field(default_factory=dict)
    """Tensor -> the base's own values that were saved along, under a delta."""
    tokens: dict[str, Lazy] = field(default_factory=dict)
    """Embedding -> the rows that were trained."""


def opened(source: Source, position: int | None = None) -> Adapter:
    """An adapter, from whatever `weightsmith.open` opens, with its settings checked."""
    where = os.fspath(source) if isinstance(source, str | os.PathLike) else "the adapter"
    if position is not None and where == "the adapter":
        where = f"adapter {position + 1}"
    weights = _opened(source)
    adapter = Adapter(weights, config_of(weights, where), where)
    factors: dict[tuple[str, int], dict[str, Lazy]] = {}
    called: set[str] = set()
    for name in weights:
        _sort(adapter, name, weights.node(name), factors, called)
    if len(called) > 1:
        raise Error(f"{where}: holds several adapters ({listed(sorted(called))}); keep one with .select(...)")
    for (module, depth), parts in factors.items():
        adapter.deltas.append(_delta(module, depth, parts, adapter))
    if not adapter.deltas and not adapter.saved and not adapter.tokens:
        raise Error(f"{where}: no LoRA tensors in it, only {listed(weights)}")
    return adapter


def _opened(source: Source) -> Weights:
    """A path may be the file or its folder; a model may lie in the same folder."""
    if isinstance(source, str | os.PathLike) and "://" not in os.fspath(source):
        path = Path(source)
        files = [path / name for name in _TENSORS if (path / name).is_file()]
        if files:
            path = files[0]
        if path.is_file() and (path.parent / FILE).is_file():
            return open(path).with_files({FILE: (path.parent / FILE).read_bytes()})
    return open(source)


def _sort(
    adapter: Adapter, name: str, node: Lazy, factors: dict[tuple[str, int], dict[str, Lazy]], called: set[str]
) -> None:
    """Put one tensor where it belongs."""
    short = name.removeprefix(PREFIX)
    tokens, factor = _TOKENS.match(short), _FACTOR.match(short)
    if tokens:
        adapter.tokens[tokens["module"]] = node
    elif factor:
        words = factor["rest"].split(".")[1:]
        leaf = words.pop() if words and words[-1] in ("weight", "bias") else "weight"
        part = factor["part"] + (".bias" if leaf == "bias" else "")
        if factor["part"] not in _PARTS or len(words) > 1 or (leaf == "bias" and factor["part"] != "lora_B"):
            raise Error(f"{adapter.where}: the tensor {name!r} belongs to no kind of LoRA that can be read")
        called.update(words)
        module = factor["module"]
        place = (module.replace(_INNER, ""), module.count(_INNER))
        if part in factors.setdefault(place, {}):
            raise FormatError(f"{adapter.where}: two tensors are the {part} of {module}")
        factors[place][part] = node
    elif _INNER + "." in short and short.endswith(".weight"):
        adapter.copies[short.replace(_INNER, "")] = node
    else:
        adapter.saved[_SAVED.sub("", short.replace(_INNER, ""))] = node


def _delta(module: str, depth: int, parts: dict[str, Lazy], adapter: Adapter) -> Delta:
    where, config = adapter.where, adapter.config
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in parts:
            raise FormatError(f"{where}: {module} has {listed(parts)} and no {name}")
    a, b = parts[names[0]], parts[names[1]]
    for name, node in zip(names, (a, b), strict=True):
        if len(node.spec.shape) < 2 or not node.spec.dtype.is_floating_point:
            raise FormatError(f"{where}: the {name} of {module} is {node.spec}, not a matrix of floats")
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    if (magnitude is not None) != config.magnitudes:
        found = "a" if magnitude is not None else "no"
        raise Error(f"{where}: use_dora is {config.magnitudes} in {FILE}, but {module} has {found} magnitude vector")
    if bias is not None and not config.record.get("lora_bias"):
        raise Error(f"{where}: lora_bias is false in {FILE}, but {module} has a lora_B.bias")
    return Delta(module, depth, a, b, embedding, bias, magnitude)


def checked_rank(adapter: Adapter, delta: Delta, key: str, groups: int = 1) -> int:
    """The rank of a delta, which the settings and the tensors must agree on."""
    rank, rows = adapter.config.rank_of(key), delta.a.spec.shape[0]
    columns = delta.b.spec.shape[1]
    if rows != rank * groups or columns != rank * groups:
        raise Error(
            f"{adapter.where}: {key} has the rank {rank} by {FILE} (r, rank_pattern), but its factors are "
            f"{list(delta.a.spec.shape)} and {list(delta.b.spec.shape)}"
        )
    return rank
