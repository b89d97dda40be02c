"""Flat values in short blocks, each with a scale of its own: what states, messages and files are kept as.

One outlier spoils only its own block, and blocks need nothing of each other. A code is a byte or, with 4 bits and
fewer, half of one; beside it each block has one number in float32 (two where its smallest value is kept).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean
from weightsmith.quantize.codecs._codebooks import check_width, dynamic_codebook, linear_codebook

Rounding = Literal["nearest", "stochastic", "shifted"]
ROUNDINGS = ("nearest", "stochastic", "shifted")
BOOKS = ("dynamic", "linear", "uniform")

CHUNK = 2**18
"""Values that are worked on at once, so that what lies between input and codes stays in the cache."""


@dataclass(frozen=True)
class Blocks:
    """A tensor as codes.

    Attributes:
        codes: ``[n]`` uint8, or ``[ceil(n / 2)]`` with two codes a byte, the first of them in the lower half.
        scale: ``[blocks]`` float32: what the table's 1 stands for; of a uniform codec the step between two codes.
        offset: ``[blocks]`` float32, what code 0 of a uniform codec stands for; else None.
        shape: of the tensor.
        dtype: of the tensor.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What has to be kept or sent."""
        return (self.codes, self.scale) if self.offset is None else (self.codes, self.scale, self.offset)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class BlockCodec:
    """How values become codes and codes values.

    Attributes:
        codebook: ``"dynamic"`` (exponent of variable length), ``"linear"`` (evenly spaced around 0), ``"uniform"``
            (evenly spaced between a block's smallest and largest value) or the sorted values of a table between -1
            and 1, such as ``tuple(quantile_codebook(sample).tolist())``.
        bits: of a code, 2 to 8; 4 and fewer lie two to a byte.
        block: values that share a scale; None: all of them.
        signed: whether values below 0 occur. Where not, the tables named have none, and one bit more for the rest.
        rounding: ``"nearest"``; ``"stochastic"``: to one of the two neighbours, the nearer the likelier, right in the
            mean; ``"shifted"``: a uniform codec's points are moved by one random share of a step a call, then nearest:
            right in the mean too, and never off by more than half a step.

    >>> codec = BlockCodec(block=4)
    >>> blocks = codec.encode(torch.tensor([0.0, 1.0, -2.0, 4.0, 100.0]))
    >>> blocks.codes, blocks.scale
    (tensor([127, 201,  35, 255, 255], dtype=torch.uint8), tensor([  4., 100.]))
    >>> codec.decode(blocks)
    tensor([  0.0000,   0.9906,  -2.0031,   4.0000, 100.0000])
    """

    codebook: str | tuple[float, ...] = "dynamic"
    bits: int = 8
    block: int | None = 2048
    signed: bool = True
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_width(self.bits)
        if self.block is not None and (isinstance(self.block, bool) or self.block < 1):
            raise Error(f"a block has at least one value, got block={self.block!r}")
        if self.rounding not in ROUNDINGS:
            raise Error(f"rounding is one of {', '.join(ROUNDINGS)}; got {self.rounding!r}")
        if self.rounding == "shifted" and self.codebook != "uniform":
            raise Error("only the evenly spaced points of codebook='uniform' can be shifted; take 'stochastic'")
        if isinstance(self.codebook, str):
            if self.codebook not in BOOKS:
                hint = did_you_mean(self.codebook, BOOKS)
                raise Error(f"codebook is a table or one of {', '.join(BOOKS)}; got {self.codebook!r}{hint}")
        elif not _is_table(self.codebook, self.bits):
            raise Error(f"a table has 2 to {2**self.bits} finite values between -1 and 1, sorted; got {self.codebook}")

    def encode(self, values: Tensor, *, generator: torch.Generator | None = None, check: bool = True) -> Blocks:
        """Codes of a tensor's values, in the order of its flat view.

        Args:
            values: any shape, floating. bf16 and fp16 are worked on as float32; float64 is rounded to it.
            generator: for rounding at random; drawn from PyTorch's own where None.
            check: look for what cannot be coded first. Without it a device is not waited for, and a block that holds
                a NaN or an infinity decodes as NaN.

        Returns:
            Blocks: on the device of the values. About 3 MB is held beside input and output.

        Raises:
            Error: not floating; a NaN or an infinity; a value below 0 though not ``signed``; of a uniform codec a
                range that float32 does not hold.
        """
        if not values.is_floating_point():
            raise Error(f"a block codec needs floating values, got {values.dtype}")
        flat = values.detach().reshape(-1)
        low, high = _extremes(flat, self._length(flat))
        if check:
            self._check(low, high)
        if self.codebook == "uniform":
            return self._encode_uniform(flat, low, high, values, generator)
        scale = torch.maximum(high, -low) if self.signed else high.clamp(min=0)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        levels, finder = self._table(flat.device)
        codes = self._empty(len(flat), flat.device)
        divisor = torch.where(scale > 0, scale, 1)
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK].to(torch.float32, copy=True)
            chunk = _by_block(chunk, start, self._length(flat), divisor, Tensor.div_)
            _write(codes, start, _rounded(chunk, levels, finder, self.rounding, generator), self.bits)
        return Blocks(codes, scale, None, tuple(values.shape), values.dtype)

    def decode(self, blocks: Blocks, *, out: Tensor | None = None) -> Tensor:
        """The values that codes stand for.

        Args:
            blocks: made with the same codec.
            out: contiguous, of as many values; written to and returned. Default: a new tensor of the shape and dtype
                that was encoded.

        Returns:
            The values, computed in float32.

        Raises:
            Error: blocks of another codec, or an ``out`` that does not fit.
        """
        numel = math.prod(blocks.shape)
        if blocks.nbytes != self.nbytes(numel):
            raise Error(
                f"decode needs blocks of its own codec: {self} has {self.nbytes(numel):,} bytes for {numel:,} values, "
                f"these have {blocks.nbytes:,}"
            )
        if out is None:
            out = torch.empty(blocks.shape, dtype=blocks.dtype, device=blocks.codes.device)
        elif out.numel() != numel or not out.is_contiguous():
            raise Error(f"decode needs a contiguous out of {numel} values, got {list(out.shape)}")
        flat, length = out.view(-1), self.block or max(numel, 1)
        levels = None if self.codebook == "uniform" else self.levels(out.device)
        for start in range(0, numel, CHUNK):
            stop = min(start + CHUNK, numel)
            codes = _read(blocks.codes, start, stop, self.bits)
            points = codes.float() if levels is None else levels.index_select(0, codes.int())
            points = _by_block(points, start, length, blocks.scale, Tensor.mul_)
            if blocks.offset is not None:
                points = _by_block(points, start, length, blocks.offset, Tensor.add_)
            flat[start:stop] = points
        return out

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """The table, sorted, float32; not of ``"uniform"``, which has none."""
        if self.codebook == "uniform":
            raise Error("a uniform codec has no table: its points are offset + scale * code")
        return self._table(torch.device(device))[0]

    def nbytes(self, numel: int) -> int:
        """Bytes of codes, scales and offsets of that many values.

        >>> BlockCodec().nbytes(2**20), BlockCodec(bits=4, block=64).nbytes(2**20)
        (1050624, 589824)
        """
        blocks = -(-numel // self.block) if self.block else min(numel, 1)
        return (numel if self.bits > 4 else -(-numel // 2)) + blocks * (8 if self.codebook == "uniform" else 4)

    def _table(self, device: torch.device) -> tuple[Tensor, _Finder]:
        return _table(self.codebook, self.bits, self.signed, self.rounding, device)

    def _encode_uniform(
        self, flat: Tensor, low: Tensor, high: Tensor, values: Tensor, generator: torch.Generator | None
    ) -> Blocks:
        most = 2**self.bits - 1
        scale = ((high - low) / most).nan_to_num(torch.nan, torch.nan, torch.nan)
        length = self._length(flat)
        divisor = torch.where(scale > 0, scale, 1)
        share = torch.full((), 0.5, device=flat.device)
        if self.rounding == "shifted":
            share = _uniform((), flat.device, generator)
        codes = self._empty(len(flat), flat.device)
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK].to(torch.float32, copy=True)
            chunk = _by_block(chunk, start, length, low, Tensor.sub_)
            chunk = _by_block(chunk, start, length, divisor, Tensor.div_)
            chunk += _uniform(chunk.shape, flat.device, generator) if self.rounding == "stochastic" else share
            _write(codes, start, chunk.nan_to_num_(0).floor_().clamp_(0, most).to(torch.uint8), self.bits)
        # A code stands for the middle of what is rounded to it; that of all blocks is moved by the same share.
        offset = low + scale * (0.5 - share) if self.rounding == "shifted" else low
        return Blocks(codes, scale, offset, tuple(values.shape), values.dtype)

    def _check(self, low: Tensor, high: Tensor) -> None:
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise Error("a block codec needs finite values, got a NaN or an infinity")
        if self.codebook == "uniform" and not bool((high - low).isfinite().all()):
            raise Error(f"values that reach from {float(low.min()):g} to {float(high.max()):g} need another codebook")
        if not self.signed and self.codebook != "uniform" and bool((low < 0).any()):
            raise Error(f"a codec that is not signed needs values of at least 0, got {float(low.min()):g}")

    def _length(self, flat: Tensor) -> int:
        return self.block or max(len(flat), 1)

    def _empty(self, numel: int, device: torch.device) -> Tensor:
        return torch.empty(numel if self.bits > 4 else -(-numel // 2), dtype=torch.uint8, device=device)


def _is_table(values: tuple[float, ...], bits: int) -> bool:
    inside = all(isinstance(value, int | float) and -1 <= value <= 1 for value in values)
    return inside and 2 <= len(values) <= 2**bits and list(values) == sorted(values)


@functools.lru_cache(maxsize=32)
def _table(
    codebook: str | tuple[float, ...], bits: int, signed: bool, rounding: str, device: torch.device
) -> tuple[Tensor, _Finder]:
    """The sorted values, and what finds a value's place among them or, for rounding to nearest, their midpoints."""
    if not isinstance(codebook, str):
        levels = torch.tensor(codebook, dtype=torch.float32)
    else:
        make = {"dynamic": dynamic_codebook, "linear": linear_codebook}[codebook]
        levels = make(bits, signed=signed)
    levels = levels.to(device)
    return levels, _Finder((levels[1:] + levels[:-1]) / 2 if rounding == "nearest" else levels)


def _extremes(flat: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each block, float32."""
    whole = len(flat) // length * length
    parts = [flat[:whole].view(-1, length).aminmax(dim=1)] if whole else []
    if whole < len(flat):
        parts.append(flat[whole:].view(1, -1).aminmax(dim=1))
    if not parts:
        return flat.float(), flat.float()
    low, high = (torch.cat([part[side] for part in parts]).float() for side in (0, 1))
    return low, high


def _by_block(
    values: Tensor, start: int, length: int, of_block: Tensor, act: Callable[[Tensor, Tensor], Any]
) -> Tensor:
    """A run of flat values, each with its block's number applied, in place; it may begin and end inside a block."""
    block, inside = divmod(start, length)
    head = min(length - inside, len(values)) if inside else 0
    whole = (len(values) - head) // length
    first, tail = block + (inside > 0), head + whole * length
    if head:
        act(values[:head], of_block[block])
    if whole:
        act(values[head:tail].view(whole, length), of_block[first : first + whole, None])
    if tail < len(values):
        act(values[tail:], of_block[first + whole])
    return values


def _rounded(
    values: Tensor, levels: Tensor, finder: _Finder, rounding: str, generator: torch.Generator | None
) -> Tensor:
    """Places of values in a sorted table; of two that are equally near the lower. Of a NaN any place."""
    if rounding == "nearest":
        return finder(values)
    upper = finder(values).int().clamp_(1, len(levels) - 1)
    below, above = levels.index_select(0, upper - 1), levels.index_select(0, upper)
    share = (values - below) / (above - below).clamp_(min=torch.finfo(torch.float32).tiny)
    up = _uniform(values.shape, values.device, generator) < share
    return (upper - 1 + up).to(torch.uint8)


class _Finder:
    """How many of some sorted marks lie below a value, by the value's first 16 bits.

    Numbers that share these bits lie so near each other that at most one mark is between them: one comparison is left.
    17 times as fast as a binary search. A table with closer marks is searched.
    """

    def __init__(self, marks: Tensor):
        self.marks = marks
        first = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        ends = [bits.view(torch.float32).nan_to_num(0, 0, 0) for bits in (first, first | 0xFFFF)]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        known = marks.cpu()
        below, most = (torch.bucketize(end, known, out_int32=True) for end in (low, high))
        beyond = torch.cat([known, torch.tensor([torch.inf])])
        self.below = below.to(torch.uint8).to(marks.device) if bool((most - below <= 1).all()) else None
        self.next = beyond[below.long()].to(marks.device)

    def __call__(self, values: Tensor) -> Tensor:
        if self.below is None:
            return torch.bucketize(values, self.marks, out_int32=True).to(torch.uint8)
        place = (values.view(torch.int32) >> 16).add_(2**15)
        return self.below.index_select(0, place).add_(values > self.next.index_select(0, place))


def _uniform(shape: torch.Size | tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    place = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=place).to(device)


def _write(codes: Tensor, start: int, found: Tensor, bits: int) -> None:
    if bits > 4:
        codes[start : start + len(found)] = found
        return
    part = codes[start // 2 : start // 2 + -(-len(found) // 2)]
    part.copy_(found[0::2])
    part[: len(found) // 2] |= found[1::2] << 4


def _read(codes: Tensor, start: int, stop: int, bits: int) -> Tensor:
    if bits > 4:
        return codes[start:stop]
    part = codes[start // 2 : -(-stop // 2)]
    return torch.stack([part & 15, part >> 4], dim=1).view(-1)[: stop - start]
