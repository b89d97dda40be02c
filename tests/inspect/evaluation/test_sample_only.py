"""Losses from draws: their means against the exact losses, every subset by hand, and what is least."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import harmonic_log_loss, power_loss, quadratic_loss


def distribution(seed: int, size: int = 20) -> torch.Tensor:
    return torch.softmax(torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 0)


def drawn(chances: torch.Tensor, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(chances, math.prod(shape), replacement=True, generator=generator).view(shape)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_every_subset_by_hand(degree: int):
    draws, targets = drawn(distribution(0, 4), 5, 6), drawn(distribution(1, 4), 5, seed=1)
    total = 0.0
    for row, target in zip(draws.tolist(), targets.tolist(), strict=True):
        same = [len(set(chosen)) == 1 for chosen in itertools.combinations(row, degree)]
        hit = [set(chosen) == {target} for chosen in itertools.combinations(row, degree - 1)]
        total += (degree - 1) * sum(same) / len(same) - degree * sum(hit) / len(hit)
    assert power_loss(draws, targets, degree=degree).estimate == pytest.approx(total / 5)


@pytest.mark.parametrize(("degree", "count"), [(2, 2), (2, 8), (3, 3), (3, 9)])
def test_means_are_the_exact_losses(degree: int, count: int):
    p, q = distribution(0), distribution(1)
    found = power_loss(drawn(q, 20000, count), drawn(p, 20000, seed=1), degree=degree)
    exact = float((degree - 1) * (q**degree).sum() - degree * (p * q ** (degree - 1)).sum())
    assert abs(found.estimate - exact) < 3.5 * found.error
    assert found.error < 0.02
    if degree == 2:
        assert exact == pytest.approx(float((p - q).square().sum() - p.square().sum()))
        assert quadratic_loss(drawn(q, 20000, count), drawn(p, 20000, seed=1)) == found


def test_more_draws_narrow_the_interval():
    p, q = distribution(0), distribution(1)
    targets = drawn(p, 3000, seed=1)
    assert quadratic_loss(drawn(q, 3000, 16), targets).error < 0.7 * quadratic_loss(drawn(q, 3000, 2), targets).error


def test_the_harmonic_mean_is_the_log_loss():
    p, q = distribution(2, 6), distribution(3, 6)
    generator = torch.Generator().manual_seed(0)

    def draw(examples: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(q, len(examples), replacement=True, generator=generator)

    found = harmonic_log_loss(draw, drawn(p, 6000, seed=4), repeats=2)
    assert abs(found.estimate - float(-(p * q.log()).sum())) < 3.5 * found.error + 0.03


def test_the_harmonic_sum_by_hand():
    answers = iter([[1, 1], [1, 0], [0]])
    found = harmonic_log_loss(lambda examples: torch.tensor(next(answers)), torch.tensor([0, 0]))
    # The second target comes up on the second draw (1), the first on the third (1 + 1/2).
    assert found.estimate == pytest.approx((1 + 1.5) / 2)


def test_conditional_models_are_asked_by_example():
    targets = torch.tensor([3, 1, 2])
    assert harmonic_log_loss(lambda examples: targets[examples], targets, repeats=3).estimate == 0


def test_the_truth_has_the_least_loss():
    p = distribution(0, 5)
    targets = drawn(p, 4000, seed=9)
    for degree in (2, 3):
        own = power_loss(drawn(p, 4000, 12, seed=5), targets, degree=degree).estimate
        others = [power_loss(drawn(distribution(s, 5), 4000, 12, seed=s), targets, degree=degree).estimate
                  for s in range(10, 40)]  # fmt: skip
        assert own < min(others)


def test_refusals():
    with pytest.raises(Error, match="at least 3 draws"):
        power_loss(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long), degree=3)
    with pytest.raises(Error, match="whole numbers"):
        quadratic_loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    never = torch.ones_like
    with pytest.raises(Error, match="did not come up in 50"):
        harmonic_log_loss(never, torch.tensor([0]), limit=50)
    cut = harmonic_log_loss(never, torch.tensor([0]), limit=4, truncate=True)
    assert cut.estimate == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4)
    with pytest.raises(Error, match="asked for 1"):
        harmonic_log_loss(lambda examples: torch.tensor([0, 0]), torch.tensor([0]))
