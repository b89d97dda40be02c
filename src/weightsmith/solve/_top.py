"""Which scores are the highest: exactly so many, the same ones every time.

The threshold is found from two histograms of the bits of the scores, without sorting: for floats of
one sign, order of bits is order of values. Among equal scores the first ones are kept, so the result
depends on nothing but the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.weights import Pass

BUCKETS = 2**16

GATHERED = 2**21
"""So many scores of a row around its threshold are held in memory; more are counted in two more readings."""

Scores = Callable[..., Tensor]
"""``(*chunk) -> [k, n]``: scores of ``n`` elements in ``k`` rows that are cut apart from each other."""


@dataclass(frozen=True)
class Cut:
    """Keep a score whose key is above ``key``, or equal to it before element ``index``."""

    key: int
    index: int


EVERYTHING = Cut(torch.iinfo(torch.int32).min, torch.iinfo(torch.int64).max)
NOTHING = Cut(torch.iinfo(torch.int32).max, 0)


def keys(score: Tensor) -> Tensor:
    """int32 numbers in the order of float32 scores; NaN comes last, so it is never dropped silently.

    >>> keys(torch.tensor([-1.0, 0.0, 1.0, torch.nan])).argsort()
    tensor([0, 1, 2, 3])
    """
    bits = (score.to(torch.float32) + 0.0).contiguous().view(torch.int32)  # -0.0 + 0.0 is 0.0: their bits now agree
    bits = torch.where(score.isnan(), torch.iinfo(torch.int32).max, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow towards zero, their bits do not


def kept(score: Tensor, cut: Cut, start: int = 0) -> Tensor:
    """The boolean mask of a run of scores that begins at element ``start``.

    >>> kept(torch.tensor([3.0, 1.0, 3.0]), Cut(int(keys(torch.tensor(3.0))), 2))
    tensor([ True, False, False])
    """
    key = keys(score).reshape(-1)
    before = min(max(cut.index - start, 0), len(key))
    return torch.cat([key[:before] >= cut.key, key[before:] > cut.key]).reshape(score.shape)


def cut_at(keep: int, total: int) -> Generator[Pass, Any, Cut]:
    """A solver for the cut that keeps exactly ``keep`` of ``total`` scores, the highest.

    Reads the scores twice; up to four times where very many of them are alike.

    >>> from weightsmith.weights import in_memory
    >>> score = torch.tensor([1.0, 4.0, 4.0, 4.0])
    >>> kept(score, in_memory(cut_at(2, 4), score))
    tensor([False,  True,  True, False])
    """
    if not 0 < keep < total:
        return EVERYTHING if keep >= total else NOTHING
    (cut,) = yield from cuts_at(_in_one_row, lambda rows, total: [keep])
    return cut


def cuts_at(
    scores: Scores, keep: Callable[[int, int], Sequence[int]], positive: bool = False
) -> Generator[Pass, Any, list[Cut]]:
    """A solver for one cut a row, all found in the same readings: two, or four where very many scores are alike.

    Args:
        scores: ``(*chunk) -> [k, n]``.
        keep: ``(k, elements of a row) -> how many of each row``, the highest.
        positive: no score is below zero (or minus zero), so the bits themselves are in order. NaN comes last.
    """
    high = yield Pass(partial(_high_histograms, scores=scores, positive=positive))
    total = int(high[0].sum())
    wanted = keep(len(high), total)
    found = [EVERYTHING if count >= total else NOTHING for count in wanted]
    missing = {row: count for row, count in enumerate(wanted) if 0 < count < total}
    if not missing:
        return found
    buckets: dict[int, int] = {}
    inside = 0
    for row, count in missing.items():
        place, above = _from_top(high[row], count)
        buckets[row] = place - (0 if positive else BUCKETS // 2)
        missing[row] = count - above
        inside = max(inside, int(high[row][place]))
    if inside <= GATHERED:  # few enough to be looked at one by one
        gathered = yield Pass(partial(_gather, scores=scores, buckets=buckets, positive=positive))
        for row, bucket in buckets.items():
            found[row] = gathered.cut(row, bucket, missing[row])
        return found
    low = yield Pass(partial(_low_histograms, scores=scores, buckets=buckets, positive=positive))
    levels: dict[int, int] = {}
    for (row, bucket), histogram in zip(buckets.items(), low, strict=True):
        place, above = _from_top(histogram, missing[row])
        missing[row] -= above
        found[row] = Cut((bucket << 16) | place, total)
        if missing[row] < int(histogram[place]):
            levels[row] = found[row].key
    if levels:
        ends = yield from _ends(scores, levels, missing, positive)
        found = [Cut(cut.key, ends.get(row, cut.index)) for row, cut in enumerate(found)]
    return found


@dataclass(frozen=True)
class Gathered:
    """Scores that share the high half of their keys, row by row, run after run: where they are and their keys."""

    runs: tuple[tuple[int, dict[int, tuple[Tensor, Tensor]]], ...]

    def __add__(self, other: Gathered) -> Gathered:
        return Gathered(self.runs + other.runs)

    def cut(self, row: int, bucket: int, keep: int) -> Cut:
        """The cut that keeps ``keep`` of a row's: the highest, and of equal ones the first."""
        low = torch.cat([found[row][1] for _, found in self.runs]).cpu()
        places = torch.cat([found[row][0].cpu() + start for start, found in self.runs])
        histogram = torch.bincount(low, minlength=BUCKETS)
        place, above = _from_top(histogram, keep)
        level = (low == place).nonzero().flatten()
        return Cut((bucket << 16) | place, int(places[level[keep - above - 1]]) + 1)


def _ends(
    scores: Scores, levels: Mapping[int, int], missing: Mapping[int, int], positive: bool
) -> Generator[Pass, Any, dict[int, int]]:
    """Row -> the index after the last of its equal scores that is kept."""
    counts = torch.stack((yield Pass(partial(_ties, scores=scores, levels=levels, positive=positive), each=True)))
    ends = counts[:, 0].cumsum(0)
    found: dict[int, int] = {}
    for column, (row, key) in enumerate(levels.items(), start=1):
        reached = counts[:, column].cumsum(0)
        unit = int(torch.searchsorted(reached, missing[row]))
        length = int(counts[unit, 0])
        begin = int(ends[unit]) - length
        function = partial(_places, scores=scores, row=row, key=key, begin=begin, length=length, positive=positive)
        (places,) = yield Pass(function, each=True, units=[unit])
        last = missing[row] - int(reached[unit] - counts[unit, column])
        found[row] = begin + int(places.nonzero().flatten()[last - 1]) + 1
    return found


def _from_top(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bucket that holds the keep-th highest, and how many lie above that bucket."""
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, keep))
    return len(histogram) - 1 - place, int(reached[place - 1]) if place else 0


def _in_one_row(score: Tensor) -> Tensor:
    return score.reshape(1, score.numel())


def _keys(score: Tensor, positive: bool) -> Tensor:
    return score.to(torch.float32).contiguous().view(torch.int32) if positive else keys(score)


def _high_histograms(*chunk: Any, scores: Scores, positive: bool) -> Tensor:
    key = _keys(scores(*chunk), positive) >> 16
    if not positive:
        key += BUCKETS // 2
    return torch.stack([torch.bincount(row, minlength=BUCKETS // 2 if positive else BUCKETS) for row in key])


def _inside(key: Tensor, bucket: int) -> Tensor:
    """Where the high half of a key is ``bucket``."""
    if key.is_cpu:  # several times as fast as torch's comparison and its nonzero
        return torch.from_numpy(np.flatnonzero((key.numpy() >> 16) == bucket))
    return ((key >> 16) == bucket).nonzero().flatten()


def _gather(*chunk: Any, scores: Scores, buckets: Mapping[int, int], positive: bool, start: int) -> Gathered:
    key = _keys(scores(*chunk), positive)
    found = {}
    for row, bucket in buckets.items():
        places = _inside(key[row], bucket)
        found[row] = (places.to(torch.int32), key[row][places] & 0xFFFF)
    return Gathered(((start, found),))


def _low_histograms(*chunk: Any, scores: Scores, buckets: Mapping[int, int], positive: bool) -> Tensor:
    key = _keys(scores(*chunk), positive)
    inside = [key[row][_inside(key[row], bucket)] for row, bucket in buckets.items()]
    return torch.stack([torch.bincount(row & 0xFFFF, minlength=BUCKETS) for row in inside])


def _ties(*chunk: Any, scores: Scores, levels: Mapping[int, int], positive: bool) -> Tensor:
    """The number of elements, and of those at its level for every row."""
    key = _keys(scores(*chunk), positive)
    return torch.tensor([key.shape[1], *(_count(key[row], level) for row, level in levels.items())])


def _count(key: Tensor, level: int) -> int:
    if key.is_cpu:
        return int(np.count_nonzero(key.numpy() == level))
    return int((key == level).sum())


def _places(
    *chunk: Any, scores: Scores, row: int, key: int, begin: int, length: int, positive: bool, start: int
) -> Tensor:
    """Where in its unit each tie of a row stands, as a 0/1 vector of the unit's length (so that chunks add up)."""
    equal = _keys(scores(*chunk)[row], positive) == key
    found = torch.zeros(length, dtype=torch.int8, device=equal.device)
    found[start - begin : start - begin + len(equal)] = equal
    return found


def shrink(values: Tensor, cut: Cut, start: int = 0) -> Tensor:
    """In place, zeros where the magnitude of a run of values ``[n]`` is below the cut; the run begins at ``start``.

    The same as ``values * kept(values.abs(), cut, start)`` for a cut found with ``positive``, many times faster.

    >>> shrink(torch.tensor([3.0, -1.0, -3.0]), Cut(int(keys(torch.tensor(3.0))), 2))
    tensor([3., 0., 0.])
    """
    if cut == EVERYTHING:
        return values
    if cut == NOTHING:
        return values.zero_()
    level = torch.tensor(cut.key, dtype=torch.int32).view(torch.float32).item()
    before = min(max(cut.index - start, 0), len(values))
    if values.dtype == torch.float32 and math.isfinite(level):
        # What is smaller than the threshold, or in the first part than the number just below it, goes.
        below = torch.tensor(cut.key - 1, dtype=torch.int32).view(torch.float32).item() if cut.key else -1.0
        for part, threshold in ((values[:before], below), (values[before:], level)):
            if threshold >= 0 and len(part):
                torch.ops.aten.hardshrink.out(part, threshold, out=part)
        return values
    key = _keys(values.abs(), True)
    keep = torch.cat([key[:before] >= cut.key, key[before:] > cut.key])
    return values.masked_fill_(~keep, 0)
