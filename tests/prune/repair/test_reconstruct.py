"""One block trained on the outputs of another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.prune.repair import reconstruct, trainable
from weightsmith.prune.repair._reconstruct import descend, fit


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 6))
    pruned = copy.deepcopy(dense)
    for name in ("0.weight", "3.weight"):
        weight = pruned.get_parameter(name)
        weight.data[weight.abs() < weight.abs().median()] = 0
    return pruned, dense


def data(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 16, 6, generator=torch.Generator().manual_seed(1)))


def test_the_outputs_come_closer_and_the_zeros_stay():
    pruned, dense = pair()
    zeros = {name: value == 0 for name, value in pruned.named_parameters()}
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    losses = reconstruct(pruned, dense, data(), steps=150, rate=1e-2)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout
    assert pruned.training
    assert dense.training
    assert len(losses) == 150
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(torch.equal(value == 0, zeros[name]) for name, value in pruned.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(p.grad is None for p in dense.parameters())


def test_the_first_loss_by_hand_and_the_same_every_time():
    pruned, dense = pair()
    other = copy.deepcopy(pruned)
    inputs = data(1)
    dense.eval()
    other.eval()
    target = dense(inputs[0])
    expected = float((other(inputs[0]) - target).square().sum() / target.square().sum())
    losses = reconstruct(pruned, dense, inputs, steps=5, seed=2)
    assert losses[0] == pytest.approx(expected)
    assert reconstruct(other, dense, inputs, steps=5, seed=2) == losses


def test_only_what_needs_gradients_is_trained():
    pruned, dense = pair()
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    with trainable(pruned, ("biases",)) as chosen:
        reconstruct(pruned, dense, data(), steps=5)
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(chosen) == {"0.bias", "3.bias"}


def test_masks_that_are_given_are_kept():
    pruned, dense = pair()
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[0] = True
    reconstruct(pruned, dense, data(), steps=3, masks={"0.weight": mask})
    assert torch.equal(pruned[0].weight != 0, mask & (pruned[0].weight != 0))
    assert not pruned[0].weight[1:].any()
    assert (pruned[3].weight != 0).all()  # of these none was said to be held


def test_the_rate_falls_along_a_line():
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.item()
    descend(layer, [layer.weight], lambda number: layer.weight.sum(), 1, steps=10, rate=0.01, masks={}, seed=0)
    # Where the slope is the same at each step, Adam goes by the rate: 0.01 (1 + 0.9 + ... + 0.1).
    assert before - layer.weight.item() == pytest.approx(0.055, rel=1e-4)


def test_padded_tokens_do_not_count():
    layer, target = nn.Linear(2, 2), torch.zeros(1, 3, 2)
    mask = torch.tensor([[1, 1, 0]])
    batch = {"hidden": torch.ones(1, 3, 2), "attention_mask": mask}
    target[0, 2] = 1e6
    target[0, 0] = 1.0

    def forward(block: Any, batch: Any) -> Tensor:
        return block(batch["hidden"])

    expected = float((layer(batch["hidden"]) - target)[0, :2].square().sum() / 2)
    losses = fit(layer, [batch], [target], forward, steps=1, rate=1e-3, masks=None, seed=0)
    assert losses[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": []}, "at least 1 batch"),
        ({"rate": 0.0}, "rate above 0"),
        ({"masks": {"9.weight": torch.ones(1, 1).bool()}}, "mask of 9.weight"),
        ({"inputs": [torch.full((2, 6), torch.nan)]}, "loss is nan"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str):
    pruned, dense = pair()
    with pytest.raises(Error, match=says):
        reconstruct(pruned, dense, **({"inputs": data()} | change))
    for parameter in pruned.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(Error, match="nothing in the module needs gradients"):
        reconstruct(pruned, dense, data())
