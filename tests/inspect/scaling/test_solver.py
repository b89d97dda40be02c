"""The batched solver: its loss by hand, its steps against exact answers, its least against scipy's."""

from __future__ import annotations

import pytest
import torch

from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import _solver

X = torch.linspace(1, 3, 30, dtype=torch.float64)


def line(theta, rows):
    return theta[:, :1] + theta[:, 1:] * X - (2 + 3 * X)


def test_huber_by_hand():
    by_hand = [r * r / 2 if abs(r) <= 0.5 else 0.5 * (abs(r) - 0.25) for r in (-2.0, -0.5, 0.1, 0.5, 3.0)]
    assert _solver.huber(torch.tensor([-2.0, -0.5, 0.1, 0.5, 3.0]), 0.5).tolist() == pytest.approx(by_hand)


def test_the_objective_is_a_sum_and_counts_count():
    residuals = torch.tensor([[0.2, -0.4]], dtype=torch.float64)
    once = _solver.objective(residuals, None, 1.0)
    assert once.item() == pytest.approx((0.04 + 0.16) / 2)
    twice = _solver.objective(torch.cat([residuals, residuals], dim=1), None, 1.0)
    assert twice.item() == pytest.approx(2 * once.item())
    counts = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert _solver.objective(residuals, counts, 1.0).item() == pytest.approx(0.04)
    lost = torch.tensor([[0.2, torch.nan]], dtype=torch.float64)
    assert _solver.objective(lost, None, 1.0).item() == torch.inf
    assert _solver.objective(lost, counts, 1.0).item() == pytest.approx(0.04)  # what does not count may be anything


def test_jacobian_is_that_of_autograd():
    def f(theta):
        return theta[:, :1].exp() * X ** theta[:, 1:]

    theta = torch.tensor([[0.3, -0.7], [1.0, 0.2]], dtype=torch.float64)
    value, slopes = _solver.jacobian(f, theta)
    exact = torch.stack([torch.autograd.functional.jacobian(lambda t: f(t[None])[0], row) for row in theta])
    assert torch.equal(value, f(theta))
    assert torch.allclose(slopes, exact, atol=1e-14)


def test_a_line_is_found_from_anywhere_whatever_the_threshold():
    starts = torch.tensor([[0.0, 0.0], [-9.0, 40.0], [7.0, -2.0]], dtype=torch.float64)
    for delta in (1e-6, 1e-3, 10.0):
        found, value = _solver.minimise(line, starts, delta=delta)
        assert torch.allclose(found, torch.tensor([2.0, 3.0], dtype=torch.float64).expand(3, 2), atol=1e-9), delta
        assert float(value.max()) < 1e-18


def test_one_outlier_does_not_move_an_absolute_fit():
    wrong = torch.zeros(30, dtype=torch.float64)
    wrong[4] = 50

    def residuals(theta, rows):
        return line(theta, rows) - wrong

    start = torch.zeros(1, 2, dtype=torch.float64)
    robust, _ = _solver.minimise(residuals, start, delta=1e-3)
    squares, _ = _solver.minimise(residuals, start, delta=1e6)
    assert (robust - torch.tensor([[2.0, 3.0]])).abs().max() < 5e-3
    assert (squares - torch.tensor([[2.0, 3.0]])).abs().max() > 1


def test_rows_do_not_know_of_each_other():
    counts = torch.randint(0, 3, (4, 30), generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def residuals(theta, rows):
        return line(theta, rows) + noise

    starts = torch.zeros(4, 2, dtype=torch.float64)
    together, values = _solver.minimise(residuals, starts, counts=counts, delta=0.1)
    for i in range(4):
        alone, value = _solver.minimise(residuals, starts[i : i + 1], counts=counts[i : i + 1], delta=0.1)
        assert torch.allclose(alone[0], together[i], atol=1e-8)
        assert value.item() == pytest.approx(values[i].item(), rel=1e-9)


def test_a_count_of_two_is_a_run_that_stands_twice():
    noise = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.ones(1, 30, dtype=torch.float64)
    counts[0, 3] = 2
    again = [*range(30), 3]
    start = torch.zeros(1, 2, dtype=torch.float64)
    one, _ = _solver.minimise(lambda t, _: line(t, _) + noise, start, counts=counts, delta=0.1)
    other, _ = _solver.minimise(lambda t, _: (line(t, _) + noise)[:, again], start, delta=0.1)
    assert torch.allclose(one, other, atol=1e-7)


def test_a_start_that_cannot_be_computed_is_left_alone():
    starts = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found, value = _solver.minimise(line, starts, delta=1.0)
    assert value[0] == torch.inf
    assert torch.allclose(found[1], torch.tensor([2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_scipy_finds_nothing_lower(seed):
    optimize = pytest.importorskip("scipy.optimize", reason="the optimizer that is compared with")
    generator = torch.Generator().manual_seed(seed)
    design = {name: 10 ** (6 + 3 * torch.rand(60, generator=generator, dtype=torch.float64)) for name in ("N", "D")}
    truth = {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.34, "beta": 0.35}
    law = scaling.fit(scaling.simulate("chinchilla", truth, design, seed=seed), bootstrap=0)

    def value(theta):
        at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        told = law.form.predict(at[None], law.columns)[0]
        total = _solver.huber(law.form.difference(told, law.observed), law.delta).sum()
        total.backward()
        return total.item() * 1e4, at.grad.numpy() * 1e4

    theirs = min(
        optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-8}).fun / 1e4
        for start in ((0.5, 6, 7, -1, -1), law.theta.numpy())
    )
    assert law.loss <= theirs * (1 + 1e-6)
