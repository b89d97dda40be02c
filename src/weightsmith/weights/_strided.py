"""Tensors whose values do not lie one after another in the file: transposed, sliced or expanded ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.weights._files import Bytes
from weightsmith.weights._lazy import Lazy, Scratch, Stored, as_buffer
from weightsmith.weights._spec import Spec


def strided(file: Bytes, offset: int, spec: Spec, stride: tuple[int, ...]) -> Lazy:
    """A node for values at an offset, ``stride`` elements apart along each axis."""
    expected = 1
    for length, step in zip(reversed(spec.shape), reversed(stride), strict=True):
        if length != 1:
            if step != expected and spec.numel:
                return Strided(file, offset, spec, stride)
            expected *= length
    return Stored(file, offset, spec)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype of each width whose values can be gathered: not all of the narrow ones can."""


class Strided:
    """Values with gaps, repetitions or another order of axes: a transposed, sliced or expanded tensor.

    Rows (indices of the first axis) are read one by one where each is a short run of the file. Where
    a row is scattered over the tensor, as in a transposed matrix, the tensor is read whole: row by
    row it would be read as often as it has rows.
    """

    SCATTERED = 4
    """A row is scattered when the run that holds it is this many times as long."""
    RUN = 2**18
    """Elements read at once of a tensor whose rows are far apart."""

    def __init__(self, file: Bytes, offset: int, spec: Spec, stride: tuple[int, ...]):
        self.file, self.offset, self.spec, self.stride = file, offset, spec, stride
        row = spec.numel // spec.shape[0]
        self.by_row = _span(spec.shape[1:], stride[1:]) <= self.SCATTERED * row
        self.grain = row if self.by_row else spec.numel

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.spec.dtype)
        row = self.spec.numel // self.spec.shape[0]
        first, last = start // row, -(-stop // row)
        shape = (last - first, *self.spec.shape[1:])
        if not self.by_row or _span(shape, self.stride) <= self.SCATTERED * (stop - start):
            return self._run(first, shape).reshape(-1).view(self.spec.dtype)
        # Rows far apart are read some at a time, so that the gaps between them need not fit in memory.
        values = scratch.take(stop - start, self.spec.dtype).view(_BITS[self.spec.dtype.itemsize]).view(shape)
        step = max(self.RUN // self.stride[0], 1)
        for index in range(0, last - first, step):
            some = min(step, last - first - index)
            values[index : index + some] = self._run(first + index, (some, *self.spec.shape[1:]))
        return values.view(-1).view(self.spec.dtype)

    def _run(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """Rows from ``first`` on, as a view of the shortest run of the file that holds them."""
        itemsize = self.spec.dtype.itemsize
        run = torch.empty(_span(shape, self.stride), dtype=_BITS[itemsize])
        self.file.read_into(self.offset + first * self.stride[0] * itemsize, as_buffer(run))
        return run.as_strided(shape, self.stride)

    def inputs(self) -> tuple[Lazy, ...]:
        return ()

    def identity(self) -> object:
        return [self.file.identity(), self.offset, str(self.spec), list(self.stride)]


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first value to the last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
