"""The signature of quantizing, the one loop that lifts it, and the way back."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from weightsmith.card import card_of
from weightsmith.errors import Error, FormatError
from weightsmith.lifting import dressed, example, per_tensor_options, tried
from weightsmith.prune import prunable
from weightsmith.quantize._parts import check_bits, check_group, decode, pack, packed_width, unpack
from weightsmith.weights import Held, Inputs, Lazy, Output, Pattern, Spec, Step, Weights, Work, as_dtype, open
from weightsmith.weights._files import Bytes, content_of

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module
Codes = tuple[Tensor, Tensor]

METADATA = "weightsmith.quantization"
"""Under this word the header says the bits of every quantized tensor."""

_ENDINGS = ("_packed", "_scale", "_shape")
_MOST_AXES = 8  # of a weight; more is a damaged file


class Quantize(Protocol):
    """What a user calls."""

    kernel: Callable[..., Codes]

    @overload
    def __call__(self, weights: Source, *, pattern: Pattern | None = None, **options: Any) -> Weights: ...

    @overload
    def __call__(self, weights: Tensor, **options: Any) -> Codes: ...


_PARAMETERS = (
    inspect.Parameter("weights", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Source"),
    inspect.Parameter("pattern", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Pattern | None"),
)


def lift(kernel: Callable[..., Codes]) -> Quantize:
    """``(weights, pattern, ...) -> Weights`` from codes and scales of a tensor. Options may be `PerTensor`.

    ``pattern`` names the tensors to quantize; by default matrices and convolutions without
    embeddings and the head. Called with a tensor the public function is the kernel.
    """
    defaults = {p.name: p.default for p in inspect.signature(kernel).parameters.values()}

    def quantize(weights: Any, *, pattern: Pattern | None = None, **options: Any) -> Any:
        if isinstance(weights, Tensor):
            return kernel(weights, **options)
        opened = open(weights)
        targets = _targets(opened, pattern)
        chosen = per_tensor_options(kernel, options, targets)
        plans = {name: defaults | chosen[name] for name in targets}
        _check(kernel, opened, plans)
        coded = {name: _coded(kernel, opened.node(name), plans[name]) for name in targets}
        step = Step(f"quantize.{kernel.__name__}", options, (opened.lineage,))
        metadata = {**opened.metadata, METADATA: json.dumps({n: {"bits": p["bits"]} for n, p in plans.items()})}
        files = _with_config(opened, plans)
        return Weights(_replaced(opened, coded), step, files, metadata)

    return dressed(quantize, kernel, _PARAMETERS)


def _targets(weights: Weights, pattern: Pattern | None) -> list[str]:
    if pattern is None:
        names = prunable(weights)
    else:
        ties = weights.ties
        names = list(dict.fromkeys(ties.get(name, name) for name in weights.names(pattern, floating=True)))
    flat = [name for name in names if not weights.spec(name).shape]
    if flat or not names:
        raise Error(f"no matrix to quantize fits pattern={pattern!r}" if not names else f"{flat[0]} is a single number")
    return names


def _check(kernel: Callable[..., Codes], weights: Weights, plans: Mapping[str, Mapping[str, Any]]) -> None:
    for name, plan in plans.items():
        shape = weights.spec(name).shape
        try:
            check_bits(plan["bits"])
            check_group(torch.Size(shape[1:]).numel(), plan["group"])
            tried(kernel, [_given(plan)], example(2, 2) if plan["group"] is None else example(1, plan["group"]))
        except Error as error:
            raise Error(f"{name} {list(shape)}: {error}") from None


def _coded(kernel: Callable[..., Codes], node: Lazy, options: Mapping[str, Any]) -> dict[str, Lazy]:
    """The three tensors that stand for one, by their endings."""
    shape = node.spec.shape
    rows, inputs = shape[0], torch.Size(shape[1:]).numel()
    group = options.get("group") or max(inputs, 1)
    stored = as_dtype(options.get("scale_dtype") or node.spec.dtype)
    outputs = {
        "_packed": Spec((rows, packed_width(inputs, options["bits"])), torch.int32),
        "_scale": Spec((rows, max(inputs // group, 1)), stored),
    }
    function = partial(_encode, kernel, tuple(_given({**options, "scale_dtype": stored}).items()))
    work = Work(function, Inputs([node], card_of(kernel).unit), outputs)  # type: ignore[arg-type]
    parts: dict[str, Lazy] = {key: Output(work, key) for key in outputs}
    return parts | {"_shape": Held(torch.tensor(shape))}


def _given(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plan as the kernel takes them."""
    given = {name: value for name, value in plan.items() if value is not inspect.Parameter.empty}
    if given.get("scale_dtype") is not None:
        given["scale_dtype"] = as_dtype(given["scale_dtype"])
    return given


def _encode(kernel: Callable[..., Codes], options: tuple[tuple[str, Any], ...], weight: Tensor) -> dict[str, Tensor]:
    given = dict(options)
    codes, scale = kernel(weight, **given)
    return {"_packed": pack(codes, given["bits"]), "_scale": scale}


def _replaced(weights: Weights, coded: Mapping[str, Mapping[str, Lazy]]) -> dict[str, Lazy]:
    """The nodes of all tensors, each coded one by its three; aliases of a coded tensor follow it."""
    nodes: dict[str, Lazy] = {}
    for name in weights:
        parts = coded.get(weights.ties.get(name, name))
        if parts is None:
            nodes[name] = weights.node(name)
        else:
            nodes |= {name + ending: part for ending, part in parts.items()}
    return nodes


def _with_config(weights: Weights, plans: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes | Bytes]:
    """config.json that tells transformers and vLLM how to load the codes, where one setting serves all."""
    files = dict(weights.files)
    settings = {(plan["bits"], plan["group"]) for plan in plans.values()}
    parsed = _config(weights)
    if parsed is None or len(settings) != 1:
        return files
    bits, group = settings.pop()
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    scheme |= {"group_size": group} if group else {}
    coded = {name for name in weights if weights.ties.get(name, name) in plans}
    matrices = {name for name in weights.names(floating=True) if len(weights.spec(name).shape) == 2}
    # A head that is tied to the embedding is often not in the file, and is a Linear all the same.
    whole = {name.removesuffix(".weight") for name in ({*matrices, "lm_head.weight"} - coded)}
    parsed["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": sorted(whole),
    }
    files["config.json"] = _as_file(parsed)
    return files


def _config(weights: Weights) -> dict[str, Any] | None:
    """config.json, if it is there and can be read."""
    config = weights.files.get("config.json")
    if config is None:
        return None
    try:
        parsed = json.loads(content_of(config))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _as_file(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


# The way back


def dequantize(weights: Source, dtype: torch.dtype | str | None = None) -> Weights:
    """Float weights from codes and scales, lazily: ``layer.weight`` from its three tensors.

    Args:
        weights: what a method of this room made, or a folder in the ``pack-quantized`` layout.
        dtype: of the result; that of the scales by default.

    Raises:
        Error: nothing in it is quantized, or it does not say with how many bits.

    >>> w = Weights.of({"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.4]])})
    >>> dequantize(ws.quantize.rtn(w))["l.weight"]
    tensor([[ 7., -8.,  1.,  0.]])
    """
    opened = open(weights)
    found = [name.removesuffix("_packed") for name in opened if name.endswith("_packed")]
    if not found:
        raise Error("nothing here is quantized: no tensor ends in _packed")
    bits = _bits(opened, found)
    made: dict[int, Lazy] = {}
    nodes: dict[str, Lazy] = {}
    for name in opened:
        if name.endswith("_packed"):
            own = name.removesuffix("_packed")
            packed = opened.node(name)
            if id(packed) not in made:
                made[id(packed)] = _decoded(opened, own, bits[own], dtype)
            nodes[own] = made[id(packed)]
        elif not (name.endswith(_ENDINGS) and name.rpartition("_")[0] in bits):
            nodes[name] = opened.node(name)
    metadata = {key: word for key, word in opened.metadata.items() if key != METADATA}
    return Weights(nodes, Step("quantize.dequantize", {}, (opened.lineage,)), _plain_config(opened), metadata)


def _bits(weights: Weights, names: list[str]) -> dict[str, int]:
    """The bits of every quantized tensor, from the header or else from config.json. Both are untrusted."""
    if METADATA in weights.metadata:
        try:
            said = {name: int(entry["bits"]) for name, entry in json.loads(weights.metadata[METADATA]).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise FormatError(f"the header's words {METADATA} do not say the bits of every quantized tensor") from None
    else:
        said = _bits_of_groups(weights)
    widths = set(said.values())
    bits = {name: said[name] if name in said else _only(widths, name) for name in names}
    for name, width in bits.items():
        try:
            check_bits(width)
        except Error as error:
            raise FormatError(f"{name}: {error}") from None
    return bits


def _bits_of_groups(weights: Weights) -> dict[str, int]:
    if "config.json" not in weights.files:
        raise Error("these weights do not say with how many bits they are coded (no metadata, no config.json)")
    try:
        groups = (_config(weights) or {})["quantization_config"]["config_groups"].items()
        plain = all(group["weights"].get("symmetric", True) for _, group in groups)
        said = {name: int(group["weights"]["num_bits"]) for name, group in groups}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError("config.json has no quantization_config in the compressed-tensors form") from None
    if len(set(said.values())) != 1 or not plain:
        raise Error("config.json describes several or asymmetric grids, which are not understood yet")
    return said


def _only(widths: set[int], name: str) -> int:
    if len(widths) != 1:
        raise FormatError(f"nothing says with how many bits {name} is coded")
    return next(iter(widths))


def _decoded(weights: Weights, name: str, bits: int, dtype: torch.dtype | str | None) -> Lazy:
    lacking = [name + ending for ending in _ENDINGS if name + ending not in weights]
    if lacking:
        raise FormatError(f"{name} is quantized, but {lacking[0]} is missing")
    unknown = [name + ending for ending in ("_zero_point", "_g_idx") if name + ending in weights]
    if unknown:
        raise Error(f"{name} is coded with {unknown[0]}, which is not understood yet")
    packed, scale = weights.node(f"{name}_packed"), weights.node(f"{name}_scale")
    shape = _shape(weights, f"{name}_shape")
    rows, inputs = shape[0], math.prod(shape[1:])
    groups = scale.spec.shape[1] if len(scale.spec.shape) == 2 else 0
    fits = packed.spec == Spec((rows, packed_width(inputs, bits)), torch.int32)
    if not fits or groups < 1 or scale.spec.shape[0] != rows or inputs % groups:
        raise FormatError(f"{name}: {packed.spec} with scales {scale.spec} holds no {bits}-bit codes of {list(shape)}")
    spec = Spec(shape, scale.spec.dtype if dtype is None else as_dtype(dtype))
    function = partial(_decode, bits=bits, inputs=inputs)
    return Output(Work(function, Inputs([packed, scale], "row"), {"": spec}))


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape that a ``_shape`` tensor says, which may lie."""
    spec = weights.spec(name)
    if len(spec.shape) != 1 or not 1 <= spec.shape[0] <= _MOST_AXES or spec.dtype.is_floating_point:
        raise FormatError(f"{name} is {spec}, not the sizes of a tensor's axes")
    shape = tuple(int(size) for size in weights[name])
    if min(shape) < 0:
        raise FormatError(f"{name} says {list(shape)}: a size cannot be negative")
    return shape


def _decode(packed: Tensor, scale: Tensor, *, bits: int, inputs: int) -> Tensor:
    return decode(unpack(packed, bits, inputs), scale)


def _plain_config(weights: Weights) -> dict[str, bytes | Bytes]:
    """The files, with a config.json that no longer speaks of codes."""
    files = dict(weights.files)
    parsed = _config(weights)
    if parsed is not None and parsed.pop("quantization_config", None) is not None:
        files["config.json"] = _as_file(parsed)
    return files
