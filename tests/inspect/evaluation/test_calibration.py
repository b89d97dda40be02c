"""Calibration figures against loops, and the fixed remedies against their stationary equations."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as theirs_log_loss

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import brier, calibration_error, log_loss, platt, reliability, temperature


def stream(seed: int = 0, count: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    said = torch.rand(count, generator=generator, dtype=torch.float64)
    return said, (torch.rand(count, generator=generator, dtype=torch.float64) < said**2).long()


def test_calibration_error_against_a_loop():
    said, came = stream()
    total = 0.0
    for b in range(15):
        inside = [(p, y) for p, y in zip(said.tolist(), came.tolist(), strict=True) if b / 15 < p <= (b + 1) / 15]
        if inside:
            total += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / 500
    assert calibration_error(said, came) == pytest.approx(total)
    order = said.argsort()
    equal = sum(abs(float((said[part] - came[part]).sum())) / 500 for part in order.split(50))
    assert calibration_error(said, came, bins=10, adaptive=True) == pytest.approx(equal)
    assert calibration_error(torch.full((8,), 0.5), [0, 1] * 4, adaptive=True, bins=4) == 0  # equals stay together
    assert calibration_error([0.0, 1.0], [0, 1]) == 0
    assert calibration_error([0.07, 0.065], [1, 0], bins=100) == pytest.approx(0.8650 / 2)  # both in (0.06, 0.07]
    # Gaps of neighbouring bins do not cancel, and an upper edge belongs to its bin.
    assert calibration_error([0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0], bins=5) == pytest.approx((0.7 + 0.7) / 4)


def test_several_classes_are_judged_by_the_likeliest():
    generator = torch.Generator().manual_seed(1)
    chances = torch.softmax(2 * torch.randn(200, 4, generator=generator, dtype=torch.float64), 1)
    true = torch.randint(0, 4, (200,), generator=generator)
    top, which = chances.max(1)
    assert calibration_error(chances, true) == pytest.approx(calibration_error(top, (which == true).long()))
    assert log_loss(chances, true) == pytest.approx(theirs_log_loss(true, chances.numpy(), labels=range(4)))
    hot = torch.nn.functional.one_hot(true, 4)
    assert brier(chances, true) == pytest.approx(float(((chances - hot) ** 2).sum(1).mean()))


def test_losses_of_events():
    said, came = stream()
    assert log_loss(said, came) == pytest.approx(theirs_log_loss(came, said.numpy()))
    assert brier(said, came) == pytest.approx(brier_score_loss(came, said.numpy()))
    assert log_loss([0.0], [1]) == pytest.approx(-math.log(1e-12))


def test_reliability():
    said, came = stream()
    found = reliability(said, came, bins=10)
    assert sum(found["forecasts"]) == 500
    gap = sum(n * abs(p - y) for n, p, y in zip(found["forecasts"], found["said"], found["came true"], strict=True))
    assert found["calibration error"] == pytest.approx(gap / 500)
    assert found["Brier"] == pytest.approx(brier(said, came))
    assert all(0 <= row["low"] <= row["came true"] <= row["high"] <= 1 for row in found.table)
    mean = float(came.double().mean())
    spread = sum(n * (y - mean) ** 2 for n, y in zip(found["forecasts"], found["came true"], strict=True)) / 500
    assert found["sharpness"] == pytest.approx(spread)


def test_temperature_is_where_the_slope_is_nothing():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(300, 6, generator=generator, dtype=torch.float64)
    true = torch.where(torch.rand(300, generator=generator) < 0.6, logits.argmax(1),
                       torch.randint(0, 6, (300,), generator=generator))  # fmt: skip
    found = temperature(logits, true)

    def loss(t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / t, true))

    assert found > 1.5
    assert loss(found) < min(loss(found * 1.001), loss(found / 1.001))
    assert temperature(logits * 3, true) == pytest.approx(3 * found)
    assert temperature(torch.tensor([[3.0, 0.0]]), torch.tensor([0])) == pytest.approx(1e-4, rel=1e-3)
    assert temperature(torch.tensor([[3.0, 0.0]]), torch.tensor([1])) == pytest.approx(1e4, rel=1e-3)
    with pytest.raises(Error, match="fit"):
        temperature(logits, true[:-1])


def test_platt_is_where_the_gradient_is_nothing():
    said, came = stream(3)
    scores = torch.logit(said.clamp(0.01, 0.99))
    a, b = platt(scores, came, smooth=False)
    left = torch.sigmoid(a * scores + b) - came
    assert abs(float(left.sum())) < 1e-6
    assert abs(float((left * scores).sum())) < 1e-6
    separated = platt([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1])
    assert all(map(math.isfinite, separated))
    assert separated[0] > 0
    with pytest.raises(Error, match="0 or 1"):
        platt([1.0], [0.5])


def test_refusals():
    for said, came in (
        ([], []),
        ([1.2], [1]),
        ([0.5], [2]),
        ([0.5], [0.5]),
        ([0.5], [math.nan]),
        ([0.5, 0.5], [1]),
        ([math.nan], [1]),
    ):
        with pytest.raises(Error):
            calibration_error(said, came)
    with pytest.raises(Error, match="bins"):
        calibration_error([0.5], [1], bins=0)
