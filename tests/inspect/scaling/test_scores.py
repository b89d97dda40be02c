"""Formulas of scores: by hand, and what they do at their ends."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import scaling


def one(value):
    return torch.tensor(value, dtype=torch.float64)


def test_downstream_error_by_hand():
    assert scaling.downstream_error(one(2.5), one(0.85), one(2.0), one(0.7)).item() == pytest.approx(
        0.85 - 2 * math.exp(-0.7 * 2.5)
    )


def test_accuracy_by_hand_and_at_its_ends():
    loss = one([0.0, 0.9, 50.0])
    made = scaling.accuracy(loss, one(0.6), one(5.0), one(0.9), one(0.25)).tolist()
    assert made[0] == pytest.approx(0.6 / (1 + math.exp(5 * (0 - 0.9))) + 0.25)
    assert made[1:] == pytest.approx([0.55, 0.25])


def test_shifted_power_by_hand():
    made = scaling.shifted_power(one([2.0, 3.0]), one(1.3), one(0.8), one(1.5), one(0.9)).tolist()
    assert made == pytest.approx([1.3 * 0.5**0.8 + 0.9, 1.3 * 1.5**0.8 + 0.9])
    for kappa in (0.8, 2.0):
        assert math.isnan(scaling.shifted_power(one(1.0), one(1.3), one(kappa), one(1.5), one(0.9)).item())


def test_log_linear_by_hand():
    made = scaling.log_linear(*map(one, (32.0, 4096.0, 11008.0, 2e12, 0.8, 3.0, 4.0, 5.0, 6.0, -50.0))).item()
    terms = [(3, 32), (4, 4096), (5, 11008), (6, 2e12)]
    assert made == pytest.approx(sum(w * math.log(0.8 * x) for w, x in terms) - 50)


def test_step_time_by_hand():
    made = scaling.step_time(one(1e9), one(1e12), one(0.01), one(1e-10), one(1e-13))
    assert made.item() == pytest.approx(0.01 + 0.1 + 0.1)
