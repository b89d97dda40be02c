"""Which elements of a score are kept: exactly so many, the same ones every time.

The threshold is found from two histograms of the bits of the scores, without sorting: for floats of
one sign, order of bits is order of values. Among equal scores the first ones are kept, so the result
depends on nothing but the scores.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.weights import Pass

BUCKETS = 2**16


@dataclass(frozen=True)
class Cut:
    """Keep a score whose key is above ``key``, or equal to it before element ``index``."""

    key: int
    index: int


def keys(score: Tensor) -> Tensor:
    """int32 numbers in the order of float32 scores; NaN comes last, so it is never pruned silently."""
    bits = (score.to(torch.float32) + 0.0).reshape(-1).view(torch.int32)  # -0.0 + 0.0 is 0.0: their bits now agree
    bits = torch.where(score.reshape(-1).isnan(), torch.iinfo(torch.int32).max, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow towards zero, their bits do not


def kept(score: Tensor, cut: Cut, start: int = 0) -> Tensor:
    """The boolean mask of a run of scores that begins at element ``start``."""
    key = keys(score)
    mask = key > cut.key
    ties = (key == cut.key).nonzero().flatten()
    mask[ties[ties + start < cut.index]] = True
    return mask.reshape(score.shape)


def cut_at(keep: int, total: int) -> Generator[Pass, Any, Cut]:
    """A solver for the cut that keeps exactly ``keep`` of ``total`` scores, the highest.

    Reads the scores twice, and once more where the cut falls among equal ones.
    """
    if keep >= total:
        return Cut(torch.iinfo(torch.int32).min, total)
    if keep <= 0:
        return Cut(torch.iinfo(torch.int32).max, 0)
    high, above = _from_top((yield Pass(_high_histogram)), keep)
    low, inside = _from_top((yield Pass(partial(_low_histogram, bucket=high))), keep - above)
    key = ((high - BUCKETS // 2) << 16) | low
    missing = keep - above - inside
    counts = yield Pass(partial(_ties, key=key), each=True)
    begin = 0
    for unit, count in enumerate(counts):
        ties, elements = int(count[0]), int(count[1])
        if missing <= ties:
            (places,) = yield Pass(partial(_places, key=key, begin=begin, length=elements), each=True, units=[unit])
            return Cut(key, begin + int(places.nonzero().flatten()[missing - 1]) + 1)
        missing -= ties
        begin += elements
    raise AssertionError("the scores changed between two readings")


def _from_top(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bucket that holds the keep-th highest, and how many lie above that bucket."""
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, keep))
    return len(histogram) - 1 - place, int(reached[place - 1]) if place else 0


def _high_histogram(score: Tensor) -> Tensor:
    return torch.bincount((keys(score) >> 16) + BUCKETS // 2, minlength=BUCKETS)


def _low_histogram(score: Tensor, *, bucket: int) -> Tensor:
    key = keys(score)
    inside = key[(key >> 16) + BUCKETS // 2 == bucket]
    return torch.bincount(inside & 0xFFFF, minlength=BUCKETS)


def _ties(score: Tensor, *, key: int) -> Tensor:
    equal = keys(score) == key
    return torch.stack([equal.sum(), torch.tensor(equal.numel())])


def _places(score: Tensor, *, key: int, begin: int, length: int, start: int) -> Tensor:
    """Where in its unit each tie stands, as a 0/1 vector of the unit's length (so that chunks add up)."""
    found = torch.zeros(length, dtype=torch.int8)
    found[start - begin : start - begin + score.numel()] = (keys(score) == key).to(torch.int8)
    return found


def kept_of_groups(score: Tensor, *, keep: int, group: int) -> Tensor:
    """N:M: in every run of ``group`` inputs of a row, the ``keep`` highest; the first of equal ones.

    Args:
        score: ``[rows, ...]``; the axes after the first are one run of inputs.
    """
    runs = score.reshape(len(score), -1, group)
    order = keys(runs).reshape(runs.shape).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(runs.shape, dtype=torch.bool)
    mask.scatter_(-1, order[..., :keep], True)
    return mask.reshape(score.shape)


def pattern_of(sparsity: str, option: str = "sparsity") -> tuple[int, int]:
    """``"2:4"`` -> (2, 4): two of four are kept.

    >>> pattern_of("2:4")
    (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", sparsity.strip())
    if not found or not 0 <= int(found[1]) <= int(found[2]) or int(found[2]) == 0:
        raise Error(f'{option}: {sparsity!r} is no pattern; write "2:4" to keep two of every four')
    return int(found[1]), int(found[2])
