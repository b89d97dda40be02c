"""Exact counts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from weightsmith.prune.sparse import apportioned, highest


def by_hand(score: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    values = [float("inf") if value != value else value for value in score.flatten().tolist()]
    allowed = [True] * len(values) if among is None else among.flatten().tolist()
    order = sorted((i for i in range(len(values)) if allowed[i]), key=lambda i: (-values[i], i))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(score.shape)


@pytest.mark.parametrize("seed", range(20))
def test_highest_is_a_stable_sort(seed: int):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(5, 7, generator=generator)
    score = (score * 2).round() if seed % 2 else score  # many ties, and minus zero beside zero
    among = torch.rand(5, 7, generator=generator) > 0.4
    for count in (0, 1, 4, 17, 34, 35):
        assert torch.equal(highest(score, count), by_hand(score, count))
        assert torch.equal(highest(score, count, among), by_hand(score, count, among))


def test_highest_of_odd_inputs():
    score = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert highest(score, 1).tolist() == [False, True, False, False]
    assert highest(score, 1, torch.tensor([False, False, False, True])).tolist() == [False, False, False, True]
    assert highest(torch.zeros(0), 0).shape == (0,)
    assert highest(torch.zeros(3, 2).t(), 1).sum() == 1
    assert highest(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 1).tolist() == [False, True]


def test_highest_leaves_among_alone():
    among = torch.tensor([True, False])
    highest(torch.ones(2), 2, among)[:] = True
    assert among.tolist() == [True, False]


def test_apportioned_adds_up_and_fits():
    chance = random.Random(0)
    for _ in range(300):
        names = [str(i) for i in range(chance.randint(1, 6))]
        room = {name: chance.randint(0, 9) for name in names}
        shares = {name: chance.choice([0.0, chance.random(), 5.0]) for name in names}
        total = chance.randint(0, sum(room.values()))
        found = apportioned(shares, total, room)
        assert sum(found.values()) == total
        assert all(0 <= found[name] <= room[name] for name in names)


def test_apportioned_is_in_proportion_where_there_is_room():
    found = apportioned({"a": 0.21, "b": 0.30, "c": 0.49}, 10, {"a": 10, "b": 10, "c": 10})
    assert found == {"a": 2, "b": 3, "c": 5}


def test_apportioned_shares_the_overflow_in_proportion():
    assert apportioned({"a": 8.0, "b": 1.0, "c": 3.0}, 12, {"a": 4, "b": 99, "c": 99}) == {"a": 4, "b": 2, "c": 6}


def test_apportioned_without_shares_goes_by_room():
    assert apportioned({"a": 0.0, "b": 0.0}, 4, {"a": 2, "b": 6}) == {"a": 1, "b": 3}
    assert apportioned({"a": 1.0, "b": 0.0}, 5, {"a": 2, "b": 6}) == {"a": 2, "b": 3}
    assert apportioned({}, 0, {}) == {}
