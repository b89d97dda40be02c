"""Weights that fade out of an N:M pattern, against the formula by hand."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error, prune
from weightsmith.adapt import fold
from weightsmith.prune.sparse import advance, nm_decay
from weightsmith.prune.sparse._nm_decay import STEEPNESS, levels_of


def layer(inputs: int = 8, out: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, out, bias=False)


def mask_by_hand(weight: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(len(weight)):
        for begin in range(0, weight.shape[1], group):
            run = sorted(range(begin, begin + group), key=lambda j: (-abs(weight[row, j].item()), j))
            mask[row, run[:keep]] = True
    return mask


@pytest.mark.parametrize(
    ("decay", "progress", "share"),
    [
        ("linear", 0.1, 1.0),
        ("linear", 0.2, 1.0),
        ("linear", 0.35, 0.75),
        ("linear", 0.8, 0.0),
        ("linear", 1.0, 0.0),
        ("exponential", 0.5, math.exp(-STEEPNESS / 2)),
        ("exponential", 0.8, 0.0),
        ("hard", 0.0, 0.0),
    ],
)
def test_the_masked_part_has_its_share(decay, progress, share):
    model = layer()
    plain = model.weight.detach().clone()
    nm_decay(model, "2:4", decay=decay, start=0.2, end=0.8)
    advance(model, progress)
    mask = mask_by_hand(plain, 2, 4)
    torch.testing.assert_close(model.weight, torch.where(mask, plain, plain * share))


@pytest.mark.parametrize("pull", [0.0, 0.25])
@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_the_gradient_reaches_all_weights_whole_and_pulls_masked_ones(pull, progress):
    model = layer()
    plain = model.weight.detach().clone()
    nm_decay(model, "1:4", end=1.0, pull=pull)
    advance(model, progress)
    x, goal = torch.randn(5, 8), torch.randn(5, 3)
    effective = model.weight.detach().clone().requires_grad_()
    ((x @ effective.T - goal) ** 2).sum().backward()
    ((model(x) - goal) ** 2).sum().backward()
    by_hand = effective.grad + pull * ~mask_by_hand(plain, 1, 4) * plain
    torch.testing.assert_close(model.parametrizations.weight.original.grad, by_hand)


def test_at_the_end_it_is_the_mask_of_magnitudes_and_folds_to_exactly_n_of_m():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4))
    expected = prune.magnitude(model, sparsity={"0.*": "2:8", "3.*": "1:3"}).to_dict()
    nm_decay(model, {"0.*": "2:8", "3.*": "1:3"})
    advance(model, 1.0)
    fold(model)
    assert torch.equal(model[0].weight, expected["0.weight"])
    assert torch.equal(model[3].weight, expected["3.weight"])
    assert ((model[0].weight.reshape(6, -1, 8) != 0).sum(-1) == 2).all()
    assert ((model[3].weight.reshape(4, -1, 3) != 0).sum(-1) == 1).all()


def test_a_masked_weight_can_come_back():
    model = layer(4, 1)
    model.weight.data.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    nm_decay(model, "2:4", decay="hard")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (-(3.5 * model.weight[0, 1])).backward()
    optimizer.step()
    assert model.weight.tolist() == [[4.0, 4.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("keep", "group", "levels"),
    [(1, 8, [7, 4, 2, 1]), (2, 4, [3, 2]), (3, 4, [3]), (1, 2, [1]), (3, 8, [7, 4, 3]), (5, 8, [7, 5])],
)
def test_structure_goes_by_halves_in_equal_phases(keep, group, levels):
    assert levels_of(keep, group) == levels
    model = layer(group * 2)
    found = nm_decay(model, f"{keep}:{group}", decay="structure", start=0.2, end=0.8)["weight"]
    seen = []
    for step in range(1000):
        found.progress = step / 1000
        seen.append(found.now()[0])
        assert found.now()[1] == (1.0 if step < 200 else 0.0)
    assert seen[:200] == [group] * 200
    phases = [sum(1 for one in seen[200:800] if one == level) for level in levels]
    assert max(phases) - min(phases) <= 2  # the thousandths are rounded
    assert seen[800:] == [keep] * 200


def test_bad_patterns_and_phases_are_found_before_anything_changes():
    model = layer(6)
    for said, message in (("2:4", "groups of 4"), ("0:3", "keeps nothing"), ("3:3", "keeps nothing"), (0.5, "pattern")):
        with pytest.raises(Error, match=message):
            nm_decay(model, said)
    with pytest.raises(Error, match="6 inputs a row cannot"):
        nm_decay(layer(6, 2), "2:4")
    with pytest.raises(Error, match="decay is one of"):
        nm_decay(model, "1:3", decay="cosine")
    with pytest.raises(Error, match="start < end"):
        nm_decay(model, "1:3", start=0.8, end=0.8)
    assert type(model) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["weight"]


def test_ties_and_nan_keep_the_count():
    model = layer(4, 2)
    model.weight.data.copy_(torch.tensor([[1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, float("nan")]]))
    nm_decay(model, "2:4", decay="hard")
    assert model.weight[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert model.weight[1, 3].isnan()
