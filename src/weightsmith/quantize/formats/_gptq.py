"""Folders of GPTQ and AWQ, which vLLM, SGLang and GPTQModel load.

Both keep the matrix transposed: ``qweight``, ``qzeros`` and ``scales``. GPTQ packs codes along the inputs and says of
each input to which group it belongs (``g_idx``); its first version stores zero points less one. AWQ packs eight outputs
a word, the even ones first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError, listed
from weightsmith.prune import prunable
from weightsmith.quantize._layout import Layout, layouts_of, put_back
from weightsmith.quantize._parts import pack as pack_codes
from weightsmith.quantize._parts import unpack as unpack_codes
from weightsmith.quantize.formats._parts import (
    by_group,
    check_all,
    dtype_of,
    expect,
    half,
    number_of,
    repacked,
    weights_before,
    words_of,
    work_of,
)
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Held, Inputs, Lazy, Output, Spec, Weights, Work

FORMATS = ("gptq", "gptq_v2", "awq")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs stands at each place of a word of AWQ."""

_WIDTHS = (2, 3, 4, 8)


def reason(layout: Layout, format: str) -> str:
    """Why a format cannot hold a tensor; empty if it can."""
    grid = layout.grid
    if not isinstance(grid, Integer):
        return f"the grid {type(grid).__name__} is none of its own: it holds integers"
    if not grid.symmetric and grid.zero == "float":
        return 'the smallest value is kept as a float; quantize with zero="integer", or write GGUF'
    if grid.per_tensor:
        return "a scale of the whole tensor has no place in it"
    widths = (4,) if format == "awq" else _WIDTHS
    if grid.bits not in widths:
        return f"codes are of {' or '.join(map(str, widths))} bits, not {grid.bits}"
    rows, inputs = layout.shape
    if format == "awq":
        return f"outputs go by 8, not {rows}" if rows % 8 else ""
    whole = 32 if grid.bits == 3 else 32 // grid.bits
    return f"{rows} outputs and {inputs} inputs do not fill words of {whole} codes" if (rows | inputs) % whole else ""


def pack(weights: Weights, format: str) -> Weights:
    """Our codes as GPTQ or AWQ lays them out; scales become float16."""
    layouts = layouts_of(weights)
    check_all(format, weights, layouts, lambda layout: reason(layout, format))
    before = weights_before(weights, layouts)
    # Both formats take every layer for quantized unless told, and not every reader listens.
    whole = [name for name in prunable(before) if name not in layouts and len(before.spec(name).shape) == 2]
    grids: Counter[Any] = Counter((layout.grid.bits, layout.grid.group) for layout in layouts.values())
    usual = grids.most_common(1)[0][0]
    head = [name for name in layouts if name.endswith("lm_head.weight")]
    if format == "awq" and head:
        raise Error(
            f"{listed(head)}: readers of the format awq take the head for a whole one; leave it out, or write gptq"
        )
    if format == "awq" and len(grids) > 1:
        raise Error("the format awq has one size of groups for all tensors; these have several")
    made = {name: _nodes(weights, name, layout, format) for name, layout in layouts.items()}
    bits, group = usual
    symmetric = all(layout.grid.symmetric for layout in layouts.values())  # type: ignore[attr-defined]
    words: dict[str, Any] = {
        "quant_method": "awq" if format == "awq" else "gptq",
        "bits": bits,
        "group_size": group or -1,
    }
    modules = [name.removesuffix(".weight") for name in whole]
    if format == "awq":
        words |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": sorted({*modules, "lm_head"})}
        return repacked(weights, layouts, made, words, format)
    words |= {
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        "lm_head": bool(head),
    }
    other = {n: layout for n, layout in layouts.items() if (layout.grid.bits, layout.grid.group) != usual}
    own: dict[str, Any] = {f"-:{_exactly(module)}": {} for module in modules}
    for name, layout in other.items():
        said = {"bits": layout.grid.bits, "group_size": layout.grid.group or -1}
        own[f"+:{_exactly(name.removesuffix('.weight'))}"] = said
    if own:
        words["dynamic"] = own
    return repacked(weights, layouts, made, words, format)


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}$"


def _nodes(weights: Weights, name: str, layout: Layout, format: str) -> dict[str, Lazy]:
    grid: Any = layout.grid
    rows, inputs = layout.shape
    groups = inputs // (grid.group or inputs)
    stem = name.removesuffix("weight")
    if format == "awq":
        outputs = {"qweight": Spec((inputs, rows // 8), torch.int32), "qzeros": Spec((groups, rows // 8), torch.int32)}
        function = partial(_awq, stem=stem, middle=grid.middle, name=name)
    else:
        packed = rows * grid.bits // 32
        outputs = {
            "qweight": Spec((inputs * grid.bits // 32, rows), torch.int32),
            "qzeros": Spec((groups, packed), torch.int32),
        }
        function = partial(_gptq, stem=stem, bits=grid.bits, less=1 if format == "gptq" else 0, name=name)
    outputs["scales"] = Spec((groups, rows), torch.float16)
    found = work_of(weights, name, layout, function, {stem + key: spec for key, spec in outputs.items()})
    if format != "awq":
        found[f"{stem}g_idx"] = Held(_in_a_row(inputs, groups))
    return found


def _zeros(params: Mapping[str, Tensor], middle: int) -> Tensor:
    """Zero points ``[groups, out]``, uint8."""
    if "zero_point" in params:
        return params["zero_point"].t().contiguous()
    return torch.full_like(params["scale"].t(), middle, dtype=torch.uint8)


def _gptq(codes: Tensor, params: Mapping[str, Tensor], stem: str, bits: int, less: int, name: str) -> dict[str, Tensor]:
    zeros = _zeros(params, 2 ** (bits - 1))
    if less and not zeros.all():
        raise Error(f'{name} has zero points of 0, which GPTQ of version 1 stores as -1; write format="gptq_v2"')
    return {
        f"{stem}qweight": pack_codes(codes, bits).t().contiguous(),
        f"{stem}qzeros": pack_codes(zeros - less, bits),
        f"{stem}scales": half(params["scale"], name).t().contiguous(),
    }


def _awq(codes: Tensor, params: Mapping[str, Tensor], stem: str, middle: int, name: str) -> dict[str, Tensor]:
    return {
        f"{stem}qweight": pack_codes(_ordered(codes.t()), 4),
        f"{stem}qzeros": pack_codes(_ordered(_zeros(params, middle)), 4),
        f"{stem}scales": half(params["scale"], name).t().contiguous(),
    }


def _ordered(codes: Tensor) -> Tensor:
    """Of each eight outputs, the even ones first."""
    return codes.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)


def _in_order(codes: Tensor) -> Tensor:
    """The way back."""
    return codes.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)


# The way back


def unpack(weights: Weights, dtype: torch.dtype | str | None = None) -> Weights:
    """Floats of a folder of GPTQ (either version, with any order of inputs) or AWQ."""
    words = words_of(weights)
    awq = words.get("quant_method") == "awq"
    if awq and words.get("version", "gemm") != "gemm":
        raise Error(f"AWQ in the layout {words['version']!r} is not understood; that of gemm is")
    nodes: dict[str, Lazy] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for first in weights:
        if first.endswith(".qweight"):
            stem = first.removesuffix("qweight")
            nodes[f"{stem}weight"] = (_awq_node if awq else _gptq_node)(weights, stem, words, dtype)
            parts[f"{stem}weight"] = (first, *(stem + ending for ending in ("qzeros", "scales", "g_idx")))
    if not nodes:
        raise Error(f"nothing here is quantized, although config.json says {words.get('quant_method')}: no qweight")
    back = put_back(weights, nodes, parts, step="quantize.formats.unpack")
    files = {name: file for name, file in back.files.items() if name != "quantize_config.json"}
    return Weights({name: back.node(name) for name in back}, back.lineage, files, back.metadata)


def _matrix(weights: Weights, name: str) -> tuple[int, int]:
    spec = weights.spec(name)
    if spec.dtype != torch.int32 or len(spec.shape) != 2 or not spec.numel:
        raise FormatError(f"{name} is {spec}, where a matrix of int32 is expected")
    return spec.shape  # type: ignore[return-value]


def _gptq_node(weights: Weights, stem: str, words: Mapping[str, Any], dtype: Any) -> Lazy:
    own = _own_words(stem.removesuffix("."), words)
    bits = number_of(own, "bits", None, 2, 8)
    words_in, rows = _matrix(weights, f"{stem}qweight")
    if bits is None:
        raise FormatError("config.json does not say of how many bits the codes are")
    if words_in * 32 % bits:
        raise FormatError(
            f"{stem}qweight has {words_in} words in a column, which whole codes of {bits} bits do not fill"
        )
    inputs = words_in * 32 // bits
    packed = rows * bits // 32
    groups = _matrix(weights, f"{stem}qzeros")[0]
    arguments = [
        weights.node(f"{stem}qweight"),
        expect(weights, f"{stem}qzeros", torch.int32, groups, packed),
        expect(weights, f"{stem}scales", None, groups, rows),
    ]
    if f"{stem}g_idx" in weights:
        arguments.append(expect(weights, f"{stem}g_idx", torch.int32, inputs))
    elif inputs % groups:
        raise FormatError(f"{stem}qzeros has {groups} groups, which do not fill {inputs} inputs")
    version = own.get("checkpoint_format", own.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2"):
        raise Error(f"codes in the layout {version!r} are not understood; those of gptq and gptq_v2 are")
    spec = Spec((rows, inputs), dtype_of(weights, dtype, arguments[2].spec))
    function = partial(_of_gptq, bits=bits, more=int(version == "gptq"), name=f"{stem}g_idx")
    return Output(Work(function, Inputs(arguments, "tensor"), {"": spec}))


def _own_words(module: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of one module."""
    dynamic = words.get("dynamic") or {}
    try:
        for pattern, own in dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return {**words, **own}
    except (AttributeError, TypeError, re.error):
        raise FormatError("config.json has words about single modules (dynamic) that are none") from None
    return dict(words)


def _of_gptq(
    packed: Tensor, zeros: Tensor, scales: Tensor, order: Tensor | None = None, *, bits: int, more: int, name: str
) -> Tensor:
    groups, rows = scales.shape
    codes = unpack_codes(packed.t().contiguous(), bits, len(packed) * 32 // bits)
    zero = ((unpack_codes(zeros, bits, rows) + more) & (2**bits - 1)).t()
    scale = scales.t()
    if order is None or torch.equal(order, _in_a_row(len(order), groups, order.device)):
        return by_group(codes, scale, zero, groups)
    if order.min() < 0 or order.max() >= groups:
        raise FormatError(f"{name} tells of group {int(order.max())}, and there are {groups}")
    order = order.long()
    return (codes.to(scale.dtype) - zero.to(scale.dtype)[:, order]).mul_(scale[:, order])


def _in_a_row(inputs: int, groups: int, device: torch.device | None = None) -> Tensor:
    """The group of each input, where they follow one another: int32."""
    return torch.arange(groups, dtype=torch.int32, device=device).repeat_interleave(inputs // groups)


def _awq_node(weights: Weights, stem: str, words: Mapping[str, Any], dtype: Any) -> Lazy:
    if number_of(words, "bits", number_of(words, "w_bit", 4, 1, 8), 1, 8) != 4:
        raise Error("AWQ of other than 4 bits is not understood")
    inputs, packed = _matrix(weights, f"{stem}qweight")
    groups = _matrix(weights, f"{stem}qzeros")[0]
    if inputs % groups:
        raise FormatError(f"{stem}qzeros has {groups} groups, which do not fill {inputs} inputs")
    scale = expect(weights, f"{stem}scales", None, groups, packed * 8)
    zeros = expect(weights, f"{stem}qzeros", torch.int32, groups, packed)
    spec = Spec((packed * 8, inputs), dtype_of(weights, dtype, scale.spec))
    return Output(Work(_of_awq, Inputs([weights.node(f"{stem}qweight"), zeros, scale], "tensor"), {"": spec}))


def _of_awq(packed: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    rows = packed.shape[1] * 8
    codes = _in_order(unpack_codes(packed, 4, rows)).t()
    zero = _in_order(unpack_codes(zeros, 4, rows)).t()
    return by_group(codes, scales.t(), zero, len(scales))


__all__ = ["FORMATS", "ORDER", "pack", "reason", "unpack"]
