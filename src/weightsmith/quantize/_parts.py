"""Packing codes: as many bits each as they have, one after another, in words of 32.

Codes are packed by folding: two neighbours become one of twice the width, until whole bytes are full. Every step is
one pass of wide integers over a piece that lies in the caches, so nothing wider than the codes is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # bits of a packed word
_PIECE = 2**17  # codes folded together; with its buffers in the second-level cache
_WIDE = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[out, in]`` uint8 to int32 ``[out, ceil(in * bits / 32)]``, lowest bits first, without gaps.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
    tensor([[801]], dtype=torch.int32)
    """
    rows, inputs = codes.shape
    if not codes.numel():
        return torch.zeros(rows, packed_width(inputs, bits), dtype=torch.int32, device=codes.device)
    if inputs * bits % WORD:
        codes = torch.nn.functional.pad(codes, (0, -inputs % WORD))
    flat = _aligned(codes.reshape(-1))
    if bits < 8:
        packed = torch.empty(flat.numel() * bits // 8, dtype=torch.uint8, device=flat.device)
        step = _PIECE if flat.is_cpu else flat.numel()
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            packed[start * bits // 8 : (start + piece.numel()) * bits // 8] = _folded(piece, bits)
        flat = packed
    words = flat.view(torch.int32).view(rows, -1)
    return (words.clone() if words.data_ptr() == codes.data_ptr() else words)[
        :, : packed_width(inputs, bits)
    ].contiguous()


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: uint8 ``[out, inputs]``."""
    rows = len(packed)
    if not rows or not inputs:
        return torch.zeros(rows, inputs, dtype=torch.uint8, device=packed.device)
    if inputs * bits % WORD:
        packed = torch.nn.functional.pad(packed, (0, -(-inputs // WORD) * bits - packed.shape[1]))
    flat = _aligned(packed.reshape(-1)).view(torch.uint8)
    if bits < 8:
        codes = torch.empty(flat.numel() * 8 // bits, dtype=torch.uint8, device=flat.device)
        step = _PIECE if codes.is_cpu else codes.numel()
        for start in range(0, codes.numel(), step):
            piece = codes[start : start + step]
            _unfolded(flat[start * bits // 8 : (start + piece.numel()) * bits // 8], bits, piece)
        flat = codes
    codes = flat.view(rows, -1)
    return (codes.clone() if codes.data_ptr() == packed.data_ptr() else codes)[:, :inputs].contiguous()


def packed_width(inputs: int, bits: int) -> int:
    """int32 words for a row of codes."""
    return -(-inputs * bits // WORD)


def _aligned(flat: Tensor) -> Tensor:
    """The same contiguous values where they can be looked at as wider ones."""
    return flat.clone() if flat.storage_offset() * flat.itemsize % 8 else flat


def _folds(bits: int) -> list[tuple[int, int]]:
    """Widths of fields and of the places they lie in, until fields are whole bytes: 3 -> (3, 8), (6, 8), (12, 16)."""
    found, place = [], 8
    while bits % 8:
        found.append((bits, place))
        bits *= 2
        place *= 1 + (bits > place)
    return found


def _folded(piece: Tensor, bits: int) -> Tensor:
    """Bytes of a run of codes, whose number fills whole bytes; the codes are left as they are."""
    for field, place in _folds(bits):
        both = piece.view(_WIDE[2 * place])
        upper = both >> (place - field)
        if 2 * field <= place:  # the lower field falls out of the shift, and the upper half out of the cast
            piece = upper.bitwise_or_(both).to(_WIDE[place])
        else:
            upper &= ((1 << field) - 1) << field
            piece = upper.bitwise_or_(both & ((1 << field) - 1))
    field = bits * 2 ** len(_folds(bits)) // 8
    return piece.view(torch.uint8).view(-1, piece.itemsize)[:, :field].reshape(-1)


def _unfolded(flat: Tensor, bits: int, codes: Tensor) -> None:
    """Codes from bytes, the folds undone one by one."""
    folds = _folds(bits)
    width = bits * 2 ** len(folds) // 8
    last, place = folds[-1]
    place *= 1 + (2 * last > place)
    if width * 8 == place:
        piece = _aligned(flat).view(_WIDE[place])
    else:
        piece = flat.new_zeros(flat.numel() // width, place // 8)
        piece[:, :width] = flat.view(-1, width)
        piece = piece.view(-1).view(_WIDE[place])
    for number, (field, place) in reversed(list(enumerate(folds))):
        both = piece.to(_WIDE[2 * place])
        upper = both << (place - field)
        upper &= ((1 << field) - 1) << place
        both = both & ((1 << field) - 1) if both is piece else both.bitwise_and_((1 << field) - 1)
        if number:
            piece = upper.bitwise_or_(both).view(_WIDE[place])
        else:
            torch.bitwise_or(upper, both, out=codes.view(_WIDE[16]))
