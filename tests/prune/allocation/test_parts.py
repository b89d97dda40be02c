"""Budgets that are met exactly, and names of layers."""

from __future__ import annotations

import random

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.prune.allocation._parts import layer_of, met, share_of, sized


def test_shares_move_together_until_the_budget_is_met():
    chance = random.Random(0)
    for _ in range(200):
        names = [f"t{i}" for i in range(chance.randint(1, 6))]
        start = {name: chance.uniform(-2, 2) for name in names}
        sizes = {name: chance.randint(1, 50) for name in names}
        most = {name: chance.choice([0.0, 0.4, 1.0]) for name in names}
        able = sum(sizes[name] * most[name] for name in names) / sum(sizes.values())
        sparsity = able * chance.choice([0.0, chance.random(), 1.0])
        shares = met(start, sizes, sparsity, most)
        assert sum(sizes[n] * shares[n] for n in names) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-9)
        assert all(0 <= shares[n] <= most[n] for n in names)
        inside = [shares[n] - start[n] for n in names if 1e-9 < shares[n] < most[n] - 1e-9]
        if inside:  # one move for all; those at their ends would have gone further
            moved = inside[0]
            assert inside == pytest.approx([moved] * len(inside))
            assert all(shares[n] == pytest.approx(min(max(start[n] + moved, 0), most[n])) for n in names)


def test_a_budget_that_cannot_be_had():
    with pytest.raises(Error, match=r"mine: a sparsity of 0.6 in all cannot be had: at most 0.5 can be removed"):
        met({"a": 0.0, "b": 0.0}, {"a": 4, "b": 4}, 0.6, {"a": 1.0, "b": 0.0}, "mine")
    for wrong in (-0.1, 1.1, "2:4", True, float("nan"), {"*": 0.5}):
        with pytest.raises(Error, match="mine shares one sparsity between 0 and 1"):
            share_of(wrong, "mine")  # type: ignore[arg-type]


def test_tied_tensors_count_once():
    tied = torch.ones(2, 3)
    _, sizes = sized({"a.weight": tied, "b.weight": tied, "c.weight": torch.ones(4, 2), "c.bias": torch.ones(4)}, None)
    assert sizes == {"a.weight": 6, "c.weight": 8}


def test_layers_by_name():
    names = ["model.layers.10.mlp.up.weight", "h_1/w", "0.weight", "head.weight", "block12.weight", "a.3"]
    assert [layer_of(name) for name in names] == [
        "model.layers.10", "h_1", "0", "head.weight", "block12.weight", "a.3"
    ]  # fmt: skip
