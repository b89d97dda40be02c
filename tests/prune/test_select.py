"""So many of every few are kept, the highest, and among equals the first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.prune._select import kept_of_groups, pattern_of

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


def brute_force(score: Tensor, keep: int) -> Tensor:
    """By a stable sort on plain Python numbers; NaN is above all."""
    values = [math.inf if math.isnan(x) else x for x in score.flatten().tolist()]
    order = sorted(range(len(values)), key=lambda i: (not math.isnan(float(score.flatten()[i])), -values[i]))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.tensor(order[:keep], dtype=torch.long)] = True
    return mask.reshape(score.shape)


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


@pytest.mark.parametrize("group", [1, 4, 17, 300])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_long_runs_and_many_ties(group: int, levels: int):
    """One level: all are alike. Some runs have ties at their threshold and some have none."""
    generator = torch.Generator().manual_seed(group)
    score = torch.randint(-levels, levels, (3, 2 * group), generator=generator).float()
    score[0] = torch.randperm(2 * group, generator=generator)
    for keep in {0, 1, group // 3, group - 1, group}:
        found = kept_of_groups(score, keep=keep, group=group)
        for row, mask in zip(score, found, strict=True):
            for run, kept_here in zip(row.split(group), mask.split(group), strict=True):
                assert torch.equal(kept_here, brute_force(run, keep))


def test_scores_that_lie_otherwise_in_memory_and_none_at_all():
    score = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        kept_of_groups(score.t(), keep=2, group=4), kept_of_groups(score.t().contiguous(), keep=2, group=4)
    )
    for shape in ((0, 4), (3, 0)):
        assert kept_of_groups(torch.zeros(shape), keep=2, group=4).shape == shape


def test_patterns():
    assert pattern_of("2:4") == (2, 4)
    assert pattern_of(" 1:8 ") == (1, 8)
    assert pattern_of("4:4") == (4, 4)
    assert pattern_of("0:4") == (0, 4)


@pytest.mark.parametrize("word", ["5:4", "0:0", "2-4", "0.5", "", "2:4:8", "-1:4", "a:b", "٢:٤:"])
def test_what_is_no_pattern(word: str):
    with pytest.raises(Error, match=r"sparsity of w: .* is no pattern; write \"2:4\""):
        pattern_of(word, "sparsity of w")
