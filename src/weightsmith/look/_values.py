"""What is drawn of one tensor: a histogram, singular values, a small picture. All read chunk by chunk."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.inspect import Statistics, spectrum
from weightsmith.weights import CHUNK, Lazy, Scratch, Spec, apply, working

BINS = 120
"""Bars of a histogram of values."""

DEVIATIONS = 6
"""A histogram of values reaches so many standard deviations to both sides of the mean; what is beyond is counted."""

DOWN, ACROSS = 96, 160
"""Most cells of a picture."""

POINTS = 512
"""Most singular values of an answer."""

_EXPONENTS = 1100  # below the least binary exponent of a float64


def chunks(label: str, *nodes: Lazy) -> Iterator[tuple[int, list[Tensor]]]:
    """The values of nodes of one shape side by side: index of the first, and a flat run of each.

    The runs are valid until the next are asked for.
    """
    scratch = Scratch()
    grain = math.lcm(*(node.grain for node in nodes))
    step = max(CHUNK // grain, 1) * grain
    numel = nodes[0].spec.numel
    with progress.task(label, sum(node.spec.nbytes for node in nodes), "bytes") as advance:
        for start in range(0, numel, step):
            scratch.next_chunk()
            stop = min(start + step, numel)
            yield start, [working(node.read(start, stop, scratch)).reshape(-1) for node in nodes]
            advance(sum((stop - start) * node.spec.dtype.itemsize for node in nodes))


def change(a: Lazy, b: Lazy) -> Lazy:
    """``b - a``, in float32 where both are at most that precise, else in float64.

    >>> from weightsmith.weights import Weights, materialize
    >>> w = Weights.of({"a": torch.tensor([200, 1], dtype=torch.uint8), "b": torch.tensor([1, 3], dtype=torch.uint8)})
    >>> materialize(change(w.node("a"), w.node("b")))
    tensor([-199.,    2.], dtype=torch.float64)
    """
    narrow = all(n.spec.dtype.is_floating_point and n.spec.dtype.itemsize <= 4 for n in (a, b))
    complex = any(n.spec.dtype.is_complex for n in (a, b))
    dtype = torch.float32 if narrow else torch.complex128 if complex else torch.float64
    return apply(_difference, a, b, spec=Spec(a.spec.shape, dtype), options={"dtype": dtype})


def _difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return b.to(dtype) - a.to(dtype)


def _real(values: Tensor) -> Tensor:
    """As float64; complex values by their magnitude, as `Statistics` has them."""
    return values.to(torch.complex128).abs() if values.is_complex() else values.double()


def histogram(node: Lazy, found: Statistics) -> dict[str, Any] | None:
    """How many values lie where, in equal steps and in powers of two; None where none is finite.

    Args:
        found: the statistics of the same node: they say from where to where.

    Returns:
        ``counts`` of `BINS` equal steps from ``low`` to ``high`` (one step where all values are equal),
        the values ``below`` and ``above`` that; ``positive`` and ``negative``, the values with a
        magnitude from ``2**(first + i)`` to ``2**(first + i + 1)``; the ``zeros``.
    """
    if found.min is None or found.max is None or found.mean is None or found.std is None:
        return None
    low, high = max(found.min, found.mean - DEVIATIONS * found.std), min(found.max, found.mean + DEVIATIONS * found.std)
    if not low < high:
        low, high = found.min, found.max
    bins = BINS if low < high else 1
    unit = 1.0 if math.isfinite(high - low) else 0.25  # the largest float64 values lie further apart than it can say
    counts = torch.zeros(bins, dtype=torch.int64)
    signs = torch.zeros(2, 2 * _EXPONENTS, dtype=torch.int64)
    below = above = zeros = 0
    for _, (values,) in chunks("histogram", node):
        x = _real(values)
        if not math.isfinite(float(x.sum())):
            x = x[x.isfinite()]
        under, over = x < low, x > high
        below, above = below + int(under.sum()), above + int(over.sum())
        inside = x[~(under | over)]
        places = (inside * unit - low * unit) / (high * unit - low * unit) * bins if bins > 1 else inside * 0
        counts += torch.bincount(places.long().clamp_(0, bins - 1), minlength=bins)
        other = x[x != 0]
        zeros += x.numel() - other.numel()
        exponents = other.abs().frexp().exponent.long() + (_EXPONENTS - 1)
        for sign in (0, 1):
            chosen = exponents[(other < 0) == bool(sign)]
            signs[sign] += torch.bincount(chosen, minlength=2 * _EXPONENTS)
    used = signs.sum(0).nonzero()
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (_EXPONENTS, _EXPONENTS)
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "below": below,
        "above": above,
        "zeros": zeros,
        "first": first - _EXPONENTS,
        "positive": signs[0, first:last].tolist(),
        "negative": signs[1, first:last].tolist(),
    }


def picture(node: Lazy) -> dict[str, Any]:
    """The tensor seen as a matrix ``[first axis, all others]``, in at most `DOWN` by `ACROSS` cells.

    A tensor of one axis is one row.

    Returns:
        the matrix's ``rows`` and ``columns``, the picture's ``height`` and ``width``, and of the values
        of each cell the ``mean`` and the root mean square ``rms``: float32, little endian, base64.
        Values that are not finite are left out and counted in ``nonfinite``; a cell of nothing else is NaN.
    """
    shape = node.spec.shape
    rows = shape[0] if len(shape) > 1 else 1
    columns = node.spec.numel // rows if rows else 0
    height, width = min(rows, DOWN), min(columns, ACROSS)
    cells = height * width
    total, squares, count = (torch.zeros(cells, dtype=torch.float64) for _ in range(3))
    nonfinite = 0
    for start, (values,) in chunks("picture", node):
        x = _real(values)
        index = torch.arange(start, start + x.numel())
        row = index.div(columns, rounding_mode="floor")
        place = (row * height).div(rows, rounding_mode="floor") * width
        place += (index.sub_(row * columns) * width).div(columns, rounding_mode="floor")
        if not math.isfinite(float(x.sum())):
            kept = x.isfinite()
            nonfinite += x.numel() - int(kept.sum())
            x, place = x[kept], place[kept]
        total += torch.bincount(place, x, minlength=cells)
        squares += torch.bincount(place, x * x, minlength=cells)
        count += torch.bincount(place, minlength=cells)
    return {
        "rows": rows,
        "columns": columns,
        "height": height,
        "width": width,
        "mean": _packed(total / count),
        "rms": _packed((squares / count).sqrt()),
        "nonfinite": nonfinite,
    }


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.float().numpy().astype("<f4").tobytes()).decode()


def singular_values(node: Lazy) -> dict[str, Any] | None:
    """The ranks and at most `POINTS` of the singular values, each with its place; None where a value is not finite."""
    matrix = torch.empty(node.spec.numel, dtype=node.spec.dtype)  # not a mapped file: its pages would stay counted
    for start, (values,) in chunks("reading", node):
        matrix[start : start + values.numel()] = values
    found = spectrum(matrix.reshape(node.spec.shape), keep=node.spec.numel)
    if found is None:
        return None
    places = _evenly(found.full_rank)
    return {
        "effective_rank": found.effective_rank,
        "stable_rank": found.stable_rank,
        "full_rank": found.full_rank,
        "places": [place + 1 for place in places],
        "values": [found.values[place] for place in places],
    }


def _evenly(count: int) -> Sequence[int]:
    if count <= POINTS:
        return range(count)
    return [place * (count - 1) // (POINTS - 1) for place in range(POINTS)]


def spectrum_cost(spec: Spec) -> int:
    """About the bytes that the singular values of a matrix need at once: itself, and three Gram matrices."""
    short = min(spec.shape[0], spec.numel // max(spec.shape[0], 1))
    return spec.nbytes + 3 * 8 * short * short + 2**26


def flips(a: Lazy, b: Lazy) -> dict[str, float]:
    """Shares of the elements that changed their sign, became zero, or were zero. NaN changes nothing here.

    A complex value has changed its sign where it was turned by more than a right angle.
    """
    turned = gone = come = 0
    for _, pair in chunks("signs", a, b):
        x, y = (values if values.is_complex() else values.double() for values in pair)
        turned += int(((x.sgn() * y.sgn().conj()).real < 0).sum())  # not of the values: their product may vanish
        gone += int(((x.abs() > 0) & (y == 0)).sum())
        come += int(((x == 0) & (y.abs() > 0)).sum())
    count = max(a.spec.numel, 1)
    return {"flipped": turned / count, "to_zero": gone / count, "from_zero": come / count}
