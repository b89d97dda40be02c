"""Blocks of GGUF: codes and scales of 32 or 256 weights that lie together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weightsmith.quantize._layout import Layout
from weightsmith.quantize.formats._parts import exponents, half
from weightsmith.quantize.grids import Integer, Microscaling, Ternary

BLOCK, LONG = 32, 256

TERNARY = ("TQ2_0", "TQ1_0")
"""Packings of three values: two bits a code, or five codes a byte."""


def kind_for(layout: Layout, ternary: str = "TQ2_0") -> str:
    """The packing that holds the codes of a tensor as they are, or nothing.

    Narrower codes lie in wider ones, and a scale of a wider group stands in each of its blocks.
    """
    grid = layout.grid
    span = layout.inputs if grid.group is None else grid.group
    block = LONG if isinstance(grid, Ternary) else BLOCK
    if layout.padding or span % block or layout.inputs % span or layout.experts > 0 or len(layout.shape) != 2:
        return ""
    if isinstance(grid, Ternary):
        return ternary
    if isinstance(grid, Microscaling):
        return "MXFP4" if grid.element == "e2m1" else ""
    if not isinstance(grid, Integer) or grid.per_tensor:
        return ""
    if grid.symmetric:
        return "Q4_0" if grid.bits <= 4 else "Q5_0" if grid.bits == 5 else "Q8_0"
    return "Q4_1" if grid.bits <= 4 else "Q5_1" if grid.bits == 5 else ""


def blocks(codes: Tensor, params: Mapping[str, Tensor], layout: Layout, kind: str, name: str = "a tensor") -> Tensor:
    """Bytes ``[out, bytes of a row]`` of codes ``[out, in]``; scales and smallest values become float16."""
    size = LONG if kind in TERNARY else BLOCK
    runs = codes.unflatten(1, (-1, size))
    times = runs.shape[1] // params["scale"].shape[1]
    wide = {name: value.repeat_interleave(times, 1) for name, value in params.items()}
    grid = layout.grid
    if kind == "MXFP4":
        return torch.cat([exponents(wide["scale"]).unsqueeze(-1), _nibbles(runs)], -1).flatten(1)
    scale = _half(wide["scale"], name)
    if kind in TERNARY:
        return torch.cat([_pairs(runs) if kind == "TQ2_0" else _trits(runs), scale], -1).flatten(1)
    if kind in ("Q4_1", "Q5_1"):
        low = wide["minimum"] if "minimum" in wide else -wide["scale"] * wide["zero_point"]
        scale = torch.cat([scale, _half(low, name)], -1)
    elif isinstance(grid, Integer):
        middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind]
        runs = (runs.to(torch.int16) + (middle - grid.middle)).to(torch.uint8)
    if kind == "Q8_0":
        return torch.cat([scale, runs], -1).flatten(1)
    if kind in ("Q5_0", "Q5_1"):
        return torch.cat([scale, _fifth(runs), _nibbles(runs & 15)], -1).flatten(1)
    return torch.cat([scale, _nibbles(runs)], -1).flatten(1)


def _half(values: Tensor, name: str) -> Tensor:
    """Two bytes of each number."""
    return half(values, name).unsqueeze(-1).view(torch.uint8)


def _nibbles(runs: Tensor) -> Tensor:
    """The first half of a block in the low, the second in the high bits."""
    half = runs.shape[-1] // 2
    return runs[..., :half] | runs[..., half:] << 4


def _fifth(runs: Tensor) -> Tensor:
    """The highest of five bits, eight to a byte."""
    bits = (runs >> 4).unflatten(-1, (4, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=runs.device)).sum(-1, dtype=torch.uint8)


def _pairs(runs: Tensor) -> Tensor:
    """Two bits a code: of each 128 the first 32 in the lowest bits, and so on."""
    parts = runs.unflatten(-1, (2, 4, 32))
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=runs.device).unsqueeze(-1)
    return (parts << shift).sum(-2, dtype=torch.uint8).flatten(-2)


def _trits(runs: Tensor) -> Tensor:
    """Five codes a byte as digits of a fraction of 243 parts, so that each is read by a product: 160, 80 and 16."""
    digits = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=runs.device).unsqueeze(-1)
    parts = (runs[..., :160].unflatten(-1, (5, 32)), runs[..., 160:240].unflatten(-1, (5, 16)),
             runs[..., 240:].unflatten(-1, (4, 4)))  # fmt: skip
    whole = torch.cat([(part.to(torch.int32) * digits[: part.shape[-2]]).sum(-2) for part in parts], -1)
    return ((whole * 256 + 242) // 243).to(torch.uint8)


def quantized(rows: Tensor, kind: str) -> Tensor:
    """Floats ``[out, in]`` as bytes, rounded by the rule of the package gguf."""
    import gguf
    import numpy as np

    data = gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(data))
