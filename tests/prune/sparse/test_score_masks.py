"""Masks that are learned over frozen weights: exact counts, gradients by hand, and the swaps that are allowed."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error, prune
from weightsmith.adapt import fold
from weightsmith.prune.sparse import advance, score_masks
from weightsmith.prune.sparse._score_masks import swapped


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


def zeros(model: nn.Module) -> list[int]:
    return [int((model[i].weight == 0).sum()) for i in (0, 2)]


def learned(model, steps=12, lr=0.3, total=12):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        advance(model, (step + 1) / total)
        yield step


@pytest.mark.parametrize("restriction", [None, 0.0, 4.0])
@pytest.mark.parametrize("start", ["magnitude", "equal", "random"])
def test_the_sparsity_is_exact_in_every_step_and_weights_never_change(start, restriction):
    model = network()
    plain = [model[i].weight.detach().clone() for i in (0, 2)]
    found = score_masks(model, {"0.*": 0.75, "*": 0.33}, start=start, restriction=restriction)
    assert zeros(model) == [45, 13]
    first = [one.mask().clone() for one in found.values()]
    for _ in learned(model):
        assert zeros(model) == [45, 13]
    assert any(not torch.equal(one.mask(), mask) for one, mask in zip(found.values(), first, strict=True))
    for weight, i in zip(plain, (0, 2), strict=True):
        assert torch.equal(model[i].parametrizations.weight.original, weight)
    fold(model)
    for weight, i in zip(plain, (0, 2), strict=True):
        assert torch.equal(model[i].weight, torch.where(model[i].weight != 0, weight, 0.0))


@pytest.mark.parametrize("start", ["magnitude", "equal"])
def test_it_begins_at_the_mask_of_magnitudes(start):
    model = network()
    expected = prune.magnitude(model, sparsity=0.7).to_dict()
    made = score_masks(model, 0.7, start=start)["0.weight"]
    if start == "equal":
        assert made.score.unique().tolist() == pytest.approx([0.99, 1.0])
    assert torch.equal(model[0].weight, expected["0.weight"])
    assert torch.equal(model[2].weight, expected["2.weight"])


def test_random_scores_depend_on_seed_and_name_alone():
    scores = [score_masks(network(), 0.5, start="random", seed=seed) for seed in (2**40, 2**40, 2**40 + 2**35)]
    one, same, other = ({name: made.score for name, made in found.items()} for found in scores)
    assert torch.equal(one["0.weight"], same["0.weight"])
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.equal(one["0.weight"].flatten()[:40], one["2.weight"].flatten())


def test_only_scores_learn_and_get_weight_times_gradient():
    model = network()
    found = score_masks(model, 0.5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.parametrizations.weight.0.score",
        "2.parametrizations.weight.0.score",
    ]
    x, goal = torch.randn(7, 6), torch.randn(7, 4)
    effective = model[2].weight.detach().clone().requires_grad_()
    hidden = model[1](model[0](x)).detach()
    ((hidden @ effective.T + model[2].bias - goal) ** 2).sum().backward()
    ((model(x) - goal) ** 2).sum().backward()
    plain = model[2].parametrizations.weight.original
    torch.testing.assert_close(found["2.weight"].score.grad, effective.grad * plain)


def swaps_by_hand(mask, score, asked, share):
    coming = sorted((j for j in range(len(mask)) if asked[j] and not mask[j]), key=lambda j: -score[j])
    going = sorted((j for j in range(len(mask)) if mask[j] and not asked[j]), key=lambda j: score[j])
    count = math.ceil(share * len(coming))
    made = list(mask)
    for j in coming[:count]:
        made[j] = True
    for j in going[:count]:
        made[j] = False
    return made


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 1.0])
def test_swaps_take_the_highest_in_and_the_lowest_out(share):
    torch.manual_seed(3)
    score, mask = torch.randn(30), torch.zeros(30, dtype=torch.bool)
    mask[:11] = True
    asked = torch.zeros(30, dtype=torch.bool)
    asked[score.topk(11).indices] = True
    before = mask.clone()
    made = swapped(mask, score, asked, share)
    assert made.tolist() == swaps_by_hand(mask.tolist(), score.tolist(), asked.tolist(), share)
    assert made.sum() == 11
    assert torch.equal(mask, before)
    assert torch.equal(swapped(mask, score, mask, share), mask)
    now, best = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    assert torch.equal(swapped(now, torch.ones(4), best, 1.0), best)  # of equals what is asked for stays


def test_fewer_swaps_are_made_as_time_goes_by_and_none_without_advance():
    changes = []
    for progress in (0.0, 0.5, 0.9, 1.0):
        model = nn.Linear(40, 25, bias=False)
        made = score_masks(model, 0.5, restriction=2.0)["weight"]
        before = made.mask().clone()
        with torch.no_grad():
            made.score.neg_()
        assert torch.equal(model.weight != 0, before)
        advance(model, progress)
        assert made.mask().sum() == 500
        changes.append(int((made.mask() & ~before).sum()))
    assert changes == [500, 125, math.ceil((1 - 0.9) ** 2 * 500), 0]


def test_whole_rows_and_columns_go():
    torch.manual_seed(0)
    for structure, axis in (("row", 0), ("column", 1)):
        model = nn.Conv2d(6, 8, 3)
        made = score_masks(model, 0.5, structure=structure, restriction=1.0)["weight"]
        with torch.no_grad():
            made.score.copy_(torch.randn(8, 6, 3, 3))
        advance(model, 0.4)
        rest = [other for other in range(4) if other != axis]
        alive = (model.weight != 0).float().mean(dim=rest)
        assert set(alive.tolist()) == {0.0, 1.0}
        assert alive.sum() == len(alive) / 2


@pytest.mark.parametrize("restriction", [None, 1.0])
def test_the_mask_that_is_told_is_the_one_in_force(restriction):
    model = network()
    made = score_masks(model, 0.5, restriction=restriction)["0.weight"]
    with torch.no_grad():
        made.score.neg_()
    assert torch.equal(made.mask(), model[0].weight != 0)
    advance(model, 0.25)
    assert torch.equal(made.mask(), model[0].weight != 0)
    assert torch.equal(made.mask(), made.asked()) == (restriction is None)


def test_equal_scores_are_kept_in_order_and_the_count_is_that_of_prune():
    for shape in ((3, 5), (5, 3), (7, 9)):
        model = nn.Linear(*shape, bias=False)
        expected = prune.magnitude(model, sparsity=0.5).to_dict()["weight"]
        score_masks(model, 0.5)
        assert torch.equal(model.weight, expected)
    model = nn.Linear(5, 3, bias=False)
    model.weight.data.fill_(-2.0)
    score_masks(model, 0.6)
    assert (model.weight != 0).flatten().tolist() == [True] * 6 + [False] * 9


def test_nothing_and_everything_can_go():
    model = network()
    score_masks(model, {"0.*": 0.0, "2.*": 1.0})
    assert zeros(model) == [0, 40]
    for _ in learned(model, steps=2):
        assert zeros(model) == [0, 40]


def test_refusals():
    for wrong, message in (
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": -0.1}, "between 0 and 1"),
        ({"sparsity": math.nan}, "between 0 and 1"),
        ({"sparsity": "2:4"}, "between 0 and 1"),
        ({"start": "large"}, "scores start as"),
        ({"structure": "block"}, "structure is one of"),
        ({"restriction": -1.0}, "restriction"),
    ):
        model = network()
        with pytest.raises(Error, match=message):
            score_masks(model, **wrong)
        assert all(p.requires_grad for p in model.parameters())
        assert type(model[0]) is nn.Linear
