"""Splits: everything is tested once a round, groups stay together, classes are spread."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import folds, nested_folds


@pytest.mark.parametrize(("count", "k"), [(10, 5), (11, 4), (7, 7), (2, 2)])
def test_every_example_is_tested_once_a_round(count: int, k: int):
    found = list(folds(count, k, repeats=3, seed=1))
    assert len(found) == 3 * k
    for start in range(0, 3 * k, k):
        tested = torch.cat([split.test for split in found[start : start + k]])
        assert sorted(tested.tolist()) == list(range(count))
        for split in found[start : start + k]:
            assert sorted([*split.training.tolist(), *split.test.tolist()]) == list(range(count))
            assert count // k <= len(split.test) <= -(-count // k)
    if count > 3:
        assert any(not torch.equal(found[0].test, found[i].test) for i in (k, 2 * k))


def test_classes_are_spread_and_groups_stay_together():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 5)
    for split in folds(55, 5, labels=labels):
        assert torch.bincount(labels[split.test]).tolist() == [8, 2, 1]
    groups = ["a"] * 7 + ["b"] * 2 + ["c"] * 3 + ["d"]
    for split in folds(13, 3, groups=groups, repeats=2):
        assert not {groups[i] for i in split.training.tolist()} & {groups[i] for i in split.test.tolist()}


def test_nested():
    labels = torch.arange(36) % 3
    for split in nested_folds(36, 3, 4, labels=labels):
        assert len(split.inner) == 4
        tested = torch.cat([one.test for one in split.inner])
        assert sorted(tested.tolist()) == sorted(split.training.tolist())
        assert not set(tested.tolist()) & set(split.test.tolist())
        assert all(torch.bincount(labels[one.test]).tolist() == [2, 2, 2] for one in split.inner)


def test_refusals():
    for options in ({"k": 1}, {"k": 4}, {"repeats": 0}, {"labels": [0, 1, 0], "groups": [0, 1, 2]}, {"labels": [1]}):
        with pytest.raises(Error):
            folds(3, **options)
