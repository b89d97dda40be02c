"""Folders of bitsandbytes in 4 bits, which transformers loads: NF4 under the largest magnitude of each block.

Blocks run over the flattened matrix, two codes a byte with the first one high; `quant_map` holds the table of points,
and a small piece of JSON, as bytes, what is else to know. Scales that are themselves quantized are read, not written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.quantize._layout import Layout, layouts_of, put_back, whole_matrices
from weightsmith.quantize.formats._parts import (
    check_all,
    dtype_of,
    expect,
    floating,
    number_of,
    repacked,
    weights_before,
    work_of,
)
from weightsmith.quantize.grids import NormalFloat
from weightsmith.quantize.grids._tables import NORMAL
from weightsmith.weights import Held, Inputs, Lazy, Output, Spec, Weights, Work, as_dtype, dtype_name

FORMATS = ("bitsandbytes",)
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_STATE = 2**12


def reason(layout: Layout) -> str:
    """Why the format cannot hold a tensor; empty if it can."""
    grid = layout.grid
    if not isinstance(grid, NormalFloat):
        return f"the grid {type(grid).__name__} is none of its own: it holds nf4"
    span = grid.group or layout.inputs
    return "" if span in BLOCKS else f"blocks are of {', '.join(map(str, BLOCKS))} weights, not {span}"


def pack(weights: Weights, format: str = "bitsandbytes") -> Weights:
    """Our codes as bitsandbytes keeps them; scales become float32."""
    layouts = layouts_of(weights)
    check_all(format, weights, layouts, reason)
    made = {name: _nodes(weights, name, layout) for name, layout in layouts.items()}
    words = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": dtype_name(_computed(weights)),
        "llm_int8_skip_modules": whole_matrices(weights_before(weights, layouts), layouts),
    }
    return repacked(weights, layouts, made, words, format)


def _computed(weights: Weights) -> torch.dtype:
    """The dtype in which the model computes: that of what is not coded."""
    rest = [weights.spec(name).dtype for name in weights.names(floating=True) if not name.endswith("_scale")]
    return next((dtype for dtype in rest if dtype.itemsize > 1), torch.float32)


def _nodes(weights: Weights, name: str, layout: Layout) -> dict[str, Lazy]:
    numel = layout.rows * layout.inputs
    block = layout.grid.group or layout.inputs
    outputs = {
        name: Spec((numel // 2, 1), torch.uint8),
        f"{name}.absmax": Spec((numel // block,), torch.float32),
    }
    state = {"quant_type": "nf4", "blocksize": block, "dtype": dtype_name(_computed(weights)), "shape": [*layout.shape]}
    raw = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        **work_of(weights, name, layout, partial(_bytes, name=name), outputs),
        f"{name}.quant_map": Held(torch.tensor(NORMAL)),
        f"{name}{_STATE}nf4": Held(raw),
    }


def _bytes(codes: Tensor, params: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    pairs = codes.reshape(-1, 2)
    return {name: (pairs[:, :1] << 4) | pairs[:, 1:], f"{name}.absmax": params["scale"].reshape(-1)}


# The way back


def unpack(weights: Weights, dtype: torch.dtype | str | None = None) -> Weights:
    """Floats of a folder of bitsandbytes in 4 bits, with scales that are quantized or not."""
    nodes: dict[str, Lazy] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for key in weights:
        name, found, _ = key.partition(_STATE)
        if found:
            nodes[name] = _node(weights, name, key, dtype)
            beside = (f"{name}.{one}" for one in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))
            parts[name] = (name, *(one for one in beside if one in weights), key)
    if not nodes:
        raise Error("config.json says bitsandbytes, and no tensor is coded in 4 bits; other codes are not understood")
    return put_back(weights, nodes, parts, step="quantize.formats.unpack")


def _state(weights: Weights, key: str) -> dict[str, Any]:
    spec = weights.spec(key)
    if spec.dtype != torch.uint8 or len(spec.shape) != 1 or spec.numel > _LARGEST_STATE:
        raise FormatError(f"{key} is {spec}, not a few words of JSON")
    try:
        said = json.loads(bytes(weights[key].tolist()))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise FormatError(f"{key} is not JSON")
    return said


def _node(weights: Weights, name: str, key: str, dtype: Any) -> Lazy:
    said = _state(weights, key)
    shape: Any = said.get("shape")
    block = number_of(said, "blocksize", 64, 1, 2**20) or 64
    whole = isinstance(shape, list) and bool(shape) and all(type(size) is int and size > 0 for size in shape)
    numel = math.prod(shape) if whole else 0
    if not whole or numel % 2 or name not in weights or weights.spec(name).numel * 2 != numel:
        raise FormatError(f"{key} tells of a tensor {shape}, which the codes of {name} are not")
    blocks = -(-numel // block)
    nested = said.get("nested_blocksize") is not None
    arguments = [
        expect(weights, name, torch.uint8, *weights.spec(name).shape),
        expect(weights, f"{name}.quant_map", torch.float32, 16),
        expect(weights, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks),
    ]
    over = number_of(said, "nested_blocksize", 256, 1, 2**20) or 256
    if nested:
        arguments.append(expect(weights, f"{name}.nested_absmax", torch.float32, -(-blocks // over)))
        arguments.append(expect(weights, f"{name}.nested_quant_map", torch.float32, 256))
    offset = said.get("nested_offset", 0.0)
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise FormatError(f"{key} says nested_offset = {offset!r}")
    usual = floating(said.get("dtype")) or dtype_of(weights, None)
    spec = Spec(tuple(shape), usual if dtype is None else as_dtype(dtype))
    function = partial(_values, block=block, over=over, offset=float(offset), shape=tuple(shape))
    return Output(Work(function, Inputs(arguments, "tensor"), {"": spec}))


def _values(
    packed: Tensor, table: Tensor, scale: Tensor, coarse: Tensor | None = None, fine: Tensor | None = None, *,
    block: int, over: int, offset: float, shape: tuple[int, ...],
) -> Tensor:  # fmt: skip
    flat = packed.flatten()
    values = table[torch.stack((flat >> 4, flat & 15), -1).flatten().long()]
    if coarse is not None and fine is not None:
        scale = fine[scale.long()] * coarse.repeat_interleave(over)[: len(scale)] + offset
    return values.mul_(scale.repeat_interleave(block)[: len(values)]).view(shape)
