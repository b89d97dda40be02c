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

from weightsmith import native
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

    Reads the scores once, and a sample of them before; up to five times where very many of them are alike.

    >>> from weightsmith.weights import in_memory
    >>> score = torch.tensor([1.0, 4.0, 4.0, 4.0])
    >>> kept(score, in_memory(cut_at(2, 4), score))
    tensor([False,  True,  True, False])
    """
    if not 0 < keep < total:
        return EVERYTHING if keep >= total else NOTHING
    (cut,) = yield from cuts_at(_in_one_row, lambda rows, count: [keep * count // total])
    return cut


def cuts_at(
    scores: Scores, keep: Callable[[int, int], Sequence[int]], positive: bool = False
) -> Generator[Pass, Any, list[Cut]]:
    """A solver for one cut a row, all found in the same readings: one as a rule, and a part of another before it.

    From a sample of the scores it is guessed between which two values a threshold lies; then all scores are read,
    those above are counted, and those between are looked at one by one. Where the guess is wrong, or very many scores
    are alike, exact histograms are made, which takes two readings more, or four. The result is the same.

    Args:
        scores: ``(*chunk) -> [k, n]``.
        keep: ``(k, elements of a row) -> how many of each row``, the highest; a share of any number of elements.
        positive: no score is below zero (or minus zero), so the bits themselves are in order. NaN comes last.
    """
    sample = yield Pass(partial(_sampled_histograms, scores=scores, positive=positive), units=_spread)
    seen = int(sample[0].sum())
    asked, of_many = keep(len(sample), seen), keep(len(sample), MANY)
    if all(pair in ((seen, MANY), (0, 0)) for pair in zip(asked, of_many, strict=True)):  # all or nothing: no reading
        return [EVERYTHING if count else NOTHING for count in of_many]
    bounds = {
        row: limits for row, count in enumerate(asked) if (limits := _bounds(sample[row], count, positive)) is not None
    }
    between = yield Pass(partial(_between, scores=scores, bounds=bounds, positive=positive))
    wanted = keep(len(sample), between.total)
    found = [EVERYTHING if count >= between.total else NOTHING for count in wanted]
    missing = {row: count for row, count in enumerate(wanted) if 0 < count < between.total}
    for row in [row for row in missing if row in bounds]:
        cut = between.cut(row, missing[row])
        if cut is not None:
            found[row] = cut
            del missing[row]
    if missing:
        for row, cut in (yield from _by_histograms(scores, missing, positive)).items():
            found[row] = cut
    return found


MANY = 2**40
"""More than any tensor has: what is kept of so many shows whether it is all or nothing of any number."""

MARGIN = 0.015
"""The share of a sample on either side of its threshold in which the real one is looked for."""

WIDEST = 0.1
"""The largest share of a sample that is worth looking at one by one."""


def _spread(units: int) -> Sequence[int]:
    """Three units of many: the first, the last and the one between."""
    return sorted({0, units // 2, units - 1}) if units else ()


def _sampled_histograms(*chunk: Any, scores: Scores, positive: bool) -> Tensor:
    """Histograms of the high halves of the keys; of every fourth where there are many."""
    score = scores(*chunk)
    return _histograms(_keys(score[:, ::4] if score.shape[1] >= 2**14 else score, positive), positive)


def _bounds(histogram: Tensor, keep: int, positive: bool) -> tuple[int, int] | None:
    """The keys between which a threshold is expected, the upper not included; None where it cannot be guessed."""
    seen = int(histogram.sum())
    if not 0 < keep < seen:
        return None
    slack = int(MARGIN * seen) + 8
    upper, above = _from_top(histogram, max(keep - slack, 1))
    lower, below = _from_top(histogram, min(keep + slack, seen))
    if below + int(histogram[lower]) - above > WIDEST * seen + 4 * slack:
        return None
    offset = 0 if positive else BUCKETS // 2
    upper = len(histogram) - 1 if keep <= slack else upper  # the highest of all may be higher than any in the sample
    lower = 0 if keep + slack >= seen else lower
    return (lower - offset) << 16, (upper + 1 - offset) << 16


@dataclass(frozen=True)
class Between:
    """Scores whose keys lie between two bounds, row by row, run after run; and how many there are above."""

    total: int
    above: tuple[int, ...]
    runs: tuple[tuple[int, dict[int, tuple[Tensor, Tensor]]], ...]
    """Where a run begins, and per row the places in it and the keys."""

    def __add__(self, other: Between) -> Between:
        above = tuple(one + two for one, two in zip(self.above, other.above, strict=True))
        return Between(self.total + other.total, above, self.runs + other.runs)

    def cut(self, row: int, keep: int) -> Cut | None:
        """The cut that keeps ``keep`` of a row: the highest, and of equal ones the first. None if it is elsewhere."""
        runs = [(start, *found[row]) for start, found in self.runs]
        key = torch.cat([keys for _, _, keys in runs]).cpu().numpy()
        left = keep - self.above[row]
        if not 0 < left <= len(key):
            return None
        key.partition(len(key) - left)
        level = int(key[len(key) - left])
        left -= int(np.count_nonzero(key > level))
        for start, places, keys in runs:
            equal = (keys == level).nonzero().flatten()
            if left <= len(equal):
                return Cut(level, start + int(places[equal[left - 1]]) + 1)
            left -= len(equal)
        raise AssertionError("a level has fewer scores than were counted")


def _between(*chunk: Any, scores: Scores, bounds: Mapping[int, tuple[int, int]], positive: bool, start: int) -> Between:
    key = _keys(scores(*chunk), positive)
    above, found = [0] * len(key), {}
    for row, (lower, upper) in bounds.items():
        places, values, above[row] = native.inside(key[row], lower, upper) or _inside(key[row], lower, upper)
        found[row] = (places, values)
    return Between(key.shape[1], tuple(above), ((start, found),))


def _inside(key: Tensor, lower: int, upper: int) -> tuple[Tensor, Tensor, int]:
    """Where keys lie in ``[lower, upper)``, they themselves, and how many lie above."""
    top = torch.iinfo(torch.int32).max
    if key.is_cpu:  # by way of numpy: several times as fast as torch's comparisons and its nonzero
        values = key.numpy()
        distance = np.subtract(values, np.int32(lower)).view(np.uint32)  # what is below wraps around
        places = torch.from_numpy(np.flatnonzero(distance <= np.uint32(upper - lower - 1)))
        above = int(np.count_nonzero(values >= upper)) if upper <= top else 0
    else:
        places = ((key >= lower) & (key <= min(upper - 1, top))).nonzero().flatten()
        above = int((key >= upper).sum()) if upper <= top else 0
    return places.to(torch.int32), key[places], above


def _by_histograms(scores: Scores, wanted: Mapping[int, int], positive: bool) -> Generator[Pass, Any, dict[int, Cut]]:
    """The cuts of some rows, from exact histograms."""
    high = yield Pass(partial(_high_histograms, scores=scores, positive=positive))
    total = int(high[0].sum())
    found: dict[int, Cut] = {}
    missing = dict(wanted)
    buckets: dict[int, int] = {}
    inside = 0
    for row, count in missing.items():
        place, above = _from_top(high[row], count)
        buckets[row] = place - (0 if positive else BUCKETS // 2)
        missing[row] = count - above
        inside = max(inside, int(high[row][place]))
    if inside <= GATHERED:  # few enough to be looked at one by one
        bounds = {row: (bucket << 16, (bucket + 1) << 16) for row, bucket in buckets.items()}
        between = yield Pass(partial(_between, scores=scores, bounds=bounds, positive=positive))
        cuts = {row: between.cut(row, count) for row, count in wanted.items()}
        return {row: cut for row, cut in cuts.items() if cut is not None}  # none is None: these bounds are exact
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
        found = {row: Cut(cut.key, ends.get(row, cut.index)) for row, cut in found.items()}
    return found


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
    return _histograms(_keys(scores(*chunk), positive), positive)


def _histograms(key: Tensor, positive: bool) -> Tensor:
    """Of the high halves of keys ``[k, n]``."""
    key = key >> 16
    if not positive:
        key += BUCKETS // 2
    return torch.stack([torch.bincount(row, minlength=BUCKETS // 2 if positive else BUCKETS) for row in key])


def _low_histograms(*chunk: Any, scores: Scores, buckets: Mapping[int, int], positive: bool) -> Tensor:
    key = _keys(scores(*chunk), positive)
    inside = [_inside(key[row], bucket << 16, (bucket + 1) << 16)[1] for row, bucket in buckets.items()]
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
