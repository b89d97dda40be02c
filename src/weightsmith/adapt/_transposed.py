"""A matrix read the other way round, a few columns at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from weightsmith.weights import Lazy, Scratch, Spec, materialize


class Transposed:
    """The columns of a small matrix ``[rows, columns]`` as rows.

    So the factor of an adapter whose columns belong to the rows of a weight is cut where the weight is.
    """

    def __init__(self, source: Lazy):
        self.source = source
        rows, columns = source.spec.shape
        self.spec = Spec((columns, rows), source.spec.dtype)
        self.grain = max(rows, 1)
        self._whole: Tensor | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        columns, rows = self.spec.shape
        first, last = start // self.grain, -(-stop // self.grain)
        if self.source.grain > 1:  # its rows cannot be read in part
            part = self._kept()[:, first:last]
        else:
            runs = [self.source.read(row * columns + first, row * columns + last, scratch) for row in range(rows)]
            part = torch.stack(runs) if runs else torch.empty(0, last - first, dtype=self.spec.dtype)
        return part.T.reshape(-1)

    def _kept(self) -> Tensor:
        with self._lock:
            if self._whole is None:
                self._whole = materialize(self.source)
        return self._whole

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["transposed", self.source.identity()]

    def __reduce__(self) -> tuple[type[Transposed], tuple[Lazy]]:
        return Transposed, (self.source,)
