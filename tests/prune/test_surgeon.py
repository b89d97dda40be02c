"""Optimal Brain Surgeon, against fitting the rest again without each weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune._surgeon import obs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(rows: int = 30, inputs: int = 5) -> Tensor:
    """Inputs that go together."""
    return normal(rows, inputs) @ normal(inputs, inputs, seed=1)


def test_it_is_what_least_squares_leaves():
    inputs, weight = mixed(), normal(3, 5, seed=2)
    found = obs(weight, inputs.T @ inputs, damp=0.0)
    for row in range(3):
        for place in range(5):
            rest = [j for j in range(5) if j != place]
            target = inputs @ weight[row]
            fitted = torch.linalg.lstsq(inputs[:, rest], target[:, None]).solution[:, 0]
            left = (target - inputs[:, rest] @ fitted).square().sum()
            assert float(found[row, place]) == pytest.approx(float(left), rel=1e-5)


def test_with_a_diagonal_it_is_the_square_of_wanda():
    weight, energy = normal(3, 5).float(), normal(5, seed=1).float().square() + 0.1
    torch.testing.assert_close(obs(weight, torch.diag(energy), damp=0.0), ws.prune.wanda.kernel(weight, energy) ** 2)


def test_blocks_are_inverted_one_by_one():
    inputs, weight = mixed(inputs=6), normal(2, 6, seed=2).float()
    gram = inputs.T @ inputs
    blocks = torch.stack([gram[:3, :3], gram[3:, 3:]])
    apart = torch.cat([obs(weight[:, :3], gram[:3, :3]), obs(weight[:, 3:], gram[3:, 3:])], dim=1)
    torch.testing.assert_close(obs(weight, blocks), apart)
    torch.testing.assert_close(obs(weight, blocks, damp=0.0), obs(weight, torch.block_diag(*blocks), damp=0.0))


def test_a_copy_of_an_input_costs_nothing_and_a_dead_one_neither():
    inputs = mixed(inputs=4)
    inputs = torch.cat([inputs, inputs[:, :1], torch.zeros(30, 1)], dim=1)
    found = obs(torch.ones(1, 6), inputs.T @ inputs, damp=1e-6)
    assert float(found[0, 5]) == 0
    assert float(found[0, [0, 4]].max()) < 1e-3 * float(found[0, 1:4].min())
    assert not obs(torch.ones(2, 3), torch.zeros(3, 3)).any()


def test_convolutions_and_streams(tmp_path):
    weight, inputs = normal(4, 2, 3, 3).float(), mixed(40, 18)
    gram = (inputs.T @ inputs).float()
    torch.testing.assert_close(obs(weight, gram), obs(weight.flatten(1), gram).reshape(weight.shape))
    pruned = ws.prune.obs({"w": weight}, 0.5, stats={"w": gram})
    assert (pruned["w"].flatten(1) == 0).sum(1).tolist() == [9] * 4


def test_refusals():
    for stats, words in (
        (torch.ones(3), "needs how inputs go together"),
        (torch.full((3, 3), float("nan")), "NaN"),
    ):
        with pytest.raises(Error, match=words):
            obs(torch.ones(2, 3), stats)
    with pytest.raises(Error, match="damp"):
        obs(torch.ones(2, 3), torch.eye(3), damp=-1.0)
