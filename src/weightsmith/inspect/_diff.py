"""How far two checkpoints are apart, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.errors import Error, listed
from weightsmith.inspect._parts import short
from weightsmith.inspect._plain import layer_of, plain
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._statistics import is_countable, streamed
from weightsmith.weights import Lazy, Pattern, Weights

Status = Literal["same", "changed", "dtype", "shape", "only in a", "only in b"]


@dataclass(frozen=True)
class Sums:
    """What two tensors (or parts, or many of them) say of each other; can be added up.

    Products are of the elements that are finite on both sides.
    """

    count: int = 0
    changed: int = 0
    """Elements of another value (NaN equals NaN, -0 equals 0)."""
    bits: int = 0
    """Elements of other bits; of other values where the dtypes differ."""
    nonfinite: int = 0
    """Elements that are not finite on one side or both."""
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    """Sum of squared differences."""
    largest: float = 0.0
    """Largest absolute difference."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.changed + other.changed,
            self.bits + other.bits,
            self.nonfinite + other.nonfinite,
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
            self.dd + other.dd,
            max(self.largest, other.largest),
        )

    @property
    def distance(self) -> float:
        """``||a - b|| / ||a||``; infinite where only ``a`` is zero."""
        if self.dd == 0:
            return 0.0
        return math.sqrt(self.dd) / math.sqrt(self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between ``a`` and ``b``; None where one of them is zero."""
        scale = math.sqrt(self.aa) * math.sqrt(self.bb)
        return max(-1.0, min(1.0, self.ab / scale)) if scale else None

    @property
    def share(self) -> float:
        """Share of the elements that have another value."""
        return self.changed / self.count if self.count else 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "distance": self.distance,
            "cosine": self.cosine,
            "largest": self.largest,
            "changed": self.share,
            "nonfinite": self.nonfinite,
        }


@dataclass(frozen=True)
class TensorDiff:
    """One name. ``sums`` is None where the values cannot be set against each other."""

    name: str
    status: Status
    """What differs first: presence, shape, dtype, or the bits of the values."""
    a: str | None
    """dtype and shape in the first, as in ``float32[2, 3]``."""
    b: str | None
    sums: Sums | None = None


@dataclass(frozen=True)
class LayerDiff:
    """The tensors of a layer that both have, together."""

    name: str
    tensors: int
    different: int
    sums: Sums


@dataclass(frozen=True)
class Diff:
    """What `diff` found: the names of the first in their order, then those only the second has."""

    tensors: tuple[TensorDiff, ...]
    overall: Sums

    @property
    def same(self) -> bool:
        """Same names, shapes, dtypes and bits."""
        return all(tensor.status == "same" for tensor in self.tensors)

    def counts(self) -> dict[str, int]:
        """Tensors by status; statuses that do not occur are left out."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.status] = found.get(tensor.status, 0) + 1
        return found

    def layers(self) -> list[LayerDiff]:
        """The comparable tensors added up by layer."""
        groups: dict[str, list[TensorDiff]] = {}
        for tensor in self.tensors:
            if tensor.sums is not None:
                groups.setdefault(layer_of(tensor.name), []).append(tensor)
        return [
            LayerDiff(
                name,
                len(tensors),
                sum(tensor.status != "same" for tensor in tensors),
                sum((tensor.sums for tensor in tensors if tensor.sums), Sums()),
            )
            for name, tensors in groups.items()
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a name; the figures where both sides can be compared."""
        return [_row(tensor) for tensor in self.tensors]

    def to_json(self) -> dict[str, Any]:
        """Everything as data that JSON can hold."""
        return {
            "same": self.same,
            "counts": self.counts(),
            "overall": plain(self.overall.figures()),
            "tensors": self.rows(),
        }

    def report(self) -> Report:
        """How far the two are apart overall, a row a tensor, and the distances by layer."""
        layers = self.layers()
        names = short([layer.name for layer in layers])
        distances = Line("distance", names, [layer.sums.distance for layer in layers], style="bars")
        shares = Line("share of values", names, [layer.sums.share for layer in layers], style="bars")
        empty = dict.fromkeys(Sums().figures())
        return Report(
            "How far two checkpoints are apart",
            figures={
                "same": self.same,
                **{f"tensors {status}": count for status, count in self.counts().items()},
                **self.overall.figures(),
            },
            table=[{**_row(tensor), **(tensor.sums.figures() if tensor.sums else empty)} for tensor in self.tensors],
            plots=[
                Plot("Distance by layer", "layer", "||a - b|| / ||a||", [distances]),
                Plot("Values that changed, by layer", "layer", "share", [shares]),
            ]
            if layers
            else (),
            notes=[
                "A tensor is the same when its bits are; distance and cosine are of the values finite on both sides."
            ],
        )


def diff(a: Weights, b: Weights, pattern: Pattern = "*", threads: int | None = None) -> Diff:
    """Compare two checkpoints by name, in one streamed reading of both.

    Args:
        a: the one that distances are relative to.
        b: the other. Shapes and dtypes may differ; such tensors are reported as different.
        pattern: only these names.
        threads: workers; default one a core.

    Raises:
        Error: the pattern fits no name on either side.

    >>> a = Weights.of({"w": torch.tensor([3.0, 4.0])})
    >>> found = diff(a, Weights.of({"w": torch.tensor([3.0, 3.0])}))
    >>> found.same, found.tensors[0].sums.distance, found.tensors[0].sums.share
    (False, 0.2, 0.5)
    """
    first, second = a.names(pattern), b.names(pattern)
    if not first and not second and (len(a) or len(b)):
        raise Error(f"no tensor of either side fits {pattern!r}; the first has {listed(a)}")
    pairs = [(a.node(n), b.node(n)) for n in first if n in b and a.spec(n).shape == b.spec(n).shape]
    sums = _compared(pairs, threads)
    tensors = [_tensor(name, a, b, sums) for name in first]
    tensors += [TensorDiff(name, "only in b", None, str(b.spec(name))) for name in second if name not in a]
    return Diff(tuple(tensors), sum((found for found in sums.values() if found), Sums()))


Pair = tuple[int, int]


def _compared(pairs: Sequence[tuple[Lazy, Lazy]], threads: int | None) -> dict[Pair, Sums | None]:
    """The sums of every pair, each pair of tied names once; None where values are no numbers."""
    distinct = {(id(one), id(other)): (one, other) for one, other in pairs}
    possible = {key: pair for key, pair in distinct.items() if _comparable(*pair)}
    found = streamed(compare, list(possible.values()), "comparing", threads)
    sums = {key: one or Sums() for key, one in zip(possible, found, strict=True)}
    return {key: sums.get(key) for key in distinct}


def _comparable(one: Lazy, other: Lazy) -> bool:
    alike = one.spec.dtype == other.spec.dtype
    return alike or (is_countable(one.spec.dtype) and is_countable(other.spec.dtype))


def _tensor(name: str, a: Weights, b: Weights, sums: dict[Pair, Sums | None]) -> TensorDiff:
    own = str(a.spec(name))
    if name not in b:
        return TensorDiff(name, "only in a", own, None)
    other = str(b.spec(name))
    if a.spec(name).shape != b.spec(name).shape:
        return TensorDiff(name, "shape", own, other)
    found = sums[id(a.node(name)), id(b.node(name))]
    if a.spec(name).dtype != b.spec(name).dtype:
        return TensorDiff(name, "dtype", own, other, found)
    return TensorDiff(name, "changed" if found is None or found.bits else "same", own, other, found)


def compare(a: Tensor, b: Tensor) -> Sums:
    """The sums of two chunks of one shape, in float64."""
    bits = _other_bits(a, b)
    if not is_countable(a.dtype):  # packed: only the bits can be told apart
        return Sums(count=a.numel(), changed=bits, bits=bits)
    complex = a.is_complex() or b.is_complex()
    x, y = _numbers(a, complex), _numbers(b, complex)
    aa, bb = float(x.dot(x)), float(y.dot(y))
    nonfinite, other = 0, None
    if not math.isfinite(aa + bb):  # seldom: only then look at every element
        finite = x.isfinite() & y.isfinite()
        other = (x != y) & ~(x.isnan() & y.isnan())
        nonfinite = _elements(~finite, complex)
        x, y = x[finite], y[finite]
        aa, bb = float(x.dot(x)), float(y.dot(y))
    apart = x - y
    changed = _elements(apart != 0 if other is None else other, complex)
    return Sums(
        count=a.numel(),
        changed=changed,
        bits=changed if a.dtype != b.dtype else bits,
        nonfinite=nonfinite,
        aa=aa,
        bb=bb,
        ab=float(x.dot(y)),
        dd=float(apart.dot(apart)),
        largest=max(map(abs, map(float, apart.aminmax()))) if apart.numel() else 0.0,
    )


def _elements(chosen: Tensor, complex: bool) -> int:
    """How many elements are chosen; a complex one is two numbers, either of which counts."""
    return int((chosen.view(-1, 2).any(1) if complex else chosen).count_nonzero())


def _numbers(values: Tensor, complex: bool) -> Tensor:
    return torch.view_as_real(values.to(torch.complex128)).reshape(-1) if complex else values.double().reshape(-1)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _other_bits(a: Tensor, b: Tensor) -> int:
    """Elements whose bits differ; 0 where the dtypes do."""
    if a.dtype != b.dtype:
        return 0
    size = a.dtype.itemsize
    word = _WORDS.get(size, torch.int64)
    apart = a.contiguous().view(word) != b.contiguous().view(word)
    return int((apart.view(-1, size // 8).any(1) if size > 8 else apart).sum())


def _row(tensor: TensorDiff) -> dict[str, Any]:
    row: dict[str, Any] = {"name": tensor.name, "status": tensor.status, "a": tensor.a, "b": tensor.b}
    return row | (plain(tensor.sums.figures()) if tensor.sums is not None else {})
