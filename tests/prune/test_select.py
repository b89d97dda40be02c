"""Exactly so many are kept, the highest, and among equals the first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune._select import Cut, cut_at, kept, kept_of_groups, keys, pattern_of
from weightsmith.prune.room import _cut_together
from weightsmith.weights import Held, Inputs, Output, Spec, Work, _lazy, in_memory, materialize

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
    """The masks of several tensors under one budget, streamed."""
    nodes = {
        name: Output(
            Work(torch.clone, Inputs([Held(tensor)], "element"), {"": Spec(tuple(tensor.shape), tensor.dtype)})
        )
        for name, tensor in tensors.items()
    }
    return {name: materialize(mask) for name, mask in _cut_together(nodes, share).items()}


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


# N of M


def test_n_of_m_by_hand():
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0]])
    assert kept_of_groups(score, keep=2, group=4).tolist() == [[False, True, True, False, True, False, False, True]]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.data())
def test_n_of_m_keeps_the_highest_of_every_group(rows: int, groups: int, size: int, data: st.DataObject):
    keep = data.draw(st.integers(0, size))
    count = rows * groups * size
    values = data.draw(st.lists(st.sampled_from(AWKWARD), min_size=count, max_size=count))
    score = torch.tensor(values, dtype=torch.float32).reshape(rows, groups * size)
    found = kept_of_groups(score, keep=keep, group=size)
    for row, mask in zip(score, found, strict=True):
        for run, kept_here in zip(row.split(size), mask.split(size), strict=True):
            assert torch.equal(kept_here, brute_force(run, keep))


def test_n_of_m_runs_over_all_axes_after_the_first():
    score = torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    found = kept_of_groups(score, keep=1, group=4)
    assert torch.equal(found, kept_of_groups(score.reshape(3, 12), keep=1, group=4).reshape(score.shape))


def test_patterns():
    assert pattern_of("2:4") == (2, 4)
    assert pattern_of(" 1:8 ") == (1, 8)
    assert pattern_of("4:4") == (4, 4)
    assert pattern_of("0:4") == (0, 4)


@pytest.mark.parametrize("word", ["5:4", "0:0", "2-4", "0.5", "", "2:4:8", "-1:4", "a:b", "٢:٤:"])
def test_what_is_no_pattern(word: str):
    with pytest.raises(Error, match=r"sparsity of w: .* is no pattern; write \"2:4\""):
        pattern_of(word, "sparsity of w")
