"""Steps that formats share: from our codes to other tensors, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError, listed
from weightsmith.quantize._layout import (
    METADATA,
    Layout,
    config_of,
    embeddings,
    endings_by_name,
    endings_of,
    plain_files,
    tied_codes,
)
from weightsmith.quantize._parts import unpack
from weightsmith.weights import Entire, Inputs, Lazy, Output, Spec, Step, Weights, Work, as_dtype
from weightsmith.weights._files import Bytes

Packing = Callable[[Tensor, Mapping[str, Tensor]], dict[str, Tensor]]
"""``(codes [out, in] uint8, params) -> {name: tensor}``: what a format writes of one tensor or a run of its rows."""


def work_of(
    weights: Weights, name: str, layout: Layout, function: Packing, outputs: Mapping[str, Spec], unit: str = "tensor"
) -> dict[str, Lazy]:
    """Nodes of what a format writes of one tensor, each under its own name."""
    endings = list(endings_of(layout))
    shared = {f"_{key}" for key, stored in layout.grid.stored().items() if stored.shared}
    arguments = [
        Entire(weights.node(name + ending)) if unit == "row" and ending in shared else weights.node(name + ending)
        for ending in endings
    ]
    whole = partial(_packed, layout=layout, endings=tuple(endings), function=function)
    work = Work(whole, Inputs(arguments, unit), outputs)  # type: ignore[arg-type]
    return {key: Output(work, key) for key in outputs}


def _packed(packed: Tensor, *params: Tensor, layout: Layout, endings: tuple[str, ...], function: Packing) -> Any:
    codes = unpack(packed, layout.grid.bits, layout.width)
    return function(codes, {ending[1:]: value for ending, value in zip(endings[1:], params, strict=True)})


def repacked(
    weights: Weights,
    layouts: Mapping[str, Layout],
    made: Mapping[str, Mapping[str, Lazy]],
    config: Mapping[str, Any],
    format: str,
) -> Weights:
    """The weights with the tensors of a format in the place of our codes, and its words in config.json."""
    parts = endings_by_name(layouts)
    first = {names[0]: name for name, names in parts.items()}
    consumed = {part for names in parts.values() for part in names}
    nodes: dict[str, Lazy] = {}
    for name in weights:
        if name in first:
            nodes |= made[first[name]]
        elif name not in consumed:
            nodes[name] = weights.node(name)
    metadata = {key: word for key, word in weights.metadata.items() if key != METADATA}
    step = Step("quantize.formats.pack", {"format": format}, (weights.lineage,))
    return Weights(nodes, step, with_words(weights, config), metadata)


def with_words(weights: Weights, words: Mapping[str, Any]) -> dict[str, bytes | Bytes]:
    """The files with a ``quantization_config`` in config.json."""
    from weightsmith.quantize._layout import CONFIG, as_file

    files = plain_files(weights)
    parsed = config_of(weights.with_files(files)) or {}
    files[CONFIG] = as_file({**parsed, "quantization_config": words})
    return files


def words_of(weights: Weights) -> dict[str, Any]:
    """The ``quantization_config`` of a folder, or nothing."""
    said = (config_of(weights) or {}).get("quantization_config")
    return said if isinstance(said, dict) else {}


def check_all(format: str, weights: Weights, layouts: Mapping[str, Layout], reason: Callable[[Layout], str]) -> None:
    """An error that names every tensor that a format cannot hold, and why.

    Args:
        reason: why it cannot hold a tensor; empty if it can.
    """
    wrong: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        why = "" if name.endswith(".weight") else 'codes must be those of a layer\'s ".weight"'
        if len(layout.shape) != 2:
            why = f"it holds matrices, not {len(layout.shape)} axes"
        elif layout.padding:
            why = "it holds no inputs that only fill up a group"
        elif not why and layout.grid.group and layout.inputs % layout.grid.group:
            why = f"groups of {layout.grid.group} do not fill rows of {layout.inputs} inputs"
        why = why or reason(layout)
        if why:
            wrong.setdefault(why, []).append(name)
    if coded := embeddings(layouts):
        wrong.setdefault("programs that read it load no coded embeddings", []).extend(coded)
    if tied := tied_codes(weights_before(weights, layouts), layouts):
        wrong.setdefault("tensors that share their values cannot be coded in it", []).extend(tied)
    if wrong:
        told = "; ".join(f"{listed(names)}: {why}" for why, names in wrong.items())
        raise Error(f"the format {format} cannot hold {told}")


def weights_before(weights: Weights, layouts: Mapping[str, Layout]) -> Weights:
    """Names and files as they were before tensors were coded; the nodes of coded ones are their codes."""
    nodes: dict[str, Lazy] = {}
    endings = endings_by_name(layouts)
    first = {names[0]: name for name, names in endings.items()}
    consumed = {part for names in endings.values() for part in names}
    for name in weights:
        if name in first:
            nodes[first[name]] = _Float(weights.node(name), layouts[first[name]])
            if name in weights.ties:
                nodes[first[name]] = nodes[first_name(weights.ties[name])]
        elif name not in consumed:
            nodes[name] = weights.node(name)
    return Weights(nodes, weights.lineage, plain_files(weights), weights.metadata)


def first_name(packed: str) -> str:
    """``layer.weight`` of ``layer.weight_packed``."""
    return packed.removesuffix("_packed")


class _Float:
    """What a tensor was before it was coded: a shape."""

    grain = 1

    def __init__(self, codes: Lazy, layout: Layout):
        self.codes, self.spec = codes, Spec(layout.shape, torch.float32)

    def read(self, start: int, stop: int, scratch: Any) -> Tensor:
        raise Error("is coded")

    def inputs(self) -> Iterable[Lazy]:
        return (self.codes,)

    def identity(self) -> object:
        return self.codes.identity()


# Scales


_COARSE = 1e-3  # a relative change that float16 makes of numbers only where it runs out of digits


def half(scale: Tensor, name: str) -> Tensor:
    """Scales in float16; a warning where that changes some by more than a part in a thousand.

    Raises:
        Error: scales that are too large for it.
    """
    found = scale.to(torch.float16)
    if not found.isfinite().all():
        raise Error(
            f"{name} has scales up to {float(scale.abs().max()):.3g}, too large for float16, in which this format "
            'keeps them; write "compressed-tensors"'
        )
    wide = scale.float()
    if coarse := int(((found.float() - wide).abs() > _COARSE * wide.abs()).sum()):
        warnings.warn(
            f"{name}: {coarse} of {scale.numel()} scales are so small that float16, in which this format keeps them, "
            f"changes them by more than {_COARSE:g} of their size",
            stacklevel=2,
        )
    return found


def exponents(scale: Tensor) -> Tensor:
    """Powers of two as the bytes of e8m0: 127 for 1."""
    return (torch.frexp(scale.float()).exponent.clamp_(-126, 128) + 126).to(torch.uint8)


# The way back


def dtype_of(weights: Weights, dtype: torch.dtype | str | None, *specs: Spec) -> torch.dtype:
    """The dtype asked for, else that of the scales, else that of config.json, else float32."""
    if dtype is not None:
        return as_dtype(dtype)
    for spec in specs:
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
            return spec.dtype
    said = config_of(weights) or {}
    return floating(said.get("dtype", said.get("torch_dtype"))) or torch.float32


def floating(word: Any) -> torch.dtype | None:
    """The dtype of floats that a config calls by this word, or None."""
    try:
        found = as_dtype(word) if isinstance(word, str) else None
    except Error:
        return None
    return found if found is not None and found.is_floating_point else None


def number_of(words: Mapping[str, Any], key: str, usual: int | None, least: int, most: int) -> int | None:
    """A whole number that a config says, which is not trusted."""
    value = words.get(key, usual)
    if value is usual or value is None:
        return usual
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise FormatError(f"config.json says {key} = {value!r}; known are {least} to {most}")
    return value


def expect(weights: Weights, name: str, dtype: torch.dtype | None, *shape: int) -> Lazy:
    """The node of a tensor that must have this shape, and this dtype or else be a float."""
    if name not in weights:
        raise FormatError(f"{name} is missing, without which the codes beside it cannot be read")
    spec = weights.spec(name)
    fits = spec.dtype == dtype if dtype is not None else spec.dtype.is_floating_point
    if not fits or spec.shape != shape:
        wanted = "a float" if dtype is None else str(dtype).removeprefix("torch.")
        raise FormatError(f"{name} is {spec}, where {wanted}{list(shape)} is expected")
    return weights.node(name)


def by_group(codes: Tensor, scale: Tensor, zero: Tensor | int, groups: int) -> Tensor:
    """``(codes - zero) * scale`` as floats ``[out, in]``, with scales and zeros ``[out, groups]``."""
    values = codes.unflatten(1, (groups, -1)).to(scale.dtype)
    values -= zero.to(scale.dtype).unsqueeze(-1) if isinstance(zero, Tensor) else zero
    return values.mul_(scale.unsqueeze(-1)).flatten(1)
