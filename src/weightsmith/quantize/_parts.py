"""Steps that quantizing methods share: grids, groups of inputs, and packing of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights import dtype_name

WORD = 32  # bits of a packed word


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """``[out, in]`` (or ``[out, ...]``) as ``[out, groups, group]``; None for one group a row."""
    inputs = weight.shape[1:].numel()
    check_group(inputs, group)
    size = inputs if group is None else min(group, inputs)
    return weight.reshape(len(weight), inputs // size if size else 1, size)


def check_group(inputs: int, group: int | None) -> None:
    """An error unless groups of this size fill a row."""
    if group is not None and (group < 1 or inputs % group):
        fitting = [size for size in (16, 32, 48, 64, 96, 128, 192, 256) if inputs % size == 0]
        hint = f"; these fit: {', '.join(map(str, fitting))}, or None for whole rows" if fitting else "; use group=None"
        raise Error(f"groups of {group} do not fill a row of {inputs} inputs{hint}")


def check_bits(bits: int) -> None:
    """An error unless codes of this width can be packed."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise Error(f"bits must be a whole number from 2 to 8, got {bits!r}")


def symmetric_scale(groups: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The step of a signed grid that just holds the largest value of each group: ``[out, groups]``.

    ``2 max|w| / (2^bits - 1)``; 1 for a group of zeros. Rounded through ``dtype``, the one it will
    be stored in, so that codes fit the scale that decodes them. An error for values that no grid holds.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise Error(f"scales are floats; they cannot be stored as {dtype_name(dtype)}")
    largest = groups.abs().amax(dim=-1) if groups.shape[-1] else groups.new_zeros(groups.shape[:-1])
    step = largest / ((2**bits - 1) / 2)
    step = step if dtype is None else step.to(dtype).to(groups.dtype)
    if not step.isfinite().all():
        stored = "float32" if dtype is None else dtype_name(dtype)
        raise Error(f"there are values that are not finite, or too large for a scale in {stored}")
    return torch.where(step > 0, step, torch.ones_like(step))


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes ``[out, in]`` and scale ``[out, groups]`` to values ``[out, in]``, float32."""
    runs = codes.reshape(*scale.shape, codes.shape[1] // max(scale.shape[1], 1))
    return (runs.float() * scale.float().unsqueeze(-1)).reshape(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes ``[out, in]`` to int32 ``[out, ceil(in * bits / 32)]``, lowest bits first, without gaps."""
    rows, inputs = codes.shape
    words = packed_width(inputs, bits)
    unsigned = codes.to(torch.int64) + 2 ** (bits - 1)
    runs = torch.nn.functional.pad(unsigned, (0, -inputs % WORD)).unflatten(1, (-(-inputs // WORD), WORD))
    packed = torch.zeros(rows, runs.shape[1], bits, dtype=torch.int64, device=codes.device)
    for index in range(WORD):  # 32 codes fill exactly `bits` words, so this pattern repeats
        word, shift = divmod(index * bits, WORD)
        packed[..., word] |= runs[..., index] << shift
        if shift + bits > WORD:
            packed[..., word + 1] |= runs[..., index] >> (WORD - shift)
    packed &= 2**WORD - 1
    signed = torch.where(packed >= 2 ** (WORD - 1), packed - 2**WORD, packed)
    return signed.to(torch.int32).flatten(1)[:, :words].contiguous()


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: int8 ``[out, inputs]``."""
    rows = len(packed)
    runs = -(-inputs // WORD)
    words = torch.nn.functional.pad(packed.to(torch.int64) & (2**WORD - 1), (0, runs * bits - packed.shape[1]))
    words = words.reshape(rows, runs, bits)
    codes = torch.empty(rows, runs, WORD, dtype=torch.int8, device=packed.device)
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        value = words[..., word] >> shift
        if shift + bits > WORD:
            value = value | (words[..., word + 1] << (WORD - shift))
        codes[..., index] = ((value & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)
    return codes.flatten(1)[:, :inputs]


def packed_width(inputs: int, bits: int) -> int:
    """int32 words for a row of codes."""
    return -(-inputs * bits // WORD)
