"""Whole curves: the implicit equation, its inverse, and constants that come back from planted curves."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.scaling import Trajectory, fit_trajectory, given

TRUTH = {"Nc": 1e13, "alpha_N": 0.08, "B_star": 2e5, "alpha_B": 0.25, "Sc": 1500.0, "alpha_S": 0.7}
STEPS = torch.logspace(2, 5, 40, dtype=torch.float64)


def true_law():
    return Trajectory(
        given("kaplan-size", Nc=1e13, alpha_N=0.08),
        given("critical-batch", B_star=2e5, alpha_B=0.25),
        given("kaplan-steps", Nc=1e13, Sc=1500.0, alpha_N=0.08, alpha_S=0.7),
    )


def planted(noise=0.0):
    law, generator = true_law(), torch.Generator().manual_seed(0)
    curves = []
    for n in (1e6, 4e6, 1.6e7):
        for b in (200.0, 800.0, 3200.0):
            random = (noise * torch.randn(40, generator=generator, dtype=torch.float64)).exp()
            curves.append({"N": n, "B": b, "S": STEPS.tolist(), "loss": (law.curve(n, b, STEPS) * random).tolist()})
    converged = {"N": [1e6, 4e6, 1.6e7], "loss": [(1e13 / n) ** 0.08 for n in (1e6, 4e6, 1.6e7)]}
    return curves, converged


def test_a_curve_solves_its_equation():
    law = true_law()
    losses = law.curve(4e6, 800.0, STEPS)
    for step, loss in zip(STEPS.tolist(), losses.tolist(), strict=True):
        critical = 2e5 / loss ** (1 / 0.25)
        least = step / (1 + critical / 800)
        assert loss == pytest.approx((1e13 / 4e6) ** 0.08 + (1500 / least) ** 0.7, rel=1e-9)
        assert law.steps_to(4e6, 800.0, loss) == pytest.approx(step, rel=1e-6)
    assert bool((losses.diff() < 0).all())


def test_limits_of_a_curve():
    law = true_law()
    vast = law.curve(4e6, 1e15, STEPS)
    assert torch.allclose(vast, law.steps.told({"N": torch.full_like(STEPS, 4e6), "S": STEPS}))
    assert law.min_steps(4e6, 1.0) == float("inf")  # below what this size can reach
    assert law.curve(4e6, 800.0, [1e30]).item() == pytest.approx((1e13 / 4e6) ** 0.08)


def test_the_constants_come_back_and_a_larger_model_is_told():
    curves, converged = planted()
    law = fit_trajectory(curves, converged)
    assert law.parameters == pytest.approx(TRUTH, rel=0.02)
    told, true = law.curve(3e8, 1600.0, STEPS), true_law().curve(3e8, 1600.0, STEPS)
    assert float((told / true - 1).abs().max()) < 0.005
    assert law.tradeoffs[0]["B_crit"] == pytest.approx(law.tradeoffs[0]["E_min"] / law.tradeoffs[0]["S_min"])
    report = law.report()
    assert report["alpha_S"] == pytest.approx(0.7, rel=0.02)
    assert report.plots[0].title == "Critical batch"


def test_noise_moves_it_little():
    law = fit_trajectory(*planted(noise=0.003), skip=150)
    told, true = law.curve(3e8, 1600.0, STEPS), true_law().curve(3e8, 1600.0, STEPS)
    assert float((told / true - 1).abs().max()) < 0.03


def test_losses_of_ones_own():
    curves, converged = planted()
    law = fit_trajectory(curves, converged, losses=[4.0, 5.0, 1e-9])
    assert {row["loss"] for row in law.tradeoffs} == {4.0, 5.0}
    assert law.critical_batch(4.0) == pytest.approx(2e5 / 4**4, rel=0.05)


def test_refusals():
    curves, converged = planted()
    with pytest.raises(Error, match="three batches"):
        fit_trajectory(curves[:2], converged)
    with pytest.raises(Error, match="curve 1 has no loss"):
        fit_trajectory([{"N": 1, "B": 1, "S": [1.0]}], converged)
    with pytest.raises(Error, match="steps must rise"):
        fit_trajectory([curves[0] | {"S": STEPS.flip(0).tolist()}], converged)
    with pytest.raises(Error, match="finite"):
        fit_trajectory([curves[0] | {"loss": [float("nan")] * 40}], converged)
    with pytest.raises(Error, match="N and B must be above 0"):
        fit_trajectory([curves[0] | {"B": 0.0}], converged)
    with pytest.raises(Error, match="nothing is left"):
        fit_trajectory(curves, converged, skip=1e9)
    with pytest.raises(Error, match="above 0"):
        true_law().curve(1e6, 0.0, [1.0])
