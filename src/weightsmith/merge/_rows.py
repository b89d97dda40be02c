"""Rows of tensors put together anew: copied, averaged, or zero.

Models with different vocabularies speak of the same tokens at different rows. A gather brings their
rows into one order while they are read; no tensor is ever held whole for it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.weights import UNIT, Inputs, Lazy, Reduction, Scratch, Spec, apply, promote, single, working_dtype

ZERO = -1
"""In place of a source: the row is zero."""
_MEAN = -2

Term = tuple[int, int]
"""A source and a row of it."""


@dataclass(frozen=True, eq=False)
class Order:
    """For every new row the old ones that it is the mean of: one is a copy, none is zero."""

    source: Tensor
    """``[rows]`` integers: which source, `ZERO`, or the mark of a mean."""
    row: Tensor
    """``[rows]`` integers: which row of it."""
    means: Mapping[int, tuple[Term, ...]] = field(default_factory=dict)
    """New row -> what it is the mean of."""

    @classmethod
    def of(cls, terms: Sequence[Sequence[Term]]) -> Order:
        """From the old rows of every new one."""
        marks = [(_MEAN, 0) if len(t) > 1 else t[0] if t else (ZERO, 0) for t in terms]
        source, row = torch.tensor(marks, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return cls(source, row.contiguous(), {at: tuple(t) for at, t in enumerate(terms) if len(t) > 1})

    def identity(self) -> object:
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.source, self.row):
            digest.update(bytes(part.contiguous().numpy()))
        return [digest.hexdigest(), [[at, *map(list, terms)] for at, terms in sorted(self.means.items())]]


class Rows:
    """A tensor whose slices along one axis are slices of others, in a new order.

    Means are taken in float32 or wider and rounded when they leave.

    Args:
        sources: tensors that are alike but for the length of ``axis``.
        order: where each slice comes from.
        dtype: of the result.
        axis: along which the slices lie.
    """

    BLOCK = UNIT
    """Elements that are read in one piece, also where not all of them are wanted."""

    def __init__(self, sources: Sequence[Lazy], order: Order, dtype: torch.dtype, axis: int = 0):
        self.sources, self.order, self.axis = tuple(sources), order, axis
        shape = self.sources[0].spec.shape
        self.count = len(order.row)
        self.spec = Spec((*shape[:axis], self.count, *shape[axis + 1 :]), dtype)
        self.inner = math.prod(shape[axis + 1 :])
        self.heights = [source.spec.shape[axis] for source in self.sources]
        # What can only be had in large pieces is asked for once.
        self.coarse = any(source.grain > max(self.inner, self.BLOCK) for source in self.sources)
        self.grain = max(self.spec.numel if self.coarse else self.inner, 1)
        dtypes = {source.spec.dtype for source in self.sources}
        copies = dtypes == {dtype} and not order.means
        self.working = dtype if copies else promote(*map(working_dtype, (dtype, *dtypes)))

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.working)
        own = scratch.kept.setdefault(("rows", id(self)), Scratch())
        own.kept = scratch.kept
        first, last = start // self.inner, stop // self.inner
        result: Tensor | None = None
        for places, values in self._pieces(first, last, own):
            if result is None:
                result = self._zeros(last - first, values, scratch)
            result[places] = values.to(result.dtype)
            own.next_chunk()
        if result is None:
            result = self._zeros(last - first, self._values(0, 0, self.inner, own), scratch)
            own.next_chunk()
        return result.view(-1)

    def _zeros(self, rows: int, like: Tensor, scratch: Scratch) -> Tensor:
        if like.device.type == "cpu":
            return scratch.take(rows * self.inner, self.working).view(rows, self.inner).zero_()
        return torch.zeros(rows, self.inner, dtype=self.working, device=like.device)

    def _pieces(self, first: int, last: int, scratch: Scratch) -> Iterator[tuple[Tensor | int, Tensor]]:
        """``(places from first on, [places, inner] values)``; what is zero is left out."""
        for outer in range(first // self.count, -(-last // self.count)):
            low, high = max(first - outer * self.count, 0), min(last - outer * self.count, self.count)
            shift = outer * self.count - first
            chosen, rows = self.order.source[low:high], self.order.row[low:high]
            for source, height in enumerate(self.heights):
                places = (chosen == source).nonzero().flatten()
                if len(places):
                    yield places + (low + shift), self._gathered(source, rows[places] + outer * height, scratch)
            for place in (chosen == _MEAN).nonzero().flatten().tolist():
                yield place + low + shift, self._mean(self.order.means[place + low], outer, scratch)

    def _gathered(self, source: int, rows: Tensor, scratch: Scratch) -> Tensor:
        """``[rows, inner]``: in one piece where they lie near to each other, else run by run."""
        least, most = int(rows.min()), int(rows.max()) + 1
        if (most - least) * self.inner <= self.BLOCK or self.coarse:
            block = self._values(source, least * self.inner, most * self.inner, scratch).view(-1, self.inner)
            return block[(rows - least).to(block.device)]
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        starts = torch.cat([breaks.new_zeros(1), breaks])
        ends = rows[torch.cat([breaks, breaks.new_tensor([len(rows)])]) - 1] + 1
        runs = zip((rows[starts] * self.inner).tolist(), (ends * self.inner).tolist(), strict=True)
        return torch.cat([self._values(source, start, stop, scratch) for start, stop in runs]).view(-1, self.inner)

    def _mean(self, terms: Sequence[Term], outer: int, scratch: Scratch) -> Tensor:
        total: Tensor | None = None
        for source, row in terms:
            start = (outer * self.heights[source] + row) * self.inner
            value = self._values(source, start, start + self.inner, scratch).to(self.working)
            total = value if total is None else total + value
        assert total is not None
        return total / len(terms)

    def _values(self, source: int, start: int, stop: int, scratch: Scratch) -> Tensor:
        """A run of a source, whatever it can be cut into."""
        node = self.sources[source]
        low = start // node.grain * node.grain
        high = min(-(-stop // node.grain) * node.grain, node.spec.numel)
        values = node.read(low, high, scratch)
        return values if (low, high) == (start, stop) else values[start - low : stop - low]

    def inputs(self) -> Iterable[Lazy]:
        return self.sources

    def identity(self) -> object:
        return ["rows", str(self.spec), self.axis, self.order.identity(), *(s.identity() for s in self.sources)]


def mean_slice(node: Lazy, axis: int) -> Lazy:
    """The mean of a tensor along an axis, which stays, with length 1."""
    count = node.spec.shape[axis]
    shape = (*node.spec.shape[:axis], 1, *node.spec.shape[axis + 1 :])
    spec = Spec(shape, working_dtype(node.spec.dtype))
    if axis:
        return apply(_mean_along, node, unit="row", spec=spec, options={"axis": axis})
    divide = functools.partial(_divided, count=count)
    reduction = Reduction([Inputs([node], "row")], functools.partial(single, _summed, divide), ["mean of rows", count])
    first = Rows([node], Order.of([[(0, 0)]]), node.spec.dtype)
    return apply(_told, first, unit="tensor", spec=spec, reduction=reduction)


def _mean_along(values: Tensor, *, axis: int) -> Tensor:
    return values.double().mean(axis, keepdim=True).to(values.dtype)


def _summed(rows: Tensor) -> Tensor:
    return rows.double().sum(0)


def _divided(total: Tensor, count: int) -> Tensor:
    return total / count


def _told(first: Tensor, *, solved: Tensor) -> Tensor:
    return solved.to(first.dtype).reshape(first.shape)
