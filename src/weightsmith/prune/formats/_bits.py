"""A sparse tensor as the values that are not zero and a bit an entry that says where they were.

Each part is a node of its own that reads its source again where it needs it, a block at a time, so that nothing is
held whole. Where a part begins in the other is known from counts of each block. Values travel as their bits, never as
numbers, so what comes back is what went in, to the bit.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import FormatError
from weightsmith.weights import Held, Inputs, Lazy, Reduction, Scratch, Spec, single
from weightsmith.weights._lazy import convert

BLOCK = 2**16
"""Entries that are looked at together, unless the source cannot be cut so finely."""

Rule = Literal["value", "bits", "2:4"]
"""Which entries are kept: those whose value is not zero, those of which any bit is set, or two of every four."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(values: Tensor) -> Tensor:
    """The bits of floats as integers of their size; no copy."""
    return values.view(_INTEGERS[values.dtype.itemsize])


def kept(values: Tensor, rule: Rule) -> Tensor:
    """Which entries of a run ``[n]`` are kept; for ``"2:4"`` n is a multiple of 4.

    ``"value"`` leaves out both zeros (a negative one comes back as zero) and keeps NaN. ``"2:4"`` keeps exactly two of
    every four: those that are not zero, and of zeros the first.

    >>> kept(torch.tensor([0.0, -0.0, 1.0, torch.nan]), "value"), kept(torch.tensor([0.0, -0.0]), "bits")
    (tensor([False, False,  True,  True]), tensor([False,  True]))
    """
    bits = as_integers(values)
    if rule == "bits":
        return bits != 0
    there = (bits & torch.iinfo(bits.dtype).max) != 0  # without the sign
    if rule == "value":
        return there
    first = there.view(-1, 4).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :2]
    return torch.zeros_like(there).view(-1, 4).scatter_(1, first, True).view(-1)


def packed_bits(mask: Tensor) -> Tensor:
    """A mask ``[rows, columns]`` as ``[rows, ceil(columns / 8)]`` uint8, the first entry in the lowest bit.

    >>> packed_bits(torch.tensor([[True, False, True]]))
    tensor([[5]], dtype=torch.uint8)
    """
    if mask.is_cpu:
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    wide = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).reshape(len(mask), -1, 8)
    return (wide << torch.arange(8, device=mask.device)).sum(dim=-1).to(torch.uint8)


def unpacked_bits(packed: Tensor) -> Tensor:
    """Bytes ``[n]`` as a mask ``[8 n]``.

    >>> unpacked_bits(torch.tensor([5], dtype=torch.uint8)).tolist()
    [True, False, True, False, False, False, False, False]
    """
    if packed.is_cpu:
        return torch.from_numpy(np.unpackbits(packed.contiguous().numpy(), bitorder="little")).view(torch.bool)
    bits = packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (bits & 1).to(torch.bool).reshape(-1)


class Rows:
    """How the bits of a tensor lie in bytes: rows of ``columns`` bits, each filled up to whole bytes.

    Where nothing is filled up, one row and many are the same.
    """

    def __init__(self, rows: int, columns: int):
        self.total = rows * columns
        self.flat = rows <= 1 or columns % 8 == 0
        self.columns = self.total if self.flat else columns
        self.bytes = -(-self.columns // 8)
        """Of a row."""

    @property
    def grain(self) -> int:
        """Entries that begin with a byte."""
        return 8 if self.flat else self.columns

    def byte(self, entry: int) -> int:
        """The byte that an entry begins, for a multiple of the grain; of the end, how many bytes there are."""
        return -(-entry // 8) if self.flat else entry // self.columns * self.bytes

    def entry(self, byte: int) -> int:
        """The entry that a byte begins with, where rows begin."""
        return min(8 * byte, self.total) if self.flat else byte // self.bytes * self.columns

    def pack(self, mask: Tensor) -> Tensor:
        """A mask of whole grains ``[n]`` as bytes."""
        return packed_bits(mask.view(1 if self.flat else -1, mask.numel() if self.flat else self.columns)).view(-1)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The first ``count`` bits of bytes of whole rows; what fills a row up is left out."""
        found = unpacked_bits(packed)
        return (found if self.flat else found.view(-1, 8 * self.bytes)[:, : self.columns].reshape(-1))[:count]


def read(node: Lazy, start: int, stop: int, scratch: Scratch) -> Tensor:
    """Any run of a node, in the dtype that it promises."""
    first = start // node.grain * node.grain
    last = min(-(-stop // node.grain) * node.grain, node.spec.numel)
    return convert(node.read(first, last, scratch), node.spec.dtype)[start - first : stop - first]


def _inner(owner: object, scratch: Scratch) -> Scratch:
    """Buffers for the blocks that one chunk is made of: they are used again for every block."""
    return scratch.kept.setdefault((id(owner), "blocks"), Scratch())


# Counts


def counts_of(source: Lazy, rule: Rule) -> Reduction:
    """How many entries of each block are kept: its value is ``[blocks]`` int64. In rule ``"2:4"``: how many groups of
    four have more than two, ``[1]``."""
    if rule == "2:4":
        inputs = Inputs([source], "row")
        return Reduction([inputs], partial(single, partial(_too_many, dtype=source.spec.dtype), _same))
    block = block_of(source)
    function = partial(_counts, dtype=source.spec.dtype, rule=rule, block=block, blocks=-(-source.spec.numel // block))
    return Reduction([Inputs([source], "element")], partial(single, function, _same))


def block_of(source: Lazy) -> int:
    """Entries of a block: about `BLOCK`, and a multiple of what the source is read in."""
    return max(BLOCK // source.grain, 1) * source.grain


def _same(found: Any) -> Any:
    return found


def _counts(values: Tensor, *, start: int, dtype: torch.dtype, rule: Rule, block: int, blocks: int) -> Tensor:
    return per_block(kept(values.to(dtype), rule), start, block, blocks)


def per_block(numbers: Tensor, start: int, block: int, blocks: int) -> Tensor:
    """The sums of a run that begins at ``start``, by block, ``[blocks]`` int64; zero for blocks elsewhere."""
    found = torch.zeros(blocks, dtype=torch.int64)
    first, done = start // block, 0
    while done < numbers.numel():
        upto = min((first + 1) * block - start, numbers.numel())
        found[first] = numbers[done:upto].sum(dtype=torch.int64)
        first, done = first + 1, upto
    return found


def _too_many(rows: Tensor, *, dtype: torch.dtype) -> Tensor:
    there = kept(rows.to(dtype).reshape(-1), "value")
    return (there.view(-1, 4).sum(dim=1) > 2).sum()[None]


def places(counts: Tensor) -> list[int]:
    """Counts of blocks to where each begins among all, with the end."""
    return [0, *counts.cumsum(0).tolist()]


# Parts of a packed tensor


class Kept:
    """The values of a tensor that are kept, in order: ``[kept]``."""

    def __init__(self, source: Lazy, rule: Rule, begin: list[int]):
        self.source, self.begin = source, begin
        self.rule: Rule = rule
        self.spec = Spec((begin[-1],), source.spec.dtype)
        self.block = block_of(source)
        self.grain = max(begin[-1], 1) if source.grain > BLOCK else 1

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        inner, parts = _inner(self, scratch), []
        first = bisect.bisect_right(self.begin, start) - 1
        for index in range(first, len(self.begin) - 1):
            begin, end = self.begin[index], self.begin[index + 1]
            if begin >= stop:
                break
            inner.next_chunk()
            last = min((index + 1) * self.block, self.source.spec.numel)
            values = read(self.source, index * self.block, last, inner)
            found = as_integers(values)[kept(values, self.rule)]  # a copy: the buffer is used again
            parts.append(found[max(start - begin, 0) : min(stop, end) - begin])
        if not parts:
            return torch.empty(0, dtype=self.spec.dtype)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.spec.dtype)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["kept", self.rule, self.source.identity()]


class KeptOfFour:
    """Two values of every four: ``[out, in / 2]``."""

    def __init__(self, source: Lazy):
        self.source = source
        rows, inputs = source.spec.shape
        self.spec = Spec((rows, inputs // 2), source.spec.dtype)
        self.grain = max(self.spec.numel, 1) if source.grain > BLOCK else math.lcm(source.grain, 4) // 2

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        values = read(self.source, 2 * start, 2 * stop, scratch)
        return as_integers(values)[kept(values, "2:4")].view(self.spec.dtype)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["kept of four", self.source.identity()]


class Bits:
    """Where the kept values were: a bit an entry, in bytes of the given shape."""

    def __init__(self, source: Lazy, rule: Rule, rows: Rows, shape: tuple[int, ...]):
        self.source, self.rows = source, rows
        self.rule: Rule = rule
        self.spec = Spec(shape, torch.uint8)
        own = math.lcm(source.grain, rows.grain)
        self.grain = max(self.spec.numel if source.grain > BLOCK else rows.byte(own), 1)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        inner, parts = _inner(self, scratch), []
        step = max(BLOCK // max(self.rows.grain, 1), 1) * self.rows.grain
        if self.source.grain > BLOCK:
            step = self.rows.total
        first, last = self.rows.entry(start), self.rows.entry(stop)
        for begin in range(first, last, step):
            inner.next_chunk()
            values = read(self.source, begin, min(begin + step, last), inner)
            parts.append(self.rows.pack(kept(values, self.rule)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["bits", self.rule, list(self.spec.shape), self.source.identity()]


class RowStarts:
    """Where each row of a matrix begins among its kept values: ``[rows]`` int64."""

    def __init__(self, source: Lazy, rule: Rule, begin: list[int]):
        self.source, self.begin = source, begin
        self.rule: Rule = rule
        self.spec = Spec(source.spec.shape[:1], torch.int64)
        self.block, self.grain = block_of(source), max(self.spec.numel, 1) if source.grain > BLOCK else 1

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        columns, inner = self.source.spec.shape[1], _inner(self, scratch)
        first = start * columns // self.block
        before = self._counted(first * self.block, start * columns, 1, inner)
        total = self.begin[min(first, len(self.begin) - 1)] + int(before.sum())
        step = max(self.block // max(columns, 1), 1)
        made = torch.empty(stop - start, dtype=torch.int64)  # small tensors kept between large ones would leave holes
        for row in range(start, stop, step):
            last = min(row + step, stop)
            counts = self._counted(row * columns, last * columns, last - row, inner)
            made[row - start : last - start] = total + counts.cumsum(0) - counts
            total += int(counts.sum())
        return made

    def _counted(self, start: int, stop: int, rows: int, scratch: Scratch) -> Tensor:
        """How many are kept in each of so many equal parts of a run."""
        scratch.next_chunk()
        if start == stop:
            return torch.zeros(rows, dtype=torch.int64)
        return kept(read(self.source, start, stop, scratch), self.rule).view(rows, -1).sum(dim=1)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["row starts", self.rule, self.source.identity()]


class Sizes(Held):
    """The shape of a tensor as ``[axes]`` int64, or as a column ``[axes, 1]``."""

    def __init__(self, shape: tuple[int, ...], column: bool = False):
        sizes = torch.tensor(shape, dtype=torch.int64)
        super().__init__(sizes[:, None] if column else sizes)

    def identity(self) -> object:
        return ["sizes", str(self.spec), self.tensor.tolist()]  # equal in another process: a save can be resumed


# And back


def counts_of_bits(packed: Lazy, rows: Rows) -> Reduction:
    """How many bits are set in each block of `entries_of` entries, ``[blocks]`` int64, without what fills rows up."""
    block = rows.byte(entries_of(rows))
    function = partial(
        _set_bits,
        row=rows.bytes,
        last=0xFF >> (-rows.columns % 8),
        block=block,
        blocks=-(-packed.spec.numel // block),
    )
    return Reduction([Inputs([packed], "element")], partial(single, function, _same))


def entries_of(rows: Rows) -> int:
    """Entries of a block of bits."""
    return max(BLOCK // max(rows.grain, 1), 1) * max(rows.grain, 1)


def _set_bits(packed: Tensor, *, start: int, row: int, last: int, block: int, blocks: int) -> Tensor:
    ends = (-start - 1) % row  # of the first row that ends in here
    packed = packed.to(torch.uint8, copy=True)
    packed[ends::row] &= last
    return per_block(_set_in_bytes().to(packed.device)[packed.long()], start, block, blocks)


@functools.cache
def _set_in_bytes() -> Tensor:
    return torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


class Dense:
    """A tensor from its kept values and bits."""

    def __init__(self, values: Lazy, packed: Lazy, rows: Rows, shape: tuple[int, ...], begin: list[int]):
        self.values, self.packed, self.rows, self.begin = values, packed, rows, begin
        self.spec = Spec(shape, values.spec.dtype)
        self.grain = max(rows.grain, 1)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.spec.dtype)
        block = entries_of(self.rows)
        first = start // block * block
        ends = self.rows.byte(stop)
        mask = self.rows.unpack(read(self.packed, self.rows.byte(first), ends, scratch), stop - first)
        before, mask = int(mask[: start - first].count_nonzero()), mask[start - first :]
        begin = self.begin[start // block] + before
        found = as_integers(read(self.values, begin, begin + int(mask.count_nonzero()), scratch))
        if found.numel() != int(mask.count_nonzero()):
            raise FormatError("the bits speak of more values than there are; the file is damaged")
        made = found.new_zeros(stop - start)
        return made.masked_scatter_(mask.to(found.device), found).view(self.spec.dtype)

    def inputs(self) -> Iterable[Lazy]:
        return (self.values, self.packed)

    def identity(self) -> object:
        return ["dense", list(self.spec.shape), self.values.identity(), self.packed.identity()]
