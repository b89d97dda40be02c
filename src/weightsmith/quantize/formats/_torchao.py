"""Codes as tensors of torchao, in a module: what it then computes with, compiles and exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, listed, missing
from weightsmith.quantize._layout import Layout, endings_of, layouts_of
from weightsmith.quantize._parts import unpack
from weightsmith.quantize.formats._parts import check_all, weights_before
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Weights, dtype_name, open

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def torchao(weights: Any, module: nn.Module) -> nn.Module:
    """Codes of integers loaded into a module as weights of torchao (``IntxUnpackedToInt8Tensor``), unchanged.

    A code takes a byte in memory, whatever its width; values are made of it where a layer is called, and inputs are not
    quantized. All other tensors are copied as `Weights.load_into` does.

    Args:
        weights: codes ``[out, in]`` on `Integer` grids of 1 to 8 bits, or a folder of them, with what is not coded.
        module: takes them in place; its dtypes (float32, bfloat16 or float16) and devices stay, and a parameter on the
            meta device comes to the CPU, in the dtype that it has.

    Returns:
        The module.

    Raises:
        MissingPackage: torchao is not installed.
        Error: codes that it cannot hold, or names and shapes that do not fit the module; nothing is then changed.

    >>> net = torch.nn.Linear(32, 8, bias=False)
    >>> net = torchao(ws.quantize.rtn(net, bits=4, group=16), net)  # doctest: +SKIP
    """
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
    except ImportError:
        raise missing("torchao", "peers", "loading codes as torchao's") from None
    opened = open(weights)
    layouts = layouts_of(opened)
    check_all("torchao", opened, layouts, _reason)
    before = weights_before(opened, layouts)
    own = _fitting(before, layouts, module)
    Weights({name: before.node(name) for name in before if name not in layouts}).load_into(module, strict=False)
    for name, layout in layouts.items():
        grid: Any = layout.grid
        codes, scale, zero = _parts(opened, name, layout)
        device = None if own[name].is_meta else own[name].device
        block = (layout.rows if grid.per_tensor else 1, layout.inputs // scale.shape[1])
        made = IntxUnpackedToInt8Tensor(
            codes.to(device),
            scale.to(device),
            zero.to(device),
            getattr(torch, f"int{grid.bits}"),
            block,
            own[name].dtype,
            None,
        )
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, nn.Parameter(made, requires_grad=False))
    return module


def _reason(layout: Layout) -> str:
    grid = layout.grid
    if not isinstance(grid, Integer):
        return f"the grid {type(grid).__name__} is none of its own: it holds integers"
    if not grid.symmetric and grid.zero == "float":
        return 'the smallest value is kept as a float; quantize with zero="integer"'
    return "" if grid.scale_dtype in _FLOATS else f"scales are no {dtype_name(grid.scale_dtype)}"


def _fitting(before: Weights, layouts: Mapping[str, Layout], module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors, if the weights fit them."""
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    held = {id(value) for name, value in own.items() if name in before}
    lacking = [name for name, value in own.items() if id(value) not in held]
    surplus = [name for name in before if name not in own]
    if lacking or surplus:
        said = [f"it needs {listed(lacking)}"] * bool(lacking) + [f"it has no {listed(surplus)}"] * bool(surplus)
        raise Error(f"these weights do not fit the module: {'; '.join(said)}")
    for name, spec in before.specs.items():
        if spec.shape != tuple(own[name].shape):
            raise Error(f"shapes do not fit the module: {name} {list(spec.shape)} into {list(own[name].shape)}")
    for name in layouts:
        if own[name].dtype not in _FLOATS:
            kind = dtype_name(own[name].dtype)
            raise Error(f"{name} is {kind} in the module; torchao has weights of float32, bfloat16 or float16")
        if shared := [other for other, value in own.items() if value is own[name] and other != name]:
            raise Error(
                f"{listed(shared)} shares the tensor of {name} in the module, and torchao's codes are not shared"
            )
    return own


def _parts(weights: Weights, name: str, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes ``[out, in]``, scales and zero points ``[out, groups]``, or ``[1, 1]`` of a whole tensor."""
    grid: Any = layout.grid
    found = {ending: weights[name + ending] for ending in endings_of(layout)}
    middle = 2 ** (grid.bits - 1)
    codes = (unpack(found["_packed"], grid.bits, layout.width).to(torch.int16) - middle).to(torch.int8)
    scale = found["_scale"].reshape(1, 1) if grid.per_tensor else found["_scale"]
    if grid.symmetric:
        return codes, scale, torch.zeros_like(scale, dtype=torch.int8)
    zero = (found["_zero_point"].to(torch.int16) - middle).to(torch.int8)
    return codes, scale, zero.reshape(scale.shape)


__all__ = ["torchao"]
