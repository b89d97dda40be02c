"""Floats in fewer bytes, equal to the bit: the exponents in codes of unequal length, the rest as it is.

The exponents of a trained tensor take some two and a half bits of their eight, so bfloat16 shrinks to about two thirds.
Nothing is rounded: NaN with what they carry, infinities, negative zero and the smallest numbers come back as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import FormatError
from weightsmith.share._huffman import LANE, WIDEST, Code, code_lengths, code_of, coded, counted, decoded, lane_bytes
from weightsmith.share._planes import planes, together
from weightsmith.weights import Held, Lazy, Scratch, Spec, Weights, dtype_name
from weightsmith.weights._execute import Call, Job, run, solving, working_set
from weightsmith.weights._lazy import UNIT, convert

ENDINGS = ("_stream", "_rest", "_sizes", "_table", "_shape")
"""The tensors that stand for one."""

_NAMES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
DTYPES = tuple(getattr(torch, name) for name in _NAMES.split() if hasattr(torch, name))
"""What can be coded."""

RUN = 64 * LANE
"""Values that are worked on together: a bound on memory, not on results."""

WORTH = 0.02
"""Share of a plane that coding must save, or it is kept as it is: a plane of mantissas is read faster so."""

_HEADER = 600
"""Bytes that the names of five tensors take in the header of a file."""

_MOST_AXES = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """How the planes of a tensor are kept: each one coded, as it is, or told once because it is one value all over."""

    table: Tensor
    """``[planes, 256]`` uint8, code lengths: eight everywhere for a plane as it is, a single one for one value."""
    numel: int
    codes: dict[int, Code]
    """Plane -> code, of those that are coded."""
    raw: tuple[int, ...]
    """Planes that are kept as they are."""
    fixed: dict[int, int]
    """Plane -> the byte that it is all over."""

    @property
    def lanes(self) -> int:
        """Lanes of a coded plane."""
        return -(-self.numel // LANE)


def layout_of(table: Tensor, numel: int) -> Layout:
    """What a table ``[planes, 256]`` uint8 says, which may lie."""
    codes, raw, fixed = {}, [], {}
    for index, row in enumerate(table):
        used = row.nonzero()[:, 0]
        if len(used) == 1:
            fixed[index] = int(used[0])
        elif (row == 8).all():
            raw.append(index)
        else:
            codes[index] = code_of(row.contiguous().numpy().tobytes())
    return Layout(table, numel, codes, tuple(raw), fixed)


def packed_table(table: Tensor) -> Tensor:
    """Code lengths ``[planes, 256]`` as ``[planes, 128]``: two a byte, the first lower.

    >>> packed_table(torch.tensor([[1, 12, 8, 0]], dtype=torch.uint8)).tolist()
    [[193, 8]]
    """
    return table[:, ::2] | table[:, 1::2] << 4


def unpacked_table(table: Tensor) -> Tensor:
    """The inverse of `packed_table`."""
    return torch.stack([table & 15, table >> 4], dim=2).flatten(1)


def read(node: Lazy, start: int, stop: int, scratch: Scratch) -> Tensor:
    """Any run of a node, in the dtype that it promises."""
    first = start // node.grain * node.grain
    last = min(-(-stop // node.grain) * node.grain, node.spec.numel)
    return convert(node.read(first, last, scratch), node.spec.dtype)[start - first : stop - first]


def readable(node: Lazy, scratch: Scratch) -> Callable[[int, int], Tensor]:
    """What reads any run of a node; one that is made in one piece is made once for all runs."""
    if node.grain <= UNIT:
        return partial(read, node, scratch=scratch)
    whole = read(node, 0, node.spec.numel, scratch)
    return lambda start, stop: whole[start:stop]


def runs(start: int, stop: int, step: int) -> Iterable[tuple[int, int]]:
    """Consecutive runs, cut at multiples of ``step``."""
    while start < stop:
        upto = min((start // step + 1) * step, stop)
        yield start, upto
        start = upto


# There


@dataclass(eq=False)
class Plan:
    """A tensor that is looked at: what codes suit it, and how long each lane of them is."""

    source: Lazy
    layout: Layout | None = None
    sizes: Tensor | None = None
    """``[coded planes, lanes]`` int64."""

    def job(self, under_way: dict[int, Any]) -> Job:
        """Reads the tensor twice, in pieces: for how often what occurs, and for how long that makes the lanes."""
        yield from solving([self.source], under_way)
        numel, grain = self.source.spec.numel, self.source.grain
        pieces = list(runs(0, numel, numel if grain > UNIT else UNIT))
        cost = working_set(self.source) + 4 * RUN
        found = yield [Call(partial(_counts, self.source, *piece), cost) for piece in pieces]
        self.layout = layout = layout_of(_table(torch.stack(found).sum(dim=0), numel), numel)
        codes = layout.codes
        lengths = (yield [Call(partial(_lanes, self.source, codes, *p), cost) for p in pieces]) if codes else []
        self.sizes = torch.cat(lengths, dim=1) if lengths else torch.zeros(0, layout.lanes, dtype=torch.int64)

    def parts(self) -> dict[str, Lazy]:
        """The tensors that stand for this one, by their endings."""
        assert self.layout is not None
        assert self.sizes is not None
        return {
            "_stream": Stream(self.source, self.layout, self.sizes),
            "_rest": Rest(self.source, self.layout),
            "_sizes": Noted(self.sizes.to(torch.int16)),
            "_table": Noted(packed_table(self.layout.table)),
            "_shape": Noted(torch.tensor(self.source.spec.shape, dtype=torch.int64)),
        }


def planned(sources: Iterable[Lazy], threads: int | None) -> list[Plan]:
    """Plans of tensors, made side by side."""
    plans, under_way = [Plan(source) for source in sources], {}
    run((plan.job(under_way) for plan in plans), threads)
    return plans


def pays(parts: dict[str, Lazy], source: Lazy) -> bool:
    """Whether the parts take less than the tensor."""
    return sum(part.spec.nbytes for part in parts.values()) + _HEADER < source.spec.nbytes


def _each(source: Lazy, start: int, stop: int, scratch: Scratch, found: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What a function finds in the planes of each run of a piece."""
    made = []
    inner = scratch.kept.setdefault((id(source), "planes"), Scratch())
    for first, last in runs(start, stop, source.spec.numel if source.grain > UNIT else RUN):
        inner.next_chunk()
        made.append(found(planes(read(source, first, last, inner))))
    return made


def _counts(source: Lazy, start: int, stop: int, scratch: Scratch) -> Tensor:
    """``[planes, 256]``: how often each byte occurs in each plane."""
    found = _each(source, start, stop, scratch, lambda bytes_: torch.stack([counted(plane) for plane in bytes_]).cpu())
    return torch.stack(found).sum(dim=0)


def _lanes(source: Lazy, codes: dict[int, Code], start: int, stop: int, scratch: Scratch) -> Tensor:
    """``[coded planes, lanes of the piece]``: their bytes."""

    def found(bytes_: Tensor) -> Tensor:
        return torch.stack([lane_bytes(bytes_[index], code) for index, code in codes.items()]).cpu()

    return torch.cat(_each(source, start, stop, scratch, found), dim=1)


def _table(counts: Tensor, numel: int) -> Tensor:
    rows = []
    for own in counts.tolist():
        lengths = code_lengths(own)
        bits = sum(count * length for count, length in zip(own, lengths, strict=True))
        takes = bits / 8 + 3 * (numel / LANE) + 256
        raw = sum(count > 0 for count in own) > 1 and takes > (1 - WORTH) * numel
        rows.append([8] * 256 if raw else lengths)
    return torch.tensor(rows, dtype=torch.uint8)


def _starts(sizes: Tensor) -> Tensor:
    """Where each lane of a stream begins, with the end: ``[lanes of all planes + 1]``."""
    return torch.nn.functional.pad(sizes.reshape(-1).cumsum(0), (1, 0))


class Noted(Held):
    """A small tensor, known by its values: a save can be resumed in another process."""

    def identity(self) -> object:
        return ["noted", str(self.spec), hashlib.blake2b(self.tensor.contiguous().numpy().tobytes()).hexdigest()]


class Stream:
    """The codes of a tensor: its planes one after the other, each lane by lane."""

    def __init__(self, source: Lazy, layout: Layout, sizes: Tensor):
        self.source, self.layout = source, layout
        self.begin = _starts(sizes)
        self.spec = Spec((int(self.begin[-1]),), torch.uint8)
        self.grain = max(self.spec.numel, 1) if source.grain > UNIT else 1

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        inner, made = scratch.kept.setdefault((id(self), "runs"), Scratch()), []
        first = int(torch.searchsorted(self.begin, start, right=True)) - 1
        last = int(torch.searchsorted(self.begin, stop))
        lanes, indices = self.layout.lanes, list(self.layout.codes)
        for one, upto in runs(first, last, lanes):  # the lanes of one plane
            index = indices[one // lanes]
            step = lanes if self.grain > 1 else RUN // LANE  # in one piece where the source is made in one
            for here, end in runs(one % lanes, one % lanes + upto - one, step):
                inner.next_chunk()
                values = read(self.source, here * LANE, min(end * LANE, self.layout.numel), inner)
                begin = self.begin[one // lanes * lanes + here : one // lanes * lanes + end + 1]
                made.append(coded(planes(values)[index], begin - begin[0], self.layout.codes[index]))
        found = made[0] if len(made) == 1 else torch.cat(made)
        skipped = start - int(self.begin[first])
        return found[skipped : skipped + stop - start]

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["codes", str(self.spec), self.source.identity()]


class Rest:
    """The planes that are kept as they are, one after the other."""

    def __init__(self, source: Lazy, layout: Layout):
        self.source, self.layout = source, layout
        self.spec = Spec((len(layout.raw) * layout.numel,), torch.uint8)
        self.grain = max(self.spec.numel, 1) if source.grain > UNIT else 1

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        inner, made = scratch.kept.setdefault((id(self), "runs"), Scratch()), []
        if self.grain > 1:
            return planes(read(self.source, 0, self.layout.numel, inner))[list(self.layout.raw)].flatten()
        for first, last in runs(start, stop, self.layout.numel):
            plane, place = divmod(first, self.layout.numel)
            for here, end in runs(place, place + last - first, RUN):
                inner.next_chunk()
                made.append(planes(read(self.source, here, end, inner))[self.layout.raw[plane]])
        if not made:
            return torch.empty(0, dtype=torch.uint8)
        return made[0] if len(made) == 1 else torch.cat(made)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["planes", str(self.spec), list(self.layout.raw), self.source.identity()]


# And back


class Floats:
    """A tensor from its codes and the rest."""

    def __init__(self, stream: Lazy, rest: Lazy, layout: Layout, begin: Tensor, spec: Spec):
        self.stream, self.rest, self.layout, self.begin, self.spec = stream, rest, layout, begin, spec
        self.grain = max(spec.numel, 1) if max(stream.grain, rest.grain) > UNIT else 1

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        inner, made = scratch.kept.setdefault((id(self), "runs"), Scratch()), []
        for first, last in runs(start, stop, self.layout.numel if self.grain > 1 else RUN):
            inner.next_chunk()
            made.append(self._run(first, last, inner))
        if not made:
            return torch.empty(0, dtype=self.spec.dtype)
        return made[0] if len(made) == 1 else torch.cat(made)

    def _run(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        layout, numel = self.layout, self.layout.numel
        found: dict[int, Tensor] = {}
        first, end = start // LANE, -(-stop // LANE)
        stream_of, rest_of = readable(self.stream, scratch), readable(self.rest, scratch)
        for place, (index, code) in enumerate(layout.codes.items()):
            begin = self.begin[place * layout.lanes + first : place * layout.lanes + end + 1]
            stream = stream_of(int(begin[0]), int(begin[-1]))
            count = min(end * LANE, numel) - first * LANE
            symbols = decoded(stream, begin - begin[0], count, code)
            found[index] = symbols[start - first * LANE : stop - first * LANE]
        for place, index in enumerate(layout.raw):
            found[index] = rest_of(place * numel + start, place * numel + stop)
        device = next((plane.device for plane in found.values()), torch.device("cpu"))
        for index, value in layout.fixed.items():
            found[index] = torch.full((stop - start,), value, dtype=torch.uint8, device=device)
        return together(torch.stack([found[index] for index in range(len(layout.table))]), self.spec.dtype)

    def inputs(self) -> Iterable[Lazy]:
        return (self.stream, self.rest)

    def identity(self) -> object:
        table = hashlib.blake2b(self.layout.table.numpy().tobytes()).hexdigest()
        return ["floats", str(self.spec), table, self.stream.identity(), self.rest.identity()]


def floats(weights: Weights, name: str, dtype: torch.dtype) -> Floats:
    """The node of a tensor from the five that stand for it, which may lie."""
    if dtype not in DTYPES:
        raise FormatError(f"{name}: codes are of floats, not of {dtype_name(dtype)}")
    shape = shape_of(weights, f"{name}_shape")
    spec = Spec(shape, dtype)
    table = _small(weights, f"{name}_table", (dtype.itemsize, 128), torch.uint8)
    layout = layout_of(unpacked_table(table), spec.numel)
    sizes = _small(weights, f"{name}_sizes", (len(layout.codes), layout.lanes), torch.int16).long()
    begin = _starts(sizes)
    stream, rest = weights.node(f"{name}_stream"), weights.node(f"{name}_rest")
    if sizes.numel() and not 0 <= int(sizes.min()) <= int(sizes.max()) <= WIDEST:
        raise FormatError(f"{name}_sizes: a lane takes from 0 to {WIDEST} bytes; the file is damaged")
    if stream.spec != Spec((int(begin[-1]),), torch.uint8):
        raise FormatError(f"{name}_stream is {stream.spec}, and its lanes speak of {int(begin[-1]):,} bytes")
    if rest.spec != Spec((len(layout.raw) * spec.numel,), torch.uint8):
        raise FormatError(f"{name}_rest is {rest.spec}, not {len(layout.raw)} planes of {spec.numel:,} bytes")
    return Floats(stream, rest, layout, begin, spec)


def shape_of(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape that a tensor of sizes says, which may lie."""
    spec = weights.spec(name)
    if len(spec.shape) != 1 or spec.numel > _MOST_AXES or spec.dtype != torch.int64:
        raise FormatError(f"{name} is {spec}, not the sizes of a tensor's axes")
    shape = tuple(weights[name].tolist())
    numel = 1
    for size in shape:
        numel *= size
        if size < 0 or numel >= 2**62:
            raise FormatError(f"{name} says {list(shape)}: no tensor has that shape")
    return shape


def _small(weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if weights.spec(name) != Spec(shape, dtype):
        raise FormatError(f"{name} is {weights.spec(name)}, not {Spec(shape, dtype)}")
    return weights[name].cpu()
