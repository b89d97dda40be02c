"""Wanda: values times the norms of their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    weight, inputs = normal(3, 4), normal(7, 4, seed=1)
    expected = torch.tensor([[abs(float(w)) * float(inputs[:, j].norm()) for j, w in enumerate(row)] for row in weight])
    gram = inputs.T @ inputs
    for stats in (gram, gram.diagonal(), torch.stack([gram[:2, :2], gram[2:, 2:]])):
        torch.testing.assert_close(ws.prune.wanda.kernel(weight, stats), expected)


def test_with_equal_inputs_it_is_magnitude_by_row():
    weights = {"w": normal(5, 8)}
    equal = ws.prune.wanda(weights, 0.5, stats={"w": torch.full((8,), 3.0)}, pattern="*")
    assert torch.equal(equal["w"], ws.prune.magnitude(weights, 0.5, scope="row", pattern="*")["w"])


def test_from_data_each_row_loses_its_share():
    layer = nn.Linear(8, 5, bias=False)
    stats = ws.stats.gram(layer, [normal(20, 8)])
    pruned = ws.prune.wanda(layer, 0.25, stats=stats)["weight"]
    assert (pruned == 0).sum(dim=1).tolist() == [2] * 5


def test_statistics_that_will_not_do():
    weights = {"w": normal(2, 4)}
    for stats, words in (
        (None, "wanda needs stats="),
        ({"v": torch.ones(4)}, "stats say nothing of w"),
        ({"w": torch.ones(3)}, r"of w is \[3\], which does not fit its weight \[2, 4\]"),
        ({"w": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "input 1 has the sum of squares nan"),
    ):
        with pytest.raises(Error, match=words):
            ws.prune.wanda(weights, 0.5, stats=stats, pattern="*")["w"]


def test_dead_inputs_go_first():
    pruned = ws.prune.wanda({"w": normal(3, 4)}, 0.5, stats={"w": torch.tensor([0.0, 1.0, 0.0, 1.0])}, pattern="*")["w"]
    assert (pruned[:, [0, 2]] == 0).all()
    assert (pruned[:, [1, 3]] != 0).all()
