"""The smallest weights go."""

from __future__ import annotations

import pytest
import torch

import weightsmith as ws
from weightsmith.prune._magnitude import magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_score_is_the_absolute_value(dtype: torch.dtype):
    weight = torch.tensor([[-3.0, 1.0], [0.0, -0.5]], dtype=dtype)
    found = magnitude(weight)
    assert found.dtype == torch.float32
    assert found.tolist() == [[abs(float(x)) for x in row] for row in weight]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_what_is_pruned_is_smaller_than_what_is_kept(sparsity: float):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = ws.prune.magnitude({"l.weight": weight}, sparsity)["l.weight"]
    gone = found == 0
    assert int(gone.sum()) == round(sparsity * 600)
    assert torch.equal(found[~gone], weight[~gone])
    if 0 < sparsity < 1:
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_values_that_are_not_finite_are_the_last_to_go():
    weight = torch.tensor([[1.0, torch.nan, -torch.inf, 2.0]])
    found = ws.prune.magnitude({"l.weight": weight}, 0.5)["l.weight"]
    assert found[0, [0, 3]].tolist() == [0, 0]
    assert found[0, 1].isnan()
    assert found[0, 2] == -torch.inf


def test_called_with_a_tensor_it_is_the_score():
    assert ws.prune.magnitude(torch.tensor([-2.0])).tolist() == [2]
