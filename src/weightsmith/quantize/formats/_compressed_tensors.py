"""Folders of compressed-tensors, which vLLM and transformers load: integers, 8-bit and 4-bit floats.

What is written follows the names and layouts of compressed-tensors 0.15 to 0.20 (``weight_packed``, ``weight_scale``,
``weight_zero_point``, ``weight_global_scale``, ``weight_shape``; ``config_groups`` in config.json).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.quantize._layout import (
    PACKED,
    Layout,
    Scheme,
    compressed_words,
    endings_of,
    integer_scheme,
    layouts_of,
    put_back,
    told_shape,
    whole_matrices,
)
from weightsmith.quantize._parts import pack as pack_codes
from weightsmith.quantize._parts import packed_width
from weightsmith.quantize._parts import unpack as unpack_codes
from weightsmith.quantize.formats._parts import (
    by_group,
    check_all,
    dtype_of,
    expect,
    exponents,
    number_of,
    repacked,
    weights_before,
    words_of,
    work_of,
)
from weightsmith.quantize.grids import Float, Integer, Microscaling, NvFloat4, element_of, of_element
from weightsmith.weights import Held, Inputs, Lazy, Output, Spec, Weights, Work

INT, FLOAT, NAIVE = "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
MXFP6, MXFP8 = "mxfp6-pack-quantized", "mxfp8-quantized"
ALL = "compressed-tensors"
FORMATS = (ALL, PACKED, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP6, MXFP8)

_E2M1, _E2M3 = element_of("e2m1"), element_of("e2m3")
_SHARED = {"e2m1": MXFP4, "e2m3": MXFP6, "e4m3": MXFP8}
_SQUARE = 128  # rows and inputs of a block of 8-bit floats
_DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def usual(layout: Layout) -> str:
    """The format that holds a grid, or nothing."""
    grid = layout.grid
    if isinstance(grid, Integer):
        return PACKED
    if isinstance(grid, Float) and grid.element == "e4m3":
        return NAIVE
    if isinstance(grid, Microscaling):
        return _SHARED.get(grid.element, "")
    return NVFP4 if isinstance(grid, NvFloat4) else ""


def reason(layout: Layout, format: str) -> str:
    """Why a format cannot hold a tensor; empty if it can."""
    grid, own = layout.grid, usual(layout)
    if not own:
        return f"the grid {type(grid).__name__} is none of its own (integers, e4m3, MX of e2m1, e2m3 or e4m3, NVFP4)"
    holds = {PACKED: (PACKED, INT, NAIVE), NAIVE: (FLOAT, NAIVE)}.get(own, (own,))
    if format not in (ALL, *holds):
        return f"the grid {type(grid).__name__} goes into {' or '.join(holds)}"
    if isinstance(grid, Integer) and not grid.symmetric and grid.zero == "float":
        return 'the smallest value is kept as a float; quantize with zero="integer", or write GGUF'
    if isinstance(grid, Integer) and grid.bits < 2:
        return "codes of 1 bit are not loaded"
    if isinstance(grid, Float) and grid.group:
        return f"8-bit floats have a scale a row or a tensor, not groups of {grid.group}"
    fixed = 16 if own == NVFP4 else 32 if own in _SHARED.values() else None
    return f"groups are of {fixed} inputs, not {grid.group}" if fixed and grid.group != fixed else ""


def scheme_of(layout: Layout, format: str) -> Scheme:
    """What config.json says of a tensor."""
    grid: Any = layout.grid
    own = usual(layout) if format == ALL else format
    if isinstance(grid, Integer):
        return own, integer_scheme(layout), {**_DYNAMIC, "type": "int"} if own == INT else None
    words: dict[str, Any] = {"num_bits": grid.bits, "type": "float", "symmetric": True}
    if isinstance(grid, Float):
        strategy = "tensor" if grid.per_tensor else "channel"
        return own, words | {"strategy": strategy}, {**_DYNAMIC, "type": "float"} if own == FLOAT else None
    if own == NVFP4:
        return own, words | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}, None
    return own, words | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None


def pack(weights: Weights, format: str) -> Weights:
    """Our codes as compressed-tensors writes them."""
    layouts = layouts_of(weights)
    check_all(format, weights, layouts, lambda layout: reason(layout, format))
    schemes = {name: scheme_of(layout, format) for name, layout in layouts.items()}
    made = {name: _nodes(weights, name, layout, schemes[name][0]) for name, layout in layouts.items()}
    whole = whole_matrices(weights_before(weights, layouts), layouts)
    return repacked(weights, layouts, made, compressed_words(schemes, whole), format)


def _nodes(weights: Weights, name: str, layout: Layout, format: str) -> dict[str, Lazy]:
    grid: Any = layout.grid
    rows, inputs = layout.shape
    shape = {f"{name}_shape": Held(torch.tensor(layout.shape))}
    if format == PACKED and grid.symmetric and not grid.per_tensor:
        return {name + ending: weights.node(name + ending) for ending in endings_of(layout)} | shape
    scale = weights.spec(f"{name}_scale")
    alone = getattr(grid, "per_tensor", False)
    outputs = {f"{name}_scale": Spec((1,) if alone else scale.shape, scale.dtype)}
    groups = 1 if alone else scale.shape[-1]
    if format == PACKED:
        outputs[f"{name}_packed"] = Spec((rows, packed_width(inputs, grid.bits)), torch.int32)
        if not grid.symmetric:
            dense = Spec((packed_width(rows, grid.bits), groups), torch.int32)
            outputs[f"{name}_zero_point"] = Spec((1,), torch.int8) if alone else dense
        return work_of(weights, name, layout, partial(_integers, name=name, layout=layout), outputs) | shape
    if format in (INT, NAIVE, FLOAT):
        floats = isinstance(grid, Float)
        outputs[name] = Spec((rows, inputs), torch.float8_e4m3fn if floats else torch.int8)
        if not floats and not grid.symmetric:
            outputs[f"{name}_zero_point"] = Spec(outputs[f"{name}_scale"].shape, torch.int8)
        return work_of(weights, name, layout, partial(_bytes, name=name, layout=layout), outputs, _unit(layout))
    if format == MXFP8:
        outputs[name] = Spec((rows, inputs), torch.float8_e4m3fn)
    else:
        outputs[f"{name}_packed"] = Spec((rows, inputs * grid.bits // 8), torch.uint8)
    if format == NVFP4:
        outputs[f"{name}_global_scale"] = Spec((1,), torch.float32)
    else:
        outputs[f"{name}_scale"] = Spec(scale.shape, torch.uint8)
    return work_of(weights, name, layout, partial(_small, name=name, bits=grid.bits), outputs, _unit(layout))


def _unit(layout: Layout) -> str:
    """Rows one by one, unless the tensor shares something that is written too."""
    return "tensor" if any(stored.shared for stored in layout.grid.stored().values()) else "row"


def _integers(codes: Tensor, params: Mapping[str, Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """Codes without gaps, and zero points without gaps along the rows, of each group."""
    grid: Any = layout.grid
    found = {f"{name}_packed": pack_codes(codes, grid.bits), f"{name}_scale": params["scale"]}
    if not grid.symmetric:
        zero = params["zero_point"]
        dense = None if grid.per_tensor else pack_codes(zero.t(), grid.bits).t().contiguous()
        found[f"{name}_zero_point"] = _signed(zero, grid.bits) if dense is None else dense
    return found


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes counted from the middle, int8."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _bytes(codes: Tensor, params: Mapping[str, Tensor], name: str, layout: Layout) -> dict[str, Tensor]:
    """One byte a code."""
    grid: Any = layout.grid
    found = {f"{name}_scale": params["scale"]}
    if isinstance(grid, Float):
        return found | {name: codes.view(torch.float8_e4m3fn)}
    if not grid.symmetric:
        found[f"{name}_zero_point"] = _signed(params["zero_point"], grid.bits)
    return found | {name: _signed(codes, grid.bits)}


def _small(codes: Tensor, params: Mapping[str, Tensor], name: str, bits: int) -> dict[str, Tensor]:
    """Floats of a few bits without gaps, the first one low; scales as exponents, or under the inverse of one more."""
    if bits == 8:
        found = {name: codes.view(torch.float8_e4m3fn)}
    else:
        found = {f"{name}_packed": pack_codes(codes, bits).view(torch.uint8)[:, : codes.shape[1] * bits // 8]}
    if "tensor_scale" in params:
        return found | {f"{name}_scale": params["scale"], f"{name}_global_scale": 1 / params["tensor_scale"]}
    return found | {f"{name}_scale": exponents(params["scale"])}


# The way back


def unpack(weights: Weights, dtype: torch.dtype | str | None = None) -> Weights:
    """Floats of a folder of compressed-tensors."""
    groups = words_of(weights).get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FormatError("config.json has no quantization_config in the compressed-tensors form")
    modules = {name.rpartition(".")[0] for name in weights}
    nodes: dict[str, Lazy] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for first in weights:
        name = first.removesuffix("_packed")
        if first.endswith("_packed") or (f"{first}_scale" in weights and weights.spec(first).dtype.itemsize == 1):
            scheme = _scheme_for(name.removesuffix(".weight"), groups, modules)
            nodes[name] = _node(weights, name, first, scheme, dtype)
            parts[name] = (first, *(name + ending for ending in _ENDINGS if name + ending in weights))
    if not nodes:
        raise Error("nothing here is quantized, although config.json says so: no tensor ends in _packed or _scale")
    return put_back(weights, nodes, parts, step="quantize.formats.unpack")


_ENDINGS = ("_scale", "_zero_point", "_global_scale", "_shape", "_g_idx")


def _scheme_for(module: str, groups: Mapping[str, Any], modules: Container[str]) -> dict[str, Any]:
    """What config.json says of the weights of a module: by its name, by a pattern, or by what kind it is."""
    by_kind = []
    try:
        for group in groups.values():
            words = {**group["weights"], "format": group.get("format")}
            for target in group["targets"]:
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    return words
                if not target.startswith("re:") and "." not in target and target not in modules:
                    by_kind.append(words)
    except (KeyError, TypeError, AttributeError, re.error):
        raise FormatError("config.json has no quantization_config in the compressed-tensors form") from None
    if not by_kind or any(words != by_kind[0] for words in by_kind):
        raise FormatError(f"config.json does not tell how {module} is coded")
    return by_kind[0]


def _node(weights: Weights, name: str, first: str, scheme: Mapping[str, Any], dtype: Any) -> Lazy:
    if f"{name}_g_idx" in weights:
        raise Error(f"{name} has groups of inputs in another order ({name}_g_idx), which compressed-tensors gave up")
    bits = number_of(scheme, "num_bits", 8, 1, 8)
    spec = weights.spec(first)
    if f"{name}_scale" not in weights or len(spec.shape) != 2:
        raise FormatError(f"{name} is quantized, but {name}_scale is missing or its codes are not a matrix")
    scale = weights.node(f"{name}_scale")
    chosen = dtype_of(weights, dtype, scale.spec)
    if scale.spec.dtype == torch.uint8 or (spec.dtype == torch.uint8 and first != name):
        return _small_floats(weights, name, first, chosen, bits or 8)
    shape = spec.shape
    if first != name:
        if spec.dtype != torch.int32 or scheme.get("type", "int") != "int":
            raise FormatError(f"{first} is {spec}, where codes of integers are int32")
        shape = _told_shape(weights, name, spec, bits or 8)
    elif spec.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise FormatError(f"{name} is {spec}, where int8 or float8_e4m3fn is expected")
    arguments, groups = _with_scale(weights, name, scale, shape)
    symmetric = bool(scheme.get("symmetric", True))
    if symmetric and f"{name}_zero_point" in weights:
        if first != name:
            raise FormatError(f"{name} is symmetric by its config, and has a {name}_zero_point")
        symmetric = False  # older files have zeros there
    if not symmetric:
        alone = scale.spec.numel == 1
        dense = first != name and not alone
        size = (packed_width(shape[0], bits or 8), groups) if dense else scale.spec.shape
        arguments.append(expect(weights, f"{name}_zero_point", torch.int32 if dense else torch.int8, *size))
    function = partial(_floats, bits=bits or 8, inputs=shape[1], packed=first != name)
    work = Work(function, Inputs([weights.node(first), *arguments], "tensor"), {"": Spec(shape, chosen)})
    return Output(work)


def _told_shape(weights: Weights, name: str, spec: Spec, bits: int) -> tuple[int, int]:
    if f"{name}_shape" not in weights:
        raise FormatError(f"{name}_shape is missing, without which the codes beside it cannot be read")
    told = told_shape(weights, f"{name}_shape")
    if len(told) != 2 or spec.shape != (told[0], packed_width(told[1], bits)):
        raise FormatError(f"{name}_packed is {spec}, and {name}_shape says {list(told)} for codes of {bits} bits")
    return told[0], told[1]


def _with_scale(weights: Weights, name: str, scale: Lazy, shape: tuple[int, ...]) -> tuple[list[Lazy], int]:
    """The scale, and how many groups it tells of; a scale of blocks has fewer rows than the weight."""
    rows, inputs = shape
    size = scale.spec.shape
    if scale.spec.numel == 1 and len(size) <= 2:
        return [scale], 1
    grouped = len(size) == 2 and size[0] == rows and size[1] and inputs % size[1] == 0
    if grouped or size == (-(-rows // _SQUARE), -(-inputs // _SQUARE)):
        return [scale], size[1]
    raise FormatError(f"{name}_scale is {scale.spec}, which does not fit a weight {list(shape)}")


def _floats(
    first: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, inputs: int, packed: bool
) -> Tensor:
    """Values of one byte a code, or of codes without gaps."""
    codes, middle = (unpack_codes(first, bits, inputs), 2 ** (bits - 1)) if packed else (first, 0)
    rows = len(codes)
    if scale.numel() > 1 and len(scale) != rows:  # square blocks
        scale = scale.repeat_interleave(_SQUARE, 0)[:rows].repeat_interleave(_SQUARE, 1)[:, :inputs]
        return codes.to(scale.dtype).sub_(middle).mul_(scale)
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_codes(zero.t().contiguous(), bits, rows).t()
    elif zero is not None:
        zero = zero.reshape(scale.shape).to(torch.int16) + middle
    return by_group(codes, scale, middle if zero is None else zero, scale.shape[1])


def _small_floats(weights: Weights, name: str, first: str, dtype: torch.dtype, bits: int) -> Lazy:
    """Values whose scale is an exponent, or lies under one of the tensor."""
    spec = weights.spec(first)
    nv = f"{name}_global_scale" in weights
    size, kind = (16, torch.float8_e4m3fn) if nv else (32, torch.uint8)
    whole = first == name
    if whole != (bits == 8) or bits not in ((4,) if nv else (4, 6, 8)):
        raise FormatError(
            f"{first} is {spec} with scales of {weights.spec(f'{name}_scale')}, and not codes of {bits} bits"
        )
    if whole and spec.dtype != torch.float8_e4m3fn:
        raise FormatError(f"{name} is {spec}, where float8_e4m3fn is expected")
    rows, inputs = spec.shape[0], spec.shape[1] * 8 // bits
    if not inputs or inputs % size or inputs * bits != spec.shape[1] * 8:
        raise FormatError(f"{first} has rows of {spec.shape[1]} bytes, which groups of {size} codes do not fill")
    arguments = [weights.node(first), expect(weights, f"{name}_scale", kind, rows, inputs // size)]
    if nv:
        over = weights.spec(f"{name}_global_scale").shape
        if over not in ((), (1,)):
            raise FormatError(f"{name}_global_scale is not one number")
        arguments.append(expect(weights, f"{name}_global_scale", torch.float32, *over))
    function = partial(_of_small, bits=bits)
    return Output(Work(function, Inputs(arguments, "tensor"), {"": Spec((rows, inputs), dtype)}))


def _of_small(packed: Tensor, scale: Tensor, over: Tensor | None = None, *, bits: int) -> Tensor:
    if over is None:
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    else:
        scale = scale.float() / over
    if bits == 8:
        values = packed.to(scale.dtype)
    elif bits == 6:
        first, second, third = packed.unflatten(1, (-1, 3)).unbind(-1)
        four = (first & 63, first >> 6 | (second & 15) << 2, second >> 4 | (third & 3) << 4, third >> 2)
        values = of_element(torch.stack(four, -1).flatten(1), _E2M3, scale.dtype)
    else:
        values = of_element(torch.stack((packed & 15, packed >> 4), -1).flatten(1), _E2M1, scale.dtype)
    return values.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1)).flatten(1)
