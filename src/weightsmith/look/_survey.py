"""One figure of every tensor, gathered in the background, in slices: norms of a checkpoint, changes of a pair."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from weightsmith.inspect import diff, summary
from weightsmith.look._jobs import Work
from weightsmith.weights import Weights

SLICE = 2**26
"""Bytes that are read before something more urgent may go first (or one tensor, if that is larger)."""

TENSORS = 128
"""Tensors of a slice at most."""


class Survey:
    """Rows that become more while it runs; who called it off can let it go on."""

    def __init__(self, names: Sequence[str], nbytes: Callable[[str], int], measure: Callable[[list[str]], list[Any]]):
        self.rows: list[Any] = []
        """``[index of the tensor, figures ...]``."""
        self.read = 0
        """Bytes so far."""
        self._slices = list(_slices(names, nbytes))
        self._measure = measure
        self.total = sum(size for _, size in self._slices)
        self._begun = 0  # slices that are done
        self._lock = threading.Lock()

    @property
    def whole(self) -> bool:
        """Whether nothing is left."""
        return self._begun == len(self._slices)

    def work(self) -> Work:
        """Goes on where it stopped."""
        while not self.whole:
            with self._lock:  # one that was called off may still be at its last slice
                if not self.whole:
                    names, size = self._slices[self._begun]
                    self.rows += self._measure(names)
                    self.read += size
                    self._begun += 1
            yield
        return b""


def norms(weights: Weights) -> Survey:
    """The norm of every tensor: ``[index, norm or None, non-finite values]``."""
    index = {name: place for place, name in enumerate(weights)}

    def measure(names: list[str]) -> list[Any]:
        found = summary(Weights({name: weights.node(name) for name in names}), stats=True, threads=threads())
        return [[index[t.name], t.stats and t.stats.norm, t.stats.nonfinite if t.stats else 0] for t in found.tensors]

    return Survey(list(weights), lambda name: weights.spec(name).nbytes, measure)


def changes(a: Weights, b: Weights) -> Survey:
    """What became of every tensor that both have: ``[index in a, status, aa, bb, ab, dd, largest, changed, count]``.

    The sums are those of `weightsmith.inspect.Sums`; zeros where the values cannot be set against each other.
    """
    index = {name: place for place, name in enumerate(a)}

    def measure(names: list[str]) -> list[Any]:
        one, other = (Weights({name: side.node(name) for name in names}) for side in (a, b))
        found = diff(one, other, threads=threads())
        return [[index[tensor.name], tensor.status, *_sums(tensor.sums)] for tensor in found.tensors]

    return Survey([name for name in a if name in b], lambda name: a.spec(name).nbytes + b.spec(name).nbytes, measure)


def _sums(found: Any) -> list[float]:
    if found is None:
        return [0] * 7
    return [found.aa, found.bb, found.ab, found.dd, found.largest, found.changed, found.count]


def threads() -> int:
    """Workers of one computation, as two may run side by side."""
    return max((os.cpu_count() or 1) // 2, 1)


def _slices(names: Sequence[str], nbytes: Callable[[str], int]) -> Iterator[tuple[list[str], int]]:
    chosen: list[str] = []
    size = 0
    for name in names:
        if chosen and (size + nbytes(name) > SLICE or len(chosen) == TENSORS):
            yield chosen, size
            chosen, size = [], 0
        chosen.append(name)
        size += nbytes(name)
    if chosen:
        yield chosen, size
