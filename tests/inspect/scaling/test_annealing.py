"""Areas of schedules by a double loop from the formula, and whole curves of schedules that were not fitted."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.scaling import AnnealingLaw, areas, fit_annealing

TRUTH = {"L0": 1.4, "A": 0.9, "alpha": 0.45, "C": 0.03}
CONSTANT = [0.1] * 400
COSINE = [0.05 * (1 + math.cos(math.pi * i / 400)) + 1e-4 for i in range(400)]
HOLD = [0.1] * 300 + [0.1 * (1 - i / 100) for i in range(100)]


def slow_areas(rates, decay):
    """The formula's two sums, as they stand."""
    forward, annealed = [], []
    for s in range(len(rates)):
        forward.append(sum(rates[: s + 1]))
        annealed.append(
            sum((rates[k - 1] - rates[k]) * decay ** (i - k) for i in range(1, s + 1) for k in range(1, i + 1))
        )
    return forward, annealed


def true_curve(rates, decay=0.99):
    forward, annealed = areas(rates, decay)
    return TRUTH["L0"] + TRUTH["A"] * forward ** -TRUTH["alpha"] - TRUTH["C"] * annealed


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_areas_by_the_double_sum(decay):
    rates = [1.0, 1.0, 0.7, 0.8, 0.2, 0.1, 0.0]
    forward, annealed = areas(rates, decay)
    slow = slow_areas(rates, decay)
    assert forward.tolist() == pytest.approx(slow[0])
    assert annealed.tolist() == pytest.approx(slow[1])


def test_a_constant_rate_anneals_nothing_and_warm_up_is_not_remembered():
    assert areas([0.3] * 5)[1].tolist() == [0.0] * 5
    warm = [0.1, 0.2, 0.3, 0.3, 0.1]
    assert areas(warm, 0.9)[1].tolist() == pytest.approx([0, 0, 0, 0, 0.2])
    again = [1.0, 0.5, 1.1, 0.4]  # a later rise is part of the memory, also to a higher peak
    assert areas(again, 0.3)[1].tolist() == pytest.approx(slow_areas(again, 0.3)[1])


def test_without_memory_the_area_is_the_fall_so_far():
    falling = torch.linspace(1, 0.2, 9, dtype=torch.float64)
    assert torch.allclose(areas(falling, 0.0)[1], 1 - falling)


def test_a_third_schedule_is_told_from_two():
    generator = torch.Generator().manual_seed(0)
    noise = torch.exp(0.002 * torch.randn(2, 400, generator=generator, dtype=torch.float64))
    schedules = {"constant": CONSTANT, "cosine": COSINE}
    curves = {name: true_curve(rates) * noise[i] for i, (name, rates) in enumerate(schedules.items())}
    law = fit_annealing(curves, schedules, skip=10, bootstrap=20)
    assert isinstance(law, AnnealingLaw)
    assert law.decay == 0.99
    assert law.objectives[0.99] == min(law.objectives.values())
    assert law.law.parameters == pytest.approx(TRUTH, rel=0.1)
    told, true = law.predict(HOLD), true_curve(HOLD)
    assert float((told / true - 1).abs()[10:].max()) < 0.01
    ranked = law.best({"constant": CONSTANT, "cosine": COSINE, "hold": HOLD})
    finals = {"constant": true_curve(CONSTANT), "cosine": true_curve(COSINE), "hold": true_curve(HOLD)}
    assert [name for name, _ in ranked] == sorted(finals, key=lambda name: float(finals[name][-1]))
    assert len(law.law.draws) == 20
    assert law.law.groups.unique().tolist() == [0, 1]
    report = law.report()
    assert report["memory of the fall (decay)"] == 0.99
    assert any("left out whole" in note for note in report.notes)


def test_curves_may_be_known_at_some_steps_only():
    curve = {step: float(loss) for step, loss in enumerate(true_curve(HOLD)) if step % 20 == 9}
    law = fit_annealing({"hold": curve}, {"hold": HOLD}, decays=(0.99,), skip=29)
    assert len(law.law.observed) == 19
    assert law.law.parameters == pytest.approx(TRUTH, rel=1e-3)


def test_refusals():
    with pytest.raises(Error, match="learning rates"):
        areas([])
    with pytest.raises(Error, match="learning rates"):
        areas([1.0, -1.0])
    with pytest.raises(Error, match="first learning rate"):
        areas([0.0, 1.0])
    with pytest.raises(Error, match="decay"):
        areas([1.0], decay=1.0)
    with pytest.raises(Error, match="has no schedule"):
        fit_annealing({"a": [1.0]}, {})
    with pytest.raises(Error, match="at least one decay"):
        fit_annealing({"a": [1.0]}, {"a": [1.0]}, decays=())
    with pytest.raises(Error, match="at least 2 of them"):
        fit_annealing({"a": [1.0]}, {"a": [1.0]}, bootstrap=10)
    with pytest.raises(Error, match="has a step 7"):
        fit_annealing({"a": {7: 1.0}}, {"a": [1.0, 1.0]})
