"""Bytes as codes of unequal length, in lanes that are decoded side by side.

A Huffman code whose longest word is `WINDOW` bits: one look into a table of that many bits tells the next symbols, up
to six at once. Symbols are cut into lanes of `LANE`, each of whole bytes, so that any run can be decoded by itself,
several lanes keep a processor busy, and a graphics card decodes all of them together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.errors import FormatError

LANE = 4096
"""Symbols that follow one another in a stream. Their bytes are counted by an int16."""

WINDOW = 12
"""Bits of the longest code: tables of 32 KB, which fit in the first cache. 14 bits save 0.002 bits a symbol."""

_SEVERAL = 6
"""Symbols that one look may find; the other two bytes of an entry say how many, and their bits."""

WIDEST = LANE * WINDOW // 8
"""Bytes of the longest lane."""


def code_lengths(counts: Sequence[int]) -> list[int]:
    """The best code lengths up to `WINDOW` for symbols that occur so often (package-merge).

    Args:
        counts: of each symbol; at most ``2^WINDOW`` above zero.

    Returns:
        One length a symbol, 0 for those that do not occur; 1 for a symbol that is alone.

    Source: Larmore and Hirschberg 1990, 'A fast algorithm for optimal length-limited Huffman codes'.

    >>> code_lengths([8, 0, 4, 2, 2]), code_lengths([0, 7])
    ([1, 0, 2, 3, 3], [0, 1])
    """
    leaves = sorted((int(count), (symbol,)) for symbol, count in enumerate(counts) if count > 0)
    lengths = [0] * len(counts)
    if len(leaves) == 1:
        lengths[leaves[0][1][0]] = 1
        return lengths
    merged: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(WINDOW):
        items = sorted(leaves + merged)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(items[::2], items[1::2], strict=False)]
    for _, symbols in merged[: len(leaves) - 1]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


@dataclass(frozen=True, eq=False)
class Code:
    """A code and its tables."""

    lengths: Tensor
    """``[256]`` uint8; 0 for symbols that do not occur."""
    words: Tensor
    """``[256]`` int16: the code of each symbol, its first bit lowest."""
    single: Tensor
    """``[2^WINDOW]`` int16: the symbol that these bits begin with, and 256 times the length of its code."""
    several: Tensor
    """``[2^WINDOW]`` int64: up to six symbols, their number in byte 6, and their bits in byte 7."""


@functools.lru_cache(maxsize=256)
def code_of(lengths: bytes) -> Code:
    """The canonical code of given lengths: shorter codes first, then by symbol.

    Raises:
        FormatError: lengths of which no code can be made that gives every bit a meaning.
    """
    found = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(lengths) != 256 or not found or found[-1][0] > WINDOW:
        raise FormatError(f"a table of codes says the lengths of 256 codes of up to {WINDOW} bits")
    if sum(2 ** (WINDOW - length) for length, _ in found) != 2**WINDOW:
        raise FormatError("the lengths of a table of codes do not make a complete code; the file is damaged")
    words, single = np.zeros(256, np.int16), np.zeros(2**WINDOW, np.int16)
    word, before = 0, 0
    for length, symbol in found:
        word <<= length - before
        before = length
        words[symbol] = int(format(word, f"0{length}b")[::-1], 2)
        single[words[symbol] :: 2**length] = symbol | length << 8
        word += 1
    return Code(*map(torch.from_numpy, (np.frombuffer(lengths, np.uint8).copy(), words, single, _several(single))))


def _several(single: np.ndarray) -> np.ndarray:
    bits = np.arange(len(single), dtype=np.int64)
    used, count, symbols = np.zeros_like(bits), np.zeros_like(bits), np.zeros_like(bits)
    whole = np.ones(len(bits), bool)
    for index in range(_SEVERAL):
        entry = single[bits >> used].astype(np.int64)
        whole &= used + (entry >> 8) <= WINDOW  # else the code goes on beyond the window
        symbols |= np.where(whole, (entry & 255) << 8 * index, 0)
        used += np.where(whole, entry >> 8, 0)
        count += whole
    return symbols | count << 48 | used << 56


# The same in PyTorch where there is no native loop: on devices, and without a compiler


def counted(symbols: Tensor) -> Tensor:
    """How often each byte occurs in ``[n]`` uint8: ``[256]`` int64."""
    found = native.counted(symbols)
    return torch.bincount(symbols.long(), minlength=256) if found is None else found


def lane_bytes(symbols: Tensor, code: Code) -> Tensor:
    """Bytes of the lanes of symbols ``[n]`` uint8: ``[lanes]`` int64."""
    bits = native.lane_bits(symbols, LANE, code.lengths)
    if bits is None:
        own = code.lengths.to(symbols.device)[symbols.int()]
        bits = torch.nn.functional.pad(own, (0, -len(symbols) % LANE)).view(-1, LANE).sum(dim=1)
    return (bits.long() + 7) // 8


def coded(symbols: Tensor, begin: Tensor, code: Code) -> Tensor:
    """Symbols ``[n]`` uint8 as a stream ``[begin[-1]]`` uint8 whose lanes begin at ``begin`` ``[lanes + 1]`` int64."""
    made = native.coded(symbols, LANE, code.words, code.lengths, begin)
    if made is not None:
        return made
    device, index = symbols.device, symbols.int()
    lengths = code.lengths.to(device)[index].int()
    before = torch.nn.functional.pad(lengths, (0, -len(lengths) % LANE)).view(-1, LANE)
    place = (begin[:-1].to(device)[:, None] * 8 + before.cumsum(1) - before).view(-1)[: len(symbols)]
    shifted = code.words.to(device)[index].int() << (place & 7).int()
    sums = torch.zeros(int(begin[-1]) + 2, dtype=torch.int32, device=device)
    for byte in range(3):  # a code lies in up to three bytes; what meets in one has no bit in common
        sums.index_add_(0, (place >> 3) + byte, shifted >> 8 * byte & 255)
    return sums[:-2].to(torch.uint8)


def decoded(stream: Tensor, begin: Tensor, count: int, code: Code) -> Tensor:
    """The ``count`` symbols, uint8, of a stream whose lanes begin at ``begin`` ``[lanes + 1]`` int64.

    Raises:
        FormatError: a lane does not end where the next begins.
    """
    if not count:
        return torch.empty(0, dtype=torch.uint8, device=stream.device)
    found = native.decoded(stream, begin, count, LANE, code.several, code.single, WINDOW)
    made, wrong = _decoded(stream, begin, count, code) if found is None else found
    if wrong >= 0:
        raise FormatError("a stream of codes does not end where it should; the file is damaged")
    return made


def _decoded(stream: Tensor, begin: Tensor, count: int, code: Code) -> tuple[Tensor, int]:
    """All lanes at once, a symbol of each at a time."""
    device = stream.device
    begin, single = begin.to(device), code.single.to(device).int()
    # No lane can lead further than this, whatever it says.
    wide = torch.nn.functional.pad(stream, (0, WIDEST + 4)).int()
    three = wide[:-2] | wide[1:-1] << 8 | wide[2:] << 16
    lanes, last = len(begin) - 1, count - (len(begin) - 2) * LANE
    steps = LANE if lanes > 1 else last
    made = torch.empty(steps, lanes, dtype=torch.uint8, device=device)
    place = begin[:-1] * 8
    end_of_last = place[-1]
    for step in range(steps):
        if step == last:
            end_of_last = place[-1].clone()
        entry = single[three[place >> 3] >> (place & 7) & 2**WINDOW - 1]
        made[step] = entry & 255
        place = place + (entry >> 8)
    if last == steps:
        end_of_last = place[-1]
    place[-1] = end_of_last
    wrong = ((place + 7 >> 3) != begin[1:]).nonzero()
    return made.T.reshape(-1)[:count], int(wrong[0]) if len(wrong) else -1
