"""Formulas of losses: by hand in plain Python, in their limits, and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import _language as language

N, D = torch.tensor([1e6, 3e7, 8e9], dtype=torch.float64), torch.tensor([2e9, 5e8, 1e11], dtype=torch.float64)


def one(value):
    return torch.tensor(value, dtype=torch.float64)


def test_chinchilla_by_hand():
    found = scaling.chinchilla(N, D, one(1.5), one(300.0), one(900.0), one(0.3), one(0.4))
    by_hand = [1.5 + 300 / n**0.3 + 900 / d**0.4 for n, d in zip(N.tolist(), D.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-14)


def test_kaplan_by_hand():
    n, d = 3e7, 5e8
    assert scaling.size_law(one(n), one(8.8e13), one(0.076)).item() == pytest.approx((8.8e13 / n) ** 0.076)
    assert scaling.data_law(one(d), one(5.4e13), one(0.095)).item() == pytest.approx((5.4e13 / d) ** 0.095)
    by_hand = ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095
    made = scaling.joint_law(one(n), one(d), one(8.8e13), one(5.4e13), one(0.076), one(0.095))
    assert made.item() == pytest.approx(by_hand)
    by_hand = (6.5e13 / n) ** 0.077 + (2.1e3 / 1e4) ** 0.76
    made = scaling.step_law(one(n), one(1e4), one(6.5e13), one(2.1e3), one(0.077), one(0.76))
    assert made.item() == pytest.approx(by_hand)
    assert scaling.critical_batch(one(2.5), one(2e8), one(0.21)).item() == pytest.approx(2e8 / 2.5 ** (1 / 0.21))


def test_the_joint_law_has_the_laws_of_size_and_data_as_limits():
    constants = {"Nc": one(8.8e13), "Dc": one(5.4e13), "alpha_N": one(0.076), "alpha_D": one(0.095)}
    endless = scaling.joint_law(N, one(1e60).expand(3), **constants)
    assert torch.allclose(endless, scaling.size_law(N, constants["Nc"], constants["alpha_N"]))
    endless = scaling.joint_law(one(1e60).expand(3), D, **constants)
    assert torch.allclose(endless, scaling.data_law(D, constants["Dc"], constants["alpha_D"]))


def test_over_training_is_chinchilla_with_equal_exponents():
    eta, A, B = one(0.15), one(300.0), one(800.0)
    same = scaling.chinchilla(N, D, one(1.6), A, B, 2 * eta, 2 * eta)
    found = scaling.over_training(N, D, one(1.6), A * 6**eta, B * 6**eta, eta)
    assert torch.allclose(found, same, rtol=1e-12)


def test_over_training_gives_parallel_lines():
    constants = {"E": one(1.8), "a": one(60.0), "b": one(80.0), "eta": one(0.13)}

    def slope(multiplier):
        sizes = one([1e7, 1e9])
        above = scaling.over_training(sizes, multiplier * sizes, **constants) - 1.8
        compute = 6 * sizes * multiplier * sizes
        return float(above.log().diff() / compute.log().diff())

    assert slope(20.0) == pytest.approx(-0.13)
    assert slope(640.0) == pytest.approx(-0.13)


def test_encoder_decoder_by_hand():
    made = scaling.encoder_decoder(N, D, one(500.0), one(0.2), one(0.3), one(1.1))
    by_hand = [500 * n**-0.2 * d**-0.3 + 1.1 for n, d in zip(N.tolist(), D.tolist(), strict=True)]
    assert made.tolist() == pytest.approx(by_hand, rel=1e-13)


def test_annealing_and_batch_tradeoff_by_hand():
    made = scaling.annealing(one(9.0), one(0.5), one(2.0), one(3.0), one(0.5), one(0.2))
    assert made.item() == pytest.approx(2 + 3 / math.sqrt(9) - 0.2 * 0.5)
    assert scaling.batch_tradeoff(one(64.0), one(100.0), one(6400.0)).item() == pytest.approx(200)


@pytest.mark.parametrize(
    ("law", "constants"),
    [
        ("chinchilla", {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}),
        ("kaplan-joint", {"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}),
        ("over-training", {"E": 1.84, "a": 60.0, "b": 90.0, "eta": 0.136}),
        ("encoder-decoder", {"amount": 700.0, "pe": 0.18, "pd": 0.31, "floor": 1.2}),
    ],
)
@pytest.mark.parametrize("budget", [1e15, 5.76e23])
def test_closed_optima_are_those_of_the_search_and_of_a_grid(law, constants, budget):
    known = scaling.given(law, **constants)
    closed = known.shared(budget)
    searched = known.shared(budget, closed=False)
    first = known.form.columns[0]
    assert searched.columns[first] == pytest.approx(closed.columns[first], rel=1e-3)
    assert searched.value == pytest.approx(closed.value, rel=1e-12)
    assert known.form.budget.spent(*closed.columns.values()) == pytest.approx(budget)
    grid = closed.columns[first] * torch.linspace(-0.7, 0.7, 2001, dtype=torch.float64).exp()
    keep = known.form.budget.rest(grid, budget) > 0
    told = known.told({first: grid[keep], known.form.columns[1]: known.form.budget.rest(grid[keep], budget)})
    assert float(told.min()) == pytest.approx(closed.value, rel=1e-7)
    assert float(told.min()) >= closed.value * (1 - 1e-14)


def test_the_encoder_gets_its_share():
    assert language.encoder_size({"pe": 0.1, "pd": 0.3}, 1e8) == pytest.approx(2.5e7)
