"""Exactly so many are kept, the highest, and among equals the first."""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.solve import EVERYTHING, NOTHING, Cut, _top, cut_at, cuts_at, kept, keys, shrink
from weightsmith.weights import Held, Inputs, Pass, Reduction, _lazy, in_memory

AWKWARD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    -1.5,
    1e-45,
    -1e-45,
    3e38,
    -3e38,
    math.inf,
    -math.inf,
    math.nan,
    2.0,
    2.0 + 2**-22,
]
scores = st.lists(st.one_of(st.sampled_from(AWKWARD), st.floats(width=32)), max_size=40)


def brute_force(score: Tensor, keep: int) -> Tensor:
    """By a stable sort on plain Python numbers; NaN is above all."""
    values = [math.inf if math.isnan(x) else x for x in score.flatten().tolist()]
    order = sorted(range(len(values)), key=lambda i: (not math.isnan(float(score.flatten()[i])), -values[i]))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.tensor(order[:keep], dtype=torch.long)] = True
    return mask.reshape(score.shape)


def selected(score: Tensor, keep: int) -> Tensor:
    return kept(score, in_memory(cut_at(keep, score.numel()), score))


@given(scores, st.integers(0, 40))
def test_equals_a_stable_sort(values: list[float], keep: int):
    score = torch.tensor(values, dtype=torch.float32)
    keep = min(keep, len(values))
    found = selected(score, keep)
    assert int(found.sum()) == keep
    assert torch.equal(found, brute_force(score, keep))


@given(scores)
def test_keys_are_in_the_order_of_the_scores(values: list[float]):
    score = torch.tensor(values, dtype=torch.float32)
    key = keys(score).tolist()
    for x, k in zip(score.tolist(), key, strict=True):
        for y, other in zip(score.tolist(), key, strict=True):
            if math.isnan(x):
                assert k > other or math.isnan(y)
            elif not math.isnan(y):
                assert (k < other, k == other) == (x < y, x == y)


def test_zeros_of_both_signs_are_equal():
    assert keys(torch.tensor([0.0, -0.0])).unique().tolist() == [0]
    assert selected(torch.tensor([-0.0, 0.0, -0.0]), 1).tolist() == [True, False, False]


def test_equals_numpys_stable_argsort_on_many_ties():
    score = torch.randint(-3, 4, (2000,), generator=torch.Generator().manual_seed(0)).float()
    order = np.argsort(-score.numpy(), kind="stable")
    for keep in range(0, 2001, 97):
        expected = np.zeros(2000, dtype=bool)
        expected[order[:keep]] = True
        assert np.array_equal(selected(score, keep).numpy(), expected)


@pytest.mark.parametrize("values", [[1.0] * 9, [0.0] * 9, [math.nan] * 9, [-math.inf] * 9])
def test_among_equals_the_first(values: list[float]):
    for keep in range(10):
        assert selected(torch.tensor(values), keep).tolist() == [True] * keep + [False] * (9 - keep)


def test_neighbouring_floats_are_told_apart():
    score = torch.tensor([1.0, np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))])
    assert selected(score, 1).tolist() == [False, True, False]
    assert selected(score, 2).tolist() == [True, True, False]


def test_other_dtypes():
    score = torch.tensor([3.0, -1.0, 2.0])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert selected(score.to(dtype), 2).tolist() == [True, False, True]


def test_a_mask_has_the_shape_of_its_scores():
    score = torch.arange(6.0).reshape(2, 3)
    assert selected(score, 2).tolist() == [[False] * 3, [False, True, True]]
    assert selected(torch.tensor(5.0), 1).tolist() is True
    assert selected(torch.zeros(0), 0).shape == (0,)


def test_kept_counts_from_the_start_it_is_told():
    cut = Cut(keys(torch.tensor([1.0])).item(), 12)  # type: ignore[arg-type]
    assert kept(torch.ones(4), cut, start=10).tolist() == [True, True, False, False]


# In pieces


def together(tensors: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The masks of several tensors under one budget, found in pieces."""
    total = sum(tensor.numel() for tensor in tensors.values())
    items = [Inputs([Held(tensor)], "element") for tensor in tensors.values()]
    reduction = Reduction(items, partial(cut_at, total - round(share * total), total))
    cut = reduction.value()
    return {
        name: kept(tensor, cut, offset)
        for (name, tensor), offset in zip(tensors.items(), reduction.offsets, strict=False)
    }


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 130), min_size=1, max_size=4),
    st.integers(0, 100),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_across_chunks_units_and_tensors(pieces: list[int], percent: int, levels: int, seed: int):
    """Ties everywhere, in pieces of 16 and 32: the cut falls in any chunk of any unit of any tensor."""
    before = _lazy.CHUNK, _lazy.UNIT
    _lazy.CHUNK, _lazy.UNIT = 16, 32
    try:
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}": torch.randint(0, levels, (n,), generator=generator).float() for i, n in enumerate(pieces)}
        found = together(tensors, percent / 100)
    finally:
        _lazy.CHUNK, _lazy.UNIT = before
    joined = torch.cat(list(tensors.values()))
    keep = len(joined) - round(percent / 100 * len(joined))
    assert torch.equal(torch.cat(list(found.values())), brute_force(joined, keep))


@pytest.mark.usefixtures("small_pieces")
def test_every_place_where_the_cut_can_fall_among_equals():
    tensors = {"a": torch.ones(7, 7), "b": torch.ones(0), "c": torch.ones(33)}
    for gone in range(0, 83, 9):
        found = together(tensors, gone / 82)
        flat = torch.cat([mask.flatten() for mask in found.values()])
        assert flat.tolist() == [True] * (82 - gone) + [False] * gone


# Several rows at once


def rows_of(*rows: Tensor) -> Tensor:
    return torch.stack(rows)


def counted(solver: Generator[Pass, Any, Any]) -> Generator[Pass, Any, tuple[Any, int]]:
    """A solver that also tells how many readings it asked for."""
    readings, answer = 0, None
    while True:
        try:
            wanted = solver.send(answer)
        except StopIteration as finished:
            return finished.value, readings
        readings += 1
        answer = yield wanted


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 150), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_every_row_has_a_cut_of_its_own(k: int, n: int, levels: int, seed: int, data: st.DataObject):
    wanted = data.draw(st.lists(st.integers(0, n), min_size=k, max_size=k))
    rows = torch.randint(-levels, levels, (k, n), generator=torch.Generator().manual_seed(seed)).float()

    def keep(count: int, total: int) -> list[int]:
        assert count == k
        return [one * total // n if n else one for one in wanted]

    before = _lazy.CHUNK, _lazy.UNIT
    _lazy.CHUNK, _lazy.UNIT = 16, 32
    try:
        streamed = Reduction([Inputs([Held(row) for row in rows], "element")], partial(cuts_at, rows_of, keep)).value()
    finally:
        _lazy.CHUNK, _lazy.UNIT = before
    assert in_memory(cuts_at(rows_of, keep), *rows) == streamed
    for row, cut, count in zip(rows, streamed, wanted, strict=True):
        assert torch.equal(kept(row, cut), brute_force(row, count))
        assert torch.equal(torch.cat([kept(row[:7], cut), kept(row[7:], cut, 7)]), brute_force(row, count))


@pytest.mark.parametrize(
    ("values", "keep", "gathered", "guess", "readings"),
    [
        ([3.0, 1.0, 2.0, 4.0], 2, 9, True, 2),
        ([3.0, 3.0, 2.0, 4.0], 2, 0, True, 2),
        ([3.0, 3.0], 2, 0, True, 1),
        ([3.0, 3.0], 0, 0, True, 1),
        ([3.0, 1.0, 2.0, 4.0], 2, 9, False, 4),
        ([3.0, 3.0, 2.0, 4.0], 2, 2, False, 4),
        ([3.0, 3.0, 2.0, 4.0], 2, 1, False, 6),
        ([3.0, 1.0, 2.0, 4.0], 2, 0, False, 4),
    ],
)
def test_it_reads_no_more_than_it_needs(
    values: list[float], keep: int, gathered: int, guess: bool, readings: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_top, "GATHERED", gathered)
    if not guess:
        monkeypatch.setattr(_top, "_bounds", lambda histogram, keep, positive: None)
    share = lambda k, n: [keep * n // len(values)]  # noqa: E731
    found, count = in_memory(counted(cuts_at(rows_of, share)), torch.tensor(values))
    assert count == readings
    (cut,) = found
    assert torch.equal(kept(torch.tensor(values), cut), brute_force(torch.tensor(values), keep))


@pytest.mark.parametrize("guess", ["as it is", "none", "too high", "too low"])
@pytest.mark.parametrize("gathered", [2**21, 3])
@pytest.mark.parametrize("kind", ["alike", "its first part is larger", "many are equal", "nearly all are zero"])
@pytest.mark.usefixtures("small_pieces")
def test_whatever_the_sample_says_the_cut_is_exact(
    kind: str, gathered: int, guess: str, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3000, generator=generator)
    if kind == "its first part is larger":
        values[:1000] *= 1000
    elif kind == "many are equal":
        values = (values * 4).round()
    elif kind == "nearly all are zero":
        values *= torch.rand(3000, generator=generator) > 0.97
    monkeypatch.setattr(_top, "GATHERED", gathered)
    bounds = {"none": None, "too high": (0x7F000000, 0x7F010000), "too low": (-(2**31), -(2**31) + 2**16)}
    if guess in bounds:
        monkeypatch.setattr(_top, "_bounds", lambda histogram, keep, positive: bounds[guess])
    for positive, row in ((False, values), (True, values.abs())):
        for share in (0.001, 0.2, 0.5, 0.999):
            keep = int(share * 3000)
            solver = partial(cuts_at, rows_of, lambda k, n, share=share: [int(share * n)], positive)
            (cut,) = Reduction([Inputs([Held(row)], "element")], solver).value()
            assert torch.equal(kept(row, cut), brute_force(row, keep)), (positive, share)


def test_everything_and_nothing():
    score = torch.tensor([math.nan, -math.inf, 0.0])
    for start in (0, 2**40):
        assert kept(score, EVERYTHING, start).all()
        assert not kept(score, NOTHING, start).any()


# Magnitudes: bits in the order of values, and arithmetic in place of masks


def sizes_of(values: Tensor) -> Tensor:
    return values.abs().reshape(1, -1)


@pytest.mark.parametrize("gathered", [0, 2**21])
@given(values=scores, keep=st.integers(0, 40), split=st.integers(0, 40))
def test_shrink_keeps_the_largest_magnitudes(gathered: int, values: list[float], keep: int, split: int):
    score = torch.tensor(values, dtype=torch.float32)
    keep, split = min(keep, len(values)), min(split, len(values))
    before = _top.GATHERED
    try:
        _top.GATHERED = gathered
        (cut,) = in_memory(cuts_at(sizes_of, lambda k, n: [keep], positive=True), score)
    finally:
        _top.GATHERED = before
    found = torch.cat([shrink(score[:split].clone(), cut), shrink(score[split:].clone(), cut, split)])
    mask = brute_force(score.abs(), keep)
    expected = torch.where(mask, score, 0.0)
    assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_shrink_in_other_dtypes(dtype: torch.dtype):
    values = torch.randint(-3, 4, (50,), generator=torch.Generator().manual_seed(0)).to(dtype)
    (cut,) = in_memory(cuts_at(sizes_of, lambda k, n: [20], positive=True), values)
    assert torch.equal(shrink(values.clone(), cut), torch.where(brute_force(values.abs().float(), 20), values, 0))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("gathered", [0, 2**21])
@pytest.mark.parametrize("positive", [True, False])
def test_cuts_of_several_tensors_together(gathered: int, positive: bool, monkeypatch: pytest.MonkeyPatch):
    """One threshold over all of them, and among equals the first of the first tensor."""
    monkeypatch.setattr(_top, "GATHERED", gathered)
    values = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(1)).float()
    parts = [values[:70], values[70:75], values[75:]]
    items = [Inputs([Held(part.clone())], "element") for part in parts]
    for keep in (1, 60, 61, 150, 299):
        (cut,) = Reduction(items, partial(cuts_at, sizes_of, lambda k, n, keep=keep: [keep], positive)).value()
        found = torch.cat([kept(part, cut, start) for part, start in zip(parts, (0, 70, 75), strict=True)])
        assert torch.equal(found, brute_force(values, keep))
