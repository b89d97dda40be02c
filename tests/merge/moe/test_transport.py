"""Reducing many mixtures of experts to one: planted experts, limits, and the cost by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.merge.moe import Mixture, expected, reduce_mixture
from weightsmith.merge.moe._gaussian import softmax_regression, with_one
from weightsmith.merge.moe._transport import barycentres, costs, ordered, transport

PLANTED = Mixture(
    torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64),
    torch.tensor([[1.0, 2.0], [-2.0, -1.0]], dtype=torch.float64),
    torch.tensor([0.1, 0.3], dtype=torch.float64),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def machines(count: int, noise: float, experts: int = 3, width: int = 2, seed: int = 0) -> Mixture:
    gates, means = random(experts, width + 1, seed=seed), 3 * random(experts, width + 1, seed=seed + 1)
    return Mixture(
        gates + noise * random(count, experts, width + 1, seed=seed + 2),
        means + noise * random(count, experts, width + 1, seed=seed + 3),
        0.5 + random(count, experts, seed=seed + 4).square() * noise,
    )


def shuffled(mixtures: Mixture, seed: int) -> Mixture:
    """The experts of every machine in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(mixtures.variances.shape[1], generator=generator) for _ in mixtures.variances]
    return Mixture(*(torch.stack([one[o] for one, o in zip(part, orders, strict=True)]) for part in mixtures))


def divergence(many: Mixture, few: Mixture, weight: list[float], features: Tensor) -> float:
    """The formula, in loops."""
    total = 0.0
    for x in with_one(features):
        for machine, share in enumerate(weight):
            gate = (many.gates[machine] @ x).softmax(0)
            for l in range(len(gate)):
                mean, spread = float(many.experts[machine, l] @ x), float(many.variances[machine, l])
                best = math.inf
                for j in range(len(few.variances)):
                    centre, own = float(few.experts[j] @ x), float(few.variances[j])
                    best = min(best, 0.5 * (math.log(own / spread) + (spread + (mean - centre) ** 2) / own - 1))
                total += share * float(gate[l]) * best
    return total / len(features)


def test_the_divergence_is_the_formula():
    many, features = machines(4, 0.5), random(15, 2, seed=9)
    weight = [0.1, 0.2, 0.3, 0.4]
    found = reduce_mixture(many, features, weight=weight)
    assert found.divergence == pytest.approx(divergence(many, found.mixture, weight, features), rel=1e-9)
    unscaled = reduce_mixture(many, features, weight=[1, 2, 3, 4])
    torch.testing.assert_close(unscaled.mixture.experts, found.mixture.experts)


@pytest.mark.parametrize("assignment", ["input", "component"])
def test_no_small_change_of_the_experts_is_better(assignment: str):
    many, features = machines(5, 0.4, seed=20), random(40, 2, seed=9)
    found = reduce_mixture(many, features, assignment=assignment)  # type: ignore[arg-type]
    rows, local = with_one(features), ordered(many, with_one(features))
    likely = (torch.einsum("mkd,nd->nmk", local.gates, rows).softmax(-1) / 5).flatten(1)
    flat = Mixture(*(part.flatten(0, 1) for part in local))
    plan, cost = transport(flat, found.mixture, likely, rows, assignment)  # type: ignore[arg-type]
    assert cost == pytest.approx(found.divergence, rel=1e-9)
    for seed in range(20):
        other = found.mixture._replace(
            experts=found.mixture.experts + 1e-3 * random(3, 3, seed=seed),
            variances=found.mixture.variances * (1 + 1e-3 * random(3, seed=seed + 50)),
        )
        assert float((plan * costs(flat, other, rows)).sum() / len(rows)) >= cost


@pytest.mark.parametrize("assignment", ["input", "component"])
def test_every_step_lowers_the_divergence(assignment: str):
    many, features = machines(6, 1.5, seed=30), random(50, 2, seed=9)
    rows = with_one(features)
    likely = (torch.einsum("mkd,nd->nmk", many.gates, rows).softmax(-1) / 6).flatten(1)
    flat, few = Mixture(*(part.flatten(0, 1) for part in many)), Mixture(*(part[0] for part in many))
    before = math.inf
    for _ in range(10):
        plan, cost = transport(flat, few, likely, rows, assignment)  # type: ignore[arg-type]
        torch.testing.assert_close(plan.sum(2), likely)  # all is moved, and nothing twice
        assert cost <= before + 1e-9
        few, before = barycentres(flat, few, plan, rows), cost


def test_the_order_of_experts_makes_no_difference():
    many, features = machines(6, 0.5, experts=4), random(60, 2, seed=9)
    found = reduce_mixture(many, features)
    for seed in range(3):
        other = reduce_mixture(shuffled(many, seed), features)
        assert other.divergence == found.divergence
        for one, two in zip(other.mixture, found.mixture, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("assignment", ["input", "component"])
def test_planted_experts_are_found_again(assignment: str):
    noise = [0.05 * random(8, 2, 2, seed=seed) for seed in (1, 2)]
    many = shuffled(
        Mixture(PLANTED.gates + noise[0], PLANTED.experts + noise[1], PLANTED.variances.expand(8, 2).clone()), 3
    )
    found = reduce_mixture(many, random(300, 1, seed=9), assignment=assignment).mixture  # type: ignore[arg-type]
    order = PLANTED.experts[:, 1].argsort()
    torch.testing.assert_close(found.experts, PLANTED.experts[order], atol=0.06, rtol=0)
    torch.testing.assert_close(found.variances, PLANTED.variances[order], atol=0.03, rtol=0)
    gap = PLANTED.gates[order][1] - PLANTED.gates[order][0]
    torch.testing.assert_close(found.gates[1] - found.gates[0], gap, atol=0.35, rtol=0)


def test_equal_machines_are_one_of_them():
    many = Mixture(*(part.expand(5, *part.shape).clone() for part in PLANTED))
    features = random(100, 1, seed=9)
    found = reduce_mixture(many, features)
    torch.testing.assert_close(expected(found.mixture, features), expected(PLANTED, features), atol=1e-4, rtol=1e-4)
    assert found.divergence == pytest.approx(0, abs=1e-12)


def test_one_machine_is_kept():
    found = reduce_mixture(Mixture(*(part[None] for part in PLANTED)), random(100, 1, seed=9)).mixture
    torch.testing.assert_close(found.experts, PLANTED.experts.flip(0))
    torch.testing.assert_close(found.variances, PLANTED.variances.flip(0))


def test_one_expert_each_is_the_weighted_mean():
    """A line through means of lines is the mean of the lines; its variance has their spread in it."""
    many, features, weight = machines(4, 1.0, experts=1), random(30, 2, seed=9), torch.tensor([0.4, 0.3, 0.2, 0.1])
    found = reduce_mixture(many, features, weight=weight.tolist()).mixture
    mean = (weight[:, None].double() * many.experts[:, 0]).sum(0)
    torch.testing.assert_close(found.experts[0], mean)
    predictions = with_one(features) @ many.experts[:, 0].T
    spread = ((predictions - (with_one(features) @ mean)[:, None]).square() * weight).sum(1).mean()
    torch.testing.assert_close(found.variances[0], (weight * many.variances[:, 0]).sum() + spread)


def test_a_machine_of_no_weight_says_nothing():
    many, features = machines(4, 0.5), random(30, 2, seed=9)
    three = Mixture(*(part[:3] for part in many))
    found = reduce_mixture(many, features, weight=[1, 1, 1, 0], starts=3)
    for one, two in zip(found.mixture, reduce_mixture(three, features).mixture, strict=True):
        torch.testing.assert_close(one, two)


def test_an_expert_to_which_nothing_moves_stays():
    """A start whose second expert is nobody's nearest."""
    many = Mixture(torch.zeros(1, 1, 2).double(), torch.tensor([[[0.0, 1.0]]]).double(), torch.ones(1, 1).double())
    few = Mixture(torch.zeros(2, 2).double(), torch.tensor([[0.0, 1.5], [0.0, 90.0]]).double(), torch.ones(2).double())
    rows = with_one(random(5, 1))
    plan, _ = transport(Mixture(*(part[0] for part in many)), few, torch.ones(5, 1).double(), rows, "input")
    moved = barycentres(Mixture(*(part[0] for part in many)), few, plan, rows)
    torch.testing.assert_close(moved.experts, torch.tensor([[0.0, 1.0], [0.0, 90.0]]).double())
    torch.testing.assert_close(moved.variances, torch.ones(2).double())


def test_more_starts_are_never_worse():
    many, features = machines(8, 2.0, experts=4, seed=70), random(60, 2, seed=9)
    found = [reduce_mixture(many, features, starts=starts).divergence for starts in (1, 4, 8)]
    assert found[0] >= found[1] >= found[2]


def test_gates_are_the_softmax_regression_of_what_is_moved():
    shares = torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares, rows = shares / shares.sum(1, keepdim=True), with_one(random(40, 2))
    gates = softmax_regression(rows, shares).requires_grad_()
    loss = -(shares * (rows @ gates.T).log_softmax(1)).sum()
    slope = torch.autograd.grad(loss, gates)[0]
    assert slope.abs().max() < 1e-3
    torch.testing.assert_close(gates.sum(0), torch.zeros(3, dtype=torch.float64))


def test_inputs_are_left_alone_and_float32_is_taken():
    many, features = machines(3, 0.5), random(20, 2, seed=9)
    before = [part.clone() for part in many]
    wide = reduce_mixture(many, features)
    assert all(torch.equal(one, two) for one, two in zip(many, before, strict=True))
    narrow = reduce_mixture(Mixture(*(part.float() for part in many)), features.float())
    assert narrow.mixture.experts.dtype == torch.float64
    torch.testing.assert_close(narrow.mixture.experts, wide.mixture.experts, atol=1e-3, rtol=1e-3)


def test_refusals():
    many, features = machines(3, 0.5), random(20, 2, seed=9)
    for text, change in {
        r"needs gates and experts \[m, k, d \+ 1\]": {"mixtures": Mixture(*(part[0] for part in many))},
        r"needs features \[n, 2\], got \[20, 3\]": {"features": random(20, 3)},
        "positive variances": {"mixtures": many._replace(variances=-many.variances)},
        "finite gates": {"mixtures": many._replace(gates=many.gates * math.nan)},
        "weights that are not negative": {"weight": [1, 1, -1]},
        "one number for each of the 3 models, got 2": {"weight": [1, 1]},
        "assignment is one of input, component; got 'all'": {"assignment": "all"},
        "needs steps >= 1": {"steps": 0},
    }.items():
        with pytest.raises(Error, match=text):
            reduce_mixture(**({"mixtures": many, "features": features} | change))  # type: ignore[arg-type]
