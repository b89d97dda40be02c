"""Which scores are the highest: exactly so many, the same ones every time.

The threshold is found from two histograms of the bits of the scores, without sorting: for floats of
one sign, order of bits is order of values. Among equal scores the first ones are kept, so the result
depends on nothing but the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.weights import Pass

BUCKETS = 2**16

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

    Reads the scores twice, and once more where only some of equal ones are kept.

    >>> from weightsmith.weights import in_memory
    >>> score = torch.tensor([1.0, 4.0, 4.0, 4.0])
    >>> kept(score, in_memory(cut_at(2, 4), score))
    tensor([False,  True,  True, False])
    """
    if not 0 < keep < total:
        return EVERYTHING if keep >= total else NOTHING
    (cut,) = yield from cuts_at(_in_one_row, lambda rows, total: [keep])
    return cut


def cuts_at(scores: Scores, keep: Callable[[int, int], Sequence[int]]) -> Generator[Pass, Any, list[Cut]]:
    """A solver for one cut a row, all found in the same readings.

    Args:
        scores: ``(*chunk) -> [k, n]``.
        keep: ``(k, elements of a row) -> how many of each row``, the highest.
    """
    high = yield Pass(partial(_high_histograms, scores=scores))
    total = int(high[0].sum())
    wanted = keep(len(high), total)
    found = [EVERYTHING if count >= total else NOTHING for count in wanted]
    missing = {row: count for row, count in enumerate(wanted) if 0 < count < total}
    if not missing:
        return found
    buckets: dict[int, int] = {}
    for row, count in missing.items():
        buckets[row], above = _from_top(high[row], count)
        missing[row] = count - above
    low = yield Pass(partial(_low_histograms, scores=scores, buckets=buckets))
    levels: dict[int, int] = {}
    for (row, bucket), histogram in zip(buckets.items(), low, strict=True):
        place, inside = _from_top(histogram, missing[row])
        missing[row] -= inside
        found[row] = Cut(((bucket - BUCKETS // 2) << 16) | place, total)
        if missing[row] < int(histogram[place]):
            levels[row] = found[row].key
    if levels:
        ends = yield from _ends(scores, levels, missing)
        found = [Cut(cut.key, ends.get(row, cut.index)) for row, cut in enumerate(found)]
    return found


def _ends(
    scores: Scores, levels: Mapping[int, int], missing: Mapping[int, int]
) -> Generator[Pass, Any, dict[int, int]]:
    """Row -> the index after the last of its equal scores that is kept."""
    counts = torch.stack((yield Pass(partial(_ties, scores=scores, levels=levels), each=True)))
    ends = counts[:, 0].cumsum(0)
    found: dict[int, int] = {}
    for column, (row, key) in enumerate(levels.items(), start=1):
        reached = counts[:, column].cumsum(0)
        unit = int(torch.searchsorted(reached, missing[row]))
        length = int(counts[unit, 0])
        begin = int(ends[unit]) - length
        function = partial(_places, scores=scores, row=row, key=key, begin=begin, length=length)
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


def _high_histograms(*chunk: Any, scores: Scores) -> Tensor:
    return torch.stack([torch.bincount((key >> 16) + BUCKETS // 2, minlength=BUCKETS) for key in keys(scores(*chunk))])


def _low_histograms(*chunk: Any, scores: Scores, buckets: Mapping[int, int]) -> Tensor:
    key = keys(scores(*chunk))
    inside = [key[row][(key[row] >> 16) + BUCKETS // 2 == bucket] for row, bucket in buckets.items()]
    return torch.stack([torch.bincount(row & 0xFFFF, minlength=BUCKETS) for row in inside])


def _ties(*chunk: Any, scores: Scores, levels: Mapping[int, int]) -> Tensor:
    """The number of elements, and of those at its level for every row."""
    key = keys(scores(*chunk))
    return torch.tensor([key.shape[1], *((key[row] == level).sum() for row, level in levels.items())])


def _places(*chunk: Any, scores: Scores, row: int, key: int, begin: int, length: int, start: int) -> Tensor:
    """Where in its unit each tie of a row stands, as a 0/1 vector of the unit's length (so that chunks add up)."""
    equal = keys(scores(*chunk)[row]) == key
    found = torch.zeros(length, dtype=torch.int8, device=equal.device)
    found[start - begin : start - begin + len(equal)] = equal
    return found
