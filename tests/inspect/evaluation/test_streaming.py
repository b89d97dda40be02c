"""Online calibration: the step against the textbook's, what calibeating promises, and drift."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import OnlineCalibrator, calibration_error, log_loss, online_calibration, platt
from weightsmith.inspect.evaluation._streaming import Curve, features, hedged, newton_step, start_curve


def test_newton_steps_by_hand():
    generator = numpy.random.default_rng(0)
    said, came = generator.random(40), generator.integers(0, 2, 40)
    curve, matrix, weights = start_curve("platt"), 100 * numpy.eye(2), numpy.array([1.0, 0.0])
    found = online_calibration(said, came)
    for t in range(40):
        x = numpy.array([math.log(said[t] / (1 - said[t])), 1.0])
        p = 1 / (1 + math.exp(-weights @ x))
        assert float(found[t]) == pytest.approx(p)
        gradient = (p - came[t]) * x
        matrix = matrix + numpy.outer(gradient, gradient)
        weights = weights - numpy.linalg.solve(matrix, gradient) / 0.1
        curve = newton_step(curve, features(float(said[t]), "platt"), float(came[t]))
        numpy.testing.assert_allclose(curve.weights, weights)
        numpy.testing.assert_allclose(curve.inverse, numpy.linalg.inv(matrix))


def test_the_projection_is_the_nearest_by_the_metric():
    inverse = numpy.array([[2.0, 0.3], [0.3, 0.1]])
    far = Curve(numpy.array([300.0, -50.0]), inverse)
    moved = newton_step(far, numpy.zeros(2), 1.0).weights
    assert numpy.linalg.norm(moved) == pytest.approx(100)
    matrix = numpy.linalg.inv(inverse)
    angles = numpy.linspace(0, 2 * math.pi, 100001)
    circle = 100 * numpy.stack([numpy.cos(angles), numpy.sin(angles)], 1) - far.weights
    best = numpy.einsum("ni,ij,nj->n", circle, matrix, circle).min()
    away = moved - far.weights
    assert away @ matrix @ away == pytest.approx(best, rel=1e-6)


def test_beta_scaling_starts_at_the_identity_and_bends():
    said, came = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0, 1, 1])
    assert float(online_calibration(said, came, "beta")[0]) == pytest.approx(0.2)
    assert online_calibration(said, came, "none").tolist() == pytest.approx([0.2, 0.9, 0.5])


def test_tracking_says_what_came_of_the_bin():
    said = torch.tensor([0.71, 0.75, 0.12, 0.79, 0.74])
    found = online_calibration(said, [1, 0, 0, 1, 1], "none", "tracking")
    assert found.tolist() == pytest.approx([0.75, 1.0, 0.15, 0.5, 2 / 3])


def test_hedging_is_calibrated_against_an_enemy():
    calibrator, tracker = OnlineCalibrator("none", "hedging", bins=10), OnlineCalibrator("none", "tracking")
    errors = {}
    for name, one in (("hedging", calibrator), ("tracking", tracker)):
        said, came = [], []
        for _ in range(4000):
            # The enemy knows the mean of what will be said, not the draw: it answers the other way.
            probability = one.predict_one(0.5)
            mean = sum(said[-50:]) / max(len(said[-50:]), 1) if name == "hedging" else probability
            outcome = float(mean < 0.5)
            one.update_one(0.5, outcome)
            said.append(probability)
            came.append(outcome)
        errors[name] = calibration_error(said, came, bins=10)
    assert errors["hedging"] < 0.08
    assert hedged(numpy.array([10.0, 10.0]), numpy.array([6.0, 4.0]), 1, 0.0) == 0
    assert hedged(numpy.array([10.0, 10.0]), numpy.array([6.0, 4.0]), 0, 0.999) == 1
    # A place that holds is kept; when it fails, another that holds is said: here the first, which was never said.
    assert hedged(numpy.array([0.0, 10.0]), numpy.array([0.0, 7.0]), 1, 0.5) == 1
    assert hedged(numpy.array([0.0, 10.0]), numpy.array([0.0, 3.0]), 1, 0.5) == 0
    # Twice as far above as the neighbour is below: said half as often.
    assert [hedged(numpy.array([10.0, 10.0]), numpy.array([7.0, 4.0]), 0, u) for u in (0.32, 0.34)] == [0, 1]


def test_drift_is_followed_where_a_fixed_curve_is_not():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6000, generator=generator, dtype=torch.float64)
    shift = torch.linspace(0, 3, 6000, dtype=torch.float64)
    came = (torch.rand(6000, generator=generator, dtype=torch.float64) < torch.sigmoid(0.5 * logits + shift)).long()
    said = torch.sigmoid(logits)
    a, b = platt(logits[:500], came[:500])
    fixed = torch.sigmoid(a * logits + b)
    online = online_calibration(said, came)
    late = slice(3000, None)
    assert log_loss(online[late], came[late]) < log_loss(fixed[late], came[late]) - 0.02
    assert calibration_error(online[late], came[late]) < calibration_error(fixed[late], came[late]) / 2


def test_repeated_and_bad_calls():
    calibrator = OnlineCalibrator(calibeat="hedging", seed=3)
    assert len({calibrator.predict_one(0.4) for _ in range(5)}) == 1
    stream = ([0.3, 1.0, 0.0], [0, 1, 0])
    assert torch.equal(online_calibration(*stream, "beta", "hedging"), online_calibration(*stream, "beta", "hedging"))
    assert bool(online_calibration([1.0, 0.0], [0, 1]).isfinite().all())
    first = [online_calibration([p], [1], "none", "hedging").item() for p in (0.05, 0.42, 0.97)]
    assert first == pytest.approx([0.05, 0.45, 0.95])  # nothing known: the middle of its bin
    for said, came in ((math.nan, 1), (1.1, 1), (0.5, 0.5)):
        with pytest.raises(Error, match="online calibration"):
            calibrator.update_one(said, came)
    with pytest.raises(Error, match="did you mean 'platt'"):
        OnlineCalibrator("plat")
    with pytest.raises(Error, match="bins"):
        OnlineCalibrator(bins=0)
    for said, came in (([1.5], [1]), ([0.5], [0.5]), ([0.5], [1, 0]), ([], [])):
        with pytest.raises(Error):
            online_calibration(said, came)
